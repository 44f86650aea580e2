"""An engine that does not compute with what it was given: found by the canary, taken out, repaired, or given up."""

import numpy as np
import pytest

from common.canary import Canary, canary_prompt, make_canary
from common.events import read_events
from common.lifecycle import UserError
from common.snapshot import NO_VERSION
from common.wire import open_dealer
from rollout_server.inference import LocalSnapshot, WeightUpdate
from rollout_server.table_engine import TableEngine
from tests.rollout_server.builders_snapshots import (
    RUN_ID,
    SnapshotServer,
    V,
    a_receiver,
    a_table,
    assert_loaded,
    following,
)

TOLERANCE = 1e-4
PROMPT = canary_prompt(V, 64)


def a_canary(version: int) -> Canary:
    """What the learner says of that version's table."""
    table = a_table(version).astype(np.float64)
    logprobs = table - np.log(np.exp(table).sum(axis=1, keepdims=True))
    canary = make_canary(PROMPT.tolist(), logprobs[PROMPT[:-1], PROMPT[1:]].astype(np.float32), TOLERANCE)
    assert canary is not None
    return canary


class FaultyEngine(TableEngine):
    """Loads as it should, except when its fault is on; may load by changes, as vLLM does."""

    def __init__(self, fault: str, versions: tuple[int, ...]) -> None:
        super().__init__(vocab_size=V, max_model_len=64, eos_id=0)
        self._fault = fault
        self._versions = list(versions)  # in which the fault is on, once for each time that it is named
        self.forms: list[str] = []

    async def load_weights(self, snapshot: LocalSnapshot) -> WeightUpdate:
        self.forms.append("changes" if snapshot.changes is not None else "whole")
        before = self._table_VV
        update = await super().load_weights(snapshot)
        if snapshot.manifest.version in self._versions:
            self._versions.remove(snapshot.manifest.version)
            self._break(before, snapshot)
        return update

    def _break(self, before_VV: np.ndarray, snapshot: LocalSnapshot) -> None:
        table_VV = self._table_VV.copy()
        match self._fault:
            case "a flipped bit after the digest":
                table_VV.view(np.uint32)[int(PROMPT[3]), 2] ^= 1 << 29
            case "a skipped tensor":  # its new values never reach what the engine computes with
                table_VV[V // 2 :] = before_VV[V // 2 :]
            case "a stale copy":  # the parameter is new, what is multiplied with is not
                table_VV = before_VV
            case "a wrong base":  # the changed elements are right, the others those of yet another version
                changed = table_VV != before_VV
                table_VV = np.where(changed, table_VV, before_VV + np.linspace(0, 1, V, dtype=np.float32))
        self._table_VV = table_VV


FAULTS = ("a flipped bit after the digest", "a skipped tensor", "a stale copy", "a wrong base")


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_takes_the_server_out_until_the_whole_snapshot_repaired_it(tmp_path, caplog, fault):
    server = SnapshotServer(newest=3, has_deltas=True, canary_of=a_canary)
    engine = FaultyEngine(fault, versions=(4,))
    seen: list[str] = []

    async def on_doubt(doubt: str) -> None:
        assert receiver.loaded_version == 3  # what version 4 has sampled here is nobody's
        assert repr(receiver) == f"<WeightReceiver at version 3, published 4, in doubt: {doubt}>"
        seen.append(doubt)

    async with server.serving(), following(server, tmp_path, engine, on_doubt) as (receiver, _):
        for version in (3, 4):
            server.newest = version
            await receiver.announce(version)
            await receiver.wait_for_version(version)
            await assert_loaded(engine, version)
        assert not receiver.doubt
        server.newest = 5
        await receiver.announce(5)
        await receiver.wait_for_version(5)
    assert engine.forms == ["whole", "changes", "whole", "changes"]
    [reason] = seen
    assert reason.startswith("with version 4 loaded, the engine's log-probabilities of the canary are ")
    assert reason.endswith("nats per token from the learner's, 0.0001 are allowed")
    assert f"out of service until the whole snapshot is loaded: {reason}" in caplog.text
    assert "back in service at version 4, which was loaded whole" in caplog.text
    judged = [event for event in read_events([tmp_path / "events.jsonl"]) if event["kind"] == "canary"]
    assert [(event["version"], event["ok"]) for event in judged] == [(3, True), (4, False), (4, True), (5, True)]


async def test_twice_in_a_row_is_a_matter_for_a_person(tmp_path):
    server, engine = SnapshotServer(newest=4, canary_of=a_canary), FaultyEngine("a stale copy", versions=(4, 4))
    async with server.serving(), open_dealer(server.address) as dealer:
        with a_receiver(engine, tmp_path) as receiver:
            await receiver.follow(RUN_ID)
            await receiver.announce(4)
            with pytest.raises(UserError, match="so they were before the whole snapshot was loaded"):
                await receiver.run(dealer)
    assert receiver.loaded_version == NO_VERSION


async def test_a_fault_after_a_good_canary_is_the_first_again(tmp_path):
    server = SnapshotServer(newest=3, has_deltas=True, canary_of=a_canary)
    engine = FaultyEngine("a stale copy", versions=(4, 5))
    async with server.serving(), following(server, tmp_path, engine) as (receiver, _):
        for version in (3, 4, 5, 6):
            server.newest = version
            await receiver.announce(version)
            await receiver.wait_for_version(version)
        assert receiver.canaries_failed == 2


async def test_a_version_without_a_canary_is_loaded_at_its_digests_word_and_the_next_canary_still_judges(tmp_path):
    server = SnapshotServer(newest=3, has_deltas=True, canary_of=lambda v: a_canary(v) if v != 4 else None)
    engine = FaultyEngine("a stale copy", versions=(4,))
    async with server.serving(), following(server, tmp_path, engine) as (receiver, _):
        for version in (3, 4):
            server.newest = version
            await receiver.announce(version)
            await receiver.wait_for_version(version)
        assert not receiver.doubt
        engine._versions = [5]
        server.newest = 5
        await receiver.announce(5)
        await receiver.wait_for_version(5)
        assert receiver.canaries_failed == 1


async def test_a_canary_that_this_engine_cannot_be_asked_is_a_failed_one(tmp_path):
    def too_large(version: int) -> Canary:
        return Canary(token_ids=(1, V + 1), logprobs=(-1.0,), tolerance=1.0)

    server = SnapshotServer(newest=3, canary_of=too_large)
    async with server.serving(), open_dealer(server.address) as dealer:
        with a_receiver(TableEngine(vocab_size=V, max_model_len=64, eos_id=0), tmp_path) as receiver:
            await receiver.follow(RUN_ID)
            await receiver.announce(3)
            with pytest.raises(UserError, match="the canary of version 3 cannot be asked: token ids must be some of"):
                await receiver.run(dealer)
