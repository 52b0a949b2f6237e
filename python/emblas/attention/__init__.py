"""Attention over packed batches: sequences of any length end to end, without padding."""

from emblas.attention import arrays, frequencies
from emblas.attention.extra_keys import merge_attention
from emblas.attention.functions import alibi_slopes, deberta_buckets, t5_buckets, varlen_attention
from emblas.attention.modules import PackedSelfAttention
from emblas.attention.received import received_attention
from emblas.attention.rotary import rotary, rotary_, rotary_tables
from emblas.attention.rows import attend_rows, attention_columns, attention_rows, pooled_tokens
from emblas.attention.self_extend import self_extend

__all__ = [
    "PackedSelfAttention",
    "alibi_slopes",
    "arrays",
    "attend_rows",
    "attention_columns",
    "attention_rows",
    "deberta_buckets",
    "frequencies",
    "merge_attention",
    "pooled_tokens",
    "received_attention",
    "rotary",
    "rotary_",
    "rotary_tables",
    "self_extend",
    "t5_buckets",
    "varlen_attention",
]
