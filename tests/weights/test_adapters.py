"""Adapters on their way to servers: the base model once, then versions that are nothing but the adapter."""

import asyncio
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from common.canary import Canary
from common.events import EventLog
from common.snapshot import NO_VERSION, SnapshotError, digest_of
from common.wire import open_dealer
from learner.base_model import BaseModel
from learner.lora_settings import AdapterDescription
from rollout_server import weight_receiver
from rollout_server.inference import EngineError, LocalSnapshot, WeightUpdate
from rollout_server.nearest_snapshots import TRANSPORTS, TransportName
from rollout_server.snapshot_transport import WeightTarget
from rollout_server.weight_receiver import WeightReceiver
from tests.adapters import an_adapted_model, write_adapter, write_base_model
from tests.models import a_model
from tests.weights.fleet import DoubtingEngine, Fleet, Weights, a_fleet

PATIENCE_S = 60.0
ADAPTER = AdapterDescription(rank=4, alpha=8.0, target_modules=("q_proj",))
ADAPTER_SHAPES = {"q_proj.lora_A.weight": (4, 512), "q_proj.lora_B.weight": (512, 4)}
CANARY = Canary(token_ids=(0, 1), logprobs=(-1.0,), tolerance=0.1)


@pytest.fixture(params=["zeromq", "shared_memory", "relayed"])
def transport(request: pytest.FixtureRequest) -> TransportName:
    return request.param


class AdaptedTwin(DoubtingEngine):
    """Takes adapters of the very base model that it holds; its canary is as the test wants it."""

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights)
        self.base_models: list[bytes] = []  # content digests, as loaded
        self.base_bytes = b""
        self.adapters: list[int] = []
        self.canary_logprobs = [-1.0]

    async def load_weights(self, snapshot: LocalSnapshot) -> WeightUpdate:
        manifest = snapshot.manifest
        if manifest.is_base_model:
            self.base_bytes = digest_of(snapshot.path.read_bytes())
            self.base_models.append(manifest.content_digest)
            self.loaded_version = NO_VERSION
            return WeightUpdate(version=NO_VERSION, pause_s=0.0)
        assert manifest.adapter is not None
        if not self.base_models or manifest.adapter.base_model != self.base_models[-1]:
            raise EngineError("an adapter of another base model")
        assert (manifest.adapter.rank, manifest.adapter.alpha, manifest.adapter.target_modules) == (4, 8.0, ("q_proj",))
        self.adapters.append(manifest.version)
        return await super().load_weights(snapshot)

    async def token_logprobs(self, token_ids: np.ndarray) -> np.ndarray:
        return np.array(self.canary_logprobs, np.float32)


class AdapterWeights(Weights):
    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed, ADAPTER_SHAPES)

    def canary(self) -> Canary:
        return CANARY


def base_weights(seed: int = 5) -> Weights:
    weights = Weights(seed)
    weights.remember(NO_VERSION)
    return weights


def an_adapter_fleet(directory: Path, *, base: Weights, run_id: str = "run.1", seed: int = 0):
    model = BaseModel(lambda: base.tensors, ADAPTER)
    weights = AdapterWeights(seed)
    return a_fleet(directory, num_members=0, patience_s=PATIENCE_S, weights=weights, base_model=model, run_id=run_id)


async def join(fleet: Fleet, transport: TransportName) -> AdaptedTwin:
    engine = AdaptedTwin(fleet.weights)
    await fleet.join(transport, engine)
    return engine


async def test_the_base_model_comes_once_and_then_nothing_but_adapters_also_to_who_joins_late(
    tmp_path: Path, transport
):
    base = base_weights()
    async with an_adapter_fleet(tmp_path, base=base) as fleet:
        early = await join(fleet, transport)
        for share in (None, 0.01, None):
            await fleet.publish(share)
            await fleet.deliver()
        late = await join(fleet, transport)
        await fleet.deliver()
        await fleet.publish(None)
        await fleet.deliver()
        for engine in (early, late):
            assert engine.base_bytes == base.digests[NO_VERSION]
            assert (len(engine.base_models), engine.loaded_version, engine.mixed) == (1, 3, [])
        assert (early.adapters, late.adapters) == ([0, 1, 2, 3], [2, 3])
        base_bytes, adapter_bytes = 1_127_424, fleet.publisher.num_bytes
        received = [member.receiver.received_bytes for member in fleet.members]
        if transport == "zeromq":
            assert received[1] == base_bytes + 2 * adapter_bytes
            assert base_bytes + 3 * adapter_bytes < received[0] < base_bytes + 4 * adapter_bytes  # one was a delta
        assert fleet.members[0].receiver.deltas_loaded == (0 if transport == "shared_memory" else 1)
        if transport == "relayed":  # the base model is the learner's to give
            assert (fleet.members[1].bytes_of_learner, received[1]) == (base_bytes, base_bytes + 2 * adapter_bytes)


@pytest.mark.parametrize("same_base", [True, False])
async def test_a_restarted_learner_gives_its_base_model_only_where_it_is_another(
    tmp_path: Path, transport, same_base: bool
):
    base = base_weights()
    async with an_adapter_fleet(tmp_path, base=base) as former:
        engine = await join(former, transport)
        for _ in range(2):
            await former.publish(None)
            await former.deliver()
        receiver = former.members[0].receiver
        former.stop_following()
        again = base_weights(5 if same_base else 6)
        async with an_adapter_fleet(tmp_path / "again", base=again, run_id="run.2", seed=1) as resumed:
            resumed.version = 0  # of its checkpoint
            await resumed.publish(None)
            engine._weights = resumed.weights
            async with open_dealer(resumed.publisher.address) as dealer, asyncio.TaskGroup() as tasks:
                await receiver.follow("run.2")
                running = tasks.create_task(receiver.run(dealer))
                await receiver.announce(1)
                await receiver.wait_for_version(1)
                running.cancel()
        assert (engine.loaded_version, engine.mixed) == (1, [])
        assert len(engine.base_models) == (1 if same_base else 2)
        assert engine.base_bytes == again.digests[NO_VERSION]


async def test_after_a_failed_canary_base_model_and_adapter_come_anew(tmp_path: Path, transport):
    async with an_adapter_fleet(tmp_path, base=base_weights()) as fleet:
        engine = await join(fleet, transport)
        await fleet.publish(None)
        await fleet.deliver()
        engine.canary_logprobs = [-3.0]
        doubts: list[str] = []
        [member] = fleet.members

        async def repair(doubt: str) -> None:
            doubts.append(doubt)
            engine.canary_logprobs = [-1.0]

        fleet.stop_following()
        async with open_dealer(fleet.publisher.address) as dealer, asyncio.TaskGroup() as tasks:
            running = tasks.create_task(member.receiver.run(dealer, on_doubt=repair))
            await fleet.publish(None)
            await member.receiver.announce(1)
            await member.receiver.wait_for_version(1)
            running.cancel()
        assert len(doubts) == 1
        assert (len(engine.base_models), engine.adapters, member.receiver.canaries_failed) == (2, [0, 1, 1], 1)


async def test_a_base_model_is_not_given_up_for_a_newer_version(tmp_path: Path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(weight_receiver, "ASK_AGAIN_S", 0.01)
    async with an_adapter_fleet(tmp_path, base=base_weights()) as fleet:
        engine = AdaptedTwin(fleet.weights)
        await fleet.publish(None)
        with closing(EventLog(tmp_path / "one.jsonl", "rollout_server")) as events:
            receiver = WeightReceiver(engine, events, transport=TRANSPORTS["zeromq"])
            async with open_dealer(fleet.publisher.address) as dealer, asyncio.TaskGroup() as tasks:
                await receiver.follow("run.1")
                running = tasks.create_task(receiver.run(dealer))
                await receiver.announce(5)  # as if five had been published since
                while not engine.base_models:
                    await asyncio.sleep(0.01)
                assert "the base model of the adapters is given up" not in caplog.text
                await receiver.wait_for_version(0)
                running.cancel()
            receiver.close()
        assert (engine.base_models, receiver.received_bytes) == (
            engine.base_models[:1],
            1_127_424 + fleet.publisher.num_bytes,
        )


def test_adapters_of_another_base_model_and_what_is_no_base_model_are_refused_by_name(tmp_path: Path):
    base = a_model(0, tied=True)
    manifest = write_base_model(tmp_path / "base", base).manifest
    adapter = write_adapter(tmp_path / "adapter", an_adapted_model(base, 1), manifest, version=3).manifest
    target = WeightTarget(run_id="test", published_version=5)
    with pytest.raises(
        SnapshotError, match=f"adapter of base model {manifest.content_digest.hex()}, the engine holds none"
    ):
        target.check(adapter)
    with pytest.raises(SnapshotError, match="snapshot 3 was given as a base model"):
        target.check_base_model(adapter)
    with pytest.raises(SnapshotError, match="was given -1"):
        target.check(manifest)
    target.check_base_model(manifest)
    target.base_model = manifest.content_digest
    target.check(adapter)
    with pytest.raises(SnapshotError, match="the engine holds it"):
        target.check_base_model(manifest)
    target.run_id = "run.2"
    with pytest.raises(SnapshotError, match=r"base model of the adapters is of run test, not of run\.2"):
        target.check_base_model(manifest)
