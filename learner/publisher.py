"""Publisher: copies the parameters out of the training process once per version; the rest happens elsewhere.

The copy goes into a slot of memory shared with the snapshot server, which encodes, hashes and serves it beside the next
step. When every slot is still being read the version is skipped: training never waits for a server.

Memory: NUM_SLOTS times the bytes of the model, and deltas of at most half of it. The base that the next version is
encoded against takes no slot of its own: it is the newest version.
"""

import asyncio
import logging
import math
import mmap
import os
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from common import messages
from common.canary import Canary
from common.codec import Decoder, encode
from common.keys import ServerKeys
from common.lifecycle import ChildProcess, UserError
from common.shared_slots import create_slot, lock_to_write, unlock
from common.snapshot import CHUNK_BYTES, ITEM_BYTES, NO_VERSION, DType, TensorSpec
from common.wire import Peer, Router, open_router
from learner.snapshot_server import SnapshotServerSettings

logger = logging.getLogger(__name__)

NUM_SLOTS = 3  # one being written, the newest, and one that a slower server is still pulling
KEPT_S = 2.0  # and as long as KEPT_BYTES_PER_S: who reads a slot for longer keeps it, and another takes its place
KEPT_BYTES_PER_S = 1e9
LOOK_AGAIN_S = 0.05  # for a lock that another process lets go of

DTYPE_NAMES: dict[torch.dtype, DType] = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def lay_out(tensors: Iterable[tuple[str, Tensor]]) -> tuple[TensorSpec, ...]:
    """Places of the tensors in a snapshot, without gaps; wide items first, so that every one is aligned."""
    specs: list[TensorSpec] = []
    offset = 0
    kinds = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors]  # they may go one after the other
    for name, dtype, shape in sorted(kinds, key=lambda kind: -kind[1].itemsize):
        if dtype not in DTYPE_NAMES:
            raise ValueError(f"{name} is {dtype}; snapshots hold {', '.join(sorted(ITEM_BYTES))}")
        spec = TensorSpec(name=name, shape=shape, dtype=DTYPE_NAMES[dtype], offset=offset)
        specs.append(spec)
        offset += spec.num_bytes
    return tuple(specs)


class Slots:
    """Shared memory for NUM_SLOTS snapshots; it vanishes with the processes that map it. See common/shared_slots.py."""

    def __init__(self, slot_bytes: int, num_slots: int = NUM_SLOTS) -> None:
        self.slot_bytes = slot_bytes
        self.descriptors = [create_slot(slot_bytes) for _ in range(num_slots)]
        self._mappings = [mmap.mmap(descriptor, slot_bytes) for descriptor in self.descriptors]
        self._kept_since_s: dict[int, float] = {}

    def claim(self, slot: int, now_s: float) -> bool:
        """To write it; False while a server on this host reads it.

        One that stops while it reads keeps that memory, and the slot goes on with new.
        """
        if not lock_to_write(self.descriptors[slot]):
            kept_s = now_s - self._kept_since_s.setdefault(slot, now_s)
            if kept_s < KEPT_S + self.slot_bytes / KEPT_BYTES_PER_S:
                return False
            logger.warning("a rollout server on this host reads a snapshot for %.0f s now: it keeps the memory", kept_s)
            self._replace(slot)
        self._kept_since_s.pop(slot, None)
        return True

    def _replace(self, slot: int) -> None:
        former, self.descriptors[slot] = self.descriptors[slot], create_slot(self.slot_bytes)
        os.close(former)
        self._mappings[slot] = mmap.mmap(self.descriptors[slot], self.slot_bytes)
        lock_to_write(self.descriptors[slot])

    def let_read(self, slot: int) -> None:
        """It is written."""
        unlock(self.descriptors[slot])

    def write(self, slot: int, layout: Sequence[TensorSpec], tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy the tensors to their places: the one copy that publishing costs the training process.

        Each is copied before the next is asked for. Raises KeyError for one that has no place.
        """
        specs = {spec.name: spec for spec in layout}
        memory = torch.frombuffer(self._mappings[slot], dtype=torch.uint8)
        for name, each in tensors:
            spec, tensor = specs[name], each.detach()
            place = memory[spec.offset : spec.offset + spec.num_bytes].view(tensor.dtype).view(tensor.shape)
            place.copy_(tensor)

    def close(self) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)


class Publisher:
    """Publishes versions through one snapshot server process."""

    def __init__(self, slots: Slots, layout: tuple[TensorSpec, ...], router: Router, server: ChildProcess) -> None:
        self._slots = slots
        self._layout = layout
        self._router = router
        self._server = server
        self._decoder = Decoder(messages.SnapshotsToLearner, max_payload_bytes=0)
        self._peer: Peer | None = None
        self._free = list(range(len(slots.descriptors)))
        self._changed = asyncio.Condition()
        self.address = ""
        self.published_version = NO_VERSION
        self.newest: messages.SnapshotReady | None = None
        self._not_written = 0

    def __repr__(self) -> str:
        return f"<Publisher at {self.address or '?'}, version {self.published_version}, {len(self._free)} slots free>"

    @property
    def num_bytes(self) -> int:
        return self._slots.slot_bytes

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(spec.shape) for spec in self._layout)

    @property
    def skipped_versions(self) -> int:
        """Steps were faster than publishing: no slot was free, or a newer version came before their turn."""
        return self._not_written + (self.newest.overtaken_versions if self.newest is not None else 0)

    def take_slot(self) -> int | None:
        """A slot to write the next version into; None (counted) when all are being read."""
        slot = self._claim_slot()
        self._not_written += slot is None
        return slot

    def _claim_slot(self) -> int | None:
        for slot in self._free:
            if self._slots.claim(slot, time.monotonic()):
                self._free.remove(slot)
                return slot
        return None

    def write(self, slot: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy the parameters into the slot. To be called between two steps, on the training thread."""
        self._slots.write(slot, self._layout, tensors)

    async def hand_over(self, slot: int, version: int, canary: Canary | None = None) -> None:
        """Version `version` lies in the slot: hash and serve it. Returns at once."""
        assert self._peer is not None, "hand_over() before listening()"
        self._slots.let_read(slot)
        order = messages.SnapshotWritten(
            version=version,
            slot=slot,
            num_bytes=self._slots.slot_bytes,
            descriptor=self._slots.descriptors[slot],
            canary=canary,
        )
        self._router.send(self._peer, encode(order, msgspec.msgpack.encode(self._layout)))

    async def listening(self) -> str:
        """Waits until the snapshot server is up; returns its address."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._peer is not None)
        return self.address

    async def slot_free(self) -> None:
        """Waits until take_slot() may have one."""
        async with self._changed:
            await self._changed.wait_for(lambda: bool(self._free))
        while (slot := self._claim_slot()) is None:
            await asyncio.sleep(LOOK_AGAIN_S)
        self._slots.let_read(slot)
        self._free.append(slot)

    async def watch(self) -> None:
        """Raises UserError when the snapshot server ends by itself."""
        code = await self._server.wait()
        raise UserError(f"the snapshot server ended with exit code {code}; start the learner to resume")

    async def ready_versions(self) -> AsyncIterator[messages.SnapshotReady]:
        """Follows the snapshot server for ever; yields what it says of each version once that is being served."""
        while True:
            for incoming in await self._router.receive():
                message, _ = self._decoder.decode(incoming.frames)
                async with self._changed:
                    match message:
                        case messages.SnapshotsListening(address=address):
                            self._peer, self.address = incoming.peer, address
                        case messages.SlotReleased(slot=slot):
                            self._free.append(slot)
                        case messages.SnapshotReady(version=version):
                            self.published_version, self.newest = version, message
                    self._changed.notify_all()
                if isinstance(message, messages.SnapshotReady):
                    yield message


@asynccontextmanager
async def open_publisher(
    layout: tuple[TensorSpec, ...],
    *,
    run_id: str,
    listen: str,
    keys: ServerKeys | None,
    private_directory: Path,
    chunk_bytes: int = CHUNK_BYTES,
) -> AsyncIterator[Publisher]:
    """Starts the snapshot server for tensors as lay_out() placed them; ends it on exit.

    private_directory: a short path only this user can enter; holds the socket between the two processes.
    """
    slots = Slots(sum(spec.num_bytes for spec in layout))
    try:
        async with open_router(f"ipc://{private_directory}/snapshots", max_frame_bytes=1 << 16) as router:
            settings = SnapshotServerSettings(
                run_id=run_id,
                parent_pid=os.getpid(),
                listen=listen,
                keys_directory=str(keys.directory) if keys is not None else None,
                learner_socket=router.address,
                slot_descriptors=slots.descriptors,
                slot_bytes=slots.slot_bytes,
                chunk_bytes=chunk_bytes,
            )
            path = private_directory / "snapshots.json"
            path.write_bytes(msgspec.json.encode(settings))
            arguments = ("learner.snapshot_server", str(path))
            child = ChildProcess.run_module(*arguments, pass_fds=slots.descriptors, grace_s=0.0)
            async with child as process:
                yield Publisher(slots, layout, router, process)
    finally:
        slots.close()
