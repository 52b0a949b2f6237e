"""Inner products of tiles of vectors and of bit codes, on tensor cores.

Bits are unpacked to +1 and -1 and multiplied like any vector: an unpacked tile serves 16 queries
and more. Products of float32 are made of three in TF32 (the upper and the lower half of the bits;
lower times lower is left out), which errs by about 2^-21; those of two 16-bit values, and of signs
with signs, are exact.
"""

import triton
import triton.language as tl


@triton.jit
def load_values(
    x,
    row_stride,
    row,
    given,
    first,
    dim,
    BITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Values of rows in dimensions from ``first`` on, (BLOCK_R, BLOCK_D), float32."""
    d = first + tl.arange(0, BLOCK_D)
    if BITS:
        byte = first // 8 + tl.arange(0, BLOCK_D // 8)
        inside = given[:, None] & (byte * 8 < dim)[None, :]
        packed = tl.load(x + row[:, None] * row_stride + byte[None, :], mask=inside, other=0)
        bits = (packed.to(tl.int32)[:, :, None] >> (7 - tl.arange(0, 8))[None, None, :]) & 1
        signs = (2 * bits - 1).reshape(BLOCK_R, BLOCK_D)
        return tl.where((d < dim)[None, :], signs, 0).to(tl.float32)
    else:
        inside = given[:, None] & (d < dim)[None, :]
        tile = tl.load(x + row[:, None] * row_stride + d[None, :], mask=inside, other=0)
        return tile.to(tl.float32)


@triton.jit
def add_dots(total, a, b, dtype: tl.constexpr):
    """Add the inner products of the rows of two tiles, whose values ``dtype`` can hold."""
    if dtype == tl.float32:
        return tl.dot(a, tl.trans(b), total, input_precision="tf32x3")
    else:
        return tl.dot(a.to(dtype), tl.trans(b.to(dtype)), total)
