"""Composed tables in Triton. The formulas stand in ``csrc/tables/compose.h``.

What the parts are is data: kernels read their constants from a small array on the device, which is
made once for each composition, and branch on the kind of key. So one binary serves all
compositions; the dtype, the way to combine and the mode of bags are compiled in.

A program owns 128 columns of one slot, of one bag or (without offsets) of 16 ids. It makes the row
numbers in registers and adds, or multiplies, the rows as it gathers them.

Bytes: the ids once for each 128 columns, the rows in use, and out. Small tables are bound by the
caches that hold them, large ones by memory.
"""

import functools
import itertools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from emblas import _op
from emblas._triton import FLOATS, segment_bounds
from emblas.tables.composition import FIELDS, tables_of
from emblas.tables.triton.hash_bag import _reciprocal, _row, _two_words

_PRODUCT = tl.constexpr(2)  # ways to combine: sum, mean, product
_BAG_MEAN, _BAG_MAX = tl.constexpr(1), tl.constexpr(2)  # modes of bags: sum, mean, max
_MEAN = tl.constexpr(1)

# Fields of a part on the device; its slot is the parts SLOT_FIRST to SLOT_FIRST + SLOT_SIZE - 1.
_KIND, _A, _B, _P, _ROWS, _RECIPROCAL = map(tl.constexpr, range(6))
_BASE, _STRIDE, _WIDTH, _COLUMN, _SIGNED = map(tl.constexpr, range(6, 11))
_FIRST_ROW, _SLOT_FIRST, _SLOT_SIZE, _FEATURE = map(tl.constexpr, range(11, 15))
_PART = tl.constexpr(15)
# Fields of a tile of columns: first part of its slot, first column, first part of its feature.
_TILE = tl.constexpr(3)

_TILE_IDS, _BAG_IDS = 16, 8
_TILE_DIM = 128


class Region(NamedTuple):
    """Rows of one table inside the flat array."""

    base: int
    stride: int
    width: int
    rows: int
    first_row: int  # among the rows of all regions


class Plan(NamedTuple):
    """What the kernels need to know of the parts."""

    parts: Tensor  # [parts, fields]
    features: Tensor  # [features + 1] first part of each
    tiles: Tensor  # [tiles, fields]
    regions: tuple[Region, ...]
    num_features: int
    most_parts: int  # of one feature
    dim: int
    rows: int
    alignment: int  # largest number of elements that rows and columns start at multiples of


@functools.lru_cache(maxsize=256)
def _plan(parts: tuple[int, ...], device: torch.device) -> Plan:
    """Lay out the parts for the kernels; the first call for a composition copies to the device."""
    fields = [parts[i : i + FIELDS] for i in range(0, len(parts), FIELDS)]
    regions, total = [], 0
    for table, rows in tables_of(parts):
        regions.append(Region(*table, rows, total))
        total += rows
    first_rows = {region[:3]: region.first_row for region in regions}
    features = [next(i for i, f in enumerate(fields) if f[0] == number)
                for number in range(fields[-1][0] + 1)]  # fmt: skip
    features.append(len(fields))
    records, tiles = [], []
    for i, (feature, kind, a, b, p, rows, _, base, stride, width, column, signed) in enumerate(
        fields
    ):
        slot = [j for j, f in enumerate(fields) if (f[0], f[10]) == (feature, column)]
        records.append(
            (kind, a, b, p, rows, _reciprocal(rows), base, stride, width, column, signed,
             first_rows[base, stride, width], slot[0], len(slot), feature)
        )  # fmt: skip
        if i == slot[0]:
            tiles += [(i, start, features[feature]) for start in range(0, width, _TILE_DIM)]
    most_parts = max(end - begin for begin, end in itertools.pairwise(features))
    dim = fields[-1][10] + fields[-1][9]
    return Plan(
        torch.tensor(records, device=device),
        torch.tensor(features, device=device),
        torch.tensor(tiles, device=device),
        tuple(regions),
        len(features) - 1,
        most_parts,
        dim,
        total,
        math.gcd(dim, *(n for field in fields for n in field[7:11])),
    )


# --- keys ----------------------------------------------------------------------------------------


@triton.jit
def _linear(id, a, b, p):
    """Make ``(a id + b) mod p`` without overflow: Horner's rule over the bits of the id."""
    key = id * 0
    for bit in range(64):
        key *= 2
        key = tl.where(key >= p, key - p, key)
        key += tl.where((id >> (63 - bit)) & 1 == 1, a % p, 0)
        key = tl.where(key >= p, key - p, key)
    key += b % p
    return tl.where(key >= p, key - p, key)


@triton.jit
def _rows_and_signs(id, part):
    """Row numbers of ids, 64-bit patterns, for one part, and 1 or -1."""
    kind = tl.load(part + _KIND)
    a, b = tl.load(part + _A), tl.load(part + _B)
    rows = tl.load(part + _ROWS)
    sign = id & 0
    if kind < 2:
        first = b // 4 * 4
        if kind == 0:
            word_1, word_2 = _two_words(id, a, first, 0)
        else:
            word_1, word_2 = _two_words(id, a, first, 1)
        word = tl.where(b % 4 < 2, word_1, word_2)
        key = tl.where(b % 2 == 0, word & 0xFFFFFFFF, word >> 32)
        row = _row(key, rows, tl.load(part + _RECIPROCAL))
        sign = (key >> 31) & tl.load(part + _SIGNED).to(tl.uint64)
    else:
        if kind == 2:
            key = id // a.to(tl.uint64)
        else:
            p = tl.load(part + _P).to(tl.uint64)
            key = _linear(id, a.to(tl.uint64), b.to(tl.uint64), p)
        row = (key % rows.to(tl.uint64)).to(tl.int64)
    return row, 1.0 - 2.0 * sign.to(tl.float32)


@triton.jit
def _load_ids(ids, i, inside, padding_id, HAS_PADDING: tl.constexpr):
    """Ids as 64-bit patterns, and which of them count."""
    id = tl.load(ids + i, mask=inside, other=0)
    present = inside
    if HAS_PADDING:
        present = inside & (id != padding_id)
    return id.to(tl.uint64), present


# --- forward -------------------------------------------------------------------------------------


@triton.jit
def _columns(tile, slot, ALIGN: tl.constexpr, BLOCK_D: tl.constexpr):
    """Columns of a tile inside its slot, and which of them there are."""
    d = tl.multiple_of(tl.load(tile + 1), BLOCK_D) + tl.arange(0, BLOCK_D)
    return d, d < tl.multiple_of(tl.load(slot + _WIDTH), ALIGN)


@triton.jit
def _slot_values(
    id,
    i,
    present,
    table,
    weights,
    weights_per_id,
    parts,
    tile,
    COMBINE: tl.constexpr,
    PER_PART: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Columns of one slot for each id, (BLOCK_I, BLOCK_D), times its weight."""
    first = tl.load(tile)
    slot = parts + first * _PART
    d, inside = _columns(tile, slot, ALIGN, BLOCK_D)
    wanted = present[:, None] & inside[None, :]
    size = tl.load(slot + _SLOT_SIZE)
    total = tl.full([BLOCK_I, BLOCK_D], 1.0 if COMBINE == _PRODUCT else 0.0, tl.float32)
    for number in range(0, size):
        part = slot + number * _PART
        row, sign = _rows_and_signs(id, part)
        at = tl.multiple_of(tl.load(part + _BASE) + row * tl.load(part + _STRIDE), ALIGN)
        values = tl.load(table + at[:, None] + d[None, :], mask=wanted, other=0.0).to(tl.float32)
        if PER_PART:
            own = weights + i * weights_per_id + (first + number - tl.load(tile + 2))
            sign *= tl.load(own, mask=present, other=0.0)
        values *= sign[:, None]
        if COMBINE == _PRODUCT:
            total *= values
        else:
            total += values
    if COMBINE == _MEAN:
        total /= size.to(tl.float32)
    if weights is not None and not PER_PART:
        total *= tl.load(weights + i, mask=present, other=0.0)[:, None]
    return total


@triton.jit
def _compose_ids(
    ids,
    table,
    weights,
    weights_per_id: tl.int64,
    out,
    bags: tl.int64,
    features,
    dim: tl.int64,
    padding_id: tl.int64,
    parts,
    tiles,
    HAS_PADDING: tl.constexpr,
    COMBINE: tl.constexpr,
    PER_PART: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tile = tiles + tl.program_id(1) * _TILE
    slot = parts + tl.load(tile) * _PART
    bag = tl.program_id(0).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    i = bag * features + tl.load(slot + _FEATURE)
    id, present = _load_ids(ids, i, bag < bags, padding_id, HAS_PADDING)
    total = _slot_values(
        id, i, present, table, weights, weights_per_id, parts, tile,
        COMBINE, PER_PART, ALIGN, BLOCK_I, BLOCK_D,
    )  # fmt: skip
    d, inside = _columns(tile, slot, ALIGN, BLOCK_D)
    at = tl.multiple_of(bag * dim + tl.load(slot + _COLUMN), ALIGN)
    wanted = (bag < bags)[:, None] & inside[None, :]
    tl.store(out + at[:, None] + d[None, :], total.to(out.dtype.element_ty), mask=wanted)


@triton.jit
def _compose_bags(
    ids,
    offsets,
    table,
    weights,
    weights_per_id: tl.int64,
    out,
    argmax,
    count: tl.int64,
    dim: tl.int64,
    padding_id: tl.int64,
    parts,
    tiles,
    HAS_PADDING: tl.constexpr,
    COMBINE: tl.constexpr,
    MODE: tl.constexpr,
    PER_PART: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tile = tiles + tl.program_id(1) * _TILE
    slot = parts + tl.load(tile) * _PART
    bag = tl.program_id(0).to(tl.int64)
    segment = tl.load(slot + _FEATURE) * tl.num_programs(0) + bag
    begin, end = segment_bounds(offsets, segment, count)
    total = tl.full([BLOCK_I, BLOCK_D], -float("inf") if MODE == _BAG_MAX else 0.0, tl.float32)
    winner = tl.full([BLOCK_I, BLOCK_D], -1, tl.int32)
    used = tl.zeros([BLOCK_I], tl.int32)
    for start in range(begin, end, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        id, present = _load_ids(ids, i, i < end, padding_id, HAS_PADDING)
        values = _slot_values(
            id, i, present, table, weights, weights_per_id, parts, tile,
            COMBINE, PER_PART, ALIGN, BLOCK_I, BLOCK_D,
        )  # fmt: skip
        used += present.to(tl.int32)
        if MODE == _BAG_MAX:
            better = present[:, None] & ((winner < 0) | (values > total))
            total = tl.where(better, values, total)
            winner = tl.where(better, i.to(tl.int32)[:, None], winner)
        else:
            total += values
    d, wanted = _columns(tile, slot, ALIGN, BLOCK_D)
    at = tl.multiple_of(bag * dim + tl.load(slot + _COLUMN), ALIGN) + d
    size = tl.sum(used, 0)
    if MODE == _BAG_MAX:
        pooled = tl.max(total, 0)
        # Of equal ones the first; lanes without an id have none.
        ours = (winner >= 0) & (total == pooled[None, :])
        first = tl.min(tl.where(ours, winner, 2147483647), 0)
        tl.store(argmax + at, tl.where(size > 0, first, -1), mask=wanted)
        pooled = tl.where(size > 0, pooled, 0.0)
    else:
        pooled = tl.sum(total, 0)
        if MODE == _BAG_MEAN:
            pooled /= tl.maximum(size, 1).to(tl.float32)
    tl.store(out + at, pooled.to(out.dtype.element_ty), mask=wanted)


# --- operators -----------------------------------------------------------------------------------


def _per_part(weights: Tensor | None) -> bool:
    """Tell whether there are several weights for each id; one for its one part is the id's."""
    return weights is not None and weights.dim() == 2


def _alignment(plan: Plan, table: Tensor) -> int:
    """Return how many elements of 16 bytes rows and columns start at multiples of."""
    return math.gcd(plan.alignment, 16 // table.element_size())


def _weights_per_id(weights: Tensor | None) -> int:
    return weights.shape[1] if weights is not None and weights.dim() == 2 else 1


def _supports(
    ids: Tensor,
    table: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    parts: list[int],
    combine: int,
    bag_mode: int,
    padding_id: int | None,
) -> bool:
    return table.dtype in FLOATS and ids.shape[0] < 2**31


@_op.kernel(_supports)
def compose_bag(
    ids: Tensor,
    table: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    parts: list[int],
    combine: int,
    bag_mode: int,
    padding_id: int | None,
) -> tuple[Tensor, Tensor]:
    plan = _plan(tuple(parts), ids.device)
    features, tiles = plan.num_features, plan.tiles.shape[0]
    bags = (ids.shape[0] if offsets is None else offsets.shape[0] - 1) // features
    out = table.new_empty(bags, plan.dim)
    has_maximum = bag_mode == _BAG_MAX.value
    argmax = ids.new_empty(bags if has_maximum else 0, plan.dim, dtype=torch.int32)
    options = {"HAS_PADDING": padding_id is not None, "COMBINE": combine,
               "PER_PART": _per_part(weights), "ALIGN": _alignment(plan, table),
               "BLOCK_D": _TILE_DIM}  # fmt: skip
    if offsets is None:
        _compose_ids[(triton.cdiv(bags, _TILE_IDS), tiles)](
            ids, table, weights, _weights_per_id(weights), out, bags, features, plan.dim,
            padding_id or 0, plan.parts, plan.tiles, BLOCK_I=_TILE_IDS, **options,
        )  # fmt: skip
    else:
        _compose_bags[(bags, tiles)](
            ids, offsets, table, weights, _weights_per_id(weights), out, argmax, ids.shape[0],
            plan.dim, padding_id or 0, plan.parts, plan.tiles, MODE=bag_mode, BLOCK_I=_BAG_IDS,
            **options,
        )  # fmt: skip
    return out, argmax
