"""Hashed tables in Triton. The formulas stand in ``csrc/tables/tables.h``.

Forward: a program owns a tile of ids and dimensions, hashes the ids in registers (64-bit integer
arithmetic, some hundred instructions per id) and adds up their rows, which it gathers 512 bytes at
a time. Without bags the rows of an id are added in the order of its hashes. With bags a program
owns one bag and adds up every 8th id lane by lane, reducing across lanes at its end.

Backward for the table, without atomics: the row numbers of all ids are sorted (stably, so equal
rows keep the order of the ids), the sorted list is cut at the rows of the table, and a program adds
up the gradients of one row. The bits depend on the batch only. A row that very many ids share is
added up by one program, which then takes longest.

Bytes: forward reads K rows per id and writes one; backward reads K gradient rows per id and writes
the table. Below a few million rows the gathers hit the L2 cache; beyond, memory latency is the
limit.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from emblas import _op
from emblas._triton import FLOATS, segment_bounds

_MURMUR3 = tl.constexpr(0)
_FIRST, _SECOND = tl.constexpr(0x87C37B91114253D5), tl.constexpr(0x4CF5AD432745937F)
_MIX_1, _MIX_2 = tl.constexpr(0xFF51AFD7ED558CCD), tl.constexpr(0xC4CEB9FE1A85EC53)
_STEP = tl.constexpr(0x9E3779B97F4A7C15)
_SPLIT_1, _SPLIT_2 = tl.constexpr(0xBF58476D1CE4E5B9), tl.constexpr(0x94D049BB133111EB)

_BLOCK_IDS = 256  # hash_keys
_TILE_IDS, _BAG_IDS, _ROW_IDS, _DOT_IDS = 16, 8, 16, 8
_TILE_DIM = 128


@triton.jit
def _murmur3_mix(k):
    k = (k ^ (k >> 33)) * _MIX_1
    k = (k ^ (k >> 33)) * _MIX_2
    return k ^ (k >> 33)


@triton.jit
def _splitmix64_mix(x):
    x = (x ^ (x >> 30)) * _SPLIT_1
    x = (x ^ (x >> 27)) * _SPLIT_2
    return x ^ (x >> 31)


@triton.jit
def _two_words(ids, seed, first, FAMILY: tl.constexpr):
    """Make the 64-bit words whose halves are the keys first to first + 3 (first: 0, 4, ...)."""
    if FAMILY == _MURMUR3:
        start = ((seed + first // 4) & 0xFFFFFFFF) ^ 8
        start = start.to(tl.uint64)
        k = ids * _FIRST
        h1 = (((k << 31) | (k >> 33)) * _SECOND) ^ start
        h1 += start
        h2 = h1 + start
        h1 = _murmur3_mix(h1)
        h2 = _murmur3_mix(h2)
        h1 += h2
        return h1, h1 + h2
    else:
        begin = ids ^ _splitmix64_mix(seed.to(tl.uint64))
        steps = (seed * 0 + first // 2 + 1).to(tl.uint64)
        return (
            _splitmix64_mix(begin + steps * _STEP),
            _splitmix64_mix(begin + (steps + 1) * _STEP),
        )


@triton.jit
def _row(key, num_embeddings, reciprocal):
    """``key % num_embeddings`` of 32-bit keys without a division, see csrc/common/hash.h."""
    divisor = num_embeddings.to(tl.uint64)
    fraction = key * reciprocal.to(tl.uint64)
    low = ((fraction & 0xFFFFFFFF) * divisor) >> 32
    return (((fraction >> 32) * divisor + low) >> 32).to(tl.int64)


@triton.jit
def _four_rows(ids, seed, first, num_embeddings, reciprocal, FAMILY: tl.constexpr):
    word_1, word_2 = _two_words(ids, seed, first, FAMILY)
    return (
        _row(word_1 & 0xFFFFFFFF, num_embeddings, reciprocal),
        _row(word_1 >> 32, num_embeddings, reciprocal),
        _row(word_2 & 0xFFFFFFFF, num_embeddings, reciprocal),
        _row(word_2 >> 32, num_embeddings, reciprocal),
    )


@triton.jit
def _hash_keys(
    ids,
    stride: tl.int64,
    out,
    count: tl.int64,
    seed: tl.int64,
    num_hashes,
    num_embeddings: tl.int64,
    reciprocal: tl.int64,
    FAMILY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    id = tl.load(ids + i * stride, mask=i < count, other=0).to(tl.uint64)
    for first in range(0, num_hashes, 4):
        r0, r1, r2, r3 = _four_rows(id, seed, first, num_embeddings, reciprocal, FAMILY)
        # Four neighbours in memory for each id: [i, 0, 0], [i, 0, 1], [i, 1, 0], [i, 1, 1].
        rows = tl.join(tl.join(r0, r2), tl.join(r1, r3)).reshape(BLOCK, 4)
        j = first + tl.arange(0, 4)
        wanted = (i < count)[:, None] & (j < num_hashes)[None, :]
        at = out + i[:, None] * num_hashes + j[None, :]
        tl.store(at, rows.to(out.dtype.element_ty), mask=wanted)


@triton.jit
def _add_rows(
    total,
    rows,
    table,
    row_stride,
    d,
    wanted,
):
    tile = tl.load(table + rows[:, None] * row_stride + d[None, :], mask=wanted, other=0.0)
    return total + tile.to(tl.float32)


@triton.jit
def _embedding(
    id,
    present,
    table,
    row_stride,
    d,
    dim,
    seed,
    num_hashes,
    num_embeddings,
    reciprocal,
    FAMILY: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum of the rows of each id, (BLOCK_I, BLOCK_D); zero where the id is not present."""
    total = tl.zeros([BLOCK_I, BLOCK_D], tl.float32)
    for first in range(0, num_hashes, 4):
        r0, r1, r2, r3 = _four_rows(id, seed, first, num_embeddings, reciprocal, FAMILY)
        wanted = present[:, None] & (d < dim)[None, :]
        total = _add_rows(total, r0, table, row_stride, d, wanted)
        total = _add_rows(total, r1, table, row_stride, d, wanted & (first + 1 < num_hashes))
        total = _add_rows(total, r2, table, row_stride, d, wanted & (first + 2 < num_hashes))
        total = _add_rows(total, r3, table, row_stride, d, wanted & (first + 3 < num_hashes))
    return total


@triton.jit
def _load_ids(ids, stride, i, inside, padding_id, HAS_PADDING: tl.constexpr):
    """Ids as 64-bit patterns, and which of them count."""
    id = tl.load(ids + i * stride, mask=inside, other=0)
    present = inside
    if HAS_PADDING:
        present = inside & (id != padding_id)
    return id.to(tl.uint64), present


@triton.jit
def _lookup(
    ids,
    stride: tl.int64,
    table,
    row_stride: tl.int64,
    weights,
    out,
    count: tl.int64,
    dim,
    seed: tl.int64,
    num_hashes,
    num_embeddings: tl.int64,
    reciprocal: tl.int64,
    padding_id: tl.int64,
    HAS_PADDING: tl.constexpr,
    FAMILY: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    id, present = _load_ids(ids, stride, i, i < count, padding_id, HAS_PADDING)
    values = _embedding(
        id, present, table, row_stride, d, dim, seed, num_hashes, num_embeddings, reciprocal,
        FAMILY, BLOCK_I, BLOCK_D,
    )  # fmt: skip
    if weights is not None:
        values *= tl.load(weights + i, mask=present, other=0.0)[:, None]
    wanted = (i < count)[:, None] & (d < dim)[None, :]
    tl.store(out + i[:, None] * dim + d[None, :], values.to(out.dtype.element_ty), mask=wanted)


@triton.jit
def _bags(
    ids,
    stride: tl.int64,
    offsets,
    table,
    row_stride: tl.int64,
    weights,
    out,
    count: tl.int64,
    dim,
    seed: tl.int64,
    num_hashes,
    num_embeddings: tl.int64,
    reciprocal: tl.int64,
    padding_id: tl.int64,
    HAS_PADDING: tl.constexpr,
    FAMILY: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    bag = tl.program_id(0).to(tl.int64)
    begin, end = segment_bounds(offsets, bag, count)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_I, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        id, present = _load_ids(ids, stride, i, i < end, padding_id, HAS_PADDING)
        values = _embedding(
            id, present, table, row_stride, d, dim, seed, num_hashes, num_embeddings, reciprocal,
            FAMILY, BLOCK_I, BLOCK_D,
        )  # fmt: skip
        if weights is not None:
            values *= tl.load(weights + i, mask=present, other=0.0)[:, None]
        total += values
    summed = tl.sum(total, 0).to(out.dtype.element_ty)
    tl.store(out + bag * dim + d, summed, mask=d < dim)


@triton.jit
def _grad_rows(
    sources,
    bounds,
    bag_of,
    weights,
    grad_out,
    grad_table,
    dim,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum, for one row of the table, of the gradients of the ids in its part of ``sources``."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin = tl.load(bounds + row)
    end = tl.load(bounds + row + 1)
    total = tl.zeros([BLOCK_I, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_I):
        position = start + tl.arange(0, BLOCK_I)
        inside = position < end
        i = tl.load(sources + position, mask=inside, other=0)
        bag = i
        if bag_of is not None:
            bag = tl.load(bag_of + i, mask=inside, other=0)
        wanted = inside[:, None] & (d < dim)[None, :]
        gradient = tl.load(grad_out + bag[:, None] * dim + d[None, :], mask=wanted, other=0.0)
        gradient = gradient.to(tl.float32)
        if weights is not None:
            gradient *= tl.load(weights + i, mask=inside, other=0.0)[:, None]
        total += gradient
    summed = tl.sum(total, 0).to(grad_table.dtype.element_ty)
    tl.store(grad_table + row * dim + d, summed, mask=d < dim)


@triton.jit
def _grad_weights(
    ids,
    stride: tl.int64,
    bag_of,
    table,
    row_stride: tl.int64,
    grad_out,
    grad_weights,
    count: tl.int64,
    dim,
    seed: tl.int64,
    num_hashes,
    num_embeddings: tl.int64,
    reciprocal: tl.int64,
    padding_id: tl.int64,
    HAS_PADDING: tl.constexpr,
    FAMILY: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    id, present = _load_ids(ids, stride, i, i < count, padding_id, HAS_PADDING)
    bag = i
    if bag_of is not None:
        bag = tl.load(bag_of + i, mask=i < count, other=0)
    dot = tl.zeros([BLOCK_I], tl.float32)
    for start in range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        values = _embedding(
            id, present, table, row_stride, d, dim, seed, num_hashes, num_embeddings, reciprocal,
            FAMILY, BLOCK_I, BLOCK_D,
        )  # fmt: skip
        wanted = present[:, None] & (d < dim)[None, :]
        gradient = tl.load(grad_out + bag[:, None] * dim + d[None, :], mask=wanted, other=0.0)
        dot += tl.sum(values * gradient.to(tl.float32), 1)
    tl.store(grad_weights + i, dot, mask=i < count)


def _reciprocal(num_embeddings: int) -> int:
    """Return ceil(2^64 / num_embeddings) modulo 2^64, as the int64 with the same bits."""
    value = (2**64 - 1) // num_embeddings + 1
    return (value + 2**63) % 2**64 - 2**63


def _bag_of(ids: Tensor, offsets: Tensor | None) -> Tensor | None:
    """Return the bag of each id, a legal one whatever the offsets hold."""
    if offsets is None:
        return None
    positions = torch.arange(ids.shape[0], device=ids.device, dtype=offsets.dtype)
    bags = torch.searchsorted(offsets, positions, right=True) - 1
    return bags.clamp(0, offsets.shape[0] - 2)


def _hash_keys_supports(
    ids: Tensor, family: int, seed: int, num_hashes: int, num_embeddings: int
) -> bool:
    return family in (0, 1) and 1 <= num_embeddings <= 2**32


def _hash_bag_supports(
    ids: Tensor,
    table: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    family: int,
    seed: int,
    num_hashes: int,
    padding_id: int | None,
) -> bool:
    # Rows of the table are programs of a grid, whose size is limited to 2^31 - 1.
    return table.dtype in FLOATS and family in (0, 1) and 1 <= table.shape[0] < 2**31


def _hash_bag_backward_supports(grad_out: Tensor, *args: Any) -> bool:
    return _hash_bag_supports(*args[:-2])


@_op.kernel(_hash_keys_supports)
def hash_keys(ids: Tensor, family: int, seed: int, num_hashes: int, num_embeddings: int) -> Tensor:
    return _keys(ids, family, seed, num_hashes, num_embeddings, torch.int64)


def _keys(
    ids: Tensor, family: int, seed: int, num_hashes: int, num_embeddings: int, dtype: torch.dtype
) -> Tensor:
    keys = ids.new_empty(ids.shape[0], num_hashes, dtype=dtype)
    _hash_keys[(triton.cdiv(ids.shape[0], _BLOCK_IDS),)](
        ids, ids.stride(0), keys, ids.shape[0], seed, num_hashes, num_embeddings,
        _reciprocal(num_embeddings), FAMILY=family, BLOCK=_BLOCK_IDS,
    )  # fmt: skip
    return keys


@_op.kernel(_hash_bag_supports)
def hash_bag(
    ids: Tensor,
    table: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    family: int,
    seed: int,
    num_hashes: int,
    padding_id: int | None,
) -> Tensor:
    (count,), (rows, dim) = ids.shape, table.shape
    bags = count if offsets is None else offsets.shape[0] - 1
    out = table.new_empty(bags, dim)
    hashing = (seed, num_hashes, rows, _reciprocal(rows), padding_id or 0)
    options = {"HAS_PADDING": padding_id is not None, "FAMILY": family, "BLOCK_D": _TILE_DIM}
    tiles = triton.cdiv(dim, _TILE_DIM)
    if offsets is None:
        _lookup[(triton.cdiv(count, _TILE_IDS), tiles)](
            ids, ids.stride(0), table, table.stride(0), weights, out, count, dim, *hashing,
            BLOCK_I=_TILE_IDS, **options,
        )  # fmt: skip
    else:
        _bags[(bags, tiles)](
            ids, ids.stride(0), offsets, table, table.stride(0), weights, out, count, dim, *hashing,
            BLOCK_I=_BAG_IDS, **options,
        )  # fmt: skip
    return out


@_op.kernel(_hash_bag_backward_supports)
def hash_bag_backward(
    grad_out: Tensor,
    ids: Tensor,
    table: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    family: int,
    seed: int,
    num_hashes: int,
    padding_id: int | None,
    need_table: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor]:
    (count,), (rows, dim) = ids.shape, table.shape
    if grad_out.shape[0] == 0:  # no bag that an id could belong to
        grad_weights = table.new_zeros(count if need_weights else 0, dtype=torch.float32)
        return table.new_zeros(rows if need_table else 0, dim), grad_weights
    grad_table = table.new_empty(rows if need_table else 0, dim)
    grad_weights = table.new_empty(count if need_weights else 0, dtype=torch.float32)
    bag_of = _bag_of(ids, offsets)
    if need_table:
        keys = _keys(ids, family, seed, num_hashes, rows, torch.int32)
        if padding_id is not None:
            keys.masked_fill_((ids == padding_id)[:, None], rows)  # sorted behind the last row
        keys, order = keys.flatten().sort(stable=True)
        bounds = torch.searchsorted(
            keys, torch.arange(rows + 1, device=ids.device, dtype=torch.int32)
        )
        sources = order.div_(num_hashes, rounding_mode="floor")
        _grad_rows[(rows, triton.cdiv(dim, _TILE_DIM))](
            sources, bounds, bag_of, weights, grad_out, grad_table, dim,
            BLOCK_I=_ROW_IDS, BLOCK_D=_TILE_DIM,
        )  # fmt: skip
    if need_weights:
        _grad_weights[(triton.cdiv(count, _DOT_IDS),)](
            ids, ids.stride(0), bag_of, table, table.stride(0), grad_out, grad_weights, count, dim,
            seed, num_hashes, rows, _reciprocal(rows), padding_id or 0,
            HAS_PADDING=padding_id is not None, FAMILY=family, BLOCK_I=_DOT_IDS, BLOCK_D=_TILE_DIM,
        )  # fmt: skip
    return grad_table, grad_weights
