"""Finishing pooled vectors in Triton. The formulas stand in ``csrc/pooling/finish.h``.

A program owns a row, a launch one of the nested dims: it adds up the squares, then scales, blurs
and stores block by block. Signs are packed as a sum of shifted comparisons. Backward: the launches
of all dims add to one float32 gradient, one after another.

Bytes: a row and its result once; the second pass over a row finds it in the first-level cache. Rows
are few, one for each document: the launches are the limit, and noise in double precision.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from emblas import _op
from emblas._triton import FLOATS

_EPSILON = tl.constexpr(1e-12)
_FLOATING, _INT8, _BITS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_BLOCK = 512
_TURN = tl.constexpr(2 * 3.141592653589793 / 2**32)


@triton.jit
def cosine_of_turn(w):
    """Cosine of the angle ``2 pi / 2**32 w``, to the last bits of a double.

    The function of that name keeps a table in local memory to bring large angles into the range of
    its series; here integers do that.
    """
    quadrant = (w + 536870912) >> 30
    angle = (w - (quadrant << 30)).to(tl.int32, bitcast=True).to(tl.float64) * _TURN
    square = angle * angle
    cosine = tl.full(w.shape, 1.0, tl.float64)
    sine = cosine
    for n in tl.static_range(16, 0, -2):  # Taylor series, the last terms first
        cosine = 1.0 - square * (1.0 / (n * (n - 1))) * cosine
        sine = 1.0 - square * (1.0 / (n * (n + 1))) * sine
    value = tl.where(quadrant % 2 == 0, cosine, angle * sine)
    return tl.where((quadrant == 1) | (quadrant == 2), -value, value)


@triton.jit
def normal_at(seed, row, stream, column):
    """Return the standard normal numbers at these columns, float64, as ``philox.h`` makes them."""
    zero = tl.zeros_like(column)
    counter = (column // 4).to(tl.uint32)
    low, high = (zero + row).to(tl.uint32), (zero + (row >> 32)).to(tl.uint32)
    first, second, third, fourth = tl.philox(
        seed, counter, (zero + stream).to(tl.uint32), low, high
    )
    # Box and Muller: the first of a pair is radius cos(angle), the second radius sin(angle), which
    # is the cosine of a quarter turn less.
    second_pair = column % 4 >= 2
    length = tl.where(second_pair, third, first)
    turn = tl.where(second_pair, fourth, second)
    radius = tl.sqrt(-2.0 * tl.log((length.to(tl.float64) + 1.0) * 2.3283064365386963e-10))
    return radius * cosine_of_turn(turn - ((column % 2).to(tl.uint32) << 30))


@triton.jit
def divisor_of(square):
    """Return the length, but at least epsilon; NaN stays."""
    length = tl.sqrt_rn(square)
    return tl.where(length < _EPSILON, _EPSILON, length)


@triton.jit
def _finish_rows(
    x,
    row_stride: tl.int64,
    dim,
    out,
    out_stride: tl.int64,
    ranges,
    ranges_stride: tl.int64,
    noise,
    seed: tl.int64,
    stream,
    NORMALIZE: tl.constexpr,
    NOISE: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    divisor = 1.0
    if NORMALIZE:
        squares = tl.zeros([BLOCK], tl.float32)
        for start in range(0, dim, BLOCK):
            d = start + lanes
            values = tl.load(x + row * row_stride + d, mask=d < dim, other=0.0)
            squares += values * values
        divisor = divisor_of(tl.sum(squares, 0))
    for start in range(0, dim, BLOCK):
        d = start + lanes
        z = tl.load(x + row * row_stride + d, mask=d < dim, other=0.0) / divisor
        if NOISE:
            z += (noise * normal_at(seed, row, stream, d)).to(tl.float32)
        if KIND == _FLOATING:
            tl.store(out + row * out_stride + d, z.to(out.dtype.element_ty), mask=d < dim)
        elif KIND == _INT8:
            low = tl.load(ranges + d, mask=d < dim, other=0.0)
            span = tl.load(ranges + ranges_stride + d, mask=d < dim, other=0.0) - low
            scale = tl.where(span > 0, tl.div_rn(255.0, span), 0.0)
            level = (z - low) * scale
            level = tl.where(level > 0, tl.where(level < 255, level, 255.0), 0.0)  # NaN: 0
            level = (level + 8388608.0) - 8388608.0  # to the nearest integer, ties to even
            code = (level.to(tl.int32) - 128).to(tl.int8)
            tl.store(out + row * out_stride + d, code, mask=d < dim)
        else:
            above = ((z > 0) & (d < dim)).to(tl.int32).reshape(BLOCK // 8, 8)
            packed = tl.sum(above << (7 - tl.arange(0, 8))[None, :], 1)
            byte = start // 8 + tl.arange(0, BLOCK // 8)
            tl.store(out + row * out_stride + byte, packed.to(tl.uint8), mask=byte * 8 < dim)


@triton.jit
def _finish_gradient(
    grad_out,
    grad_stride: tl.int64,
    x,
    grad_x,
    row_stride: tl.int64,
    dim,
    NORMALIZE: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the gradient of one of the dims; the first also writes zeros behind it."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    divisor = 1.0
    projection = 0.0
    if NORMALIZE:
        squares = tl.zeros([BLOCK], tl.float32)
        products = tl.zeros([BLOCK], tl.float32)
        for start in range(0, dim, BLOCK):
            d = start + lanes
            values = tl.load(x + row * row_stride + d, mask=d < dim, other=0.0)
            gradient = tl.load(grad_out + row * grad_stride + d, mask=d < dim, other=0.0)
            squares += values * values
            products += values * gradient
        square = tl.sum(squares, 0)
        divisor = divisor_of(square)
        along = tl.sum(products, 0) / divisor / divisor / divisor
        # A row that is not longer than epsilon is divided by a constant.
        projection = tl.where(tl.sqrt_rn(square) <= _EPSILON, 0.0, along)
    for start in range(0, row_stride if FIRST else dim, BLOCK):
        d = start + lanes
        at = row * row_stride + d
        gradient = tl.load(grad_out + row * grad_stride + d, mask=d < dim, other=0.0) / divisor
        if NORMALIZE:
            gradient -= tl.load(x + at, mask=d < dim, other=0.0) * projection
        if FIRST:
            tl.store(grad_x + at, gradient, mask=d < row_stride)
        else:
            gradient += tl.load(grad_x + at, mask=d < dim, other=0.0)
            tl.store(grad_x + at, gradient, mask=d < dim)


def _forward_supports(
    x: Tensor,
    dims: Sequence[int],
    normalize: bool,
    noise: float,
    seed: int,
    kind: int,
    dtype: torch.dtype,
    ranges: Tensor | None,
) -> bool:
    return x.dtype == torch.float32 and dtype in FLOATS


def _backward_supports(grad_out: Tensor, *others: object) -> bool:
    return grad_out.dtype == torch.float32


@_op.kernel(_forward_supports)
def finish(
    x: Tensor,
    dims: Sequence[int],
    normalize: bool,
    noise: float,
    seed: int,
    kind: int,
    dtype: torch.dtype,
    ranges: Tensor | None,
) -> Tensor:
    rows, dim = x.shape
    widths = [triton.cdiv(k, 8) for k in dims] if kind == _BITS.value else dims
    out = x.new_empty(rows, sum(widths), dtype=(dtype, torch.int8, torch.uint8)[kind])
    for stream, (k, begin) in enumerate(zip(dims, accumulate([0, *widths]), strict=False)):
        _finish_rows[(rows,)](
            x, dim, k, out[:, begin:], out.shape[1], None if ranges is None else ranges[:, begin:],
            sum(dims), noise, seed, stream,
            NORMALIZE=normalize, NOISE=noise != 0, KIND=kind, BLOCK=_BLOCK,
        )  # fmt: skip
    return out


@_op.kernel(_backward_supports)
def finish_backward(grad_out: Tensor, x: Tensor, dims: Sequence[int], normalize: bool) -> Tensor:
    rows, dim = x.shape
    grad_x = torch.empty_like(x)
    for number, (k, begin) in enumerate(zip(dims, accumulate([0, *dims]), strict=False)):
        _finish_gradient[(rows,)](
            grad_out[:, begin:], grad_out.shape[1], x, grad_x, dim, k,
            NORMALIZE=normalize, FIRST=number == 0, BLOCK=_BLOCK,
        )  # fmt: skip
    return grad_x
