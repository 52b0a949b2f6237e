"""Codes of ids in Triton. The formulas stand in ``csrc/tables/codes.h``.

A program makes a tile of codes of some ids, in registers, and stores it; nothing is read but ids
and sequences. Arithmetic on doubles is the bound. The bits are those of every other machine: the
compiler is told not to fuse multiplications with additions.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from emblas import _op

_NORMAL, _UNIFORM = tl.constexpr(0), tl.constexpr(1)
_BLOCKS = 256  # of four words, that a program makes
_LN_2, _TURN = tl.constexpr(math.log(2)), tl.constexpr(2 * math.pi * 2.0**-32)
_ROOT_OF_HALF = tl.constexpr(math.sqrt(0.5))


@triton.jit
def _log_of_word(word):
    """Return ln((word + 1) / 2^32): of a mantissa near 1, ln(m) = 2 artanh((m - 1) / (m + 1))."""
    bits = ((word.to(tl.float64) + 1.0) * 2.3283064365386963e-10).to(tl.uint64, bitcast=True)
    mantissa = (bits & 0x000FFFFFFFFFFFFF | 0x3FE0000000000000).to(tl.float64, bitcast=True)
    exponent = ((bits >> 52).to(tl.int32) - 1022).to(tl.float64)
    small = mantissa < _ROOT_OF_HALF
    mantissa = tl.where(small, 2.0 * mantissa, mantissa)
    exponent = tl.where(small, exponent - 1.0, exponent)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    square = s * s
    series = tl.full(word.shape, 1.0 / 21, tl.float64)
    for k in tl.static_range(19, 0, -2):
        series = series * square + 1.0 / k
    return exponent * _LN_2 + 2.0 * s * series


@triton.jit
def _normal_numbers(first, second):
    """Make two independent normal numbers of two words (Box and Muller)."""
    radius = tl.sqrt(-2.0 * _log_of_word(first))
    quadrant = (second + 536870912) >> 30
    x = (second - (quadrant << 30)).to(tl.int32, bitcast=True).to(tl.float64) * _TURN
    square = x * x
    cosine = tl.full(first.shape, 1.0 / 20922789888000, tl.float64)  # 16!
    sine = tl.full(first.shape, 1.0 / 355687428096000, tl.float64)  # 17!
    cosine = cosine * square - 1.0 / 87178291200
    sine = sine * square - 1.0 / 1307674368000
    cosine = cosine * square + 1.0 / 479001600
    sine = sine * square + 1.0 / 6227020800
    cosine = cosine * square - 1.0 / 3628800
    sine = sine * square - 1.0 / 39916800
    cosine = cosine * square + 1.0 / 40320
    sine = sine * square + 1.0 / 362880
    cosine = cosine * square - 1.0 / 720
    sine = sine * square - 1.0 / 5040
    cosine = cosine * square + 1.0 / 24
    sine = sine * square + 1.0 / 120
    cosine = cosine * square - 1.0 / 2
    sine = sine * square - 1.0 / 6
    cosine = cosine * square + 1.0
    sine = x * (sine * square + 1.0)
    radius = tl.where((quadrant & 2) != 0, -radius, radius)
    odd = (quadrant & 1) != 0
    return radius * tl.where(odd, -sine, cosine), radius * tl.where(odd, cosine, sine)


@triton.jit
def _number(word, part, root, KIND: tl.constexpr):
    w = word.to(tl.float64)
    if KIND == _UNIFORM:
        return (w + 0.5) * 4.656612873077393e-10 - 1.0
    return tl.where(w < part, -root, tl.where(w < 2.0 * part, root, 0.0))


@triton.jit
def _random_codes(
    ids,
    sequence,
    sequence_step: tl.int64,
    out,
    count: tl.int64,
    dim: tl.int64,
    blocks: tl.int64,
    seed: tl.int64,
    sparsity: tl.int64,
    part: tl.int64,
    ALIGN: tl.constexpr,
    KIND: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    row, block = number // blocks, number % blocks
    id = tl.load(ids + row, mask=row < count, other=0)
    own = tl.load(sequence + row * sequence_step, mask=row < count, other=0)
    w0, w1, w2, w3 = tl.philox(
        seed, block.to(tl.uint32), id.to(tl.uint32), (id >> 32).to(tl.uint32), own.to(tl.uint32)
    )
    root, part = tl.sqrt(sparsity.to(tl.float64)), part.to(tl.float64)
    if KIND == _NORMAL:
        x0, x1 = _normal_numbers(w0, w1)
        x2, x3 = _normal_numbers(w2, w3)
    else:
        x0, x1 = _number(w0, part, root, KIND), _number(w1, part, root, KIND)
        x2, x3 = _number(w2, part, root, KIND), _number(w3, part, root, KIND)
    # Four neighbours in memory for each block of words.
    numbers = tl.join(tl.join(x0, x2), tl.join(x1, x3)).reshape(BLOCKS, 4)
    if out.dtype.element_ty != tl.float64:
        numbers = numbers.to(tl.float32)
    column = block[:, None] * 4 + tl.arange(0, 4)[None, :]
    at = tl.multiple_of(row * dim, ALIGN)[:, None] + column
    wanted = (row < count)[:, None] & (column < tl.multiple_of(dim, ALIGN))
    tl.store(out + at, numbers.to(out.dtype.element_ty), mask=wanted)


@_op.kernel()
def random_codes(
    ids: Tensor, sequence: Tensor, dim: int, kind: int, seed: int, sparsity: int, dtype: int
) -> Tensor:
    count, blocks = ids.shape[0], -(-dim // 4)
    out = ids.new_empty(count, dim, dtype=_op.FLOATS[dtype])
    _random_codes[(triton.cdiv(count * blocks, _BLOCKS),)](
        ids, sequence, 0 if sequence.shape[0] == 1 else 1, out, count, dim, blocks, seed, sparsity,
        round(2**31 / sparsity), ALIGN=math.gcd(dim, 4), KIND=kind, BLOCKS=_BLOCKS,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out
