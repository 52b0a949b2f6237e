"""The bit-code operators in Triton: kernels and, by its name, what runs them for each operator."""

from emblas.binary.triton.codes import pack_sign
from emblas.binary.triton.hamming import (
    hamming_distance,
    hamming_topk,
    range_search,
    range_search_csr,
)

__all__ = [
    "hamming_distance",
    "hamming_topk",
    "pack_sign",
    "range_search",
    "range_search_csr",
]
