"""Bit-exact differences between two versions of the weights, close to the information they carry."""

from common.delta.block import HEADER_BYTES, MAX_BLOCK_ELEMENTS, Changes, decode_block, encode_block
from common.delta.formats import DeltaError

__all__ = ["HEADER_BYTES", "MAX_BLOCK_ELEMENTS", "Changes", "DeltaError", "decode_block", "encode_block"]
