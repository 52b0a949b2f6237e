"""Segment pooling in Triton. The formulas stand in ``csrc/pooling/pooling.h``.

Forward: a program owns a segment and 64 dimensions (one or two full memory sectors per row) and
adds up rows lane by lane, reducing across lanes once at its end. With ``normalize`` the means go
through a small float32 array, whose rows a second kernel divides by their lengths; that costs
8 bytes per dimension and segment, not per token, and keeps one tile shape for every dimension.

Backward: the gradient of a segment's mean is the same for all its tokens, so a first kernel makes
it once, in float32. The second writes the gradients of the tokens, of which each depends on its own
row only: long segments are shared among programs without any effect on the bits.

Bytes: x is read once and out written once (backward: x read only for the weights, grad_x written
once). Memory bandwidth is the only limit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emblas import _op
from emblas._triton import FLOATS, segment_bounds

_EPSILON = tl.constexpr(1e-12)
_BLOCK_TOKENS, _BLOCK_DIM = 64, 64
_BLOCK_ROW = 1024  # for passes over single rows
_PROGRAMS = 4096  # enough to fill any GPU several times


@triton.jit
def _mean(
    x,
    row_stride: tl.int64,
    cu_seqlens,
    weights,
    out,
    tokens,
    dim,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    begin, end = segment_bounds(cu_seqlens, segment, tokens)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    summed = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    for start in range(begin, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        if weights is None:
            weight = (t < end).to(tl.float32)
        else:
            weight = tl.load(weights + t, mask=t < end, other=0.0)
        # Rows of weight 0 are not read: they may hold anything, NaN included.
        wanted = (weight != 0)[:, None] & (d < dim)[None, :]
        tile = tl.load(x + t[:, None] * row_stride + d[None, :], mask=wanted, other=0.0)
        summed += weight[:, None] * tile.to(tl.float32)
        total += weight
    divisor = tl.sum(total, 0)
    mean = tl.sum(summed, 0) / tl.where(divisor == 0, 1.0, divisor)
    mean = tl.where(divisor == 0, 0.0, mean)
    tl.store(out + segment * dim + d, mean.to(out.dtype.element_ty), mask=d < dim)


@triton.jit
def _normalize(mean, out, norm, dim, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, dim, BLOCK):
        d = start + lanes
        values = tl.load(mean + row * dim + d, mask=d < dim, other=0.0)
        squares += values * values
    length = tl.sqrt(tl.sum(squares, 0))
    tl.store(norm + row, length)
    length = tl.maximum(length, _EPSILON)
    for start in range(0, dim, BLOCK):
        d = start + lanes
        values = tl.load(mean + row * dim + d, mask=d < dim, other=0.0)
        tl.store(out + row * dim + d, (values / length).to(out.dtype.element_ty), mask=d < dim)


@triton.jit
def _mean_gradient(
    grad_out,
    out,
    norm,
    cu_seqlens,
    weights,
    grad_mean,
    along,
    share,
    tokens,
    dim,
    NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """grad_mean = dm_b, along = m_b . dm_b and share = 1 / W_b (0 where W_b is 0) of a segment."""
    segment = tl.program_id(0).to(tl.int64)
    begin, end = segment_bounds(cu_seqlens, segment, tokens)
    lanes = tl.arange(0, BLOCK)
    if weights is None:
        total = (end - begin).to(tl.float32)
    else:
        partial = tl.zeros([BLOCK], tl.float32)
        for start in range(begin, end, BLOCK):
            t = start + lanes
            partial += tl.load(weights + t, mask=t < end, other=0.0)
        total = tl.sum(partial, 0)
    tl.store(share + segment, tl.where(total == 0, 0.0, 1.0 / tl.where(total == 0, 1.0, total)))
    length = 1.0
    removed = 0.0
    if NORMALIZE:
        length = tl.load(norm + segment)
        products = tl.zeros([BLOCK], tl.float32)
        for start in range(0, dim, BLOCK):
            at = segment * dim + start + lanes
            g = tl.load(grad_out + at, mask=start + lanes < dim, other=0.0).to(tl.float32)
            o = tl.load(out + at, mask=start + lanes < dim, other=0.0).to(tl.float32)
            products += g * o
        removed = tl.where(length > _EPSILON, tl.sum(products, 0), 0.0)
        length = tl.maximum(length, _EPSILON)
    products = tl.zeros([BLOCK], tl.float32)
    for start in range(0, dim, BLOCK):
        at = segment * dim + start + lanes
        g = tl.load(grad_out + at, mask=start + lanes < dim, other=0.0).to(tl.float32)
        o = tl.load(out + at, mask=start + lanes < dim, other=0.0).to(tl.float32)
        gradient = (g - removed * o) / length
        products += o * length * gradient
        tl.store(grad_mean + at, gradient, mask=start + lanes < dim)
    dot = tl.sum(products, 0)
    if NORMALIZE:  # the gradient is orthogonal to the mean, but for rounding
        dot = tl.where(length > _EPSILON, 0.0, dot)
    tl.store(along + segment, dot)


@triton.jit
def _token_gradients(
    x,
    row_stride: tl.int64,
    cu_seqlens,
    weights,
    grad_mean,
    along,
    share,
    grad_x,
    grad_weights,
    tokens,
    dim,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    begin, end = segment_bounds(cu_seqlens, segment, tokens)
    part = tl.load(share + segment)
    first = begin + tl.program_id(1) * BLOCK_T
    for start in range(first, end, tl.num_programs(1) * BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        if weights is None:
            weight = (t < end).to(tl.float32)
        else:
            weight = tl.load(weights + t, mask=t < end, other=0.0)
        factor = weight * part
        dot = tl.zeros([BLOCK_T], tl.float32)
        for d_start in range(0, dim, BLOCK_D):
            d = d_start + tl.arange(0, BLOCK_D)
            inside = (t < end)[:, None] & (d < dim)[None, :]
            gradient = tl.load(grad_mean + segment * dim + d, mask=d < dim, other=0.0)[None, :]
            if grad_weights is not None:
                tile = tl.load(x + t[:, None] * row_stride + d[None, :], mask=inside, other=0.0)
                dot += tl.sum(tile.to(tl.float32) * gradient, 1)
            if grad_x is not None:
                values = tl.where(factor[:, None] == 0, 0.0, factor[:, None] * gradient)
                at = t[:, None] * dim + d[None, :]
                tl.store(grad_x + at, values.to(grad_x.dtype.element_ty), mask=inside)
        if grad_weights is not None:
            value = tl.where(part == 0, 0.0, (dot - tl.load(along + segment)) * part)
            tl.store(grad_weights + t, value, mask=t < end)


def _forward_supports(
    x: Tensor, cu_seqlens: Tensor, weights: Tensor | None, normalize: bool
) -> bool:
    return x.dtype in FLOATS


def _backward_supports(grad_out: Tensor, *others: object) -> bool:
    return grad_out.dtype in FLOATS


@_op.kernel(_forward_supports)
def segment_pool(
    x: Tensor, cu_seqlens: Tensor, weights: Tensor | None, normalize: bool
) -> tuple[Tensor, Tensor]:
    tokens, dim = x.shape
    batch = cu_seqlens.shape[0] - 1
    out = x.new_empty(batch, dim)
    norm = x.new_empty(batch if normalize else 0, dtype=torch.float32)
    mean = torch.empty_like(out, dtype=torch.float32) if normalize else out
    _mean[(batch, triton.cdiv(dim, _BLOCK_DIM))](
        x, x.stride(0), cu_seqlens, weights, mean, tokens, dim,
        BLOCK_T=_BLOCK_TOKENS, BLOCK_D=_BLOCK_DIM,
    )  # fmt: skip
    if normalize:
        _normalize[(batch,)](mean, out, norm, dim, BLOCK=_BLOCK_ROW)
    return out, norm


@_op.kernel(_backward_supports)
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
    tokens, dim = x.shape
    batch = cu_seqlens.shape[0] - 1
    grad_mean = x.new_empty(batch, dim, dtype=torch.float32)
    along, share = (x.new_empty(batch, dtype=torch.float32) for _ in range(2))
    grad_x = x.new_empty((tokens, dim) if need_x else 0)
    grad_weights = x.new_empty(tokens if need_weights else 0, dtype=torch.float32)
    _mean_gradient[(batch,)](
        grad_out, out, norm, cu_seqlens, weights, grad_mean, along, share, tokens, dim,
        NORMALIZE=normalize, BLOCK=_BLOCK_ROW,
    )  # fmt: skip
    parts = min(triton.cdiv(tokens, _BLOCK_TOKENS), max(1, _PROGRAMS // max(batch, 1)))
    _token_gradients[(batch, parts)](
        x, x.stride(0), cu_seqlens, weights, grad_mean, along, share,
        grad_x if need_x else None, grad_weights if need_weights else None, tokens, dim,
        BLOCK_T=_BLOCK_TOKENS, BLOCK_D=_BLOCK_DIM,
    )  # fmt: skip
    return grad_x, grad_weights
