"""Bit codes: packing, straight-through training, exact search."""

from emblas.binary import arrays, formats
from emblas.binary.functions import (
    pack_planes,
    pack_sign,
    sign_ste,
    unpack_planes,
    unpack_sign,
)
from emblas.binary.modules import SignBinarizer
from emblas.binary.rotation import HadamardRotation, LinearRotation, fit_itq, fit_threshold
from emblas.binary.search import (
    asymmetric_topk,
    hamming_distance,
    hamming_topk,
    near_duplicate_counts,
    near_duplicates,
    range_search,
    range_search_csr,
    symmetric_topk,
)

__all__ = [
    "HadamardRotation",
    "LinearRotation",
    "SignBinarizer",
    "arrays",
    "asymmetric_topk",
    "fit_itq",
    "fit_threshold",
    "formats",
    "hamming_distance",
    "hamming_topk",
    "near_duplicate_counts",
    "near_duplicates",
    "pack_planes",
    "pack_sign",
    "range_search",
    "range_search_csr",
    "sign_ste",
    "symmetric_topk",
    "unpack_planes",
    "unpack_sign",
]
