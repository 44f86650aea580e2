"""What a receiver does with deltas that are not what they should be, and when a newer version overtakes a pull."""

import asyncio

import msgspec
import numpy as np
import pytest

from common.delta import encode_delta_manifest
from common.delta.manifest import _whole_digest
from common.messages import Message
from common.snapshot import NO_VERSION
from common.weight_messages import ChunkReply, ChunkRequest, DeltaReply
from rollout_server import pulled_snapshots, weight_receiver
from rollout_server.inference import EngineError, LocalSnapshot, WeightUpdate
from rollout_server.table_engine import TableEngine
from tests.rollout_server.builders_snapshots import (
    CHUNK_BYTES,
    NUM_CHUNKS,
    Answer,
    Fault,
    SnapshotServer,
    V,
    a_delta,
    a_manifest,
    a_table,
    assert_loaded,
    following,
)


class RecordingEngine(TableEngine):
    """Remembers which version each load started from, None where everything was copied."""

    def __init__(self, failures: int = 0) -> None:
        super().__init__(vocab_size=V, max_model_len=64, eos_id=0)
        self.bases: list[int | None] = []
        self.fails_from = failures

    async def load_weights(self, snapshot: LocalSnapshot) -> WeightUpdate:
        self.bases.append(snapshot.changes.base_version if snapshot.changes is not None else None)
        if len(self.bases) == self.fails_from:
            raise EngineError("half of it is applied")
        return await super().load_weights(snapshot)


async def load(receiver, engine, server: SnapshotServer, version: int) -> None:
    server.newest = version
    await receiver.announce(version)
    await receiver.wait_for_version(version)
    await assert_loaded(engine, version)


async def test_a_delta_is_applied_to_the_copy_and_the_engine_is_told_what_changed(tmp_path):
    server, engine = SnapshotServer(newest=3, has_deltas=True), RecordingEngine()
    told: list[list[int]] = []
    load_weights = engine.load_weights

    async def listen(snapshot: LocalSnapshot) -> WeightUpdate:
        if snapshot.changes is not None:
            [(name, positions, words)] = snapshot.changes.read(snapshot.manifest)
            table = np.fromfile(snapshot.path, words.dtype)
            assert (name, words.tolist()) == ("table.weight", table[positions].tolist())
            told.append(positions.tolist())
        return await load_weights(snapshot)

    engine.load_weights = listen
    async with server.serving(), following(server, tmp_path, engine) as (receiver, _):
        await load(receiver, engine, server, 3)
        await load(receiver, engine, server, 4)
        assert (receiver.full_loaded, receiver.deltas_loaded) == (1, 1)
    assert engine.bases == [None, 3]
    assert told == [list(range(0, V * V, V))]


def damaged_manifest(request: Message, answer: Answer) -> Answer:
    return answer[0], answer[1][:-1] + bytes([answer[1][-1] ^ 4])


def delta_with(**changes: object) -> Fault:
    manifest = msgspec.structs.replace(a_delta(3, 4)[0], **changes)
    manifest = msgspec.structs.replace(manifest, digest=_whole_digest(manifest))
    return lambda request, answer: (answer[0], encode_delta_manifest(manifest))


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (damaged_manifest, "the manifest of delta 3 to 4 does not match its digest"),
        (delta_with(base_digest=a_manifest(3, "run.2").digest), "delta 3 to 4 is for another base"),
        (delta_with(base_digest=a_manifest(2).digest), "delta 3 to 4 is for another base"),
        (delta_with(target=a_manifest(4, "run.2")), "snapshot 4 is of run run.2, not of run.1"),
        (delta_with(target=a_manifest(3), base_version=2), "asked for a version after 3, was given 3"),
        (delta_with(target=a_manifest(5)), "snapshot 5 is not announced yet, 4 is"),
    ],
)
async def test_a_delta_that_must_not_be_applied_is_refused_by_name_and_the_full_snapshot_pulled(
    tmp_path, caplog, monkeypatch, fault, why
):
    monkeypatch.setattr(weight_receiver, "ASK_AGAIN_S", 0.02)
    server, engine = SnapshotServer(newest=3, has_deltas=True), RecordingEngine()

    def spoil(request: Message, answer: Answer) -> Answer:
        return fault(request, answer) if isinstance(answer[0], DeltaReply) else answer

    async with server.serving(), following(server, tmp_path, engine) as (receiver, _):
        await load(receiver, engine, server, 3)
        server.fault = spoil
        await load(receiver, engine, server, 4)
    assert engine.bases == [None, None]
    assert why in caplog.text


async def test_blocks_that_lead_elsewhere_than_the_manifest_says_are_found_before_the_engine_hears_of_them(
    tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(weight_receiver, "ASK_AGAIN_S", 0.02)
    server, engine = SnapshotServer(newest=3, has_deltas=True), RecordingEngine()
    elsewhere, data = a_delta(3, 7)
    lying = msgspec.structs.replace(elsewhere, target=a_manifest(4))
    lying = msgspec.structs.replace(lying, digest=_whole_digest(lying))

    def lie(request: Message, answer: Answer) -> Answer:
        if isinstance(answer[0], DeltaReply):
            return answer[0], encode_delta_manifest(lying)
        if isinstance(request, ChunkRequest) and request.base_version != NO_VERSION:
            start, end = lying.chunk_range(request.index)
            return ChunkReply(version=4, index=request.index, base_version=3), data[start:end]
        return answer

    async with server.serving(), following(server, tmp_path, engine) as (receiver, _):
        await load(receiver, engine, server, 3)
        server.fault = lie
        await load(receiver, engine, server, 4)
        server.fault = lambda request, answer: answer
        await load(receiver, engine, server, 5)
    assert engine.bases == [None, None, 4]
    assert "chunk 0 of snapshot 4: the digest does not match" in caplog.text


async def test_a_chunk_of_another_delta_to_the_same_version_is_not_taken(tmp_path, caplog):
    server, engine = SnapshotServer(newest=3, has_deltas=True), RecordingEngine()
    sent: list[int] = []

    def mix_once(request: Message, answer: Answer) -> Answer:
        if isinstance(request, ChunkRequest) and request.base_version != NO_VERSION and request.index == 1 and not sent:
            sent.append(1)
            return ChunkReply(version=request.version, index=0, base_version=2), answer[1]
        return answer

    async with server.serving(), following(server, tmp_path, engine) as (receiver, _):
        await load(receiver, engine, server, 3)
        server.fault = mix_once
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pulled_snapshots, "REPLY_TIMEOUT_S", 0.3)
            await load(receiver, engine, server, 4)
    assert sent
    assert engine.bases == [None, 3]
    assert "digest" not in caplog.text  # it was not even looked at


async def test_a_delta_that_is_gone_in_the_middle_of_its_pull_leaves_the_copy_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(weight_receiver, "ASK_AGAIN_S", 0.02)
    server, engine = SnapshotServer(newest=3, has_deltas=True), RecordingEngine()

    def moves_on(request: Message, answer: Answer) -> Answer:
        if isinstance(request, ChunkRequest) and request.version == 4 and request.index == 1:
            server.newest = 5
            return server._answer(request)
        return answer

    async with server.serving(), following(server, tmp_path, engine) as (receiver, _):
        await load(receiver, engine, server, 3)
        server.fault = moves_on
        server.newest = 4
        await receiver.announce(4)
        while not server.chunks_asked(4):
            await asyncio.sleep(0.01)
        await load(receiver, engine, server, 5)
    assert engine.bases == [None, 3]


async def test_changes_that_were_applied_half_are_repaired_by_copying_everything(tmp_path):
    server, engine = SnapshotServer(newest=3, has_deltas=True), RecordingEngine(failures=2)
    async with server.serving(), following(server, tmp_path, engine) as (receiver, _):
        await load(receiver, engine, server, 3)
        await load(receiver, engine, server, 4)
        await load(receiver, engine, server, 5)
    assert engine.bases == [None, 3, None, 4]


@pytest.mark.parametrize(("answered", "is_overtaken"), [(2, True), (NUM_CHUNKS - 2, False)])
async def test_a_newer_version_overtakes_a_full_one_of_which_less_than_half_is_there(
    tmp_path, monkeypatch, answered, is_overtaken
):
    monkeypatch.setattr(pulled_snapshots, "REPLY_TIMEOUT_S", 0.1)
    server, engine = SnapshotServer(newest=3), RecordingEngine()
    table = a_table(3).tobytes()
    stalls = True

    def stall(request: Message, answer: Answer) -> Answer | None:
        if isinstance(request, ChunkRequest) and request.version == 3:
            if stalls and request.index >= answered:
                return None
            start = request.index * CHUNK_BYTES
            return ChunkReply(version=3, index=request.index), table[start : start + CHUNK_BYTES]
        return answer

    server.fault = stall
    async with server.serving(), following(server, tmp_path, engine) as (receiver, _):
        await receiver.announce(3)
        while receiver.received_bytes < answered * CHUNK_BYTES:
            await asyncio.sleep(0.01)
        server.newest = 4
        await receiver.announce(4)
        stalls = is_overtaken
        await receiver.wait_for_version(4)
        await assert_loaded(engine, 4)
    assert len(engine.bases) == (1 if is_overtaken else 2)
