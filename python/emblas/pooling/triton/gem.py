"""Generalized mean of segments in Triton. The formulas stand in ``csrc/pooling/pooling.h``.

Forward: a program owns a segment and 64 columns, adds up powers lane by lane and takes the root of
their mean. Backward: a program for each segment makes the gradient by the mean and, from the rows,
the share of the gradient of p; ``gradients.py`` hands the former on to the rows and the weights.

Bytes: x once and out once; backward, x twice and its gradient once. x^p = 2^(p log2 x): some 30
instructions per element, so memory is the limit for float32, arithmetic for 16-bit values.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emblas import _op
from emblas._triton import FLOATS
from emblas.pooling.reference import Mode
from emblas.pooling.triton.gradients import (
    Contributions,
    keep_range,
    row_gradients,
    weight_gradients,
)
from emblas.pooling.triton.segments import (
    Places,
    row_of,
    row_start,
    segment_range,
    total_weight,
    weight_of,
)

_LN2 = tl.constexpr(0.6931471805599453)
_MEAN = tl.constexpr(int(Mode.mean))
_BLOCK_TOKENS, _BLOCK_DIM = 32, 64


@triton.jit
def _powers(
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
    power,
    epsilon,
    out,
    dim,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    begin, end = segment_range(begins, ends, skip, segment, positions)
    p = tl.load(power)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    summed = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    for start in range(begin, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        weight = weight_of(weights, t, begin, t < end, _MEAN)
        present = weight != 0
        at = row_start(row_of(index, t, present, rows), row_stride, plane_rows, plane_stride)
        wanted = present[:, None] & (d < dim)[None, :]
        value = tl.load(x + at[:, None] + d[None, :], mask=wanted, other=0.0).to(tl.float32)
        value = tl.where(value < epsilon, epsilon, value)
        summed += weight[:, None] * tl.exp2(p * tl.log2(value))
        total += weight
    divisor = tl.sum(total, 0)
    mean = tl.sum(summed, 0) / tl.where(divisor == 0, 1.0, divisor)
    root = tl.where(divisor == 0, 0.0, tl.exp2(tl.log2(mean) / p))
    tl.store(out + segment * dim + d, root, mask=d < dim)


@triton.jit
def _gem_gradients(
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
    power,
    epsilon,
    grad_out,
    out,
    first,
    last,
    owner,
    shared,
    along,
    grad_power,
    dim,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Make shared = d loss / d (sum of powers) and a segment's share of d loss / dp."""
    segment = tl.program_id(0).to(tl.int64)
    begin, end = segment_range(begins, ends, skip, segment, positions)
    keep_range(first, last, owner, segment, begin, end, BLOCK_T)
    total = total_weight(weights, begin, end, begin, _MEAN, BLOCK_T)
    p = tl.load(power)
    slope = tl.zeros([BLOCK_D], tl.float32)
    lost = tl.zeros([BLOCK_D], tl.float32)
    for d_start in range(0, dim, BLOCK_D):
        d = d_start + tl.arange(0, BLOCK_D)
        at = segment * dim + d
        gradient = tl.load(grad_out + at, mask=d < dim, other=0.0)
        root = tl.load(out + at, mask=d < dim, other=1.0)
        root = tl.where(total == 0, 1.0, root)
        log_root = tl.log2(root)
        slope -= gradient * root * log_root * _LN2 / p
        lost += gradient * root
        gradient *= tl.exp2((1 - p) * log_root) / (p * tl.where(total == 0, 1.0, total))
        gradient = tl.where(total == 0, 0.0, gradient)
        tl.store(shared + at, gradient, mask=d < dim)
        summed = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        for start in range(begin, end, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)
            weight = weight_of(weights, t, begin, t < end, _MEAN)
            present = weight != 0
            row = row_start(row_of(index, t, present, rows), row_stride, plane_rows, plane_stride)
            wanted = present[:, None] & (d < dim)[None, :]
            value = tl.load(x + row[:, None] + d[None, :], mask=wanted, other=0.0).to(tl.float32)
            log = tl.log2(tl.where(value < epsilon, epsilon, value))
            summed += weight[:, None] * tl.exp2(p * log) * log * _LN2
        slope += gradient * tl.sum(summed, 0)
    tl.store(grad_power + segment, tl.sum(slope, 0))
    lost_by_all = tl.sum(lost, 0) / (p * tl.where(total == 0, 1.0, total))
    tl.store(along + segment, tl.where(total == 0, 0.0, lost_by_all))


def _supports(x: Tensor, *_: object) -> bool:
    return x.dtype in FLOATS


def _backward_supports(grad_out: Tensor, *_: object) -> bool:
    return grad_out.dtype in FLOATS


@_op.kernel(_supports)
def segment_gem(
    x: Tensor,
    cu_seqlens: Tensor,
    weights: Tensor | None,
    power: Tensor,
    epsilon: float,
    ends: Tensor | None = None,
    skip: Tensor | None = None,
    index: Tensor | None = None,
) -> Tensor:
    places = Places.of(x, cu_seqlens, weights, ends, skip, index)
    batch, dim = places.begins.shape[0], x.shape[-1]
    out = x.new_empty(batch, dim, dtype=torch.float32)
    _powers[(batch, triton.cdiv(dim, _BLOCK_DIM))](
        *places, power, epsilon, out, dim, BLOCK_T=_BLOCK_TOKENS, BLOCK_D=_BLOCK_DIM
    )
    return out


@_op.kernel(_backward_supports)
def segment_gem_backward(
    grad_out: Tensor,
    x: Tensor,
    out: Tensor,
    cu_seqlens: Tensor,
    weights: Tensor | None,
    power: Tensor,
    epsilon: float,
    ends: Tensor | None = None,
    skip: Tensor | None = None,
    index: Tensor | None = None,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    places = Places.of(x, cu_seqlens, weights, ends, skip, index)
    batch, dim = grad_out.shape
    shared = Contributions.empty(places, [Mode.mean])
    along, grad_power = grad_out.new_empty(batch), grad_out.new_empty(batch)
    _gem_gradients[(batch,)](
        *places, power, epsilon, grad_out, out, shared.begin, shared.end, shared.owner,
        shared.shared, along, grad_power, dim,
        BLOCK_T=_BLOCK_TOKENS, BLOCK_D=_BLOCK_DIM,
    )  # fmt: skip
    grad_x = x.new_empty(x.shape)
    order = shared.order(ordered=ends is None)
    row_gradients(places, shared, order, grad_x, power, epsilon)
    grad_weights = grad_out.new_empty(places.positions if need_weights else 0)
    if need_weights:
        weight_gradients(places, shared, order, along, grad_weights, power, epsilon)
    return grad_x, grad_power, grad_weights
