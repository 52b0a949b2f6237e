"""Quantized tables in Triton. The formulas stand in ``csrc/tables/quantized.h``.

A program owns a tile of columns of one bag, or of several ids without bags. It reads the packed
bytes of some rows at once, takes the codes apart in registers and adds, or compares, them lane by
lane, reducing across lanes at its end. An id that is no row counts for nothing.

Bytes: the ids, their rows with scales and zero points, and out.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from emblas import _op
from emblas._triton import FLOATS, segment_bounds
from emblas.tables.packed_codes import row_bytes
from emblas.tables.triton.hash_bag import _bag_of

_MEAN, _MAX = tl.constexpr(1), tl.constexpr(2)  # modes of bags: sum, mean, max
_TILE = 2048  # codes at once


@triton.jit
def _find(
    ids,
    weights,
    scale,
    zero_point,
    i,
    inside,
    rows,
    padding_id,
    HAS_PADDING: tl.constexpr,
    BITS: tl.constexpr,
):
    """Rows of ids, which of them count, and what their codes are multiplied and shifted by."""
    id = tl.load(ids + i, mask=inside, other=-1)
    present = (id >= 0) & (id < rows)
    if HAS_PADDING:
        present &= id != padding_id
    coefficient = tl.load(scale + id, mask=present, other=0.0).to(tl.float32)
    if weights is not None:
        coefficient *= tl.load(weights + i, mask=present, other=0.0)
    if zero_point is not None:
        zero = tl.load(zero_point + id, mask=present, other=0.0)
    else:
        zero = coefficient * 0 + 2 ** (BITS - 1)
    return id, present, coefficient, zero


@triton.jit
def _codes(
    packed,
    id,
    present,
    row_bytes,
    tile,
    ALIGN: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Codes of a tile of columns, (BLOCK_I, BLOCK_D), zero behind the last byte of a row."""
    BYTES: tl.constexpr = BLOCK_D * BITS // 8
    byte = tile * BYTES + tl.arange(0, BYTES)
    wanted = present[:, None] & (byte < tl.multiple_of(row_bytes, ALIGN))[None, :]
    at = tl.multiple_of(id * row_bytes, ALIGN)
    x = tl.load(packed + at[:, None] + byte[None, :], mask=wanted, other=0)
    if BITS == 2:
        x = tl.join(tl.join(x & 3, x >> 4 & 3), tl.join(x >> 2 & 3, x >> 6))
    elif BITS == 4:
        x = tl.join(x & 15, x >> 4)
    elif BITS == 16:
        low, high = tl.split(x.reshape(BLOCK_I, BLOCK_D, 2))
        x = low.to(tl.int32) | high.to(tl.int32) << 8
    return x.reshape(BLOCK_I, BLOCK_D)


@triton.jit
def _quantized_lookup(
    ids,
    packed,
    scale,
    weights,
    zero_point,
    out,
    count: tl.int64,
    rows: tl.int64,
    row_bytes: tl.int64,
    dim: tl.int64,
    padding_id: tl.int64,
    HAS_PADDING: tl.constexpr,
    ALIGN: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    id, present, coefficient, zero = _find(
        ids, weights, scale, zero_point, i, i < count, rows, padding_id, HAS_PADDING, BITS
    )
    codes = _codes(packed, id, present, row_bytes, tl.program_id(1), ALIGN, BITS, BLOCK_I, BLOCK_D)
    values = coefficient[:, None] * (codes.to(tl.float32) - zero[:, None])
    values = tl.where(present[:, None], values, 0.0).to(out.dtype.element_ty)
    wanted = (i < count)[:, None] & (d < dim)[None, :]
    tl.store(out + i[:, None] * dim + d[None, :], values, mask=wanted)


@triton.jit
def _quantized_bags(
    ids,
    offsets,
    packed,
    scale,
    weights,
    zero_point,
    out,
    count: tl.int64,
    rows: tl.int64,
    row_bytes: tl.int64,
    dim: tl.int64,
    padding_id: tl.int64,
    MODE: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    ALIGN: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    bag = tl.program_id(0).to(tl.int64)
    begin, end = segment_bounds(offsets, bag, count)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    nothing: tl.constexpr = -float("inf") if MODE == _MAX else 0.0
    total = tl.full([BLOCK_I, BLOCK_D], nothing, tl.float32)
    used = tl.zeros([BLOCK_I], tl.int32)
    for start in range(begin, end, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        id, present, coefficient, zero = _find(
            ids, weights, scale, zero_point, i, i < end, rows, padding_id, HAS_PADDING, BITS
        )
        codes = _codes(
            packed, id, present, row_bytes, tl.program_id(1), ALIGN, BITS, BLOCK_I, BLOCK_D
        )
        values = coefficient[:, None] * (codes.to(tl.float32) - zero[:, None])
        values = tl.where(present[:, None], values, nothing)
        total = tl.maximum(total, values) if MODE == _MAX else total + values
        used += present.to(tl.int32)
    size = tl.sum(used, 0)
    if MODE == _MAX:
        pooled = tl.where(size > 0, tl.max(total, 0), 0.0)
    else:
        pooled = tl.sum(total, 0)
        if MODE == _MEAN:
            pooled /= tl.maximum(size, 1).to(tl.float32)
    tl.store(out + bag * dim + d, pooled.to(out.dtype.element_ty), mask=d < dim)


@triton.jit
def _quantized_dots(
    ids,
    bag_of,
    packed,
    scale,
    zero_point,
    grad_out,
    grad_weights,
    count: tl.int64,
    rows: tl.int64,
    row_bytes: tl.int64,
    dim: tl.int64,
    padding_id: tl.int64,
    HAS_PADDING: tl.constexpr,
    ALIGN: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    id, present, coefficient, zero = _find(
        ids, None, scale, zero_point, i, i < count, rows, padding_id, HAS_PADDING, BITS
    )
    bag = i
    if bag_of is not None:
        bag = tl.load(bag_of + i, mask=present, other=0)
    dot = tl.zeros([BLOCK_I], tl.float32)
    for start in range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        codes = _codes(
            packed, id, present, row_bytes, start // BLOCK_D, ALIGN, BITS, BLOCK_I, BLOCK_D
        )
        wanted = present[:, None] & (d < dim)[None, :]
        gradient = tl.load(grad_out + bag[:, None] * dim + d[None, :], mask=wanted, other=0.0)
        dot += tl.sum((codes.to(tl.float32) - zero[:, None]) * gradient.to(tl.float32), 1)
    tl.store(grad_weights + i, coefficient * dot, mask=i < count)


def _supports(
    ids: Tensor,
    packed: Tensor,
    scale: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    bits: int,
    dim: int,
    mode: int,
    padding_id: int | None,
    zero_point: Tensor | None,
) -> bool:
    return scale.dtype in FLOATS


def _backward_supports(
    grad_out: Tensor,
    ids: Tensor,
    packed: Tensor,
    scale: Tensor,
    offsets: Tensor | None,
    bits: int,
    dim: int,
    padding_id: int | None,
    zero_point: Tensor | None,
) -> bool:
    return scale.dtype in FLOATS


def _options(bits: int, dim: int, padding_id: int | None) -> dict[str, int]:
    block = 64 if dim <= 64 else 128
    # Fewer threads have more codes of a row each: 16 bytes of them but for 2 bits.
    return {"num_warps": 2 if bits <= 4 else 4,
            "HAS_PADDING": padding_id is not None, "ALIGN": math.gcd(row_bytes(dim, bits), 16),
            "BITS": bits, "BLOCK_I": _TILE // block, "BLOCK_D": block}  # fmt: skip


@_op.kernel(_supports)
def quantized_bag(
    ids: Tensor,
    packed: Tensor,
    scale: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    bits: int,
    dim: int,
    mode: int,
    padding_id: int | None,
    zero_point: Tensor | None,
) -> Tensor:
    bags = ids.shape[0] if offsets is None else offsets.shape[0] - 1
    out = scale.new_empty(bags, dim)
    options = _options(bits, dim, padding_id)
    table = (packed, scale, weights, zero_point, out, ids.shape[0], *packed.shape, dim)
    tiles = triton.cdiv(dim, options["BLOCK_D"])
    if offsets is None:
        _quantized_lookup[(triton.cdiv(bags, options["BLOCK_I"]), tiles)](
            ids, *table, padding_id or 0, **options
        )
    else:
        _quantized_bags[(bags, tiles)](ids, offsets, *table, padding_id or 0, MODE=mode, **options)
    return out


@_op.kernel(_backward_supports)
def quantized_bag_backward(
    grad_out: Tensor,
    ids: Tensor,
    packed: Tensor,
    scale: Tensor,
    offsets: Tensor | None,
    bits: int,
    dim: int,
    padding_id: int | None,
    zero_point: Tensor | None,
) -> Tensor:
    grad_weights = torch.empty(ids.shape[0], device=ids.device, dtype=torch.float32)
    if grad_out.shape[0] == 0:  # no bag that an id could belong to
        return grad_weights.zero_()
    options = _options(bits, dim, padding_id)
    _quantized_dots[(triton.cdiv(ids.shape[0], options["BLOCK_I"]),)](
        ids, _bag_of(ids, offsets), packed, scale, zero_point, grad_out, grad_weights,
        ids.shape[0], *packed.shape, dim, padding_id or 0, **options,
    )  # fmt: skip
    return grad_weights
