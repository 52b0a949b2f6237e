"""Attention over packed batches: sequences of any length end to end, without padding."""

from emblas.attention import arrays
from emblas.attention.functions import varlen_attention
from emblas.attention.modules import PackedSelfAttention

__all__ = ["PackedSelfAttention", "arrays", "varlen_attention"]
