"""The attention operators in Triton: kernels and, by its name, what runs them for each operator."""

from emblas.attention.triton.attend import varlen_attention
from emblas.attention.triton.attend_backward import (
    varlen_attention_backward,
    varlen_attention_biases_backward,
)
from emblas.attention.triton.turn import rotary, rotary_backward

__all__ = [
    "rotary",
    "rotary_backward",
    "varlen_attention",
    "varlen_attention_backward",
    "varlen_attention_biases_backward",
]
