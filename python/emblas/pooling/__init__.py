"""Pooling: the token vectors of a batch to one vector per sequence, in one pass."""

from emblas.pooling import arrays
from emblas.pooling.epilogue import Epilogue, int8_ranges
from emblas.pooling.functions import (
    gather_pool,
    group_pool,
    segment_pool,
    sif_weights,
    span_pool,
)
from emblas.pooling.learned import SparseRows, attention_pool, lexical_weights, vocab_pool
from emblas.pooling.modules import (
    AttentionPooling,
    LexicalWeights,
    Matryoshka,
    Pooling,
    SpladePooling,
)

__all__ = [
    "AttentionPooling",
    "Epilogue",
    "LexicalWeights",
    "Matryoshka",
    "Pooling",
    "SparseRows",
    "SpladePooling",
    "arrays",
    "attention_pool",
    "gather_pool",
    "group_pool",
    "int8_ranges",
    "lexical_weights",
    "segment_pool",
    "sif_weights",
    "span_pool",
    "vocab_pool",
]
