"""Where the rows of a segment are, as ``csrc/pooling/segments.h`` defines it.

Whatever the tensors hold, positions stay inside ``[0, positions)`` and rows inside ``[0, rows)``.
"""

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from emblas.pooling.reference import MAX, Mode

SUM = tl.constexpr(int(Mode.sum))
SQRT = tl.constexpr(int(Mode.mean_sqrt_len))
BY_POSITION = tl.constexpr(int(Mode.weighted_mean))
CLS = tl.constexpr(int(Mode.cls))
LAST = tl.constexpr(int(Mode.last))
MAXIMUM = tl.constexpr(MAX)
MODES = tl.constexpr(MAX + 1)
ABSENT = tl.constexpr(7)


def places_of(modes: Sequence[int]) -> int:
    """Encode the place of each mode among several, ABSENT for the others, in 3 bits each.

    Kernels go through all MODES in a loop that is unrolled: the modes are constants there.
    """
    places = {mode: place for place, mode in enumerate(modes)}
    return sum(places.get(mode, 7) << 3 * mode for mode in range(MAX + 1))


@triton.jit
def segment_range(begins, ends, skip, segment, positions):
    """First position that is pooled and last + 1."""
    begin = tl.load(begins + segment).to(tl.int64)
    end = tl.load(ends + segment).to(tl.int64)
    if skip is not None:
        begin += tl.load(skip + segment)
    begin = tl.minimum(tl.maximum(begin, 0), positions)
    return begin, tl.minimum(tl.maximum(end, begin), positions)


@triton.jit
def pooled_range(
    begins, ends, skip, weights, segment, positions, MODE: tl.constexpr, BLOCK: tl.constexpr
):
    """Narrow segment_range to one token at most in the modes that take one."""
    begin, end = segment_range(begins, ends, skip, segment, positions)
    if weights is not None and MODE >= CLS and MODE != MAXIMUM:
        first = end
        last = begin
        for start in range(begin, end, BLOCK):
            t = start + tl.arange(0, BLOCK)
            there = tl.load(weights + t, mask=t < end, other=0.0) != 0
            first = tl.minimum(first, tl.min(tl.where(there, t, end), 0))
            last = tl.maximum(last, tl.max(tl.where(there, t + 1, begin), 0))
        begin, end = first, tl.maximum(last, first)
    if MODE == CLS:
        end = tl.minimum(begin + 1, end)
    if MODE == LAST:
        begin = tl.maximum(begin, end - 1)
    return begin, end


@triton.jit
def steps_of(position, origin, MODE: tl.constexpr):
    """Derive the weights of positions by the caller's; they count from ``origin``."""
    if MODE == BY_POSITION:
        return (position - origin + 1).to(tl.float32)
    else:
        return (position == position).to(tl.float32)


@triton.jit
def weight_of(weights, position, origin, mask, MODE: tl.constexpr):
    """Weights of positions, 0 where the mask hides them."""
    weight = mask.to(tl.float32)
    if weights is not None and MODE < CLS:
        weight = tl.load(weights + position, mask=mask, other=0.0)
    return weight * steps_of(position, origin, MODE)


@triton.jit
def total_weight(weights, begin, end, origin, MODE: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of the weights of a range of positions."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        t = start + tl.arange(0, BLOCK)
        total += weight_of(weights, t, origin, t < end, MODE)
    return tl.sum(total, 0)


@triton.jit
def share_of(total, MODE: tl.constexpr):
    """1 / d_b, from the total weight; 0 where empty means zero."""
    divisor = total
    if MODE == SUM:
        divisor = tl.zeros_like(total) + 1.0
    if MODE == MAXIMUM:
        divisor = (total != 0).to(tl.float32)
    if MODE == SQRT:
        divisor = tl.sqrt(tl.abs(total))
    return tl.where(divisor == 0, 0.0, 1.0 / tl.where(divisor == 0, 1.0, divisor))


@triton.jit
def row_of(index, position, mask, rows):
    """Rows of positions."""
    if index is None:
        return position
    else:
        row = tl.load(index + position, mask=mask, other=0).to(tl.int64)
        return tl.minimum(tl.maximum(row, 0), rows - 1)


@triton.jit
def row_start(row, row_stride, plane_rows, plane_stride):
    """Where rows begin in ``x``, which has planes of ``plane_rows`` rows, or one (None)."""
    if plane_rows is None:
        return row * row_stride
    else:
        return row // plane_rows * plane_stride + row % plane_rows * row_stride


class Places(NamedTuple):
    """The arguments that kernels find rows by."""

    x: Tensor
    row_stride: int
    plane_rows: int | None
    plane_stride: int
    begins: Tensor
    ends: Tensor
    skip: Tensor | None
    row_index: Tensor | None
    weights: Tensor | None
    positions: int
    rows: int

    @property
    def ranges(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Where segments begin and end, and how much of their beginning is skipped."""
        return self.begins, self.ends, self.skip

    @classmethod
    def of(
        cls,
        x: Tensor,
        starts: Tensor,
        weights: Tensor | None,
        ends: Tensor | None,
        skip: Tensor | None,
        index: Tensor | None,
    ) -> "Places":
        """Take the operators' arguments; without ``ends``, ``starts`` are offsets."""
        begins, ends = (starts[:-1], starts[1:]) if ends is None else (starts, ends)
        planes = x.dim() == 3 and x.stride(0) != x.shape[1] * x.stride(1)
        rows = x.shape[:-1].numel()
        return cls(
            x, x.stride(-2), x.shape[1] if planes else None, x.stride(0), begins, ends, skip,
            index, weights, rows if index is None else index.shape[0], rows,
        )  # fmt: skip
