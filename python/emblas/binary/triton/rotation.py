"""Random rotations by sign flips and Hadamard transforms, in Triton.

A program holds a row in registers through all rounds. One step of the transform turns neighbours
(a, b) into sums a + b and differences a - b and puts all sums before all differences. That turns
the bits of the index round by one place, so after as many steps as it has bits every value is back
in its place. A round that mixes the last dimensions turns the row round until they are the first.

Bytes: a row is read and written once. The exchange of neighbours between threads, log2(dim) times
a round, is the limit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emblas import _op

_WIDEST = 4096  # dimensions whose row the registers hold


@triton.jit
def _hadamard(x, SIZE: tl.constexpr, STEPS: tl.constexpr):
    """Multiply a vector by the Hadamard matrix, not normalized."""
    for _ in tl.static_range(STEPS):
        a, b = tl.split(x.reshape(SIZE // 2, 2))
        x = tl.trans(tl.join(a + b, a - b)).reshape(SIZE)
    return x


@triton.jit
def _rotate(
    x,
    row_stride: tl.int64,
    signs,
    out,
    dim,
    rounds,
    norm,
    INVERSE: tl.constexpr,
    ALL: tl.constexpr,
    SIZE: tl.constexpr,
    STEPS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):
    """Rotate one row. The largest power of two of dimensions is SIZE; ALL: it is all of them."""
    row = tl.program_id(0).to(tl.int64)
    BLOCK: tl.constexpr = SIZE if ALL else 2 * SIZE
    d = tl.arange(0, BLOCK)
    values = tl.load(x + row * row_stride + d, mask=d < dim, other=0.0).to(ACCUMULATOR)
    for step in range(0, rounds):
        round = rounds - 1 - step if INVERSE else step
        sign = tl.load(signs + round * dim + d, mask=d < dim, other=0).to(ACCUMULATOR)
        if not INVERSE:
            values *= sign
        if ALL:
            values = _hadamard(values, SIZE, STEPS) / norm
        else:
            first = round % 2 * (dim - SIZE)
            turned = tl.gather(values, tl.where(d < dim, (d + first) % dim, d), 0)
            mixed, rest = tl.split(tl.trans(turned.reshape(2, SIZE)))
            mixed = _hadamard(mixed, SIZE, STEPS) / norm
            turned = tl.trans(tl.join(mixed, rest)).reshape(BLOCK)
            values = tl.gather(turned, tl.where(d < dim, (d + dim - first) % dim, d), 0)
        if INVERSE:
            values *= sign
    tl.store(out + row * dim + d, values.to(out.dtype.element_ty), mask=d < dim)


def _supports(x: Tensor, signs: Tensor) -> bool:
    return x.shape[1] <= _WIDEST


def _run(x: Tensor, signs: Tensor, inverse: bool) -> Tensor:
    rows, dim = x.shape
    out = x.new_empty(x.shape)
    if dim == 0:
        return out
    steps = dim.bit_length() - 1
    size = 2**steps
    block = size if size == dim else 2 * size
    _rotate[(rows,)](
        x, x.stride(0), signs, out, dim, signs.shape[0], size**0.5,
        INVERSE=inverse, ALL=size == dim, SIZE=size, STEPS=steps,
        ACCUMULATOR=tl.float64 if x.dtype == torch.float64 else tl.float32,
        num_warps=min(max(1, block // 256), 8),  # 16 bytes at a time for each thread
    )  # fmt: skip
    return out


@_op.kernel(_supports)
def hadamard_rotate(x: Tensor, signs: Tensor) -> Tensor:
    return _run(x, signs, False)


@_op.kernel(_supports)
def hadamard_unrotate(x: Tensor, signs: Tensor) -> Tensor:
    return _run(x, signs, True)
