"""Versions on their way to real vLLM while it samples: from a real snapshot server, each push cut at a random byte."""

import asyncio
import itertools
import random
import time
from pathlib import Path

import numpy as np
import pytest

from common.canary import canary_prompt
from rollout_server import pulled_snapshots
from rollout_server.nearest_snapshots import TransportName
from tests.models import VOCAB_SIZE, a_tiny_model, forward_logprobs
from tests.rollout_server.conftest import MAX_MODEL_LEN, LiveEngine
from tests.rollout_server.test_vllm_engine import TOLERANCE, a_prompt, a_sampling
from tests.weights.fleet import a_fleet
from tests.weights.model_weights import ModelWeights

pytestmark = pytest.mark.asyncio(loop_scope="session")

PATIENCE_S = 90.0
PUSHES = 20
FIRST_VERSION = 10_000  # whatever other tests have loaded
JOINING_S = 2.0  # a copy of this model takes microseconds
JOINS = 3  # on a busy machine any one may be delayed
PROMPT = canary_prompt(VOCAB_SIZE, MAX_MODEL_LEN)


async def keep_busy(live: LiveEngine, seed: int) -> None:
    for number in itertools.count():
        await live.engine.generate(a_prompt(10, number), a_sampling(number, 60), f"load {seed} {number}")


@pytest.mark.parametrize("transport", ["zeromq", "shared_memory"])
async def test_twenty_versions_reach_a_busy_engine_whole_whatever_is_cut(
    live: LiveEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transport: TransportName
):
    monkeypatch.setattr(pulled_snapshots, "REPLY_TIMEOUT_S", 0.1)
    randomness, weights = random.Random(3), ModelWeights(a_tiny_model(7, tied=live.tied), PROMPT)
    async with a_fleet(tmp_path, num_members=0, patience_s=PATIENCE_S, weights=weights) as fleet:
        fleet.version = FIRST_VERSION - 1
        member = await fleet.join(transport, live.engine)
        load: list[asyncio.Task[None]] = []
        for push in range(PUSHES):
            ready = await fleet.publish(None if push % 5 == 0 else 0.02)
            if transport == "zeromq":
                member.proxy.cut_after = randomness.randrange(1, ready.delta_bytes or ready.full_bytes)
            await fleet.deliver()
            load = load or [asyncio.ensure_future(keep_busy(live, seed)) for seed in range(4)]
            assert live.engine.loaded_version == FIRST_VERSION + push
            logprobs = await live.engine.token_logprobs(PROMPT)
            np.testing.assert_allclose(logprobs, forward_logprobs(weights.model, PROMPT), atol=TOLERANCE)
        for task in load:
            task.cancel()
        await asyncio.wait(load)
        assert member.receiver.canaries_failed == 0
        if transport == "zeromq":
            assert member.proxy.num_ended >= PUSHES
            assert (member.receiver.full_loaded, member.receiver.deltas_loaded) == (4, 16)
        else:
            assert member.receiver.received_bytes == 0


@pytest.mark.parametrize("transport", ["zeromq", "shared_memory"])
async def test_a_server_that_joins_generates_within_two_seconds_of_its_engine_being_up(
    live: LiveEngine, tmp_path: Path, transport: TransportName
):
    weights = ModelWeights(a_tiny_model(8, tied=live.tied), PROMPT)
    async with a_fleet(tmp_path, num_members=0, patience_s=PATIENCE_S, weights=weights) as fleet:
        fleet.version = max(live.engine.loaded_version, 0)
        took_s = []
        for _ in range(JOINS):
            fleet.stop_following()
            await fleet.publish(None)
            start_s = time.perf_counter()
            member = await fleet.join(transport, live.engine)
            await member.receiver.announce(fleet.version)
            await member.receiver.wait_for_version(fleet.version)
            completion = await live.engine.generate(a_prompt(10), a_sampling(max_new_tokens=1), "first")
            took_s.append(time.perf_counter() - start_s)
            assert completion.token_versions.tolist() == [fleet.version]
            assert (member.receiver.full_loaded, member.receiver.canaries_failed) == (1, 0)
        assert min(took_s) < JOINING_S
