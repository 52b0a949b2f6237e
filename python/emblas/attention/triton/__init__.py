"""The attention operators in Triton: kernels and, by its name, what runs them for each operator."""

from emblas.attention.triton.attend import varlen_attention
from emblas.attention.triton.attend_backward import (
    varlen_attention_backward,
    varlen_attention_biases_backward,
)
from emblas.attention.triton.rows import row_dots, row_outer, row_sums
from emblas.attention.triton.turn import rotary, rotary_, rotary_backward

__all__ = [
    "rotary",
    "rotary_",
    "rotary_backward",
    "row_dots",
    "row_outer",
    "row_sums",
    "varlen_attention",
    "varlen_attention_backward",
    "varlen_attention_biases_backward",
]
