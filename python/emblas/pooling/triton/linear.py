"""Segment pooling in the linear modes and in several modes at once, in Triton.

The formulas stand in ``csrc/pooling/pooling.h``.

Forward: a program owns a segment and 64 dimensions (one or two full memory sectors per row) and
adds up rows lane by lane, reducing across lanes once at its end; what several modes need beside it
(sums by position, maxima) comes from the same tile. cls and last read their row alone. With
``normalize`` the results go
through a small float32 array, whose rows a second kernel divides by their lengths; that costs
8 bytes per dimension and segment, not per token, and keeps one tile shape for every dimension.

Backward: what a segment contributes to its tokens is the same for all of them but for a factor, so
a first kernel makes it once, in float32. The gradients of the rows and of the weights are sums of
it (``gradients.py``).

Bytes: x is read once and out written once (backward: x read only for the weights, grad_x written
once). Memory bandwidth is the only limit.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from emblas import _op
from emblas._triton import FLOATS
from emblas.pooling.reference import MAX, Mode
from emblas.pooling.triton.gradients import (
    Contributions,
    keep_range,
    row_gradients,
    weight_gradients,
)
from emblas.pooling.triton.maximum import first_largest, take_larger
from emblas.pooling.triton.segments import (
    ABSENT,
    BY_POSITION,
    CLS,
    MAXIMUM,
    MODES,
    SQRT,
    SUM,
    Places,
    places_of,
    pooled_range,
    row_of,
    row_start,
    segment_range,
    share_of,
    steps_of,
    total_weight,
    weight_of,
)

_MEAN = tl.constexpr(int(Mode.mean))
_EPSILON = tl.constexpr(1e-12)
_BLOCK_TOKENS, _BLOCK_DIM = 64, 64
_BLOCK_ROW = 1024  # for passes over single rows


@triton.jit
def _pool(
    x,
    row_stride: tl.int64,
    plane_rows,
    plane_stride: tl.int64,
    begins,
    ends,
    skip,
    index,
    weights,
    positions: tl.int64,
    rows: tl.int64,
    out,
    argmax,
    dim,
    COUNT: tl.constexpr,
    PLACES: tl.constexpr,
    PLAIN: tl.constexpr,
    STEPPED: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Pool in COUNT modes; PLAIN, STEPPED, LARGEST: these want sums, sums by position, maxima."""
    segment = tl.program_id(0).to(tl.int64)
    begin, end = segment_range(begins, ends, skip, segment, positions)
    origin = tl.load(begins + segment)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    plain = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    stepped = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    stepped_total = tl.zeros([BLOCK_T], tl.float32)
    best = tl.full([BLOCK_T, BLOCK_D], float("-inf"), tl.float32)
    where = tl.full([BLOCK_T, BLOCK_D], -1, tl.int32)
    if PLAIN or STEPPED or LARGEST:
        for start in range(begin, end, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)
            weight = weight_of(weights, t, origin, t < end, _MEAN)
            # Rows of weight 0 are not read: they may hold anything, NaN included.
            present = weight != 0
            at = row_start(row_of(index, t, present, rows), row_stride, plane_rows, plane_stride)
            wanted = present[:, None] & (d < dim)[None, :]
            tile = tl.load(x + at[:, None] + d[None, :], mask=wanted, other=0.0).to(tl.float32)
            if PLAIN:
                plain += weight[:, None] * tile
                total += weight
            if STEPPED:
                steps = weight * steps_of(t, origin, BY_POSITION)
                stepped += steps[:, None] * tile
                stepped_total += steps
            if LARGEST:
                best, where = take_larger(best, where, tile, t, wanted)
    for MODE in tl.static_range(MODES):
        if (PLACES >> 3 * MODE) & 7 < ABSENT:
            pooled = tl.zeros([BLOCK_D], tl.float32)
            if MODE == MAXIMUM:
                pooled, first, found = first_largest(best, where)
                tl.store(argmax + segment * dim + d, tl.where(found, first, -1), mask=d < dim)
            elif MODE >= CLS:
                token, last = pooled_range(
                    begins, ends, skip, weights, segment, positions, MODE, BLOCK_T
                )
                there = token < last
                at = row_start(
                    row_of(index, token, there, rows), row_stride, plane_rows, plane_stride
                )
                pooled = tl.load(x + at + d, mask=there & (d < dim), other=0.0).to(tl.float32)
            elif MODE == BY_POSITION:
                share = share_of(tl.sum(stepped_total, 0), MODE)
                pooled = tl.where(share == 0, 0.0, tl.sum(stepped, 0) * share)
            else:
                share = share_of(tl.sum(total, 0), MODE)
                pooled = tl.where(share == 0, 0.0, tl.sum(plain, 0) * share)
            to = (segment * COUNT + ((PLACES >> 3 * MODE) & 7)) * dim + d
            tl.store(out + to, pooled.to(out.dtype.element_ty), mask=d < dim)


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
def _segment_gradients(
    grad_out,
    out,
    norm,
    begins,
    ends,
    skip,
    weights,
    positions: tl.int64,
    begin_of,
    end_of,
    owner,
    first,
    last,
    shared,
    along,
    dim,
    COUNT: tl.constexpr,
    PLACES: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Make shared = dm_b / d_b and along = a (m_b . dm_b) / W_b, and note where a segment is."""
    segment = tl.program_id(0).to(tl.int64)
    if COUNT > 1:
        begin, end = segment_range(begins, ends, skip, segment, positions)
        keep_range(begin_of, end_of, owner, segment, begin, end, BLOCK)
    lanes = tl.arange(0, BLOCK)
    for MODE in tl.static_range(MODES):
        if (PLACES >> 3 * MODE) & 7 < ABSENT:
            number = segment * COUNT + ((PLACES >> 3 * MODE) & 7)
            begin, end = pooled_range(begins, ends, skip, weights, segment, positions, MODE, BLOCK)
            if COUNT > 1:
                keep_range(first, last, None, number, begin, end, BLOCK)
            else:
                keep_range(first, last, owner, number, begin, end, BLOCK)
            total = total_weight(weights, begin, end, tl.load(begins + segment), MODE, BLOCK)
            share = share_of(total, MODE)
            length = 1.0
            removed = 0.0
            if NORMALIZE:
                length = tl.load(norm + segment)
                products = tl.zeros([BLOCK], tl.float32)
                for start in range(0, dim, BLOCK):
                    at = number * dim + start + lanes
                    g = tl.load(grad_out + at, mask=start + lanes < dim, other=0.0).to(tl.float32)
                    o = tl.load(out + at, mask=start + lanes < dim, other=0.0).to(tl.float32)
                    products += g * o
                removed = tl.where(length > _EPSILON, tl.sum(products, 0), 0.0)
                length = tl.maximum(length, _EPSILON)
            products = tl.zeros([BLOCK], tl.float32)
            for start in range(0, dim, BLOCK):
                at = number * dim + start + lanes
                g = tl.load(grad_out + at, mask=start + lanes < dim, other=0.0).to(tl.float32)
                o = tl.load(out + at, mask=start + lanes < dim, other=0.0).to(tl.float32)
                gradient = (g - removed * o) / length
                products += o * length * gradient
                gradient = tl.where(share == 0, 0.0, gradient * share)
                tl.store(shared + at, gradient, mask=start + lanes < dim)
            dot = tl.sum(products, 0)
            if NORMALIZE:  # the gradient is orthogonal to the pooled vector, but for rounding
                dot = tl.where(length > _EPSILON, 0.0, dot)
            if MODE == SUM:
                dot = 0.0
            if MODE == SQRT:
                dot *= 0.5
            dot = tl.where(total == 0, 0.0, dot / tl.where(total == 0, 1.0, total))
            tl.store(along + number, dot)


def _supports(x: Tensor, *_: object) -> bool:
    return x.dtype in FLOATS


def _backward_supports(grad_out: Tensor, x: Tensor, *_: object) -> bool:
    return x.dtype in FLOATS


def _pool_into(out: Tensor, argmax: Tensor | None, places: Places, modes: Sequence[int]) -> None:
    batch, dim = places.begins.shape[0], places.x.shape[-1]
    _pool[(batch, triton.cdiv(dim, _BLOCK_DIM))](
        *places, out, argmax, dim, COUNT=len(modes), PLACES=places_of(modes),
        PLAIN=any(mode < Mode.weighted_mean for mode in modes),
        STEPPED=Mode.weighted_mean in modes, LARGEST=MAX in modes,
        BLOCK_T=_BLOCK_TOKENS, BLOCK_D=_BLOCK_DIM,
    )  # fmt: skip


def _backward(
    grad_out: Tensor,
    out: Tensor,
    norm: Tensor | None,
    argmax: Tensor | None,
    places: Places,
    modes: Sequence[int],
    need_x: bool,
    need_weights: bool,
    ordered: bool,
) -> tuple[Tensor, Tensor]:
    x, batch, dim = places.x, places.begins.shape[0], places.x.shape[-1]
    shared = Contributions.empty(places, modes, argmax)
    along = x.new_empty(batch * len(modes), dtype=torch.float32)
    _segment_gradients[(batch,)](
        grad_out, out, norm, *places.ranges, places.weights, places.positions,
        shared.begin, shared.end, shared.owner, shared.first, shared.last, shared.shared, along,
        dim, COUNT=len(modes), PLACES=places_of(modes), NORMALIZE=norm is not None,
        BLOCK=_BLOCK_ROW,
    )  # fmt: skip
    order = shared.order(ordered=ordered)
    grad_x = x.new_empty(x.shape if need_x else 0)
    grad_weights = x.new_empty(places.positions if need_weights else 0, dtype=torch.float32)
    if need_x:
        row_gradients(places, shared, order, grad_x)
    if need_weights and min(modes) >= Mode.cls:  # weights only say which tokens there are
        grad_weights.zero_()
    elif need_weights:
        weight_gradients(places, shared, order, along, grad_weights)
    return grad_x, grad_weights


@_op.kernel(_supports)
def segment_pool(
    x: Tensor,
    cu_seqlens: Tensor,
    weights: Tensor | None,
    normalize: bool,
    mode: int = Mode.mean,
    ends: Tensor | None = None,
    skip: Tensor | None = None,
    index: Tensor | None = None,
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    places = Places.of(x, cu_seqlens, weights, ends, skip, index)
    batch, dim = places.begins.shape[0], x.shape[-1]
    out = x.new_empty(batch, dim, dtype=torch.float32 if wide else x.dtype)
    norm = x.new_empty(batch if normalize else 0, dtype=torch.float32)
    pooled = torch.empty_like(out, dtype=torch.float32) if normalize else out
    _pool_into(pooled, None, places, [mode])
    if normalize:
        _normalize[(batch,)](pooled, out, norm, dim, BLOCK=_BLOCK_ROW)
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
    mode: int = Mode.mean,
    ends: Tensor | None = None,
    skip: Tensor | None = None,
    index: Tensor | None = None,
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    places = Places.of(x, cu_seqlens, weights, ends, skip, index)
    return _backward(
        grad_out, out, norm if normalize else None, None, places, [mode], need_x, need_weights,
        ends is None,
    )  # fmt: skip


@_op.kernel(_supports)
def segment_pool_modes(
    x: Tensor,
    cu_seqlens: Tensor,
    weights: Tensor | None,
    modes: Sequence[int],
    ends: Tensor | None = None,
    skip: Tensor | None = None,
    index: Tensor | None = None,
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    places = Places.of(x, cu_seqlens, weights, ends, skip, index)
    batch, dim = places.begins.shape[0], x.shape[-1]
    out = x.new_empty(batch, len(modes) * dim, dtype=torch.float32 if wide else x.dtype)
    argmax = x.new_empty(batch if MAX in modes else 0, dim, dtype=torch.int32)
    _pool_into(out, argmax if MAX in modes else None, places, modes)
    return out, argmax


@_op.kernel(_backward_supports)
def segment_pool_modes_backward(
    grad_out: Tensor,
    x: Tensor,
    out: Tensor,
    argmax: Tensor,
    cu_seqlens: Tensor,
    weights: Tensor | None,
    modes: Sequence[int],
    need_x: bool,
    need_weights: bool,
    ends: Tensor | None = None,
    skip: Tensor | None = None,
    index: Tensor | None = None,
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    places = Places.of(x, cu_seqlens, weights, ends, skip, index)
    return _backward(
        grad_out, out, None, argmax if MAX in modes else None, places, modes, need_x, need_weights,
        ends is None,
    )  # fmt: skip
