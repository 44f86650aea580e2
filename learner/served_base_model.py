"""ServedBaseModel: the base model of the adapters as the snapshot server has it: hashed once, given to who lacks it."""

import os

import msgspec

from common.codec import encode
from common.shared_slots import map_slot
from common.snapshot import NO_VERSION, AdapterSpec, TensorSpec, build_manifest, encode_manifest
from common.weight_messages import BaseModelReply, ManifestRequest, MappingReply, MappingRequest
from learner.lora_settings import AdapterDescription

Frames = list[bytes | memoryview]


class BaseModelPlace(msgspec.Struct, frozen=True, kw_only=True):
    """Where it lies in the learner's memory, and what the adapters are that stand beside it."""

    descriptor: int  # inherited, under the number that it has in the learner
    num_bytes: int
    layout: tuple[TensorSpec, ...]
    adapter: AdapterDescription


class ServedBaseModel:
    """Its bytes never change."""

    def __init__(self, place: BaseModelPlace, *, run_id: str, chunk_bytes: int) -> None:
        self._descriptor = place.descriptor
        self._memory = memoryview(map_slot(place.descriptor, place.num_bytes))
        self.manifest = build_manifest(
            self._memory, place.layout, run_id=run_id, version=NO_VERSION, chunk_bytes=chunk_bytes
        )
        self.adapter = AdapterSpec(
            base_model=self.manifest.content_digest,
            rank=place.adapter.rank,
            alpha=place.adapter.alpha,
            target_modules=place.adapter.target_modules,
        )

    def __repr__(self) -> str:
        return f"<ServedBaseModel {self.manifest.content_digest.hex()}, {self.manifest.num_bytes} bytes>"

    def is_held_by(self, request: ManifestRequest | MappingRequest) -> bool:
        return request.base_model == self.manifest.content_digest

    def reply(self) -> Frames:
        return encode(BaseModelReply(), encode_manifest(self.manifest))

    def mapping_reply(self) -> Frames:
        inode = os.fstat(self._descriptor).st_ino
        reply = MappingReply(version=NO_VERSION, process=os.getpid(), descriptor=self._descriptor, inode=inode)
        return encode(reply, encode_manifest(self.manifest))

    def chunk(self, index: int) -> memoryview | None:
        """None when there is no such chunk."""
        if not 0 <= index < self.manifest.num_chunks:
            return None
        start, end = self.manifest.chunk_range(index)
        return self._memory[start:end]
