"""Bit codes: packing, straight-through training, exact Hamming search."""

from emblas.binary import arrays
from emblas.binary.functions import hamming_topk, pack_sign, sign_ste, unpack_sign
from emblas.binary.modules import SignBinarizer

__all__ = ["SignBinarizer", "arrays", "hamming_topk", "pack_sign", "sign_ste", "unpack_sign"]
