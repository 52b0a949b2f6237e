"""What is done with the rows in use of composed tables, in Triton (``csrc/tables/compose.h``).

The gradients of the rows in use are added up as those of a dense gradient are, and written row by
row: as a sparse gradient, or to a workspace from which an optimizer takes its step, in float32. A
program owns a row in use. Their number stands on the device, so there are as many programs as
lookups, most of which may end at once: memory and time follow the batch, not the table.

Bytes of a step: the gradients of the rows in use twice; the rows and the optimizer's state, each
read and written once (rows twice where squares are averaged over them).
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from emblas import _op
from emblas.tables.compose_reference import ADAGRAD, ADAM, ROW_WISE_ADAGRAD
from emblas.tables.triton.compose import _TILE_DIM, Region, _alignment, _plan
from emblas.tables.triton.compose_backward import _backward_supports, find_lookups, row_gradients

_ROW_WISE, _ELEMENTS, _MOMENTS = map(tl.constexpr, (ROW_WISE_ADAGRAD, ADAGRAD, ADAM))


@triton.jit
def _power(base, logarithm, exponent):
    """Raise to a whole power from 1 on, by the logarithm to base 2; exact for the first."""
    return tl.where(exponent == 1, base, tl.exp2(exponent.to(tl.float32) * logarithm))


@triton.jit
def _update_rows(
    used,
    gradients,
    stride: tl.int64,
    table,
    first,
    second,
    last_step,
    steps,
    corrections,
    first_row: tl.int64,
    rows: tl.int64,
    base: tl.int64,
    width,
    rate,
    epsilon,
    weight_decay,
    keep_first,
    log_keep_first,
    fresh_first,
    keep_second,
    log_keep_second,
    fresh_second,
    shrink,
    log_shrink,
    KIND: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One step on the row that a program owns, if it is one of this table."""
    place = tl.program_id(0).to(tl.int64)
    number = tl.load(used + place)
    if (number < first_row) | (number >= first_row + rows):
        return
    width = tl.multiple_of(width, ALIGN)
    at = tl.multiple_of(base + (number.to(tl.int64) - first_row) * width, ALIGN)
    gradient = gradients + tl.multiple_of(place * stride, ALIGN)
    if KIND == _ROW_WISE:
        squares = tl.zeros([BLOCK_D], tl.float32)
        for start in range(0, width, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            w = tl.load(table + at + d, mask=d < width, other=0.0).to(tl.float32)
            g = tl.load(gradient + d, mask=d < width, other=0.0) + weight_decay * w
            squares += g * g
        total = tl.load(first + number) + tl.sum(squares, 0) / width
        tl.store(first + number, total)
        rate /= tl.sqrt_rn(total) + epsilon
    if KIND == _MOMENTS:
        now = tl.load(steps)
        elapsed = now - tl.load(last_step + number)
        tl.store(last_step + number, now)
        keep_first = _power(keep_first, log_keep_first, elapsed)
        keep_second = _power(keep_second, log_keep_second, elapsed)
        shrink = _power(shrink, log_shrink, elapsed)
        rate = tl.load(corrections)
        correction = tl.load(corrections + 1)
    for start in range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        w = tl.load(table + at + d, mask=d < width, other=0.0).to(tl.float32)
        g = tl.load(gradient + d, mask=d < width, other=0.0)
        if KIND == _MOMENTS:
            m = tl.load(first + at + d, mask=d < width, other=0.0)
            v = tl.load(second + at + d, mask=d < width, other=0.0)
            m = keep_first * m + fresh_first * g
            v = keep_second * v + fresh_second * g * g
            tl.store(first + at + d, m, mask=d < width)
            tl.store(second + at + d, v, mask=d < width)
            w = shrink * w - rate * m / (tl.sqrt_rn(v * correction) + epsilon)
        else:
            g += weight_decay * w
            if KIND == _ELEMENTS:
                s = tl.load(first + at + d, mask=d < width, other=1.0) + g * g
                tl.store(first + at + d, s, mask=d < width)
                g /= tl.sqrt_rn(s) + epsilon
            w -= rate * g
        tl.store(table + at + d, w.to(table.dtype.element_ty), mask=d < width)


def _used_rows(keys: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Find the rows in use, of lookups whose rows are sorted, ``rows`` for what counts for nothing.

    Returns their numbers ``(lookups,)``, rising, and behind them ``rows``; the bounds of their
    lookups ``(lookups + 1,)``; and how many they are, ``(1,)``.
    """
    begins = keys < rows
    begins[1:] &= keys[1:] != keys[:-1]
    ranks = begins.cumsum(0)
    numbers = torch.arange(keys.shape[0] + 1, device=keys.device)
    bounds = torch.searchsorted(ranks, numbers + 1)
    bounds = torch.minimum(bounds, (keys < rows).sum())  # lookups that count for nothing are last
    found = keys[bounds[:-1].clamp(max=keys.shape[0] - 1)]
    return torch.where(numbers[:-1] < ranks[-1], found, rows), bounds, ranks[-1:]


def _rows_supports(
    grad_out: Tensor,
    ids: Tensor,
    table: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    argmax: Tensor | None,
    parts: list[int],
    *others: Any,
) -> bool:
    return _backward_supports(grad_out, ids, table, offsets, weights, argmax, parts)


@_op.kernel(_rows_supports)
def compose_bag_backward_rows(
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
) -> tuple[Tensor, Tensor, Tensor]:
    plan, bags = _plan(tuple(parts), ids.device), grad_out.shape[0]
    (region,) = plan.regions
    most = ids.shape[0] // plan.num_features * plan.parts.shape[0]
    if offsets is not None and plan.num_features > 1:  # how these share out ids is on the device
        most = ids.shape[0] * plan.most_parts
    rows, values = ids.new_empty(most), table.new_empty(most, region.width)
    if bags == 0 or most == 0:
        return rows, values, ids.new_zeros(1)
    lookups = find_lookups(ids, offsets, plan, bags, padding_id)
    keys, sources = lookups.keys.sort(stable=True)
    used, bounds, count = _used_rows(keys, plan.rows)
    add = row_gradients(
        grad_out, ids, table, weights, argmax, plan, combine, bag_mode, padding_id, lookups
    )
    add(region, sources, bounds, values, used[:most])
    return rows.copy_(used[:most]), values, count


def _update_supports(
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
    first: Tensor,
    second: Tensor,
    last_step: Tensor,
    step: Tensor,
    optimizer: int,
    learning_rate: float,
    epsilon: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
) -> bool:
    fits = _backward_supports(grad_out, ids, table, offsets, weights, argmax, parts)
    return fits and learning_rate * weight_decay < 1  # powers are taken by logarithms


def _keep(base: float) -> tuple[float, float]:
    """Return what a row is multiplied by in each step, and its logarithm to base 2."""
    return base, math.log2(base) if base > 0 else -math.inf


@_op.kernel(_update_supports)
def compose_bag_update_(
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
    first: Tensor,
    second: Tensor,
    last_step: Tensor,
    step: Tensor,
    optimizer: int,
    learning_rate: float,
    epsilon: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
) -> None:
    step += 1
    plan, bags = _plan(tuple(parts), ids.device), grad_out.shape[0]
    if bags == 0 or ids.shape[0] == 0:
        return
    lookups = find_lookups(ids, offsets, plan, bags, padding_id)
    keys, sources = lookups.keys.sort(stable=True)
    used, bounds, _ = _used_rows(keys, plan.rows)
    add = row_gradients(
        grad_out, ids, table, weights, argmax, plan, combine, bag_mode, padding_id, lookups
    )
    widest = max(region.width for region in plan.regions)
    gradients = table.new_empty(keys.shape[0], widest, dtype=torch.float32)
    # A product's gradient reads rows of other tables: all are taken before the first row moves.
    for region in plan.regions:
        add(region, sources, bounds, gradients, used)
    corrections = None
    if optimizer == ADAM:
        now = step.double()
        rates = learning_rate / (1 - beta1**now), 1 / (1 - beta2**now)
        corrections = torch.cat(rates).float()

    def move(region: Region) -> None:
        _update_rows[(keys.shape[0],)](
            used, gradients, widest, table, first, second, last_step, step, corrections,
            region.first_row, region.rows, region.base, region.width, learning_rate, epsilon,
            weight_decay, *_keep(beta1), 1 - beta1, *_keep(beta2), 1 - beta2,
            *_keep(1 - learning_rate * weight_decay), KIND=optimizer, ALIGN=_alignment(plan, table),
            BLOCK_D=_TILE_DIM, num_warps=1,
        )  # fmt: skip

    for region in plan.regions:
        move(region)
