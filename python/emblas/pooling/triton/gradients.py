"""Gradients of rows and of weights from what segments contribute, in Triton.

A first kernel of each operator has made ``shared``, what a segment contributes to each of its
tokens but for the token's weight, once per segment and in float32. Here a program owns some rows of
the gradient, finds the segments that reach them by binary search, adds up their contributions in a
fixed order and writes each row once: no atomics, and rows that no segment reaches get zeros.

Segments with offsets are in order. Spans are sorted by range and, where ranges are equal, by a
fingerprint of what they contribute: the sums have the same bits in whatever order spans are given.
``reach`` is how far the spans up to each one go: those that reach a row lie between the first whose
``reach`` is beyond it and the last that begins at or before it. With an index, the entries of a row
are neighbours in the sorted index.

Bytes: the gradient is written once, x read once for the weights; ``shared`` is small and stays in
the caches.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from emblas.pooling.triton.segments import (
    ABSENT,
    CLS,
    MAXIMUM,
    MODES,
    Places,
    places_of,
    row_of,
    row_start,
    steps_of,
    weight_of,
)

_BLOCK_ROWS, _BLOCK_DIM = 32, 64
_BLOCK_ROW = 1024  # for passes over single rows


@triton.jit
def keep_range(first, last, owner, segment, begin, end, BLOCK: tl.constexpr):
    """Store where a segment is pooled and, with an index, whose its positions are."""
    tl.store(first + segment, begin.to(tl.int32))
    tl.store(last + segment, end.to(tl.int32))
    if owner is not None:
        for start in range(begin, end, BLOCK):
            t = start + tl.arange(0, BLOCK)
            tl.store(owner + t, segment.to(tl.int32), mask=t < end)


@triton.jit
def _fingerprints(shared, begins, fingerprint, size, BLOCK: tl.constexpr):
    """Hash what a segment contributes: its row and where its positions count from."""
    segment = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    hash = tl.zeros([BLOCK], tl.uint64)
    for start in range(0, size, BLOCK):
        d = start + lanes
        value = tl.load(shared + segment * size + d, mask=d < size, other=0.0)
        bits = value.to(tl.uint32, bitcast=True).to(tl.uint64)
        hash += bits * (d.to(tl.uint64) * 2654435761 + 1)
    origin = tl.load(begins + segment).to(tl.int64)
    tl.store(fingerprint + segment, tl.sum(hash, 0).to(tl.int64) - origin)


@triton.jit
def _count_up_to(values, size, limit):
    """Count the leading values, which rise, that are not above the limit."""
    low = size * 0
    high = size
    while low < high:
        middle = (low + high) // 2
        if tl.load(values + middle) <= limit:
            low = middle + 1
        else:
            high = middle
    return low


@triton.jit
def _row_gradients(
    x,
    row_stride: tl.int64,
    plane_rows,
    plane_stride: tl.int64,
    begins,
    weights,
    rows: tl.int64,
    first,
    last,
    owner,
    shared,
    argmax,
    order,
    starts,
    reach,
    entries: tl.int64,
    power,
    epsilon,
    grad_x,
    dim,
    COUNT: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (d < dim)[None, :]
    begin = tl.program_id(0).to(tl.int64) * BLOCK_R
    if owner is None:
        low = _count_up_to(reach, entries, begin)
    else:
        low = _count_up_to(reach, entries, begin - 1)
    # Behind the last row come the positions of no segment.
    high = _count_up_to(starts, entries, tl.minimum(begin + BLOCK_R, rows) - 1)
    summed = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    reached = row < 0
    for entry in range(low, high):
        number = entry
        if order is not None:
            number = tl.load(order + entry)
        if owner is None:
            segment = number
            position = row
            listed = row == row
        else:
            segment = tl.load(owner + number).to(tl.int64)
            position = row * 0 + number
            listed = row == tl.load(starts + entry)
        for MODE in tl.static_range(MODES):
            if (PLACES >> 3 * MODE) & 7 < ABSENT:
                at = segment * COUNT + ((PLACES >> 3 * MODE) & 7)
                covers = (position >= tl.load(first + at)) & (position < tl.load(last + at))
                origin = tl.load(begins + segment)
                weight = weight_of(weights, position, origin, covers & listed, MODE)
                present = weight != 0
                reached = reached | present
                contribution = tl.load(shared + at * dim + d, mask=d < dim, other=0.0)[None, :]
                if MODE == MAXIMUM:
                    where = tl.load(argmax + segment * dim + d, mask=d < dim, other=-1)
                    holds = where[None, :] == position[:, None]
                    contribution = tl.where(holds, contribution, 0.0)
                summed += tl.where(present[:, None], weight[:, None] * contribution, 0.0)
    if power is not None:
        p = tl.load(power)
        at = row_start(row, row_stride, plane_rows, plane_stride)
        wanted = inside & reached[:, None]
        value = tl.load(x + at[:, None] + d[None, :], mask=wanted, other=0.0).to(tl.float32)
        clamped = tl.where(value < epsilon, epsilon, value)
        slope = p * tl.exp2((p - 1) * tl.log2(clamped))
        summed = tl.where(wanted & ~(value < epsilon), summed * slope, 0.0)
    to = row[:, None] * dim + d[None, :]
    tl.store(grad_x + to, summed.to(grad_x.dtype.element_ty), mask=inside)


@triton.jit
def _weight_gradients(
    x,
    row_stride: tl.int64,
    plane_rows,
    plane_stride: tl.int64,
    begins,
    index,
    positions: tl.int64,
    rows: tl.int64,
    first,
    last,
    shared,
    along,
    order,
    starts,
    reach,
    batch: tl.int64,
    power,
    epsilon,
    grad_weights,
    dim,
    COUNT: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    begin = tl.program_id(0).to(tl.int64) * BLOCK_R
    position = begin + tl.arange(0, BLOCK_R)
    inside = position < positions
    low = _count_up_to(reach, batch, begin)
    high = _count_up_to(starts, batch, begin + BLOCK_R - 1)
    at = row_start(row_of(index, position, inside, rows), row_stride, plane_rows, plane_stride)
    dot = tl.zeros([BLOCK_R], tl.float32)
    removed = tl.zeros([BLOCK_R], tl.float32)
    for d_start in range(0, dim, BLOCK_D):
        d = d_start + tl.arange(0, BLOCK_D)
        summed = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        removed = tl.zeros([BLOCK_R], tl.float32)
        covered = position < 0
        for entry in range(low, high):
            segment = entry
            if order is not None:
                segment = tl.load(order + entry)
            for MODE in tl.static_range(CLS):  # those that weigh tokens
                if (PLACES >> 3 * MODE) & 7 < ABSENT:
                    n = segment * COUNT + ((PLACES >> 3 * MODE) & 7)
                    covers = (position >= tl.load(first + n)) & (position < tl.load(last + n))
                    covered = covered | covers
                    steps = steps_of(position, tl.load(begins + segment), MODE)
                    contribution = tl.load(shared + n * dim + d, mask=d < dim, other=0.0)
                    summed += tl.where(covers[:, None], steps[:, None] * contribution[None, :], 0.0)
                    removed += tl.where(covers, steps * tl.load(along + n), 0.0)
        wanted = covered[:, None] & (d < dim)[None, :]
        value = tl.load(x + at[:, None] + d[None, :], mask=wanted, other=0.0).to(tl.float32)
        if power is not None:
            clamped = tl.where(value < epsilon, epsilon, value)
            value = tl.exp2(tl.load(power) * tl.log2(clamped))
        dot += tl.sum(tl.where(wanted, value * summed, 0.0), 1)
    tl.store(grad_weights + position, dot - removed, mask=inside)


class Order(NamedTuple):
    """Segments, or entries of an index, in the order in which kernels look for them."""

    order: Tensor | None
    """Numbers of segments, or of positions; None where each is its own."""
    starts: Tensor
    """Rising: first positions of segments, or rows of positions."""
    reach: Tensor
    """Rising: how far the segments up to each one go, or rows of positions."""
    size: int


class Contributions(NamedTuple):
    """What segments contribute to their tokens, and where these are; kernels fill it."""

    begin: Tensor
    """``(batch,)``: the first position that any mode pools."""
    end: Tensor
    """``(batch,)``: the last one + 1."""
    owner: Tensor | None
    """With an index: the segment of each position, or -1."""
    first: Tensor
    """``(batch, modes)``: the first position that is pooled; ``begin`` if there is one mode."""
    last: Tensor
    shared: Tensor
    """``(batch, modes, dim)``."""
    argmax: Tensor | None
    """``(batch, dim)``: positions of the maxima, if these are a mode."""
    begins: Tensor
    modes: Sequence[int]

    @classmethod
    def empty(
        cls, places: Places, modes: Sequence[int], argmax: Tensor | None = None
    ) -> "Contributions":
        """Allocate for the segments of a batch."""
        x, batch, several = places.x, places.begins.shape[0], len(modes) > 1
        begin, end = (x.new_empty(batch, dtype=torch.int32) for _ in range(2))
        first, last = (
            x.new_empty(batch, len(modes), dtype=torch.int32) if several else bound
            for bound in (begin, end)
        )
        owner = None
        if places.row_index is not None:
            owner = x.new_full((places.positions,), -1, dtype=torch.int32)
        shared = x.new_empty(batch, len(modes), x.shape[-1], dtype=torch.float32)
        return cls(begin, end, owner, first, last, shared, argmax, places.begins, modes)

    def order(self, *, ordered: bool) -> Order:
        """Order the segments; ``ordered``: they are already."""
        batch = self.begins.shape[0]
        if ordered:
            return Order(None, self.begin, self.end, batch)
        fingerprint = torch.empty_like(self.begin, dtype=torch.int64)
        _fingerprints[(batch,)](
            self.shared, self.begins, fingerprint, self.shared.shape[1:].numel(), BLOCK=_BLOCK_ROW
        )
        order = torch.argsort(fingerprint, stable=True)
        range_ = (self.begin.long() << 32) + self.end
        order = order[torch.argsort(range_[order], stable=True)]
        reach = self.end[order].cummax(0).values if batch else self.end
        return Order(order, self.begin[order], reach, batch)

    def of_rows(self, index: Tensor, rows: int) -> Order:
        """Order the positions of an index by their rows, those of no segment last."""
        assert self.owner is not None
        row = torch.where(self.owner < 0, rows, index.clamp(0, max(rows - 1, 0)))
        row, order = torch.sort(row, stable=True)
        return Order(order, row, row, row.shape[0])


def row_gradients(
    places: Places,
    shared: Contributions,
    order: Order,
    grad_x: Tensor,
    power: Tensor | None = None,
    epsilon: float = 0.0,
) -> None:
    """Write the gradients of all rows; with ``power`` those of the generalized mean."""
    x, index, rows, dim = places.x, places.row_index, places.rows, places.x.shape[-1]
    if index is not None:
        order = shared.of_rows(index, rows)
    _row_gradients[(triton.cdiv(rows, _BLOCK_ROWS), triton.cdiv(dim, _BLOCK_DIM))](
        x, places.row_stride, places.plane_rows, places.plane_stride, places.begins,
        places.weights, rows, shared.first, shared.last, shared.owner, shared.shared,
        shared.argmax, *order, power, epsilon, grad_x, dim,
        COUNT=len(shared.modes), PLACES=places_of(shared.modes),
        BLOCK_R=_BLOCK_ROWS, BLOCK_D=_BLOCK_DIM,
    )  # fmt: skip


def weight_gradients(
    places: Places,
    shared: Contributions,
    order: Order,
    along: Tensor,
    grad_weights: Tensor,
    power: Tensor | None = None,
    epsilon: float = 0.0,
) -> None:
    """Write the gradients of the weights of all positions; with ``power`` as above."""
    x, dim = places.x, places.x.shape[-1]
    _weight_gradients[(triton.cdiv(places.positions, _BLOCK_ROWS),)](
        x, places.row_stride, places.plane_rows, places.plane_stride, places.begins,
        places.row_index, places.positions, places.rows, shared.first, shared.last, shared.shared,
        along, *order, power, epsilon, grad_weights, dim,
        COUNT=len(shared.modes), PLACES=places_of(shared.modes),
        BLOCK_R=_BLOCK_ROWS, BLOCK_D=_BLOCK_DIM,
    )  # fmt: skip
