"""Batches that broke a step, each in a file of its own: for whoever wants to know why. `countercurrent batch` reads it.

A file is `ccbatch1`, the digest of all that follows, the length of the header, the header (MessagePack), and the
payload that the groups' tokens are in, as on the wire: see common/codec.py.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import xxhash

from common.codec import ProtocolError, pack_group, unpack_groups
from common.lifecycle import UserError
from common.messages import GroupHeader
from common.trajectory import Group

MAGIC = b"ccbatch1"
LENGTH_BYTES, DIGEST_BYTES = 8, 16
SUFFIX = ".ccbatch"
MAX_KEPT = 20
"""Files of one run. A run that breaks more steps than that has one reason, and the newest show it as well."""


class _Header(msgspec.Struct, frozen=True, kw_only=True):
    format: Literal[1] = 1
    version: int
    reason: str
    metrics: dict[str, float]  # JSON and MessagePack alike hold nan and inf
    groups: tuple[GroupHeader, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusedBatch:
    """What a step that was not taken would have trained on."""

    version: int  # of the parameters that it would have updated
    reason: str
    metrics: Mapping[str, float]  # what was known when it was refused
    groups: Sequence[Group]


class RefusedBatches:
    """The directory of a run's files; it exists once there is one."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def write(self, batch: RefusedBatch) -> Path:
        """Durable and whole, or not there. Raises OSError. The oldest beyond MAX_KEPT are deleted."""
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"step-{batch.version:06d}{SUFFIX}"
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            file.write(_encode(batch))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        for old in sorted(self._directory.glob(f"step-*{SUFFIX}"), key=lambda each: each.stat().st_mtime)[:-MAX_KEPT]:
            old.unlink()
        return path


def read_refused_batch(path: Path) -> RefusedBatch:
    """Raises UserError for a file that is not there, not one of these, or damaged."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if not data.startswith(MAGIC):
        raise UserError(f"{path} holds no refused batch: it does not begin with {MAGIC.decode()}")
    digest, rest = data[len(MAGIC) :][:DIGEST_BYTES], data[len(MAGIC) + DIGEST_BYTES :]
    if xxhash.xxh3_128_digest(rest) != digest:
        raise UserError(f"{path} is damaged: its {len(data)} bytes are not those that were written")
    header_end = LENGTH_BYTES + int.from_bytes(rest[:LENGTH_BYTES], "little")
    try:
        header = msgspec.msgpack.decode(rest[LENGTH_BYTES:header_end], type=_Header)
        groups = unpack_groups(header.groups, rest[header_end:])
    except (msgspec.MsgspecError, ProtocolError) as error:
        raise UserError(f"{path} was written by another version: {error}") from error
    return RefusedBatch(version=header.version, reason=header.reason, metrics=header.metrics, groups=groups)


def _encode(batch: RefusedBatch) -> bytes:
    packed = [pack_group(group) for group in batch.groups]
    header = _Header(
        version=batch.version,
        reason=batch.reason,
        metrics=dict(batch.metrics),
        groups=tuple(header for header, _ in packed),
    )
    encoded = msgspec.msgpack.encode(header)
    rest = b"".join([len(encoded).to_bytes(LENGTH_BYTES, "little"), encoded, *(payload for _, payload in packed)])
    return MAGIC + xxhash.xxh3_128_digest(rest) + rest
