"""The pooling operators: tracing, gradient, routing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emblas._op import Op, check_offsets, needs_grad, use_reference
from emblas.pooling import reference


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _segment_pool_fake(
    x: Tensor, cu_seqlens: Tensor, weights: Tensor | None, normalize: bool
) -> tuple[Tensor, Tensor]:
    batch = cu_seqlens.shape[0] - 1
    norm = x.new_empty(batch if normalize else 0, dtype=_accumulator(x))
    return x.new_empty(batch, x.shape[1]), norm


def _segment_pool_backward_fake(
    grad_out: Tensor,
    x: Tensor,
    out: Tensor,
    norm: Tensor,
    cu_seqlens: Tensor,
    weights: Tensor | None,
    normalize: bool,
    need_x: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor]:
    tokens, dim = x.shape
    grad_weights = x.new_empty(tokens if need_weights else 0, dtype=_accumulator(x))
    return x.new_empty(tokens if need_x else 0, dim), grad_weights


def _check_values(x: Tensor, cu_seqlens: Tensor, *others: Any) -> None:
    check_offsets("cu_seqlens", cu_seqlens, x.shape[0], "tokens")


_segment_pool = Op(
    "segment_pool",
    reference=reference.segment_pool,
    fake=_segment_pool_fake,
    backward="segment_pool_backward",
    triton="emblas.pooling.triton",
    check_values=_check_values,
)
_segment_pool_backward = Op(
    "segment_pool_backward",
    reference=reference.segment_pool_backward,
    fake=_segment_pool_backward_fake,
    triton="emblas.pooling.triton",
)


class _SegmentPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cu_seqlens: Tensor, weights: Tensor | None, normalize: bool
    ) -> Tensor:
        out, norm = _segment_pool(x, cu_seqlens, weights, normalize)
        ctx.save_for_backward(x, out, norm, cu_seqlens, weights)
        ctx.normalize = normalize
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        need_x, _, need_weights, _ = ctx.needs_input_grad
        grad_x, grad_weights = _segment_pool_backward(
            grad_out.contiguous(), *ctx.saved_tensors, ctx.normalize, need_x, need_weights
        )
        return grad_x if need_x else None, None, grad_weights if need_weights else None, None


def segment_pool(x: Tensor, cu_seqlens: Tensor, weights: Tensor | None, normalize: bool) -> Tensor:
    """Pool checked arguments; see :func:`emblas.pooling.segment_pool`."""
    if use_reference():
        return reference.segment_pool(x, cu_seqlens, weights, normalize)[0]
    if needs_grad(x, weights):
        return _SegmentPool.apply(x, cu_seqlens, weights, normalize)
    return _segment_pool(x, cu_seqlens, weights, normalize)[0]
