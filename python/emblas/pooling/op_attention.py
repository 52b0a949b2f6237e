"""Attention pooling: tracing, gradient, routing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emblas._op import Op, needs_grad, use_reference
from emblas.pooling.op import Segments, check_segments
from emblas.pooling.reference import accumulator, segment_entries


def _reference(
    x: Tensor,
    queries: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    weights: Tensor | None = None,
    ends: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax-weighted sums of the tokens of each segment (``csrc/pooling/attention_pool.h``)."""
    entries = segment_entries(x, cu_seqlens, weights, ends)
    present = entries.weight != 0
    row, segment = entries.row[present], entries.segment[present]
    tokens = x.reshape(-1, x.shape[-1])[row].to(queries.dtype)
    batch, heads = Segments(x, cu_seqlens, ends=ends).batch, queries.shape[0]
    scores = scale * tokens @ queries.T
    at = segment[:, None].expand_as(scores)
    largest = scores.new_full((batch, heads), -torch.inf)
    largest = largest.scatter_reduce(0, at, scores.detach(), "amax")
    shares = (scores - largest[segment]).exp()
    total = scores.new_zeros(batch, heads).index_add(0, segment, shares)
    empty = total == 0
    shares = shares / torch.where(empty, 1, total)[segment]
    out = tokens.new_zeros(batch, heads, x.shape[-1])
    out = out.index_add(0, segment, shares[:, :, None] * tokens[:, None])
    lse = torch.where(empty, 0, largest + torch.where(empty, 1, total).log())
    return out, lse.detach()


def _backward_reference(
    grad_out: Tensor,
    x: Tensor,
    queries: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    weights: Tensor | None = None,
    ends: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients by ``x`` and, one share per segment, by ``queries``."""
    entries = segment_entries(x, cu_seqlens, weights, ends)
    present = entries.weight != 0
    row, segment = entries.row[present], entries.segment[present]
    rows = x.reshape(-1, x.shape[-1])
    tokens = rows[row].to(queries.dtype)
    shares = (scale * tokens @ queries.T - lse[segment]).exp()
    along = (grad_out * out).sum(2)
    slope = scale * shares * ((grad_out[segment] * tokens[:, None]).sum(2) - along[segment])
    grad = (shares[:, :, None] * grad_out[segment]).sum(1) + slope @ queries
    grad_x = torch.zeros_like(rows, dtype=queries.dtype).index_add(0, row, grad)
    grad_queries = torch.zeros_like(out)
    grad_queries = grad_queries.index_add(0, segment, slope[:, :, None] * tokens[:, None])
    return grad_x.to(x.dtype).reshape(x.shape), grad_queries


def _fake(
    x: Tensor,
    queries: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    weights: Tensor | None = None,
    ends: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch, heads = Segments(x, cu_seqlens, ends=ends).batch, queries.shape[0]
    dtype = accumulator(x.dtype)
    return (
        x.new_empty(batch, heads, x.shape[-1], dtype=dtype),
        x.new_empty(batch, heads, dtype=dtype),
    )


def _backward_fake(
    grad_out: Tensor,
    x: Tensor,
    queries: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    weights: Tensor | None = None,
    ends: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(out)


def _check_values(
    x: Tensor,
    queries: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    weights: Tensor | None = None,
    ends: Tensor | None = None,
) -> None:
    check_segments(Segments(x, cu_seqlens, weights, ends), disjoint=True)


_attention_pool = Op(
    "attention_pool",
    reference=_reference,
    fake=_fake,
    backward="attention_pool_backward",
    check_values=_check_values,
    triton="emblas.pooling.triton",
)
_attention_pool_backward = Op(
    "attention_pool_backward",
    reference=_backward_reference,
    fake=_backward_fake,
    triton="emblas.pooling.triton",
)


class _AttentionPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        queries: Tensor,
        starts: Tensor,
        scale: float,
        weights: Tensor | None,
        ends: Tensor | None,
    ) -> Tensor:
        out, lse = _attention_pool(x, queries, starts, scale, weights, ends)
        ctx.save_for_backward(x, queries, out, lse, starts, weights, ends)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, queries, out, lse, starts, weights, ends = ctx.saved_tensors
        grad_x, grad_queries = _attention_pool_backward(
            grad_out.contiguous(), x, queries, out, lse, starts, ctx.scale, weights, ends
        )
        return grad_x, grad_queries.sum(0), None, None, None, None


def attention_pool(segments: Segments, queries: Tensor, scale: float) -> Tensor:
    """Pool checked arguments, in the accumulator's dtype."""
    x, starts, weights, ends, _, _ = segments
    if needs_grad(x, queries) and not use_reference():
        return _AttentionPool.apply(x, queries, starts, scale, weights, ends)
    function = _reference if use_reference() else _attention_pool
    return function(x, queries, starts, scale, weights, ends)[0]
