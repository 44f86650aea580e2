"""Servers that give weights on to each other: what a relay may cost those who pull there, and what it may not."""

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from common.codec import Decoder, Frame, encode
from common.keys import ClientKey
from common.messages import (
    ChunkLater,
    ChunkReply,
    ChunkRequest,
    ManifestRequest,
    MappingRequest,
    Message,
    NoNewer,
    RelayPlace,
    RelayPlan,
    SnapshotGone,
    SnapshotsToServer,
)
from common.snapshot import TensorSpec, build_manifest
from common.wire import Dealer, WireError, curve_keypair, open_dealer, open_router
from common.wire.options import LINGER_MS
from rollout_server import chunk_sources, pulled_snapshots
from rollout_server.chunk_sources import Upstream, patience_s
from rollout_server.host_copy import HostCopy
from rollout_server.relay import ANSWERS_IN_FLIGHT, Relaying, open_relay
from rollout_server.relay_shelf import RelayShelf
from tests.fault_proxy import Faults
from tests.rollout_server.builders_snapshots import a_manifest, a_table
from tests.weights.fleet import CHUNK_BYTES, RELAYED, Fleet, Member, a_fleet, follow

PATIENCE_S = 60.0
GRACE_S = 1.0


@asynccontextmanager
async def a_chain(directory: Path, num_members: int, *, chunk_bytes: int = CHUNK_BYTES) -> AsyncIterator[Fleet]:
    """Each pulls from the one before it, and has loaded version 0."""
    async with a_fleet(
        directory, num_members=num_members, patience_s=PATIENCE_S, transport=RELAYED, chunk_bytes=chunk_bytes
    ) as fleet:
        await fleet.publish(None)
        await fleet.deliver()
        yield fleet


def assert_right(fleet: Fleet) -> None:
    for member in fleet.members:
        assert (member.engine.loaded_version, member.engine.mixed) == (fleet.version, [])


async def timed_delivery(fleet: Fleet) -> float:
    start_s = time.monotonic()
    await fleet.deliver()
    return time.monotonic() - start_s


@pytest.mark.parametrize("share", [None, 0.05])
async def test_the_learner_gives_a_version_once_and_servers_give_it_on(tmp_path: Path, share: float | None):
    async with a_chain(tmp_path, 4) as fleet:
        before = [(member.bytes_of_learner, member.upstream.pulled_bytes) for member in fleet.members]
        ready = await fleet.publish(share)
        await fleet.deliver()
        pushed = ready.delta_bytes or ready.full_bytes
        after = [(member.bytes_of_learner, member.upstream.pulled_bytes) for member in fleet.members]
        grown = [(a - c, b - d) for (a, b), (c, d) in zip(after, before, strict=True)]
        assert grown == [(pushed, 0), (0, pushed), (0, pushed), (0, pushed)]
        assert before[1:] == [(0, fleet.publisher.num_bytes)] * 3  # who joins is given the whole by a server too
        assert_right(fleet)


async def test_a_relay_is_asked_for_no_manifest_and_knows_none(tmp_path: Path):
    async with a_chain(tmp_path, 1) as fleet:
        [member] = fleet.members
        async with open_dealer(member.relay_proxy.address) as dealer:
            for request in (ManifestRequest(newer_than=-1), MappingRequest(newer_than=-1, host="h")):
                assert await ask(dealer, request) == NoNewer(version=0)


async def ask(dealer: Dealer, request: Message) -> Message:
    await dealer.send(encode(request))
    async with asyncio.timeout(10):
        return Decoder(SnapshotsToServer, max_payload_bytes=1 << 20).decode(await dealer.receive())[0]


@pytest.mark.parametrize("share", [None, 0.3])
async def test_a_relay_that_dies_in_the_middle_costs_its_grace_and_no_chunk_twice(
    tmp_path: Path, monkeypatch, caplog, share
):
    async with a_chain(tmp_path, 2, chunk_bytes=1 << 12) as fleet:
        monkeypatch.setattr(chunk_sources, "GRACE_S", GRACE_S)
        first, second = fleet.members
        ready = await fleet.publish(share)
        pushed = ready.delta_bytes or ready.full_bytes
        first.relay_proxy.down = Faults(bytes_per_s=pushed / 0.3)
        before = second.receiver.received_bytes, second.upstream.pulled_bytes
        delivered = asyncio.ensure_future(timed_delivery(fleet))
        while second.upstream.pulled_bytes - before[1] < 1 << 13:
            await asyncio.sleep(0.001)
        first.relay_proxy.accepts = False
        first.relay_proxy.cut()
        assert await delivered < GRACE_S + 1.5
        assert second.receiver.received_bytes - before[0] == pushed
        assert 0 < second.upstream.pulled_bytes - before[1] < pushed
        assert "the relay of the one before at tcp://" in caplog.text
        assert "is left for the learner" in caplog.text
        assert_right(fleet)


@pytest.mark.parametrize("fault", [Faults(is_stuck=True), Faults(is_lost=True), Faults(bytes_per_s=2e4)])
async def test_a_relay_that_is_stuck_or_slow_delays_a_version_by_its_grace_and_is_then_not_asked_for_a_while(
    tmp_path: Path, monkeypatch, fault: Faults
):
    async with a_chain(tmp_path, 2) as fleet:
        monkeypatch.setattr(chunk_sources, "GRACE_S", GRACE_S)
        first, second = fleet.members
        first.relay_proxy.down = fault
        await fleet.publish(None)
        assert GRACE_S <= await timed_delivery(fleet) < GRACE_S + 1.5
        assert second.upstream.times_left == 1
        pulled_bytes = second.upstream.pulled_bytes
        await fleet.publish(None)
        assert await timed_delivery(fleet) < GRACE_S
        assert second.upstream.pulled_bytes == pulled_bytes
        monkeypatch.setattr(chunk_sources, "REST_S", 0.0)
        first.relay_proxy.heal()
        second.upstream._left_until_s.clear()  # as if it had passed
        await fleet.publish(None)
        await fleet.deliver()
        assert second.upstream.pulled_bytes > pulled_bytes
        assert_right(fleet)


async def test_a_relay_that_is_given_up_near_the_learner_is_not_given_up_by_those_behind_it(
    tmp_path: Path, monkeypatch
):
    async with a_chain(tmp_path, 3) as fleet:
        monkeypatch.setattr(chunk_sources, "GRACE_S", GRACE_S)
        first, second, third = fleet.members
        follow(third, second, level=2)
        first.relay_proxy.both(Faults(is_lost=True))
        before = third.bytes_of_learner
        await fleet.publish(None)
        assert await timed_delivery(fleet) < 2 * GRACE_S + 1.0
        assert (second.upstream.times_left, third.upstream.times_left) == (1, 0)
        assert third.bytes_of_learner == before
        assert_right(fleet)


async def test_a_relay_that_lies_is_named_counted_and_never_asked_again_and_nothing_of_it_is_loaded(
    tmp_path: Path, monkeypatch, caplog
):
    honest = RelayShelf.chunk

    def lies(self: RelayShelf, peer: bytes, request: ChunkRequest) -> Frame | None:
        chunk = honest(self, peer, request)
        return chunk if chunk is None or request.index != 3 else bytes(chunk[:-1]) + bytes([chunk[-1] ^ 1])

    async with a_chain(tmp_path, 2) as fleet:
        monkeypatch.setattr(RelayShelf, "chunk", lies)
        _, second = fleet.members
        for _ in range(3):
            await fleet.publish(None)
            await fleet.deliver()
        assert (second.upstream.liars, second.upstream.times_left) == (1, 1)
        assert second.upstream.last_liar == "the one before"
        assert second.upstream.pulled_bytes < 2 * fleet.publisher.num_bytes
        assert "sent something else than chunk 3 of snapshot 1: the digest does not match" in caplog.text
        assert "<Upstream the one before at tcp://" in repr(second.upstream)
        assert_right(fleet)


ANSWERS = {
    "too little": lambda asked: encode(ChunkReply(version=asked.version, index=asked.index), b"x" * 9),
    "garbage": lambda asked: [b"\xc1", b""],
    "later, always": lambda asked: encode(ChunkLater(version=asked.version, index=asked.index)),
    "gone": lambda asked: encode(SnapshotGone(version=asked.version, newest=9)),
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS.keys())
async def test_whatever_a_relay_answers_the_version_arrives_and_in_time(tmp_path: Path, monkeypatch, answer):
    monkeypatch.setattr(chunk_sources, "GRACE_S", GRACE_S)
    async with a_fleet(tmp_path, num_members=1, patience_s=PATIENCE_S) as fleet, a_relay_that_says(answer) as address:
        tell_to_pull(fleet.members[0], address)
        await fleet.publish(None)
        assert await timed_delivery(fleet) < GRACE_S + 1.5
        assert fleet.members[0].upstream.times_left == 1
        assert_right(fleet)


@asynccontextmanager
async def a_relay_that_says(answer) -> AsyncIterator[str]:
    decoder = Decoder(ChunkRequest, max_payload_bytes=0)
    async with open_router("tcp://127.0.0.1:0", max_frame_bytes=1 << 12) as router, asyncio.TaskGroup() as tasks:

        async def serve() -> None:
            while True:
                for incoming in await router.receive():
                    router.send(incoming.peer, answer(decoder.decode(incoming.frames)[0]))

        serving = tasks.create_task(serve())
        yield router.address
        serving.cancel()


def tell_to_pull(member: Member, address: str, key: bytes = b"") -> None:
    place = RelayPlace(server="odd", address=address, key=key, level=1)
    member.receiver.relaying.follow(RelayPlan(source=place, admitted=()))


@pytest.mark.parametrize(
    "address", ["", "tcp://", "tcp://10.0.0.1:5", "tcp://127.0.0.1:nothing", "http://a", "tcp://[::"]
)
async def test_an_address_that_is_none_or_needs_keys_that_are_not_there_costs_nothing_but_a_line(
    tmp_path: Path, caplog, address: str
):
    async with a_fleet(tmp_path, num_members=1, patience_s=PATIENCE_S) as fleet:
        tell_to_pull(fleet.members[0], address)
        await fleet.publish(None)
        await fleet.deliver()
        assert "the relay of odd at" in caplog.text
        assert_right(fleet)


async def test_a_newer_version_overtakes_one_that_is_being_given_on_and_both_end_at_the_newest(tmp_path: Path):
    async with a_chain(tmp_path, 2) as fleet:
        first, second = fleet.members
        first.relay_proxy.down = Faults(bytes_per_s=2e6)
        await fleet.publish(None)
        for member in fleet.members:
            await member.receiver.announce(1)
        await first.receiver.wait_for_version(1)
        for share in (0.01, None, 0.01):
            await fleet.publish(share)
            await first.receiver.announce(fleet.version)
            await first.receiver.wait_for_version(fleet.version)
        assert second.engine.loaded_version == 0
        first.relay_proxy.heal()
        await fleet.deliver()
        assert_right(fleet)


async def test_cut_at_random_bytes_between_servers_every_version_arrives_bit_for_bit(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(chunk_sources, "RELAY_TIMEOUT_S", 0.1)
    monkeypatch.setattr(pulled_snapshots, "REPLY_TIMEOUT_S", 0.25)
    randomness = random.Random(3)
    async with a_chain(tmp_path, 3) as fleet:
        before = [member.receiver.received_bytes for member in fleet.members]
        pushed = 0
        for push in range(20):
            ready = await fleet.publish(None if push % 4 == 0 else 0.05)
            push_bytes = ready.delta_bytes or ready.full_bytes
            pushed += push_bytes
            for member in fleet.members:
                member.proxy.cut_after = randomness.randrange(1, push_bytes)
                member.relay_proxy.cut_after = randomness.randrange(1, push_bytes)
            await fleet.deliver()
        received = [member.receiver.received_bytes for member in fleet.members]
        assert [after - earlier for after, earlier in zip(received, before, strict=True)] == [pushed] * 3
        assert sum(member.upstream.pulled_bytes for member in fleet.members[1:]) > pushed
        assert_right(fleet)


@pytest.mark.parametrize(("share", "step"), [(0.01, "apply"), (None, "begin")])
async def test_before_a_server_changes_its_copy_it_gives_nothing_of_it_any_more(
    tmp_path: Path, monkeypatch, share: float | None, step: str
):
    async with a_chain(tmp_path, 1) as fleet:
        [member] = fleet.members
        former = member.receiver._transport._copy.manifest
        request = ChunkRequest(version=former.version, index=0, digest=former.digest)
        shelf = member.receiver.relaying.shelf
        assert shelf.chunk(b"peer", request) is not None
        given: list[Frame | None] = []
        change = getattr(HostCopy, step)

        def watched(self: HostCopy, *arguments: Any) -> Any:
            given.append(shelf.chunk(b"peer", request))
            return change(self, *arguments)

        monkeypatch.setattr(HostCopy, step, watched)
        await fleet.publish(share)
        await fleet.deliver()
        assert given == [None]


async def test_once_a_pull_was_given_up_the_next_is_of_the_learner_alone(tmp_path: Path):
    async with a_chain(tmp_path, 2) as fleet:
        second = fleet.members[1]
        transport = second.receiver._transport
        transport._gave_up = True
        before = second.upstream.pulled_bytes
        await fleet.publish(None)
        await fleet.deliver()
        assert second.upstream.pulled_bytes == before
        assert not transport._gave_up
        assert_right(fleet)


async def test_who_joins_waits_for_the_coordinator_to_say_where_to_pull_but_not_for_long(monkeypatch):
    monkeypatch.setattr(chunk_sources, "PLAN_S", 0.05)
    upstream = Upstream()
    async with asyncio.timeout(10):
        await upstream.settled()  # nobody will say anything
        upstream.expect_to_be_told()
        await upstream.settled()
    monkeypatch.setattr(chunk_sources, "PLAN_S", 100.0)
    upstream.expect_to_be_told()
    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(upstream.settled())
        await asyncio.sleep(0)
        assert not waiting.done()
        upstream.tell(None)


def test_patience_is_grace_for_each_relay_on_the_way_and_a_pace_from_then_on():
    assert patience_s(0, 1) == 2.0
    assert patience_s(0, 3) == 6.0
    assert patience_s(100_000_000, 1) == 12.0


# --- who is let in


@asynccontextmanager
async def a_relay_with_keys(shelf_version: int) -> AsyncIterator[Relaying]:
    relaying = Relaying(a_key_for(curve_keypair()[0]))
    async with open_relay(relaying, "tcp://127.0.0.1:0"):
        manifest, memory = a_manifest(shelf_version), memoryview(a_table(shelf_version).tobytes())
        relaying.shelf.begin(manifest, memory)
        relaying.shelf.complete(manifest, memory)
        yield relaying


def a_key_for(server_public: bytes) -> ClientKey:
    public, secret = curve_keypair()
    return ClientKey(public=public, secret=secret, server_public=server_public)


async def is_served(relaying: Relaying, key: ClientKey | None) -> bool:
    manifest = a_manifest(3)
    request = ChunkRequest(version=3, index=0, digest=manifest.digest)
    async with open_dealer(relaying.address, key=key, linger_ms=0) as dealer:
        await dealer.send(encode(request))
        try:
            async with asyncio.timeout(1.0):
                await dealer.receive()
        except TimeoutError:
            return False
    return True


async def test_a_relay_lets_in_those_whom_it_was_told_to_and_no_stranger():
    async with a_relay_with_keys(3) as relaying:
        member, stranger = a_key_for(relaying.public_key), a_key_for(relaying.public_key)
        assert not await is_served(relaying, member)  # nobody has said yet
        relaying.follow(RelayPlan(source=None, admitted=(member.public,)))
        assert await is_served(relaying, member)
        assert not await is_served(relaying, stranger)
        assert not await is_served(relaying, None)
        assert relaying.shelf.given_bytes == 64


async def test_who_is_no_longer_to_pull_there_is_cut_off():
    async with a_relay_with_keys(3) as relaying:
        member = a_key_for(relaying.public_key)
        relaying.follow(RelayPlan(source=None, admitted=(member.public,)))
        request = ChunkRequest(version=3, index=0, digest=a_manifest(3).digest)
        async with asyncio.timeout(20), open_dealer(relaying.address, key=member, linger_ms=0) as dealer:
            assert isinstance(await ask(dealer, request), ChunkReply)
            relaying.follow(RelayPlan(source=None, admitted=()))
            given = -1
            while given != relaying.shelf.given_bytes:  # until a second passes in which nothing is given
                given = relaying.shelf.given_bytes
                await dealer.send(encode(request))
                await asyncio.sleep(1.0)


async def test_a_key_that_is_none_is_no_reason_to_fail():
    upstream = Upstream(a_key_for(curve_keypair()[0]))
    upstream.tell(RelayPlace(server="odd", address="tcp://10.0.0.1:5", key=b"short", level=1))
    async with upstream.sources(None, None, 1) as sources:  # type: ignore[arg-type]  # they are not asked
        assert sources._relay is None
    assert upstream.times_left == 1


async def test_a_relay_where_nobody_listens_is_left_without_holding_up_the_event_loop(unused_tcp_port: int):
    upstream = Upstream()
    upstream.tell(RelayPlace(server="gone", address=f"tcp://127.0.0.1:{unused_tcp_port}", key=b"", level=1))
    async with upstream.sources(None, None, 1) as sources:  # type: ignore[arg-type]  # they are not asked
        assert sources._relay is not None
        await sources._relay.send(encode(ChunkRequest(version=3, index=0)))
        start_s = time.monotonic()
    assert time.monotonic() - start_s < 0.8 * LINGER_MS / 1e3


@asynccontextmanager
async def a_large_chunk() -> AsyncIterator[tuple[Relaying, ChunkRequest]]:
    relaying, memory = Relaying(), memoryview(bytes(1 << 20))
    specs = (TensorSpec("w", (1 << 18,), "float32", 0),)
    manifest = build_manifest(memory, specs, run_id="run.1", version=0)
    async with open_relay(relaying, "tcp://127.0.0.1:0"):
        relaying.shelf.begin(manifest, memory)
        relaying.shelf.complete(manifest, memory)
        yield relaying, ChunkRequest(version=0, index=0, digest=manifest.digest)


async def test_who_asks_and_does_not_read_makes_a_relay_hold_little():
    asked, own_queue = 1000, 64 << 20  # of the one who asks, which is in this process too
    async with (
        a_large_chunk() as (relaying, request),
        open_dealer(relaying.address, max_frame_bytes=1 << 20) as dealer,
        asyncio.timeout(30),
    ):
        before = resident_bytes()
        for _ in range(asked):
            await dealer.send(encode(request))
        while relaying.shelf.given_bytes < asked << 20:
            await asyncio.sleep(0.05)
        assert resident_bytes() - before < own_queue + 2 * (ANSWERS_IN_FLIGHT << 20) + (64 << 20)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


async def test_beyond_loopback_a_relay_without_keys_does_not_listen():
    with pytest.raises(WireError, match="can be reached from other machines, so it needs keys"):
        async with open_relay(Relaying(), "tcp://0.0.0.0:0"):
            pass
