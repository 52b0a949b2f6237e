"""Attention over packed batches: sequences of any length end to end, without padding."""

from emblas.attention import arrays
from emblas.attention.functions import alibi_slopes, deberta_buckets, t5_buckets, varlen_attention
from emblas.attention.modules import PackedSelfAttention

__all__ = [
    "PackedSelfAttention",
    "alibi_slopes",
    "arrays",
    "deberta_buckets",
    "t5_buckets",
    "varlen_attention",
]
