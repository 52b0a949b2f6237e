"""The bit-code operators in Triton: kernels and, by its name, what runs them for each operator."""

from emblas.binary.triton.codes import pack_sign, unpack_planes
from emblas.binary.triton.hamming import (
    hamming_distance,
    hamming_topk,
    range_search,
    range_search_csr,
)
from emblas.binary.triton.late_interaction import maxsim, maxsim_backward
from emblas.binary.triton.rotation import hadamard_rotate, hadamard_unrotate
from emblas.binary.triton.scores import asymmetric_topk, dense_topk, gather_scores

__all__ = [
    "asymmetric_topk",
    "dense_topk",
    "gather_scores",
    "hadamard_rotate",
    "hadamard_unrotate",
    "hamming_distance",
    "hamming_topk",
    "maxsim",
    "maxsim_backward",
    "pack_sign",
    "range_search",
    "range_search_csr",
    "unpack_planes",
]
