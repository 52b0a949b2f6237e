"""Pooling: the token vectors of a batch to one vector per sequence, in one pass."""

from emblas.pooling import arrays, key_maps
from emblas.pooling.epilogue import Epilogue, int8_ranges
from emblas.pooling.functions import (
    gather_pool,
    group_pool,
    segment_pool,
    sif_weights,
    span_pool,
)
from emblas.pooling.latent import FoldedLatentAttentionPooling, LatentAttentionPooling
from emblas.pooling.layers import LayerPooling, WeightedLayerPooling, pooled_outputs
from emblas.pooling.learned import SparseRows, attention_pool, lexical_weights, vocab_pool
from emblas.pooling.modules import (
    AttentionPooling,
    LexicalWeights,
    Matryoshka,
    Pooling,
    SpladePooling,
)
from emblas.pooling.routing import two_part_similarity, zscore

__all__ = [
    "AttentionPooling",
    "Epilogue",
    "FoldedLatentAttentionPooling",
    "LatentAttentionPooling",
    "LayerPooling",
    "LexicalWeights",
    "Matryoshka",
    "Pooling",
    "SparseRows",
    "SpladePooling",
    "WeightedLayerPooling",
    "arrays",
    "attention_pool",
    "gather_pool",
    "group_pool",
    "int8_ranges",
    "key_maps",
    "lexical_weights",
    "pooled_outputs",
    "segment_pool",
    "sif_weights",
    "span_pool",
    "two_part_similarity",
    "vocab_pool",
    "zscore",
]
