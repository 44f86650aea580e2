"""Publisher: copies the parameters out of the training process once per version; the rest happens elsewhere.

The copy goes into a slot of memory shared with the snapshot server, which encodes, hashes and serves it beside the next
step. When every slot is still being read the version is skipped: training never waits for a server.

Memory: NUM_SLOTS times the bytes of the model, and deltas of at most half of it. The base that the next version is
encoded against takes no slot of its own: it is the newest version. Where versions are adapters, also their base model.
"""

import asyncio
import logging
import math
import os
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
from torch import Tensor

from common.canary import Canary
from common.codec import Decoder, encode
from common.keys import ServerKeys
from common.lifecycle import ChildProcess, UserError
from common.snapshot import CHUNK_BYTES, NO_VERSION, TensorSpec
from common.wire import Peer, Router, open_router
from learner.base_model import BaseModel
from learner.lora_settings import AdapterDescription
from learner.served_base_model import BaseModelPlace
from learner.slots import Slots
from learner.snapshot_messages import (
    SlotReleased,
    SnapshotReady,
    SnapshotsListening,
    SnapshotsToLearner,
    SnapshotWritten,
)
from learner.snapshot_server import SnapshotServerSettings

logger = logging.getLogger(__name__)

NUM_SLOTS = 3  # one being written, the newest, and one that a slower server is still pulling
LOOK_AGAIN_S = 0.05  # for a lock that another process lets go of


class Publisher:
    """Publishes versions through one snapshot server process."""

    def __init__(
        self,
        slots: Slots,
        layout: tuple[TensorSpec, ...],
        router: Router,
        server: ChildProcess,
        base_model: BaseModel | None = None,
    ) -> None:
        self._slots = slots
        self._layout = layout
        self._router = router
        self._server = server
        self._base_model = base_model
        self._decoder = Decoder(SnapshotsToLearner, max_payload_bytes=0)
        self._peer: Peer | None = None
        self._free = list(range(len(slots.descriptors)))
        self._changed = asyncio.Condition()
        self.address = ""
        self.published_version = NO_VERSION
        self.newest: SnapshotReady | None = None
        self._not_written = 0

    def __repr__(self) -> str:
        return f"<Publisher at {self.address or '?'}, version {self.published_version}, {len(self._free)} slots free>"

    @property
    def num_bytes(self) -> int:
        return self._slots.slot_bytes

    @property
    def num_parameters(self) -> int:
        """Of the policy: with adapters, those of their base model too."""
        layout = self._layout if self._base_model is None else (*self._layout, *self._base_model.layout)
        return sum(math.prod(spec.shape) for spec in layout)

    @property
    def adapters(self) -> AdapterDescription | None:
        """What every version is, unless it is the whole policy."""
        return self._base_model.adapter if self._base_model is not None else None

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
        order = SnapshotWritten(
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

    async def ready_versions(self) -> AsyncIterator[SnapshotReady]:
        """Follows the snapshot server for ever; yields what it says of each version once that is being served."""
        while True:
            for incoming in await self._router.receive():
                message, _ = self._decoder.decode(incoming.frames)
                async with self._changed:
                    match message:
                        case SnapshotsListening(address=address):
                            self._peer, self.address = incoming.peer, address
                        case SlotReleased(slot=slot):
                            self._free.append(slot)
                        case SnapshotReady(version=version):
                            self.published_version, self.newest = version, message
                    self._changed.notify_all()
                if isinstance(message, SnapshotReady):
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
    base_model: BaseModel | None = None,
) -> AsyncIterator[Publisher]:
    """Starts the snapshot server for tensors as lay_out() placed them; ends it on exit.

    base_model: what the tensors are adapters of, if they are; closed with the rest.
    private_directory: a short path only this user can enter; holds the socket between the two processes.
    """
    slots = Slots(sum(spec.num_bytes for spec in layout), NUM_SLOTS)
    shared = [slots] if base_model is None else [slots, base_model.slots]
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
                base_model=_place_of(base_model) if base_model is not None else None,
            )
            path = private_directory / "snapshots.json"
            path.write_bytes(msgspec.json.encode(settings))
            arguments = ("learner.snapshot_server", str(path))
            descriptors = [descriptor for each in shared for descriptor in each.descriptors]
            child = ChildProcess.run_module(*arguments, pass_fds=descriptors, grace_s=0.0)
            async with child as process:
                yield Publisher(slots, layout, router, process, base_model)
    finally:
        for each in shared:
            each.close()


def _place_of(base_model: BaseModel) -> BaseModelPlace:
    return BaseModelPlace(
        descriptor=base_model.slots.descriptors[0],
        num_bytes=base_model.slots.slot_bytes,
        layout=base_model.layout,
        adapter=base_model.adapter,
    )
