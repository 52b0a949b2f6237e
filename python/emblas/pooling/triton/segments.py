"""Where the rows of a segment are, as ``csrc/pooling/segments.h`` defines it.

Whatever the tensors hold, positions stay inside ``[0, positions)`` and rows inside ``[0, rows)``.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


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
