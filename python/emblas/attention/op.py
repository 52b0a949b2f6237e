"""The attention operator: tracing and routing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emblas._op import Op, check_offsets, use_reference
from emblas.attention import reference


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None,
    window_left: int,
    window_right: int,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    tokens, heads, _ = q.shape
    lse = q.new_empty(heads if return_lse else 0, tokens, dtype=dtype)
    return q.new_empty(q.shape), lse


def _check_values(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *others: Any
) -> None:
    check_offsets("cu_seqlens_q", cu_seqlens_q, q.shape[0], "tokens of q")
    check_offsets("cu_seqlens_k", cu_seqlens_k, k.shape[0], "tokens of k")


_varlen_attention = Op(
    "varlen_attention",
    reference=reference.varlen_attention,
    fake=_fake,
    triton="emblas.attention.triton",
    check_values=_check_values,
)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None,
    window: tuple[int, int],
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Attend with checked arguments; see :func:`emblas.attention.varlen_attention`."""
    run = reference.varlen_attention if use_reference() else _varlen_attention
    return run(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        softmax_scale, *window, return_lse,
    )  # fmt: skip
