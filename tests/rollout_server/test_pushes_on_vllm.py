"""Versions on their way to real vLLM while it samples: from a real snapshot server, each push cut at a random byte."""

import asyncio
import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from common.canary import TOLERANCES, Canary, canary_prompt, make_canary
from rollout_server import pulled_snapshots
from rollout_server.nearest_snapshots import TransportName
from tests.models import VOCAB_SIZE, a_tiny_model, forward_logprobs
from tests.rollout_server.conftest import MAX_MODEL_LEN, LiveEngine
from tests.rollout_server.test_vllm_engine import TOLERANCE, a_prompt, a_sampling
from tests.weights.fleet import Weights, a_fleet

pytestmark = pytest.mark.asyncio(loop_scope="session")

PATIENCE_S = 90.0
PUSHES = 20
FIRST_VERSION = 10_000  # whatever other tests have loaded
PROMPT = canary_prompt(VOCAB_SIZE, MAX_MODEL_LEN)


class ModelWeights(Weights):
    """The parameters of a model that changes a little, as training would have it, or everywhere."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.model = a_tiny_model(7, tied=tied)
        self.tensors = [(name, parameter.data) for name, parameter in self.model.named_parameters()]
        self._generator = torch.Generator().manual_seed(0)

    def change(self, share: float) -> None:
        for _, tensor in self.tensors:
            is_changed = torch.rand(tensor.shape, generator=self._generator) < share
            tensor += is_changed * 0.02 * torch.randn(tensor.shape, generator=self._generator)

    def replace(self) -> None:
        self.change(1.0)

    def remember(self, version: int) -> None: ...

    def canary(self) -> Canary | None:
        return make_canary(PROMPT.tolist(), forward_logprobs(self.model, PROMPT), TOLERANCES["float32"])


async def keep_busy(live: LiveEngine, seed: int) -> None:
    for number in itertools.count():
        await live.engine.generate(a_prompt(10, number), a_sampling(number, 60), f"load {seed} {number}")


@pytest.mark.parametrize("transport", ["zeromq", "shared_memory"])
async def test_twenty_versions_reach_a_busy_engine_whole_whatever_is_cut(
    live: LiveEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transport: TransportName
):
    monkeypatch.setattr(pulled_snapshots, "REPLY_TIMEOUT_S", 0.1)
    randomness, weights = random.Random(3), ModelWeights(tied=live.tied)
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
