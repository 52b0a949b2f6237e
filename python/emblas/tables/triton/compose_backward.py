"""Gradients of composed tables in Triton. The formulas stand in ``csrc/tables/compose.h``.

Without atomics: the rows of all lookups are written down, sorted (stably: equal rows keep the order
of ids and parts) and cut at the rows of the tables; a program adds up the gradients of one row. The
bits depend on the batch only. A row that very many ids share takes one program longest.

Bytes: 12 for each lookup are written and read, besides what the sort moves; for each a row of
grad_out is read (for products the other rows of its slot, too), and the gradient is written once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from emblas import _op
from emblas._triton import FLOATS
from emblas.tables.composition import rows_are_apart
from emblas.tables.triton.compose import (
    _BAG_MAX,
    _BAG_MEAN,
    _BASE,
    _COLUMN,
    _FEATURE,
    _FIRST_ROW,
    _MEAN,
    _PART,
    _PRODUCT,
    _SLOT_FIRST,
    _SLOT_SIZE,
    _STRIDE,
    _TILE_DIM,
    _WIDTH,
    Plan,
    Region,
    _alignment,
    _load_ids,
    _per_part,
    _plan,
    _rows_and_signs,
    _weights_per_id,
)

_ROW_IDS, _DOT_IDS, _BLOCK_IDS = 8, 8, 256


@triton.jit
def _lookups(
    ids,
    segment_of,
    numbers,
    keys,
    count: tl.int64,
    bags: tl.int64,
    features,
    most_parts,
    padding_id: tl.int64,
    parts,
    first_parts,
    HAS_PADDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows of one part for its feature's ids: ``2 row + (sign < 0)``, and among all rows."""
    number = tl.program_id(1)
    part = parts + number * _PART
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    id, present = _load_ids(ids, i, i < count, padding_id, HAS_PADDING)
    feature = tl.load(part + _FEATURE)
    if segment_of is not None:
        of = tl.load(segment_of + i, mask=i < count, other=0) // bags
    else:
        of = i % features
    mine = present & (of == feature)
    row, sign = _rows_and_signs(id, part)
    at = i * most_parts + number - tl.load(first_parts + feature)
    tl.store(numbers + at, 2 * row + (sign < 0).to(tl.int64), mask=mine)
    tl.store(keys + at, (row + tl.load(part + _FIRST_ROW)).to(tl.int32), mask=mine)


@triton.jit
def _places(i, inside, segment_of, bags, features, first_parts):
    """Bag of each id, and the first part of its feature."""
    if segment_of is not None:
        segment = tl.load(segment_of + i, mask=inside, other=0)
        feature, bag = segment // bags, segment % bags
    else:
        feature, bag = i % features, i // features
    return bag, feature, tl.load(first_parts + feature, mask=inside, other=0)


@triton.jit
def _part_values(
    i, number, first, own, numbers, most_parts, parts, table, d, inside, ALIGN: tl.constexpr
):
    """Signed rows of part ``number`` for each id; ``first`` is the first part of its feature."""
    part = parts + number * _PART
    found = tl.load(numbers + i * most_parts + number - first, mask=inside & own, other=0)
    wanted = inside & own
    base = tl.load(part + _BASE, mask=wanted, other=0)
    stride = tl.load(part + _STRIDE, mask=wanted, other=0)
    width = tl.load(part + _WIDTH, mask=wanted, other=0)
    at = tl.multiple_of(base + (found >> 1) * stride, ALIGN)
    mask = wanted[:, None] & (d[None, :] < tl.multiple_of(width, ALIGN)[:, None])
    values = tl.load(table + at[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    return values * (1.0 - 2.0 * (found & 1).to(tl.float32))[:, None]


@triton.jit
def _row_gradients(
    sources,
    bounds,
    numbers,
    segment_of,
    scale,
    argmax,
    table,
    weights,
    weights_per_id: tl.int64,
    grad_out,
    grad_table,
    bags: tl.int64,
    features,
    dim: tl.int64,
    most_parts,
    parts,
    first_parts,
    most_in_slot,
    used,
    first_row: tl.int64,
    rows: tl.int64,
    base: tl.int64,
    width,
    stride: tl.int64,
    COMBINE: tl.constexpr,
    PER_PART: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum, for one row of a table, of the gradients of the lookups in its part of ``sources``.

    Rows of tables are all there are, from number ``first_row`` on, or those that are ``used``.
    """
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    if used is not None:
        number = tl.load(used + row)
        if (number < first_row) | (number >= first_row + rows):
            return
    begin = tl.load(bounds + row)
    end = tl.load(bounds + row + 1)
    total = tl.zeros([BLOCK_I, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_I):
        place = start + tl.arange(0, BLOCK_I)
        inside = place < end
        lookup = tl.load(sources + place, mask=inside, other=0)
        i, own = lookup // most_parts, lookup % most_parts
        bag, feature, first = _places(i, inside, segment_of, bags, features, first_parts)
        part = parts + (first + own) * _PART
        sign = tl.load(numbers + lookup, mask=inside, other=0) & 1
        factor = 1.0 - 2.0 * sign.to(tl.float32)
        size = tl.load(part + _SLOT_SIZE, mask=inside, other=1)
        if COMBINE == _MEAN:
            factor /= size.to(tl.float32)
        if scale is not None:
            factor *= tl.load(scale + feature * bags + bag, mask=inside, other=0.0)
        if weights is not None:
            at = weights + i * weights_per_id
            if PER_PART:
                at += own
            factor *= tl.load(at, mask=inside, other=0.0)
        at = tl.multiple_of(bag * dim + tl.load(part + _COLUMN, mask=inside, other=0), ALIGN)
        wanted = inside[:, None] & (d < width)[None, :]
        gradient = tl.load(grad_out + at[:, None] + d[None, :], mask=wanted, other=0.0)
        gradient = gradient.to(tl.float32) * factor[:, None]
        if argmax is not None:
            winner = tl.load(argmax + at[:, None] + d[None, :], mask=wanted, other=-1)
            gradient = tl.where(winner == i[:, None], gradient, 0.0)
        if COMBINE == _PRODUCT:
            slot = tl.load(part + _SLOT_FIRST, mask=inside, other=0)
            for k in range(0, most_in_slot):
                other = (k < size) & (slot + k != first + own)
                values = _part_values(
                    i, slot + k, first, other, numbers, most_parts, parts, table, d, inside, ALIGN
                )
                gradient *= tl.where(other[:, None], values, 1.0)
        total += gradient
    summed = tl.sum(total, 0).to(grad_table.dtype.element_ty)
    tl.store(grad_table + base + row * stride + d, summed, mask=d < width)


@triton.jit
def _weight_gradients(
    ids,
    segment_of,
    numbers,
    table,
    grad_out,
    grad_weights,
    count: tl.int64,
    bags: tl.int64,
    features,
    dim: tl.int64,
    most_parts,
    most_width,
    padding_id: tl.int64,
    parts,
    first_parts,
    HAS_PADDING: tl.constexpr,
    COMBINE: tl.constexpr,
    PER_PART: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Dot products of grad_out with the slots of each id, or with each of its parts."""
    i = tl.program_id(0).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    _, present = _load_ids(ids, i, i < count, padding_id, HAS_PADDING)
    bag, feature, first = _places(i, i < count, segment_of, bags, features, first_parts)
    size = tl.load(first_parts + feature + 1, mask=i < count, other=0) - first
    dot = tl.zeros([BLOCK_I], tl.float32)
    for number in range(0, most_parts):
        own = present & (number < size)
        part = parts + (first + number) * _PART
        slot_size = tl.load(part + _SLOT_SIZE, mask=own, other=1)
        slot = tl.load(part + _SLOT_FIRST, mask=own, other=0)
        column = tl.load(part + _COLUMN, mask=own, other=0)
        width = tl.load(part + _WIDTH, mask=own, other=0)
        if PER_PART:
            dot = tl.zeros([BLOCK_I], tl.float32)
        for start in range(0, most_width, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            values = _part_values(
                i,
                first + number,
                first,
                own,
                numbers,
                most_parts,
                parts,
                table,
                d,
                i < count,
                ALIGN,
            )
            if COMBINE == _PRODUCT:  # once for each slot, by its first part
                own &= slot == first + number
                for k in range(1, most_parts):
                    other = own & (k < slot_size)
                    factor = _part_values(
                        i,
                        slot + k,
                        first,
                        other,
                        numbers,
                        most_parts,
                        parts,
                        table,
                        d,
                        i < count,
                        ALIGN,
                    )
                    values *= tl.where(other[:, None], factor, 1.0)
            at = tl.multiple_of(bag * dim + column, ALIGN)
            wanted = own[:, None] & (d[None, :] < tl.multiple_of(width, ALIGN)[:, None])
            gradient = tl.load(grad_out + at[:, None] + d[None, :], mask=wanted, other=0.0)
            along = tl.sum(values * gradient.to(tl.float32), 1)
            if COMBINE == _MEAN:
                along /= slot_size.to(tl.float32)
            dot += along
        if PER_PART:
            tl.store(grad_weights + i * most_parts + number, dot, mask=i < count)
    if not PER_PART:
        tl.store(grad_weights + i, dot, mask=i < count)


def _backward_supports(
    grad_out: Tensor,
    ids: Tensor,
    table: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    argmax: Tensor | None,
    parts: list[int],
    *others: Any,
) -> bool:
    # Rows that overlap would need a second pass. Rows and lookups are numbered by 32 bits.
    plan = _plan(tuple(parts), ids.device)
    few = plan.rows < 2**31 - 1 and ids.shape[0] * plan.most_parts < 2**31
    return table.dtype in FLOATS and few and rows_are_apart(parts)


def _segment_of(ids: Tensor, offsets: Tensor | None) -> Tensor | None:
    """Return the feature and bag of each id as one number, a legal one whatever the offsets."""
    if offsets is None:
        return None
    positions = torch.arange(ids.shape[0], device=ids.device, dtype=offsets.dtype)
    segments = torch.searchsorted(offsets, positions, right=True) - 1
    return segments.clamp(0, offsets.shape[0] - 2)


class Lookups(NamedTuple):
    """What is known of the lookups of a call, ``i most_parts + p`` that of part ``p`` of id ``i``.

    Attributes
    ----------
    segment_of : Tensor, optional
        ``(ids,)`` feature and bag of each id as one number, where there are offsets.
    numbers : Tensor
        Of each lookup ``2 row + (sign < 0)``.
    keys : Tensor
        Of each lookup its row among the rows of all tables; ``plan.rows`` if it counts for nothing.
    """

    segment_of: Tensor | None
    numbers: Tensor
    keys: Tensor


def find_lookups(
    ids: Tensor, offsets: Tensor | None, plan: Plan, bags: int, padding_id: int | None
) -> Lookups:
    """Write down the rows of all lookups."""
    count, most = ids.shape[0], plan.most_parts
    segment_of = _segment_of(ids, offsets)
    numbers = torch.zeros(count * most, device=ids.device, dtype=torch.int64)
    keys = torch.full((count * most,), plan.rows, device=ids.device, dtype=torch.int32)
    _lookups[(triton.cdiv(count, _BLOCK_IDS), plan.parts.shape[0])](
        ids, segment_of, numbers, keys, count, bags, plan.num_features, most, padding_id or 0,
        plan.parts, plan.features, HAS_PADDING=padding_id is not None, BLOCK=_BLOCK_IDS,
    )  # fmt: skip
    return Lookups(segment_of, numbers, keys)


def row_gradients(
    grad_out: Tensor,
    ids: Tensor,
    table: Tensor,
    weights: Tensor | None,
    argmax: Tensor | None,
    plan: Plan,
    combine: int,
    bag_mode: int,
    padding_id: int | None,
    lookups: Lookups,
) -> Callable[..., None]:
    """Return what adds up the gradients of one table, ``add(region, sources, bounds, out, used)``.

    ``sources`` are the lookups sorted by row, cut at ``bounds``. Without ``used``, they are cut at
    each row of all tables, and ``out`` is a flat array like ``table``; else row ``u`` of ``out``
    ``(rows, width)`` is that of row number ``used[u]``, if that is one of the table.
    """
    scale = None
    if bag_mode == _BAG_MEAN.value and lookups.segment_of is not None:
        used = torch.ones_like(ids) if padding_id is None else (ids != padding_id).long()
        sizes = used.new_zeros(plan.num_features * grad_out.shape[0])
        sizes.index_add_(0, lookups.segment_of, used)
        scale = sizes.clamp_(min=1).float().reciprocal_()

    def add(
        region: Region, sources: Tensor, bounds: Tensor, out: Tensor, used: Tensor | None = None
    ) -> None:
        rows = region.rows if used is None else used.shape[0]
        _row_gradients[(rows, triton.cdiv(region.width, _TILE_DIM))](
            sources, bounds[region.first_row if used is None else 0 :], lookups.numbers,
            lookups.segment_of, scale, argmax if bag_mode == _BAG_MAX.value else None, table,
            weights, _weights_per_id(weights), grad_out, out, grad_out.shape[0],
            plan.num_features, plan.dim, plan.most_parts, plan.parts, plan.features,
            plan.most_parts, used, region.first_row, region.rows,
            region.base if used is None else 0, region.width,
            region.width if used is None else out.shape[1], COMBINE=combine,
            PER_PART=_per_part(weights), ALIGN=_alignment(plan, table), BLOCK_I=_ROW_IDS,
            BLOCK_D=_TILE_DIM,
        )  # fmt: skip

    return add


@_op.kernel(_backward_supports)
def compose_bag_backward(
    grad_out: Tensor,
    ids: Tensor,
    table: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    argmax: Tensor | None,
    parts: list[int],
    combine: int,
    bag_mode: int,
    padding_id: int | None,
    need_table: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor]:
    plan, count = _plan(tuple(parts), ids.device), ids.shape[0]
    need_weights = need_weights and weights is not None
    bags = grad_out.shape[0]
    grad_weights = torch.empty(
        weights.numel() if need_weights and weights is not None else 0,
        device=ids.device, dtype=torch.float32,
    )  # fmt: skip
    if bags == 0:  # no bag that an id could belong to
        return table.new_zeros(table.numel() if need_table else 0), grad_weights.zero_()
    lookups = find_lookups(ids, offsets, plan, bags, padding_id)
    if need_weights:
        _weight_gradients[(triton.cdiv(count, _DOT_IDS),)](
            ids, lookups.segment_of, lookups.numbers, table, grad_out, grad_weights, count, bags,
            plan.num_features, plan.dim, plan.most_parts,
            max(region.width for region in plan.regions), padding_id or 0,
            plan.parts, plan.features, HAS_PADDING=padding_id is not None, COMBINE=combine,
            PER_PART=_per_part(weights), ALIGN=_alignment(plan, table), BLOCK_I=_DOT_IDS,
            BLOCK_D=_TILE_DIM,
        )  # fmt: skip
    if not need_table:
        return table.new_empty(0), grad_weights
    keys, sources = lookups.keys.sort(stable=True)
    bounds = torch.searchsorted(
        keys, torch.arange(plan.rows + 1, device=ids.device, dtype=torch.int32)
    )
    covered = sum(region.rows * region.width for region in plan.regions)
    grad_table = torch.empty_like(table) if covered == table.numel() else torch.zeros_like(table)
    add = row_gradients(
        grad_out, ids, table, weights, argmax, plan, combine, bag_mode, padding_id, lookups
    )
    for region in plan.regions:
        add(region, sources, bounds, grad_table)
    return grad_table, grad_weights
