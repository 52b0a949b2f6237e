"""The specification of the pooling operators in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-12


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _segment_ids(cu_seqlens: Tensor, tokens: int) -> Tensor:
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    ids = torch.arange(lengths.shape[0], device=cu_seqlens.device)
    return torch.repeat_interleave(ids, lengths, output_size=tokens)


def segment_pool(
    x: Tensor, cu_seqlens: Tensor, weights: Tensor | None, normalize: bool
) -> tuple[Tensor, Tensor]:
    """Weighted mean of the rows of each segment, optionally of unit length.

    The formula stands in ``csrc/pooling/pooling.h``. Returns the pooled vectors (batch, dim) in the
    dtype of ``x`` and, with ``normalize``, the lengths (batch,) of the means.
    """
    dtype = _accumulator(x)
    batch = cu_seqlens.shape[0] - 1
    segment = _segment_ids(cu_seqlens, x.shape[0])
    weight = torch.ones(x.shape[0], dtype=dtype, device=x.device) if weights is None else weights
    total = weight.new_zeros(batch).index_add(0, segment, weight)
    # A row of weight 0 may hold NaN: it is replaced, not multiplied.
    weighted = torch.where((weight == 0)[:, None], 0, weight[:, None] * x.to(dtype))
    summed = weighted.new_zeros(batch, x.shape[1]).index_add(0, segment, weighted)
    pooled = summed / torch.where(total == 0, 1, total)[:, None]
    pooled = torch.where((total == 0)[:, None], 0, pooled)
    if not normalize:
        return pooled.to(x.dtype), pooled.new_empty(0)
    norm = pooled.norm(dim=1)
    return (pooled / norm.clamp_min(EPSILON)[:, None]).to(x.dtype), norm.detach()


def segment_pool_backward(
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
    """Gradients of :func:`segment_pool` with respect to ``x`` and ``weights``."""
    dtype = _accumulator(x)
    batch = cu_seqlens.shape[0] - 1
    segment = _segment_ids(cu_seqlens, x.shape[0])
    weight = torch.ones(x.shape[0], dtype=dtype, device=x.device) if weights is None else weights
    total = weight.new_zeros(batch).index_add(0, segment, weight)
    grad, pooled = grad_out.to(dtype), out.to(dtype)
    if normalize:
        length = norm.clamp_min(EPSILON)[:, None]
        along = (pooled * grad).sum(1, keepdim=True)
        grad = (grad - torch.where(norm[:, None] > EPSILON, along, 0) * pooled) / length
        pooled = pooled * length
    grad = torch.where((total == 0)[:, None], 0, grad)
    share = torch.where(total == 0, 0, 1 / total)
    grad_x = (weight * share[segment])[:, None] * grad[segment]
    grad_weights = share[segment] * ((x.to(dtype) - pooled[segment]) * grad[segment]).sum(1)
    return (
        grad_x.to(x.dtype) if need_x else x.new_empty(0, x.shape[1]),
        grad_weights if need_weights else weight.new_empty(0),
    )
