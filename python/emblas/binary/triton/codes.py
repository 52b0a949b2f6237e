"""Packing signs into bits and unpacking them, in Triton. Bits are laid out as ``binary.h`` says.

A program packs or unpacks a tile. A byte is the sum of its eight comparisons, each shifted to its
place; a value is made of its bits in all planes. Values are read or written once, with an 8th to a
64th of their bytes in codes: memory bandwidth is the limit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emblas import _op

_BLOCK_ROWS, _BLOCK_BYTES = 32, 16
_UNPACKED_ROWS = 16


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


@triton.jit
def _unpack_planes(
    codes,
    row_stride: tl.int64,
    out,
    rows,
    dim,
    bytes,
    planes,
    BLOCK_R: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    byte = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = (row < rows)[:, None] & (byte < bytes)[None, :]
    at = codes + row[:, None] * row_stride + byte[None, :]
    bits = tl.zeros([BLOCK_R, BLOCK_B, 8], tl.int32)
    for plane in range(planes):
        packed = tl.load(at + plane * bytes, mask=inside).to(tl.int32)
        bits = 2 * bits + (packed[:, :, None] >> (7 - tl.arange(0, 8))[None, None, :] & 1)
    top = (1 << planes) - 1
    values = (2 * bits - top).to(tl.float32) * (2 / (top + 1))
    d = tl.program_id(1) * (BLOCK_B * 8) + tl.arange(0, BLOCK_B * 8)
    wanted = (row < rows)[:, None] & (d < dim)[None, :]
    tl.store(
        out + row[:, None] * dim + d[None, :],
        values.reshape(BLOCK_R, BLOCK_B * 8).to(out.dtype.element_ty),
        mask=wanted,
    )


@_op.kernel()
def unpack_planes(codes: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    rows, width = codes.shape[0], triton.cdiv(dim, 8)
    out = codes.new_empty(rows, dim, dtype=dtype)
    _unpack_planes[(triton.cdiv(rows, _UNPACKED_ROWS), triton.cdiv(width, _BLOCK_BYTES))](
        codes, codes.stride(0), out, rows, dim, width, codes.shape[1] // width,
        BLOCK_R=_UNPACKED_ROWS, BLOCK_B=_BLOCK_BYTES,
    )  # fmt: skip
    return out
