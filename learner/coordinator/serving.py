"""Serving: everything that has to be there before the coordinator hears its first rollout server."""

import logging
import time
from contextlib import AsyncExitStack
from pathlib import Path

from common.codec import Decoder
from common.events import EventLog
from common.key_files import KeyFileError
from common.keys import ServerKeys, load_server_keys
from common.lifecycle import UserError
from common.wire import Peer, Router, open_router
from learner.coordinator.batch_sender import PARTS_ON_THE_WAY
from learner.coordinator.core import Coordinator
from learner.coordinator.delivery import LearnerError
from learner.coordinator.journal_keeper import open_journal
from learner.coordinator.ledger import FrontierError, decode_frontier
from learner.coordinator.messages import OpenRun
from learner.coordinator.service import MAX_HEADER_BYTES, MAX_LEARNER_HEADER_BYTES, Service
from learner.coordinator.service_settings import ServiceSettings
from learner.coordinator.tasks import Tasks

logger = logging.getLogger(__name__)

BESIDE_QUEUE_BYTES = 512 << 20  # of memory: nobody but liars can make the process need more
SERVERS_RETURN_S = 2.0  # after a coordinator was replaced: until then servers may claim what they hold


async def serve(settings: ServiceSettings, tasks: Tasks, held_out: Tasks | None = None) -> int:
    """Wait for the learner to open the run, serve it, and return the exit code. Raises UserError.

    held_out: the tasks of evaluations, if there are any.
    """
    keys = _load_keys(settings)
    async with AsyncExitStack() as stack:
        learner = await stack.enter_async_context(
            open_router(
                settings.learner_socket,
                max_frame_bytes=MAX_LEARNER_HEADER_BYTES,
                send_queue_messages=PARTS_ON_THE_WAY,
            )
        )
        learner_peer, run = await _wait_for_learner(learner)
        journal = await stack.enter_async_context(open_journal(Path(settings.journal), lineage=settings.run_id))
        try:
            frontier = decode_frontier(run.frontier, version=run.version, source=settings.rules.source)
            contents = await journal.contents(frontier, is_new_run=not run.frontier)
            core = Coordinator(
                settings.rules,
                version=run.version,
                frontier=run.frontier,
                journal=contents,
                published_version=run.published_version,
                servers_return_until=time.monotonic() + SERVERS_RETURN_S if journal.is_of_this_life else None,
            )
        except FrontierError as error:
            raise UserError(f"the run cannot be resumed: {error}") from error
        # Lease ids go on from here, also if this coordinator is killed before it has written anything else.
        await journal.keep((), core.book.past())
        frame_bytes = max(MAX_HEADER_BYTES, settings.rules.max_group_bytes)
        servers = await stack.enter_async_context(
            open_router(
                settings.listen,
                max_frame_bytes=frame_bytes,
                keys=keys,
                max_growth_bytes=settings.rules.queue_bytes + BESIDE_QUEUE_BYTES,
            )
        )
        events = EventLog(Path(settings.event_log), "coordinator") if settings.event_log else None
        if events is not None:
            stack.callback(events.close)
        logger.info("rollout servers may join at %s", servers.address)
        service = Service(
            settings, tasks, core, run, servers=servers, learner=learner, learner_peer=learner_peer, journal=journal,
            events=events, evaluation_tasks=held_out,
        )  # fmt: skip
        await service.run()
    return 0


def _load_keys(settings: ServiceSettings) -> ServerKeys | None:
    try:
        return load_server_keys(Path(settings.keys)) if settings.keys else None
    except KeyFileError as error:
        raise UserError(str(error)) from error


async def _wait_for_learner(learner: Router) -> tuple[Peer, OpenRun]:
    decoder = Decoder(OpenRun, max_payload_bytes=0, max_header_bytes=MAX_LEARNER_HEADER_BYTES)
    [incoming, *more] = await learner.receive()
    message, _ = decoder.decode(incoming.frames)
    if more:
        raise LearnerError("the learner must wait for RunOpened before it says anything else")
    assert isinstance(message, OpenRun)
    return incoming.peer, message
