"""The specification of the pooling operators in plain torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from emblas._philox import WORD, philox4x32

EPSILON = 1e-12


class Mode(IntEnum):
    """The linear pooling modes, by their numbers in the operator's schema."""

    mean = 0
    sum = 1
    mean_sqrt_len = 2
    weighted_mean = 3
    cls = 4
    last = 5


MAX = len(Mode)  # the number of the maximum, where an operator takes several modes


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which values of ``dtype`` are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Entries(NamedTuple):
    """Every pair of a segment and one of its positions."""

    row: Tensor
    """Row of ``x``."""
    position: Tensor
    segment: Tensor
    weight: Tensor
    steps: Tensor
    """Derivative of ``weight`` by the caller's weight."""


def _entries(
    x: Tensor,
    starts: Tensor,
    weights: Tensor | None,
    mode: int,
    ends: Tensor | None,
    skip: Tensor | None,
    index: Tensor | None,
) -> _Entries:
    origin = (starts[:-1] if ends is None else starts).long()
    last = (starts[1:] if ends is None else ends).long()
    begin = origin if skip is None else torch.minimum(origin + skip, last)
    lengths = last - begin
    ids = torch.arange(len(lengths), device=x.device)
    rows = math.prod(x.shape[:-1]) if index is None else index.shape[0]
    size = rows if ends is None and skip is None else None
    segment = torch.repeat_interleave(ids, lengths, output_size=size)
    order = torch.arange(len(segment), device=x.device)
    position = order - (lengths.cumsum(0) - lengths - begin)[segment]
    dtype = accumulator(x.dtype)
    one = torch.ones(len(segment), dtype=dtype, device=x.device)
    weight, steps = one if weights is None else weights[position], one
    if mode == Mode.weighted_mean:
        steps = (position - origin[segment] + 1).to(dtype)
        weight = weight * steps
    elif mode in (Mode.cls, Mode.last):
        present = weight != 0
        none, reduce = (len(order), "amin") if mode == Mode.cls else (-1, "amax")
        found = torch.full_like(ids, none).scatter_reduce(
            0, segment[present], order[present], reduce
        )
        chosen = found[found != none]
        segment, position = segment[chosen], position[chosen]
        weight, steps = one[chosen], 0 * one[chosen]
    row = position if index is None else index[position].long()
    return _Entries(row, position, segment, weight, steps)


def segment_entries(
    x: Tensor, starts: Tensor, weights: Tensor | None, ends: Tensor | None
) -> _Entries:
    """Return every pair of a segment and one of its tokens."""
    return _entries(x, starts, weights, Mode.mean, ends, None, None)


def _batch(starts: Tensor, ends: Tensor | None) -> int:
    return starts.shape[0] - 1 if ends is None else ends.shape[0]


def owners(tokens: int, starts: Tensor, weights: Tensor | None, ends: Tensor | None) -> Tensor:
    """Segment of each token (int32), -1 where none; segments are in order and disjoint."""
    begins, ends = (starts[:-1], starts[1:]) if ends is None else (starts, ends)
    position = torch.arange(tokens, dtype=torch.int32, device=starts.device)
    # The last segment that starts here or before: others are over, or empty.
    owner = torch.searchsorted(begins, position, right=True, out_int32=True) - 1
    present = owner >= 0
    if begins.shape[0]:
        present &= position < ends[owner.clamp_min(0)]
    if weights is not None:
        present &= weights != 0
    return owner.where(present, -1)


def _divisor(total: Tensor, mode: int) -> Tensor:
    if mode == Mode.sum:
        return torch.ones_like(total)
    return total.abs().sqrt() if mode == Mode.mean_sqrt_len else total


def segment_pool(
    x: Tensor,
    cu_seqlens: Tensor,
    weights: Tensor | None,
    normalize: bool,
    mode: int = Mode.mean,
    ends: Tensor | None = None,
    skip: Tensor | None = None,
    index: Tensor | None = None,
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    """Pool the rows of each segment in a linear mode, optionally to unit length.

    The formulas stand in ``csrc/pooling/pooling.h``. Returns the pooled vectors (batch, dim) in the
    dtype of ``x`` (``wide``: the accumulator's) and, with ``normalize``, their lengths (batch,)
    before.
    """
    dtype = accumulator(x.dtype)
    entries = _entries(x, cu_seqlens, weights, mode, ends, skip, index)
    batch, dim, weight = _batch(cu_seqlens, ends), x.shape[-1], entries.weight
    total = weight.new_zeros(batch).index_add(0, entries.segment, weight)
    # A row of weight 0 may hold NaN: it is replaced, not multiplied.
    rows = x.flatten(0, -2)[entries.row].to(dtype)
    weighted = torch.where((weight == 0)[:, None], 0, weight[:, None] * rows)
    summed = weighted.new_zeros(batch, dim).index_add(0, entries.segment, weighted)
    divisor = _divisor(total, mode)
    pooled = summed / torch.where(divisor == 0, 1, divisor)[:, None]
    pooled = torch.where((divisor == 0)[:, None], 0, pooled)
    stored = dtype if wide else x.dtype
    if not normalize:
        return pooled.to(stored), pooled.new_empty(0)
    norm = pooled.norm(dim=1)
    return (pooled / norm.clamp_min(EPSILON)[:, None]).to(stored), norm.detach()


def segment_pool_backward(
    grad_out: Tensor,
    x: Tensor,
    out: Tensor,
    norm: Tensor,
    cu_seqlens: Tensor,
    weights: Tensor | None,
    normalize: bool,
    need_x: bool,
    need_weights: bool,
    mode: int = Mode.mean,
    ends: Tensor | None = None,
    skip: Tensor | None = None,
    index: Tensor | None = None,
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`segment_pool` with respect to ``x`` and ``weights``."""
    dtype = accumulator(x.dtype)
    entries = _entries(x, cu_seqlens, weights, mode, ends, skip, index)
    batch, dim, segment = _batch(cu_seqlens, ends), x.shape[-1], entries.segment
    total = entries.weight.new_zeros(batch).index_add(0, segment, entries.weight)
    divisor = _divisor(total, mode)
    grad, pooled = grad_out.to(dtype), out.to(dtype)
    if normalize:
        length = norm.clamp_min(EPSILON)[:, None]
        along = (pooled * grad).sum(1, keepdim=True)
        grad = (grad - torch.where(norm[:, None] > EPSILON, along, 0) * pooled) / length
        pooled = pooled * length
    grad = torch.where((divisor == 0)[:, None], 0, grad)
    shared = grad / torch.where(divisor == 0, 1, divisor)[:, None]
    power = {Mode.sum: 0.0, Mode.mean_sqrt_len: 0.5}.get(Mode(mode), 1.0)
    along_mean = power * (pooled * grad).sum(1) / torch.where(total == 0, 1, total)
    rows = x.flatten(0, -2)
    grad_x = grad.new_zeros(len(rows), dim)
    grad_x = grad_x.index_add(0, entries.row, entries.weight[:, None] * shared[segment])
    slope = (rows[entries.row].to(dtype) * shared[segment]).sum(1) - along_mean[segment]
    positions = len(rows) if index is None else index.shape[0]
    grad_weights = grad.new_zeros(positions)
    grad_weights = grad_weights.index_add(0, entries.position, entries.steps * slope)
    return (
        grad_x.to(x.dtype).reshape(x.shape) if need_x else x.new_empty(0),
        grad_weights if need_weights else grad_weights.new_empty(0),
    )


def _maxima(
    x: Tensor,
    cu_seqlens: Tensor,
    weights: Tensor | None,
    ends: Tensor | None,
    skip: Tensor | None,
    index: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Maxima, and rows and positions of the first tokens that hold them (int64, -1: none)."""
    entries = _entries(x, cu_seqlens, weights, Mode.mean, ends, skip, index)
    present = entries.weight != 0
    row, segment = entries.row[present], entries.segment[present]
    rows = x.flatten(0, -2)
    shape = _batch(cu_seqlens, ends), x.shape[-1]
    values = rows[row].detach()
    at = segment[:, None].expand_as(values)
    largest = values.new_full(shape, -torch.inf).scatter_reduce(0, at, values, "amax")[segment]
    order = torch.arange(len(row), device=x.device)[:, None].expand_as(values)
    holds = (values == largest) | (values.isnan() & largest.isnan())
    first = torch.full(shape, len(row), device=x.device)
    first = first.scatter_reduce(0, at, torch.where(holds, order, len(row)), "amin")
    none = row.new_tensor([-1])
    argmax = torch.cat([row, none])[first]
    out = rows[argmax.clamp_min(0), torch.arange(shape[1], device=x.device)] if len(rows) else 0
    out = torch.where(argmax < 0, x.new_zeros(()), out)
    return out, argmax, torch.cat([entries.position[present], none])[first]


def segment_max(
    x: Tensor,
    cu_seqlens: Tensor,
    weights: Tensor | None,
    ends: Tensor | None = None,
    skip: Tensor | None = None,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Largest value of each column in each segment, and the first row that holds it (-1: none)."""
    out, rows, _ = _maxima(x, cu_seqlens, weights, ends, skip, index)
    return out, rows.to(torch.int32)


def segment_max_backward(grad_out: Tensor, argmax: Tensor, rows: int) -> Tensor:
    """Gradient of :func:`segment_max` with respect to the rows of ``x``."""
    dtype = accumulator(grad_out.dtype)
    grad = torch.where(argmax < 0, 0, grad_out.to(dtype))
    grad_x = grad.new_zeros(rows + 1, grad.shape[1])
    at = torch.where(argmax < 0, rows, argmax.long())
    return grad_x.scatter_add(0, at, grad)[:rows].to(grad_out.dtype)


def segment_pool_modes(
    x: Tensor,
    cu_seqlens: Tensor,
    weights: Tensor | None,
    modes: Sequence[int],
    ends: Tensor | None = None,
    skip: Tensor | None = None,
    index: Tensor | None = None,
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    """Pool in several modes, linear ones and ``MAX``, each once.

    Returns the results side by side (batch, modes * dim) and, with ``MAX``, the positions of the
    maxima (batch, dim), int32, -1 where there is no token.
    """
    batch = _batch(cu_seqlens, ends) if MAX in modes else 0
    argmax = torch.empty(batch, x.shape[-1], dtype=torch.int32, device=x.device)
    parts = []
    for mode in modes:
        if mode == MAX:
            out, _, at = _maxima(x, cu_seqlens, weights, ends, skip, index)
            argmax = at.to(torch.int32)
        else:
            options = mode, ends, skip, index, wide
            out, _ = segment_pool(x, cu_seqlens, weights, False, *options)
        parts.append(out.to(accumulator(x.dtype)) if wide else out)
    return torch.cat(parts, 1), argmax


def segment_pool_modes_backward(
    grad_out: Tensor,
    x: Tensor,
    out: Tensor,
    argmax: Tensor,
    cu_seqlens: Tensor,
    weights: Tensor | None,
    modes: Sequence[int],
    need_x: bool,
    need_weights: bool,
    ends: Tensor | None = None,
    skip: Tensor | None = None,
    index: Tensor | None = None,
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`segment_pool_modes` with respect to ``x`` and ``weights``."""
    dtype, rows = accumulator(x.dtype), math.prod(x.shape[:-1])
    values, norm = x.to(dtype), argmax.new_empty(0, dtype=dtype)
    positions = rows if index is None else index.shape[0]
    grad_x, grad_weights = torch.zeros_like(values), values.new_zeros(positions)
    slices = (pooled.to(dtype).tensor_split(len(modes), 1) for pooled in (grad_out, out))
    for mode, grad, pooled in zip(modes, *slices, strict=True):
        if mode == MAX:
            at = argmax
            if index is not None and positions:
                at = torch.where(argmax < 0, -1, index[argmax.clamp_min(0)])
            grad_x += segment_max_backward(grad, at, rows).reshape(x.shape)
            continue
        of_x, of_weights = segment_pool_backward(
            grad, values, pooled, norm, cu_seqlens, weights, False, True, True, mode, ends, skip,
            index,
        )  # fmt: skip
        grad_x += of_x
        grad_weights += of_weights
    return (
        grad_x.to(x.dtype) if need_x else x.new_empty(0),
        grad_weights if need_weights else grad_weights.new_empty(0),
    )


def segment_gem(
    x: Tensor,
    cu_seqlens: Tensor,
    weights: Tensor | None,
    power: Tensor,
    epsilon: float,
    ends: Tensor | None = None,
    skip: Tensor | None = None,
    index: Tensor | None = None,
) -> Tensor:
    """Generalized mean of each segment, in the accumulator's dtype."""
    entries = _entries(x, cu_seqlens, weights, Mode.mean, ends, skip, index)
    batch, dim, weight = _batch(cu_seqlens, ends), x.shape[-1], entries.weight
    rows = x.flatten(0, -2)[entries.row].to(weight.dtype)
    raised = torch.where(rows < epsilon, epsilon, rows) ** power
    weighted = torch.where((weight == 0)[:, None], 0, weight[:, None] * raised)
    total = weight.new_zeros(batch).index_add(0, entries.segment, weight)
    summed = weighted.new_zeros(batch, dim).index_add(0, entries.segment, weighted)
    empty = (total == 0)[:, None]
    mean = torch.where(empty, 1, summed / torch.where(total == 0, 1, total)[:, None])
    return torch.where(empty, 0, mean ** (1 / power))


def segment_gem_backward(
    grad_out: Tensor,
    x: Tensor,
    out: Tensor,
    cu_seqlens: Tensor,
    weights: Tensor | None,
    power: Tensor,
    epsilon: float,
    ends: Tensor | None = None,
    skip: Tensor | None = None,
    index: Tensor | None = None,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`segment_gem` by ``x``, ``power`` (one share per segment) and weights."""
    entries = _entries(x, cu_seqlens, weights, Mode.mean, ends, skip, index)
    batch, weight = _batch(cu_seqlens, ends), entries.weight
    total = weight.new_zeros(batch).index_add(0, entries.segment, weight)
    root = torch.where((total == 0)[:, None], 1, out)
    scale = torch.where(total == 0, 0, 1 / total)[:, None] / power
    shared = grad_out * scale * root ** (1 - power)
    rows = x.flatten(0, -2).to(weight.dtype)
    clamped = torch.where(rows < epsilon, epsilon, rows)
    summed = torch.zeros_like(rows).index_add(
        0, entries.row, weight[:, None] * shared[entries.segment]
    )
    # A row that no segment reaches may hold NaN.
    constant = (rows < epsilon) | (summed == 0)
    grad_x = torch.where(constant, 0, summed * power * clamped ** (power - 1))
    taken = clamped[entries.row]
    slope = torch.where((weight == 0)[:, None], 0, taken**power * taken.log() * weight[:, None])
    grad_power = weight.new_zeros(batch).index_add(
        0, entries.segment, (slope * shared[entries.segment]).sum(1)
    )
    grad_power = grad_power - (grad_out * root * root.log()).sum(1) / power
    grad_weights = weight.new_empty(0)
    if need_weights:
        along = torch.where(total == 0, 0, (grad_out * root).sum(1) * scale[:, 0])
        slope = (taken**power * shared[entries.segment]).sum(1) - along[entries.segment]
        positions = len(rows) if index is None else index.shape[0]
        grad_weights = weight.new_zeros(positions).index_add(0, entries.position, slope)
    return grad_x.to(x.dtype).reshape(x.shape), grad_power, grad_weights


# --- finishing (csrc/pooling/finish.h) -----------------------------------------------------------


def normal_noise(rows: int, dim: int, stream: int, seed: int) -> Tensor:
    """Independent standard normal numbers (rows, dim), float64, as a function of the seed."""
    row = torch.arange(rows)[:, None].expand(rows, -(-dim // 4))
    block = torch.arange(row.shape[1]).expand_as(row)
    words = philox4x32([block, torch.full_like(row, stream), row & WORD, row >> 32], seed % 2**64)
    numbers = []
    for pair in (0, 2):
        radius = (-2 * ((words[pair].double() + 1) / 2**32).log()).sqrt()
        angle = words[pair + 1].double() * (2 * torch.pi / 2**32)
        numbers += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(numbers, 2).flatten(1)[:, :dim]


def finish(
    x: Tensor,
    dims: Sequence[int],
    normalize: bool,
    noise: float,
    seed: int,
    kind: int,
    dtype: torch.dtype,
    ranges: Tensor | None,
) -> Tensor:
    """Cut, normalize, blur and store pooled vectors."""
    parts, before = [], 0
    for stream, k in enumerate(dims):
        part = x[:, :k]
        if normalize:
            part = part / part.norm(dim=1, keepdim=True).clamp_min(EPSILON)
        if noise:
            part = part + (noise * normal_noise(len(x), k, stream, seed)).to(part)
        if kind == 1:
            assert ranges is not None
            low, high = ranges[:, before : before + k]
            scale = torch.where(high > low, 255 / (high - low), 0)
            part = (((part - low) * scale).round().clamp(0, 255) - 128).nan_to_num(-128)
        elif kind == 2:
            bits = torch.nn.functional.pad(part > 0, (0, -k % 8)).unflatten(1, (-1, 8))
            part = (bits.long() << torch.arange(7, -1, -1, device=x.device)).sum(2)
        parts.append(part.to((dtype, torch.int8, torch.uint8)[kind]))
        before += k
    return torch.cat(parts, 1)


def finish_backward(grad_out: Tensor, x: Tensor, dims: Sequence[int], normalize: bool) -> Tensor:
    """Gradient of :func:`finish`, of its floating kind."""
    grad_x = torch.zeros_like(x)
    for k, grad in zip(dims, grad_out.split(list(dims), 1), strict=True):
        if normalize:
            norm = x[:, :k].norm(dim=1, keepdim=True)
            length = norm.clamp_min(EPSILON)
            unit = x[:, :k] / length
            along = torch.where(norm > EPSILON, (unit * grad).sum(1, keepdim=True), 0)
            grad = (grad - along * unit) / length
        grad_x[:, :k] += grad
    return grad_x
