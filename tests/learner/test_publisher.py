"""The publisher with its real snapshot server process; rollout servers that pull fast, slowly, or not to the end."""

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch

from common.codec import Decoder, encode
from common.lifecycle import UserError
from common.shared_slots import lock_to_read, unlock
from common.snapshot import MAX_MANIFEST_BYTES, NO_VERSION, SnapshotManifest, decode_manifest, verify_chunk
from common.weight_messages import (
    ChunkReply,
    ChunkRequest,
    ManifestReply,
    ManifestRequest,
    NoNewer,
    SnapshotGone,
    SnapshotsToServer,
)
from common.wire import open_dealer
from learner.publisher import NUM_SLOTS, Publisher, open_publisher
from learner.slots import lay_out

PATIENCE_S = 30.0
NUM_CHUNKS = 3
SHAPES = {"embedding": (600, 1024), "norm": (1024,)}  # 2.4 MB: three chunks, the last one short


def parameters(version: int) -> list[tuple[str, torch.Tensor]]:
    """Unlike those of any other version, in every element."""
    return [
        (name, torch.arange(torch.Size(shape).numel()).view(shape) + version * 0.25) for name, shape in SHAPES.items()
    ]


class Publishing:
    """A publisher, the versions that its snapshot server said it serves, and how to publish one more."""

    def __init__(self, publisher: Publisher) -> None:
        self.publisher = publisher
        self.ready: asyncio.Queue[int] = asyncio.Queue()

    async def follow(self) -> None:
        async for ready in self.publisher.ready_versions():
            self.ready.put_nowait(ready.version)

    async def publish(self, version: int) -> bool:
        """False when there is no slot; else returns once it is being served."""
        slot = self.publisher.take_slot()
        if slot is None:
            return False
        self.publisher.write(slot, parameters(version))
        await self.publisher.hand_over(slot, version)
        assert await self.ready.get() == version
        return True


@asynccontextmanager
async def a_publisher(run_id: str = "run.1") -> AsyncIterator[Publishing]:
    with tempfile.TemporaryDirectory() as private:  # a socket's path must be short
        async with (
            asyncio.timeout(PATIENCE_S),
            open_publisher(
                lay_out(parameters(0)),
                run_id=run_id,
                listen="tcp://127.0.0.1:0",
                keys=None,
                private_directory=Path(private),
            ) as publisher,
            asyncio.TaskGroup() as tasks,
        ):
            publishing = Publishing(publisher)
            following = tasks.create_task(publishing.follow())
            await publisher.listening()
            yield publishing
            following.cancel()


class Puller:
    """A rollout server's side, one request at a time."""

    def __init__(self, dealer) -> None:
        self._dealer = dealer
        self._decoder = Decoder(SnapshotsToServer, max_payload_bytes=MAX_MANIFEST_BYTES)

    async def ask(self, request):
        await self._dealer.send(encode(request))
        return self._decoder.decode(await self._dealer.receive())

    async def manifest(self, newer_than: int = NO_VERSION) -> SnapshotManifest:
        reply, payload = await self.ask(ManifestRequest(newer_than=newer_than))
        manifest = decode_manifest(payload)
        assert reply == ManifestReply(version=manifest.version)
        return manifest

    async def chunk(self, manifest: SnapshotManifest, index: int) -> bytes:
        reply, payload = await self.ask(ChunkRequest(version=manifest.version, index=index))
        assert reply == ChunkReply(version=manifest.version, index=index)
        verify_chunk(manifest, index, payload)
        return bytes(payload)

    async def pull(self, manifest: SnapshotManifest) -> dict[str, torch.Tensor]:
        data = b"".join([await self.chunk(manifest, index) for index in range(manifest.num_chunks)])
        return {
            spec.name: torch.frombuffer(bytearray(data[spec.offset :][: spec.num_bytes]), dtype=torch.float32).view(
                spec.shape
            )
            for spec in manifest.tensors
        }


@asynccontextmanager
async def a_puller(publisher: Publisher) -> AsyncIterator[Puller]:
    async with open_dealer(publisher.address) as dealer:
        yield Puller(dealer)


def assert_equal(pulled: dict[str, torch.Tensor], version: int) -> None:
    for name, expected in parameters(version):
        torch.testing.assert_close(pulled[name], expected, rtol=0, atol=0)


async def test_what_is_pulled_is_bit_for_bit_what_was_published_version_after_version():
    async with a_publisher() as publishing, a_puller(publishing.publisher) as puller:
        assert await puller.ask(ManifestRequest(newer_than=NO_VERSION)) == (NoNewer(version=NO_VERSION), b"")
        for version in range(3 * NUM_SLOTS):  # each slot is written several times
            while not await publishing.publish(version):
                await publishing.publisher.slot_free()
            manifest = await puller.manifest(newer_than=version - 1)
            assert (manifest.run_id, manifest.version, manifest.num_chunks) == ("run.1", version, NUM_CHUNKS)
            assert_equal(await puller.pull(manifest), version)
            assert await puller.ask(ManifestRequest(newer_than=version)) == (NoNewer(version=version), b"")
        assert publishing.publisher.published_version == 3 * NUM_SLOTS - 1


async def test_a_server_that_pulls_slowly_gets_one_version_whole_while_newer_ones_are_published():
    async with a_publisher() as publishing, a_puller(publishing.publisher) as slow:
        await publishing.publish(0)
        manifest = await slow.manifest()
        first = await slow.chunk(manifest, 0)
        for version in (1, 2, 3):
            while not await publishing.publish(version):
                await publishing.publisher.slot_free()
        assert first == await slow.chunk(manifest, 0)
        assert_equal(await slow.pull(manifest), 0)
        newer = await slow.manifest(newer_than=0)
        assert newer.version == 3
        assert_equal(await slow.pull(newer), 3)


async def test_two_servers_that_pull_slowly_do_not_keep_the_next_version_from_the_others():
    async with (
        a_publisher() as publishing,
        a_puller(publishing.publisher) as one,
        a_puller(publishing.publisher) as two,
    ):
        old = []
        for version, slow in enumerate((one, two)):
            assert await publishing.publish(version)
            old.append(await slow.manifest(newer_than=version - 1))
            await slow.chunk(old[-1], 0)
        for version in (2, 3, 4):
            await publishing.publisher.slot_free()
            assert await publishing.publish(version)
        answers = [
            (await slow.ask(ChunkRequest(version=manifest.version, index=1)))[0]
            for slow, manifest in zip((one, two), old, strict=True)
        ]
        assert sorted(type(answer).__name__ for answer in answers) == ["ChunkReply", "SnapshotGone"]
        newest = await one.manifest(newer_than=0)
        assert newest.version == 4
        assert_equal(await one.pull(newest), 4)


async def test_when_no_slot_may_be_written_a_version_is_skipped_and_training_goes_on():
    async with a_publisher() as publishing:
        publisher = publishing.publisher
        descriptors = [os.open(f"/proc/self/fd/{slot}", os.O_RDONLY) for slot in publisher._slots.descriptors]
        assert all(map(lock_to_read, descriptors))  # as servers on this host do
        assert not await publishing.publish(0)
        assert publisher.skipped_versions == 1
        assert repr(publisher) == f"<Publisher at {publisher.address}, version -1, {NUM_SLOTS} slots free>"
        unlock(descriptors[1])
        await publisher.slot_free()
        assert await publishing.publish(1)
        for descriptor in descriptors:
            os.close(descriptor)


async def test_a_version_that_is_gone_is_answered_with_the_newest():
    async with a_publisher() as publishing, a_puller(publishing.publisher) as puller:
        await publishing.publish(0)
        await publishing.publish(1)
        gone = await puller.ask(ChunkRequest(version=0, index=0))
        assert gone == (SnapshotGone(version=0, newest=1), b"")


async def test_what_is_no_request_is_ignored_and_the_next_one_answered():
    async with a_publisher() as publishing, a_puller(publishing.publisher) as puller:
        await publishing.publish(0)
        await puller._dealer.send([b"\xc1 garbage", b""])
        assert (await puller.manifest()).version == 0


async def test_the_learner_is_told_when_its_snapshot_server_ends_by_itself():
    async with a_publisher() as publishing:
        publishing.publisher._server._process.kill()
        with pytest.raises(UserError, match="the snapshot server ended with exit code -9; start the learner to resume"):
            await publishing.publisher.watch()


def test_tensors_lie_without_gaps_and_wide_ones_first_so_that_all_are_aligned():
    tensors = [("half", torch.zeros(3, dtype=torch.bfloat16)), ("full", torch.zeros(2, 2))]
    assert [(spec.name, spec.offset, spec.num_bytes) for spec in lay_out(tensors)] == [("full", 0, 16), ("half", 16, 6)]


def test_a_tensor_that_snapshots_cannot_hold_is_named():
    with pytest.raises(ValueError, match=r"counts is torch.int64; snapshots hold bfloat16, float16, float32"):
        lay_out([("counts", torch.zeros(3, dtype=torch.int64))])
