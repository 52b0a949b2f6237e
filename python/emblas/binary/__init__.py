"""Bit codes: packing, straight-through training, exact Hamming search."""

from emblas.binary import arrays, formats
from emblas.binary.functions import hamming_topk, pack_sign, sign_ste, unpack_sign
from emblas.binary.modules import SignBinarizer
from emblas.binary.rotation import HadamardRotation, LinearRotation, fit_itq, fit_threshold

__all__ = [
    "HadamardRotation",
    "LinearRotation",
    "SignBinarizer",
    "arrays",
    "fit_itq",
    "fit_threshold",
    "formats",
    "hamming_topk",
    "pack_sign",
    "sign_ste",
    "unpack_sign",
]
