"""The pooling operators in Triton: kernels and, by its name, what runs them for each operator."""

from emblas.pooling.triton.attention import attention_pool, attention_pool_backward
from emblas.pooling.triton.finish import finish, finish_backward
from emblas.pooling.triton.gem import segment_gem, segment_gem_backward
from emblas.pooling.triton.lexical import lexical_index
from emblas.pooling.triton.linear import (
    segment_pool,
    segment_pool_backward,
    segment_pool_modes,
    segment_pool_modes_backward,
)
from emblas.pooling.triton.maximum import segment_max, segment_max_backward
from emblas.pooling.triton.vocab import vocab_max, vocab_max_backward
from emblas.pooling.triton.vocab_sum import vocab_sum, vocab_sum_backward

__all__ = [
    "attention_pool",
    "attention_pool_backward",
    "finish",
    "finish_backward",
    "lexical_index",
    "segment_gem",
    "segment_gem_backward",
    "segment_max",
    "segment_max_backward",
    "segment_pool",
    "segment_pool_backward",
    "segment_pool_modes",
    "segment_pool_modes_backward",
    "vocab_max",
    "vocab_max_backward",
    "vocab_sum",
    "vocab_sum_backward",
]
