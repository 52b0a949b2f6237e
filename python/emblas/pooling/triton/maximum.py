"""Maximum of each column of a segment in Triton, and the first row that holds it.

Forward: a program owns a segment and 64 columns. Every lane keeps the largest of its rows and its
position, NaN above all numbers; at its end the lanes are compared, the earlier position first.
Bytes: x once; bound by memory bandwidth.

Backward: ``argmax`` says where each gradient goes. Segments may share rows, so a program looks for
the gradients of its column that go where its own go, adds them in the order of segments, and the
first of those segments writes. That is batch^2 comparisons of a column, of rows of ``argmax`` that
the L2 cache keeps; no atomics, and nothing to sort.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emblas import _op
from emblas._triton import FLOATS
from emblas.pooling.triton.segments import Places, row_of, row_start, segment_range

_BLOCK_TOKENS, _BLOCK_SEGMENTS, _BLOCK_DIM = 32, 16, 64


@triton.jit
def take_larger(best, where, tile, t, wanted):
    """Take the wanted values of a tile at later positions, lane by lane; NaN is the largest."""
    larger = (where < 0) | (tile > best) | ((tile != tile) & (best == best))
    larger = larger & wanted
    return tl.where(larger, tile, best), tl.where(larger, t[:, None].to(tl.int32), where)


@triton.jit
def first_largest(best, where):
    """Of all lanes: the largest value (0: none), its first position, and whether there is one."""
    missing = (best != best).to(tl.int32)
    any_missing = tl.max(missing, 0) > 0
    largest = tl.max(tl.where(best == best, best, float("-inf")), 0)
    holds = tl.where(any_missing[None, :], missing > 0, best == largest[None, :]) & (where >= 0)
    first = tl.min(tl.where(holds, where, 2147483647), 0)
    found = tl.max(where, 0) >= 0
    return tl.where(found, tl.where(any_missing, float("nan"), largest), 0.0), first, found


@triton.jit
def _maximum(
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
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    begin, end = segment_range(begins, ends, skip, segment, positions)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    best = tl.full([BLOCK_T, BLOCK_D], float("-inf"), tl.float32)
    where = tl.full([BLOCK_T, BLOCK_D], -1, tl.int32)
    for start in range(begin, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        present = t < end
        if weights is not None:
            present = tl.load(weights + t, mask=present, other=0.0) != 0
        at = row_start(row_of(index, t, present, rows), row_stride, plane_rows, plane_stride)
        wanted = present[:, None] & (d < dim)[None, :]
        tile = tl.load(x + at[:, None] + d[None, :], mask=wanted, other=0.0).to(tl.float32)
        best, where = take_larger(best, where, tile, t, wanted)
    value, first, found = first_largest(best, where)
    row = row_of(index, first.to(tl.int64), found & (d < dim), rows)
    to = segment * dim + d
    tl.store(argmax + to, tl.where(found, row.to(tl.int32), -1), mask=d < dim)
    tl.store(out + to, value.to(out.dtype.element_ty), mask=d < dim)


@triton.jit
def _scatter(
    grad_out,
    argmax,
    grad_x,
    batch: tl.int64,
    rows: tl.int64,
    dim,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (segment < batch)[:, None] & (d < dim)[None, :]
    row = tl.load(argmax + segment[:, None] * dim + d[None, :], mask=inside, other=-1)
    total = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    first = inside & (row >= 0) & (row < rows)
    for other in range(0, batch):
        at = other * dim + d
        same = tl.load(argmax + at, mask=d < dim, other=-1)[None, :] == row
        gradient = tl.load(grad_out + at, mask=d < dim, other=0.0).to(tl.float32)
        total += tl.where(same, gradient[None, :], 0.0)
        first = first & ((segment <= other)[:, None] | ~same)
    at = row.to(tl.int64) * dim + d[None, :]
    tl.store(grad_x + at, total.to(grad_x.dtype.element_ty), mask=first)


def _supports(x: Tensor, *_: object) -> bool:
    return x.dtype in FLOATS


@_op.kernel(_supports)
def segment_max(
    x: Tensor,
    cu_seqlens: Tensor,
    weights: Tensor | None,
    ends: Tensor | None,
    skip: Tensor | None,
    index: Tensor | None,
) -> tuple[Tensor, Tensor]:
    places = Places.of(x, cu_seqlens, weights, ends, skip, index)
    batch, dim = places.begins.shape[0], x.shape[-1]
    out = x.new_empty(batch, dim)
    argmax = torch.empty_like(out, dtype=torch.int32)
    _maximum[(batch, triton.cdiv(dim, _BLOCK_DIM))](
        *places, out, argmax, dim, BLOCK_T=_BLOCK_TOKENS, BLOCK_D=_BLOCK_DIM
    )
    return out, argmax


@_op.kernel(_supports)
def segment_max_backward(grad_out: Tensor, argmax: Tensor, rows: int) -> Tensor:
    batch, dim = grad_out.shape
    grad_x = grad_out.new_zeros(rows, dim)
    _scatter[(triton.cdiv(batch, _BLOCK_SEGMENTS), triton.cdiv(dim, _BLOCK_DIM))](
        grad_out, argmax, grad_x, batch, rows, dim,
        BLOCK_B=_BLOCK_SEGMENTS, BLOCK_D=_BLOCK_DIM,
    )  # fmt: skip
    return grad_x
