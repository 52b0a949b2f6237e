"""Bit codes: packing, straight-through training, exact search."""

from emblas.binary import arrays, formats
from emblas.binary.correction import CorrectedCodes, pack_rabitq
from emblas.binary.csls import csls_topk
from emblas.binary.dense import Int8Quantizer, dense_topk, rescore, rescored_topk
from emblas.binary.distributed import ShardedIndex, merge_topk
from emblas.binary.functions import (
    pack_planes,
    pack_sign,
    sign_ste,
    unpack_planes,
    unpack_sign,
)
from emblas.binary.hyperbolic import lorentz_distance, poincare_distance
from emblas.binary.index import BinaryIndex
from emblas.binary.late_interaction import maxsim, maxsim_topk
from emblas.binary.modules import SignBinarizer
from emblas.binary.neighbors import Clusters, binary_kmeans, kmeans, knn_vote
from emblas.binary.recurrent import RecurrentBinarizer, recurrent_binary_loss
from emblas.binary.rotation import HadamardRotation, LinearRotation, fit_itq, fit_threshold
from emblas.binary.search import (
    asymmetric_topk,
    hamming_distance,
    hamming_topk,
    inverse_norms,
    near_duplicate_counts,
    near_duplicates,
    range_search,
    range_search_csr,
    symmetric_topk,
)
from emblas.binary.storage import CorruptIndexError

__all__ = [
    "BinaryIndex",
    "Clusters",
    "CorrectedCodes",
    "CorruptIndexError",
    "HadamardRotation",
    "Int8Quantizer",
    "LinearRotation",
    "RecurrentBinarizer",
    "ShardedIndex",
    "SignBinarizer",
    "arrays",
    "asymmetric_topk",
    "binary_kmeans",
    "csls_topk",
    "dense_topk",
    "fit_itq",
    "fit_threshold",
    "formats",
    "hamming_distance",
    "hamming_topk",
    "inverse_norms",
    "kmeans",
    "knn_vote",
    "lorentz_distance",
    "maxsim",
    "maxsim_topk",
    "merge_topk",
    "near_duplicate_counts",
    "near_duplicates",
    "pack_planes",
    "pack_rabitq",
    "pack_sign",
    "poincare_distance",
    "range_search",
    "range_search_csr",
    "recurrent_binary_loss",
    "rescore",
    "rescored_topk",
    "sign_ste",
    "symmetric_topk",
    "unpack_planes",
    "unpack_sign",
]
