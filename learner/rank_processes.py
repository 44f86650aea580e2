"""The processes of several ranks: started together, ended together, and started anew, on a new port, when one dies.

Ranks cannot be replaced one by one: the collectives that the others are in would hang. So the whole group ends, and a
fresh one goes on from the last checkpoint. The coordinator's journal makes up for the steps since.
"""

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from common.lifecycle import EXIT_FAILURE, EXIT_USER_ERROR, ChildProcess, UserError, die_with_parent
from learner.checkpoint import CheckpointStore
from learner.config import LearnerConfig
from learner.launch import Place, free_port
from learner.rank_orders import follow
from learner.run_directory import checkpoints_in

logger = logging.getLogger(__name__)

PARENT_VARIABLE = "COUNTERCURRENT_PARENT"
LEADER_GRACE_S = 60.0  # for rank 0 to write a checkpoint when it is asked to stop
SETTLE_S = 5.0  # for the others to end by themselves, and say why, after one did
PAUSE_S = 1.0  # between a group and the next


def run_follower(config: LearnerConfig, place: Place) -> int:
    """A rank other than 0, to its end; returns the exit code. It stops when rank 0 says so, or is gone."""
    if (parent := os.environ.get(PARENT_VARIABLE)) is not None:
        die_with_parent(int(parent))
    for ignored in (signal.SIGINT, signal.SIGTERM):  # launchers send these to all: rank 0 ends the group in order
        signal.signal(ignored, signal.SIG_IGN)
    from learner.deepspeed_engine import open_ranks, open_resumed_engine

    ranks, writing = open_ranks(place, timeout_s=config.rank_timeout_s)
    try:
        follow(open_resumed_engine, ranks, writing)
    except UserError as error:
        logger.error("%s", error)  # noqa: TRY400 - the sentence is all there is to know
        return EXIT_USER_ERROR
    except RuntimeError as error:
        logger.critical("rank %d ends: %s", place.rank, error)
        return EXIT_FAILURE
    return 0


async def supervise_ranks(words: Sequence[str], config: LearnerConfig) -> int:
    """Run config.ranks learners with these words until they are done; returns their exit code."""
    checkpoints = CheckpointStore(checkpoints_in(config.run_dir.absolute()), keep=config.keep_checkpoints)
    restarts, reached = 0, checkpoints.current_version()
    while True:
        async with start_ranks(words, config.ranks) as ranks:
            codes = await _exit_codes(ranks)
            if len(codes) < len(ranks):  # the others cannot go on, and rank 0 has nothing to save without them
                await ranks[0].stop(grace_s=0.0)
        failed = {rank: code for rank, code in codes.items() if code}
        if not failed:
            return 0
        if EXIT_USER_ERROR in failed.values():
            return EXIT_USER_ERROR
        version = checkpoints.current_version()
        restarts, reached = (restarts + 1 if version == reached else 1), version
        ended = ", ".join(f"rank {rank} {_describe(code)}" for rank, code in failed.items())
        if restarts > config.max_restarts:
            raise UserError(f"{ended}; gave up after {config.max_restarts} restarts without a checkpoint in between")
        logger.error("%s; starting all %d ranks anew from version %s", ended, config.ranks, version)
        await asyncio.sleep(PAUSE_S)


@asynccontextmanager
async def start_ranks(words: Sequence[str], num_ranks: int) -> AsyncIterator[list[ChildProcess]]:
    """All ranks on this machine; on exit rank 0 is stopped first, and then the others that are left."""
    port = free_port()
    async with AsyncExitStack() as stack:
        ranks: list[ChildProcess] = []
        for rank in reversed(range(num_ranks)):
            place = Place(rank=rank, num_ranks=num_ranks, local_rank=rank, address="127.0.0.1", port=port)
            child = ChildProcess.run_module(
                "learner",
                *words,
                environment=place.environment(),
                grace_s=LEADER_GRACE_S if rank == 0 else 0.0,
            )
            ranks.append(await stack.enter_async_context(child))
        yield ranks[::-1]


async def _exit_codes(ranks: Sequence[ChildProcess]) -> dict[int, int]:
    """By rank, of those that ended: all, or, once one failed, whoever ends within SETTLE_S of it."""
    codes: dict[int, int] = {}
    some_failed = asyncio.Event()

    async def follow_one(rank: int, child: ChildProcess) -> None:
        codes[rank] = await child.wait()
        if codes[rank] != 0:
            some_failed.set()

    async with asyncio.TaskGroup() as tasks:
        following = [tasks.create_task(follow_one(rank, child)) for rank, child in enumerate(ranks)]
        failing = tasks.create_task(some_failed.wait())
        everybody = tasks.create_task(_all_of(following))
        await asyncio.wait({everybody, failing}, return_when=asyncio.FIRST_COMPLETED)
        if some_failed.is_set():
            await asyncio.wait(following, timeout=SETTLE_S)
        for task in (everybody, failing, *following):
            task.cancel()
    return codes


async def _all_of(tasks: Sequence[asyncio.Task[None]]) -> None:
    await asyncio.wait(tasks)


def _describe(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
