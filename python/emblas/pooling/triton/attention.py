"""Attention pooling in Triton. The formulas stand in ``csrc/pooling/attention_pool.h``.

A segment is cut into parts of 128 tokens counted from its own first one, so the order of additions
depends on the segment's length only. A program owns a part and a query: it scores the tokens, then
adds them, as the second-level cache still holds them. The host finds the segment of each part by
the offsets, on the device.

Forward: ``_pool_parts`` makes the sums of the parts, ``_merge_parts`` joins those of a segment.
Backward: ``_slopes`` writes ``p_ht`` and ``scale ds_ht`` and makes the sums of the parts of
``du_h``; ``_merge_parts`` adds them; ``_attention_gradients`` makes ``dx_t`` of those two numbers
for each query, without reading ``x``.

Bytes: ``x`` once (more queries than one find it in the second-level cache), ``grad_x`` once, for
each row and query two numbers written and read, and 2 / 128 of ``x`` (in float32) for the sums.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from emblas import _op
from emblas._triton import FLOATS
from emblas.pooling.triton.segments import Places, row_start, segment_range

_PART = tl.constexpr(128)
_BLOCK_PARTS, _BLOCK_TOKENS, _BLOCK_DIM = 16, 32, 64
_WARPS = 8  # so that the registers suffice


@triton.jit
def part_range(begins, ends, segments, slot, positions):
    """Segment of a slot, first position of its part and last + 1: the same in idle slots."""
    segment = tl.load(segments + slot).to(tl.int64)
    begin, end = segment_range(begins, ends, None, segment, positions)
    skipped = (slot - begin // _PART - segment) * _PART
    first = tl.minimum(begin + tl.maximum(skipped, 0), end)
    return segment, first, tl.where(skipped < 0, first, tl.minimum(first + _PART, end))


@triton.jit
def tokens_of(weights, first, end, BLOCK: tl.constexpr):
    """Positions from ``first`` on, and where tokens are."""
    t = first + tl.arange(0, BLOCK)
    present = t < end
    if weights is not None:
        present = tl.load(weights + t, mask=present, other=0.0) != 0
    return t, present


@triton.jit
def _pool_parts(
    x,
    row_stride: tl.int64,
    plane_rows,
    plane_stride: tl.int64,
    begins,
    ends,
    weights,
    positions: tl.int64,
    segments,
    queries,
    scale,
    sums,
    largest,
    total,
    dim,
    BLOCK_D: tl.constexpr,
):
    slot, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    to = slot * tl.num_programs(1) + head
    _, first, end = part_range(begins, ends, segments, slot, positions)
    t, present = tokens_of(weights, first, end, _PART)
    rows = x + row_start(t, row_stride, plane_rows, plane_stride)
    score = tl.zeros([_PART], tl.float32)
    for start in range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        wanted = present[:, None] & (d < dim)[None, :]
        tile = tl.load(rows[:, None] + d[None, :], mask=wanted, other=0.0).to(tl.float32)
        query = tl.load(queries + head * dim + d, mask=d < dim, other=0.0)
        score += tl.sum(tile * query[None, :], 1)
    score = tl.where(present, scale * score, float("-inf"))
    most = tl.max(score, 0)
    share = tl.where(present, tl.exp(score - most), 0.0)
    tl.store(largest + to, most, mask=first < end)
    tl.store(total + to, tl.sum(share, 0), mask=first < end)
    for start in range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        wanted = present[:, None] & (d < dim)[None, :]
        tile = tl.load(rows[:, None] + d[None, :], mask=wanted, other=0.0).to(tl.float32)
        inside = (d < dim) & (first < end)
        tl.store(sums + to * dim + d, tl.sum(share[:, None] * tile, 0), mask=inside)


@triton.jit
def _merge_parts(
    sums,
    largest,
    total,
    begins,
    ends,
    positions: tl.int64,
    out,
    lse,
    dim,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Join the parts of a segment and query; without ``largest`` add them."""
    segment, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heads = tl.num_programs(1)
    begin, end = segment_range(begins, ends, None, segment, positions)
    parts = (end - begin + _PART - 1) // _PART
    own = (begin // _PART + segment) * heads + head
    to = segment * heads + head
    most, shares, divisor = 0.0, 0.0, 1.0
    if largest is not None:
        highest = tl.full([BLOCK_P], float("-inf"), tl.float32)
        for start in range(0, parts, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            score = tl.load(largest + own + p * heads, mask=p < parts, other=float("-inf"))
            highest = tl.maximum(highest, score)
        most = tl.max(highest, 0)
        # No token has been seen where the total is 0.
        summed = tl.zeros([BLOCK_P], tl.float32)
        for start in range(0, parts, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            score = tl.load(largest + own + p * heads, mask=p < parts, other=0.0)
            part = tl.load(total + own + p * heads, mask=p < parts, other=0.0)
            summed += tl.where(part == 0, 0.0, part * tl.exp(score - most))
        shares = tl.sum(summed, 0)
        divisor = tl.where(shares == 0, 1.0, shares)
        tl.store(lse + to, tl.where(shares == 0, 0.0, most + tl.log(divisor)))
    for first in range(0, dim, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        joined = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
        for start in range(0, parts, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            at = own + p * heads
            wanted = (p < parts)[:, None] & (d < dim)[None, :]
            tile = tl.load(sums + at[:, None] * dim + d[None, :], mask=wanted, other=0.0)
            if largest is not None:
                score = tl.load(largest + at, mask=p < parts, other=0.0)
                part = tl.load(total + at, mask=p < parts, other=0.0)
                tile *= tl.where(part == 0, 0.0, tl.exp(score - most))[:, None]
            joined += tile
        tl.store(out + to * dim + d, tl.sum(joined, 0) / divisor, mask=d < dim)


@triton.jit
def _slopes(
    x,
    row_stride: tl.int64,
    plane_rows,
    plane_stride: tl.int64,
    begins,
    ends,
    weights,
    positions: tl.int64,
    segments,
    queries,
    scale,
    grad_out,
    out,
    lse,
    sums,
    shares,
    slopes,
    dim,
    BLOCK_D: tl.constexpr,
):
    slot, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heads = tl.num_programs(1)
    segment, first, end = part_range(begins, ends, segments, slot, positions)
    t, present = tokens_of(weights, first, end, _PART)
    rows = x + row_start(t, row_stride, plane_rows, plane_stride)
    own = segment * heads + head
    score = tl.zeros([_PART], tl.float32)
    gradient = tl.zeros([_PART], tl.float32)
    along = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        wanted = present[:, None] & (d < dim)[None, :]
        tile = tl.load(rows[:, None] + d[None, :], mask=wanted, other=0.0).to(tl.float32)
        query = tl.load(queries + head * dim + d, mask=d < dim, other=0.0)
        grad = tl.load(grad_out + own * dim + d, mask=d < dim, other=0.0)
        along += grad * tl.load(out + own * dim + d, mask=d < dim, other=0.0)
        score += tl.sum(tile * query[None, :], 1)
        gradient += tl.sum(tile * grad[None, :], 1)
    share = tl.exp(scale * score - tl.load(lse + own))
    slope = tl.where(present, scale * share * (gradient - tl.sum(along, 0)), 0.0)
    tl.store(shares + head * positions + t, share, mask=present)
    tl.store(slopes + head * positions + t, slope, mask=present)
    for start in range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        wanted = present[:, None] & (d < dim)[None, :]
        tile = tl.load(rows[:, None] + d[None, :], mask=wanted, other=0.0).to(tl.float32)
        to = (slot * heads + head) * dim + d
        inside = (d < dim) & (first < end)
        tl.store(sums + to, tl.sum(slope[:, None] * tile, 0), mask=inside)


@triton.jit
def _attention_gradients(
    begins,
    ends,
    weights,
    positions: tl.int64,
    segments,
    queries,
    grad_out,
    shares,
    slopes,
    grad_x,
    heads,
    dim,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    segment, first, end = part_range(begins, ends, segments, slot, positions)
    for start in range(first, end, BLOCK_T):
        t, present = tokens_of(weights, start, end, BLOCK_T)
        total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        for head in range(0, heads):
            at = head * positions + t
            share = tl.load(shares + at, mask=present, other=0.0)
            slope = tl.load(slopes + at, mask=present, other=0.0)
            grad = tl.load(grad_out + (segment * heads + head) * dim + d, mask=d < dim, other=0.0)
            query = tl.load(queries + head * dim + d, mask=d < dim, other=0.0)
            total += share[:, None] * grad[None, :] + slope[:, None] * query[None, :]
        total = tl.where(present[:, None], total, 0.0).to(grad_x.dtype.element_ty)
        inside = (t < end)[:, None] & (d < dim)[None, :]
        tl.store(grad_x + t[:, None] * dim + d[None, :], total, mask=inside)


class _Parts(NamedTuple):
    """What the kernels find tokens by, and how many parts there can be."""

    places: Places
    segments: Tensor
    slots: int

    @classmethod
    def of(cls, x: Tensor, starts: Tensor, weights: Tensor | None, ends: Tensor | None) -> "_Parts":
        """Give segment b the slots from ``begin // 128 + b`` on, as in CUDA C++."""
        places = Places.of(x, starts, weights, ends, None, None)
        batch = places.begins.shape[0]
        slots = places.positions // _PART.value + batch if batch else 0
        begins = places.begins.clamp(0, places.positions) // _PART.value
        begins = begins + torch.arange(batch, device=x.device, dtype=begins.dtype)
        slot = torch.arange(slots, device=x.device, dtype=begins.dtype)
        # In range whatever the offsets hold.
        segments = torch.searchsorted(begins, slot, right=True, out_int32=True) - 1
        return cls(places, segments.clamp(0, max(batch - 1, 0)), slots)

    def arguments(self) -> tuple[object, ...]:
        """Return the first arguments of ``_pool_parts`` and ``_slopes``."""
        p = self.places
        return (
            p.x, p.row_stride, p.plane_rows, p.plane_stride, p.begins, p.ends, p.weights,
            p.positions, self.segments,
        )  # fmt: skip


def _supports(x: Tensor, *_: object) -> bool:
    return x.dtype in FLOATS


def _backward_supports(grad_out: Tensor, x: Tensor, *_: object) -> bool:
    return x.dtype in FLOATS


@_op.kernel(_supports)
def attention_pool(
    x: Tensor,
    queries: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    weights: Tensor | None,
    ends: Tensor | None,
) -> tuple[Tensor, Tensor]:
    parts = _Parts.of(x, cu_seqlens, weights, ends)
    heads, dim = queries.shape
    batch = parts.places.begins.shape[0]
    sums = queries.new_empty(parts.slots, heads, dim)
    largest, total = (queries.new_empty(parts.slots, heads) for _ in range(2))
    out, lse = queries.new_empty(batch, heads, dim), queries.new_empty(batch, heads)
    _pool_parts[(parts.slots, heads)](
        *parts.arguments(), queries, scale, sums, largest, total, dim,
        BLOCK_D=_BLOCK_DIM, num_warps=_WARPS,
    )  # fmt: skip
    _merge_parts[(batch, heads)](
        sums, largest, total, parts.places.begins, parts.places.ends, parts.places.positions,
        out, lse, dim, BLOCK_P=_BLOCK_PARTS, BLOCK_D=_BLOCK_DIM,
    )  # fmt: skip
    return out, lse


@_op.kernel(_backward_supports)
def attention_pool_backward(
    grad_out: Tensor,
    x: Tensor,
    queries: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    weights: Tensor | None,
    ends: Tensor | None,
) -> tuple[Tensor, Tensor]:
    parts = _Parts.of(x, cu_seqlens, weights, ends)
    places, heads, dim = parts.places, *queries.shape
    batch = places.begins.shape[0]
    # Offsets leave no row out.
    full = x.new_empty if ends is None and batch else x.new_zeros
    grad_x = full(x.shape)
    grad_queries = torch.empty_like(out)
    sums = queries.new_empty(parts.slots, heads, dim)
    shares, slopes = (queries.new_empty(heads, places.positions) for _ in range(2))
    _slopes[(parts.slots, heads)](
        *parts.arguments(), queries, scale, grad_out, out, lse, sums, shares, slopes, dim,
        BLOCK_D=_BLOCK_DIM, num_warps=_WARPS,
    )  # fmt: skip
    _merge_parts[(batch, heads)](
        sums, None, None, places.begins, places.ends, places.positions, grad_queries, None, dim,
        BLOCK_P=_BLOCK_PARTS, BLOCK_D=_BLOCK_DIM,
    )  # fmt: skip
    _attention_gradients[(parts.slots, triton.cdiv(dim, _BLOCK_DIM))](
        places.begins, places.ends, weights, places.positions, parts.segments, queries, grad_out,
        shares, slopes, grad_x, heads, dim,
        BLOCK_T=_BLOCK_TOKENS, BLOCK_D=_BLOCK_DIM, num_warps=_WARPS,
    )  # fmt: skip
    return grad_x, grad_queries
