"""WeightReceiver over real sockets, against a snapshot server that can be told to fail in every way."""

import asyncio

import numpy as np
import pytest

from common.events import read_events
from common.messages import Message
from common.snapshot import NO_VERSION, encode_manifest
from common.weight_messages import ChunkRequest, ManifestReply, ManifestRequest, SnapshotGone
from common.wire import open_dealer
from rollout_server import pulled_snapshots, weight_receiver
from rollout_server.inference import EngineError, LocalSnapshot, Sampling, WeightUpdate
from rollout_server.table_engine import TableEngine
from tests.rollout_server.builders_snapshots import (
    CHUNK_BYTES,
    NUM_CHUNKS,
    RUN_ID,
    Answer,
    Fault,
    SnapshotServer,
    V,
    a_manifest,
    a_receiver,
    a_table,
    assert_loaded,
    following,
    honestly,
)


async def test_what_is_announced_is_pulled_and_loaded_version_after_version(tmp_path):
    server = SnapshotServer()
    async with server.serving(), following(server, tmp_path) as (receiver, engine):
        assert repr(receiver) == "<WeightReceiver at version -1, published -1>"
        for version in (0, 1, 5):
            server.newest = version
            await receiver.announce(version)
            await receiver.wait_for_version(version)
            await assert_loaded(engine, version)
            assert sorted(server.chunks_asked(version)) == list(range(NUM_CHUNKS))
    assert receiver.received_bytes == 3 * NUM_CHUNKS * CHUNK_BYTES
    updates = [event for event in read_events([tmp_path / "events.jsonl"]) if event["kind"] == "weight_update"]
    assert [(event["version"], event["num_bytes"]) for event in updates] == [(v, 1024) for v in (0, 1, 5)]


async def test_nothing_is_asked_for_before_something_is_announced(tmp_path):
    server = SnapshotServer()
    async with server.serving(), following(server, tmp_path) as (receiver, _):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await receiver.wait_for_version(NO_VERSION)
    assert server.requests == []


async def test_a_pull_goes_on_at_the_chunk_where_it_was_cut(tmp_path, monkeypatch, unused_tcp_port):
    monkeypatch.setattr(pulled_snapshots, "REPLY_TIMEOUT_S", 0.3)
    server = SnapshotServer(address=f"tcp://127.0.0.1:{unused_tcp_port}")
    half_way = asyncio.Event()

    def falls_silent(request: Message, answer: Answer) -> Answer | None:
        if isinstance(request, ChunkRequest) and len(server.chunks_asked(0)) > NUM_CHUNKS // 2:
            half_way.set()
            return None
        return answer

    server.fault = falls_silent
    async with following(server, tmp_path) as (receiver, engine):
        await receiver.announce(0)
        async with server.serving():
            await half_way.wait()
        arrived = set(server.chunks_asked(0)[: NUM_CHUNKS // 2])
        server.requests.clear()
        server.fault = honestly
        async with server.serving():
            await receiver.wait_for_version(0)
            await assert_loaded(engine, 0)
    assert arrived.isdisjoint(server.chunks_asked(0))  # what had arrived is not asked for again
    assert server.asked(ManifestRequest) == []


async def test_a_chunk_with_a_flipped_bit_is_refused_and_pulled_again(tmp_path, caplog):
    server = SnapshotServer()

    def flips_a_bit_once(request: Message, answer: Answer) -> Answer:
        if isinstance(request, ChunkRequest) and request.index == 5 and server.chunks_asked(0).count(5) == 1:
            return answer[0], bytes([answer[1][0] ^ 4]) + answer[1][1:]
        return answer

    server.fault = flips_a_bit_once
    async with server.serving(), following(server, tmp_path) as (receiver, engine):
        await receiver.announce(0)
        await receiver.wait_for_version(0)
        await assert_loaded(engine, 0)
    assert sorted(server.chunks_asked(0)) == sorted([*range(NUM_CHUNKS), 5])
    assert "chunk 5 of snapshot 0: the digest does not match; pull it again" in caplog.text


async def test_a_chunk_of_another_version_under_this_ones_name_is_refused_and_pulled_again(tmp_path, caplog):
    server = SnapshotServer(newest=3)

    def mixes_once(request: Message, answer: Answer) -> Answer:
        if isinstance(request, ChunkRequest) and request.index == 5 and server.chunks_asked(3).count(5) == 1:
            start = 5 * CHUNK_BYTES
            return answer[0], a_table(2).tobytes()[start : start + CHUNK_BYTES]
        return answer

    server.fault = mixes_once
    async with server.serving(), following(server, tmp_path) as (receiver, engine):
        await receiver.announce(3)
        await receiver.wait_for_version(3)
        await assert_loaded(engine, 3)
    assert "chunk 5 of snapshot 3: the digest does not match; pull it again" in caplog.text


def flipped_manifest(request: Message, answer: Answer) -> Answer:
    return answer[0], answer[1][:-3] + bytes([answer[1][-3] ^ 4]) + answer[1][-2:]  # the last byte of the digest


def manifest_of(version: int, run_id: str = RUN_ID) -> Fault:
    return lambda request, answer: (ManifestReply(version=version), encode_manifest(a_manifest(version, run_id)))


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (flipped_manifest, "the manifest of snapshot 4 does not match its digest"),
        (manifest_of(4, "stranger.1"), "snapshot 4 is of run stranger.1, not of run.1"),
        (manifest_of(4, "run.2"), "snapshot 4 is of run run.2, not of run.1"),
        (manifest_of(2), "asked for a version after 3, was given 2"),
        (manifest_of(3), "asked for a version after 3, was given 3"),
        (manifest_of(5), "snapshot 5 is not announced yet, 4 is"),
    ],
)
async def test_a_snapshot_that_must_not_be_loaded_is_not_even_pulled_and_the_next_good_one_is(
    tmp_path, caplog, monkeypatch, fault, why
):
    monkeypatch.setattr(weight_receiver, "ASK_AGAIN_S", 0.02)
    server = SnapshotServer(newest=3)
    async with server.serving(), following(server, tmp_path) as (receiver, engine):
        await receiver.announce(3)
        await receiver.wait_for_version(3)
        server.requests.clear()
        server.newest = 4
        server.fault = lambda request, answer: (
            fault(request, answer) if isinstance(request, ManifestRequest) else answer
        )
        await receiver.announce(4)
        while len(server.asked(ManifestRequest)) < 3:
            await asyncio.sleep(0.01)
        assert server.asked(ChunkRequest) == []
        await assert_loaded(engine, 3)
        server.fault = honestly
        await receiver.wait_for_version(4)
        await assert_loaded(engine, 4)
    assert why in caplog.text


async def test_useless_answers_are_not_asked_for_in_a_hot_loop(tmp_path):
    server = SnapshotServer(newest=0, run_id="stranger.1")
    async with server.serving(), following(server, tmp_path) as (receiver, _):
        await receiver.announce(0)
        await asyncio.sleep(0.5)
    assert 1 <= len(server.requests) <= 0.5 / weight_receiver.ASK_AGAIN_S + 1


async def test_a_snapshot_that_is_gone_in_the_middle_is_given_up_for_the_newest(tmp_path):
    server = SnapshotServer(newest=1)

    def moves_on(request: Message, answer: Answer) -> Answer:
        if isinstance(request, ChunkRequest) and (request.version, request.index) == (1, 9):
            server.newest = 7
            return SnapshotGone(version=1, newest=7), b""
        return answer

    server.fault = moves_on
    async with server.serving(), following(server, tmp_path) as (receiver, engine):
        await receiver.announce(1)
        while not server.asked(ManifestRequest)[1:]:
            await asyncio.sleep(0.01)
        assert receiver.loaded_version < 7  # nobody would believe in tokens of a version that is not announced
        await receiver.announce(7)
        await receiver.wait_for_version(7)
        await assert_loaded(engine, 7)
    assert len(server.asked(ManifestRequest)) >= 2


async def test_what_is_no_reply_is_ignored(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(pulled_snapshots, "REPLY_TIMEOUT_S", 0.3)
    server = SnapshotServer()

    def babbles_once(request: Message, answer: Answer) -> Answer:
        return (request, b"") if server.requests.count(request) == 1 else answer

    server.fault = babbles_once
    async with server.serving(), following(server, tmp_path) as (receiver, engine):
        await receiver.announce(0)
        await receiver.wait_for_version(0)
        await assert_loaded(engine, 0)
    assert "the snapshot server sent what is not a reply" in caplog.text


async def test_another_life_of_the_run_begins_anew_with_whatever_version_it_is_at(tmp_path):
    server = SnapshotServer(newest=9)
    async with server.serving(), following(server, tmp_path) as (receiver, engine):
        await receiver.announce(9)
        await receiver.wait_for_version(9)
        server.newest, server.run_id = 5, "run.2"
        await receiver.follow("run.2")
        assert repr(receiver) == "<WeightReceiver at version -1, published -1>"
        await receiver.announce(5)
        await receiver.wait_for_version(5)
        await assert_loaded(engine, 5)


async def test_another_coordinator_of_the_same_life_changes_nothing(tmp_path):
    server = SnapshotServer(newest=9)
    async with server.serving(), following(server, tmp_path) as (receiver, _):
        await receiver.announce(9)
        await receiver.wait_for_version(9)
        await receiver.follow(RUN_ID)
        assert repr(receiver) == "<WeightReceiver at version 9, published 9>"


class FailingEngine(TableEngine):
    """Its first `failures` loads fail half-way."""

    def __init__(self, failures: int) -> None:
        super().__init__(vocab_size=V, max_model_len=64, eos_id=0)
        self.failures = failures
        self.loads = 0

    async def load_weights(self, snapshot: LocalSnapshot) -> WeightUpdate:
        self.loads += 1
        if self.loads <= self.failures:
            raise EngineError("half of it is applied")
        return await super().load_weights(snapshot)


async def test_weights_that_were_applied_half_are_applied_once_more(tmp_path):
    server, engine = SnapshotServer(), FailingEngine(1)
    async with server.serving(), following(server, tmp_path, engine) as (receiver, _):
        await receiver.announce(0)
        await receiver.wait_for_version(0)
        await assert_loaded(engine, 0)
    assert engine.loads == 2
    assert len(server.chunks_asked(0)) == NUM_CHUNKS  # not pulled again


async def test_weights_that_cannot_be_applied_twice_end_the_server(tmp_path):
    server, engine = SnapshotServer(), FailingEngine(2)
    async with server.serving(), open_dealer(server.address) as dealer:
        with a_receiver(engine, tmp_path) as receiver:
            await receiver.follow(RUN_ID)
            await receiver.announce(0)
            with pytest.raises(EngineError, match="half of it is applied"):
                await receiver.run(dealer)
    assert receiver.loaded_version == NO_VERSION


async def test_tokens_are_sampled_while_a_snapshot_is_pulled_and_tell_which_version_sampled_them(tmp_path):
    server, engine = SnapshotServer(), TableEngine(vocab_size=V, max_model_len=64, eos_id=0, step_s=0.005)
    async with server.serving(), following(server, tmp_path, engine) as (receiver, _), asyncio.TaskGroup() as tasks:
        await receiver.announce(0)
        await receiver.wait_for_version(0)
        sampling = Sampling(temperature=0.1, max_new_tokens=40, seed=3)
        sampled = tasks.create_task(engine.generate(np.array([1], dtype=np.int32), sampling, "a"))
        await asyncio.sleep(0.03)
        server.newest = 1
        await receiver.announce(1)
        versions = (await sampled).token_versions.tolist()
    assert versions == sorted(versions)
    assert set(versions) == {0, 1}
