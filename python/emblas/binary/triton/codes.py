"""Packing signs into bits, in Triton. Bits are laid out as ``binary.h`` says.

A program packs a tile: a byte is the sum of its eight comparisons, each shifted to its place. The
values are read once, an 8th to a 64th of them is written: memory bandwidth is the limit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emblas import _op

_BLOCK_ROWS, _BLOCK_BYTES = 32, 16


@triton.jit
def _pack_sign(
    x,
    row_stride: tl.int64,
    threshold,
    out,
    rows,
    dim,
    bytes,
    BLOCK_R: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.program_id(1) * (BLOCK_B * 8) + tl.arange(0, BLOCK_B * 8)
    inside = (row < rows)[:, None] & (d < dim)[None, :]
    values = tl.load(x + row[:, None] * row_stride + d[None, :], mask=inside, other=0.0)
    if threshold is None:
        above = values > 0
    else:
        limit = tl.load(threshold + d, mask=d < dim, other=0.0)
        above = values.to(limit.dtype) > limit[None, :]
    bits = above.to(tl.int32).reshape(BLOCK_R, BLOCK_B, 8)
    packed = tl.sum(bits << (7 - tl.arange(0, 8))[None, None, :], 2)
    byte = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    wanted = (row < rows)[:, None] & (byte < bytes)[None, :]
    tl.store(out + row[:, None] * bytes + byte[None, :], packed.to(tl.uint8), mask=wanted)


@_op.kernel()
def pack_sign(x: Tensor, threshold: Tensor | None = None) -> Tensor:
    rows, dim = x.shape
    width = triton.cdiv(dim, 8)
    out = x.new_empty(rows, width, dtype=torch.uint8)
    _pack_sign[(triton.cdiv(rows, _BLOCK_ROWS), triton.cdiv(width, _BLOCK_BYTES))](
        x, x.stride(0), threshold, out, rows, dim, width,
        BLOCK_R=_BLOCK_ROWS, BLOCK_B=_BLOCK_BYTES,
    )  # fmt: skip
    return out
