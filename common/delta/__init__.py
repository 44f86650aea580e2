"""Bit-exact differences between two versions of the weights, close to the information they carry.

`encode_block` and `decode_block` deal with a million elements at a time; `plan` says which those are.
"""

from common.delta.block import HEADER_BYTES, MAX_BLOCK_ELEMENTS, Changes, decode_block, encode_block
from common.delta.formats import DeltaError
from common.delta.manifest import DeltaManifest, build_delta_manifest, decode_delta_manifest, encode_delta_manifest
from common.delta.plan import BLOCK_ELEMENTS, BlockPlace, TensorChanges, blocks_of, changes_by_tensor, encode_delta

__all__ = [
    "BLOCK_ELEMENTS",
    "HEADER_BYTES",
    "MAX_BLOCK_ELEMENTS",
    "BlockPlace",
    "Changes",
    "DeltaError",
    "DeltaManifest",
    "TensorChanges",
    "blocks_of",
    "build_delta_manifest",
    "changes_by_tensor",
    "decode_block",
    "decode_delta_manifest",
    "encode_block",
    "encode_delta",
    "encode_delta_manifest",
]
