"""The specification of the composed table operators in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emblas.tables import reference
from emblas.tables.composition import FIELDS

_SUM, _MEAN, _PRODUCT = range(3)
_BAG_SUM, _BAG_MEAN, _BAG_MAX = range(3)
_RADIX = 2
SGD, ROW_WISE_ADAGRAD, ADAGRAD, ADAM = range(4)


def _divide(x: Tensor, divisor: int) -> tuple[Tensor, Tensor]:
    """Quotient and remainder of 64-bit patterns, unsigned."""
    quotient = (((x >> 1) & (2**63 - 1)) // divisor) << 1
    rest = x - quotient * divisor
    more = (rest < 0) | (rest >= divisor)
    return quotient + more.long(), torch.where(more, rest - divisor, rest)


def _keys(ids: Tensor, kind: int, a: int, b: int, p: int) -> Tensor:
    """Keys of int64 ids as 64-bit patterns."""
    if kind < _RADIX:
        return reference.hash_keys(ids, kind, a, b + 1, 2**32)[:, b]
    if kind == _RADIX:
        return _divide(ids, a)[0]
    exact = [(a * (one % 2**64) + b) % p for one in ids.tolist()]  # torch has no 128-bit integers
    return torch.tensor(exact, dtype=torch.int64, device=ids.device)


def _features(
    ids: Tensor, offsets: Tensor | None, count: int
) -> list[tuple[Tensor, Tensor | None, Tensor]]:
    """For each feature its positions among all ids, its offsets and the bags of its ids."""
    if offsets is None:
        positions = torch.arange(ids.shape[0], device=ids.device)
        return [(own := positions[f::count], None, own // count) for f in range(count)]
    bags = (offsets.shape[0] - 1) // count
    result: list[tuple[Tensor, Tensor | None, Tensor]] = []
    for f in range(count):
        own = offsets[f * bags : (f + 1) * bags + 1].long()
        positions = torch.arange(int(own[0]), int(own[-1]), device=ids.device)
        numbers = torch.arange(bags, device=ids.device)
        result.append((positions, own, torch.repeat_interleave(numbers, own.diff())))
    return result


def check_limits(
    ids: Tensor, offsets: Tensor | None, parts: list[int], padding_id: int | None
) -> None:
    """Raise for ids that some part of their feature can't tell apart from others."""
    fields = [parts[i : i + FIELDS] for i in range(0, len(parts), FIELDS)]
    features = _features(ids, offsets, fields[-1][0] + 1)
    for f, _, _, _, _, _, limit, *_ in fields:
        own = ids[features[f][0]]
        outside = (own < 0) | (own >= limit)
        if padding_id is not None:
            outside &= own != padding_id
        if limit and outside.any():
            raise ValueError(
                f"ids of feature {f} must be 0 to {limit - 1}, got {int(own[outside][0])}"
            )


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
    """Composed vectors of bags, and the ids that a maximum came from; csrc/tables/compose.h."""
    check_limits(ids, offsets, parts, padding_id)
    fields = [parts[i : i + FIELDS] for i in range(0, len(parts), FIELDS)]
    count = fields[-1][0] + 1
    dtype = torch.float64 if table.dtype == torch.float64 else torch.float32
    bags = ids.shape[0] // count if offsets is None else (offsets.shape[0] - 1) // count
    columns, winners = [], []
    for f, (positions, _, bag_of) in enumerate(_features(ids, offsets, count)):
        own = ids[positions]
        used = (
            own != padding_id if padding_id is not None else torch.ones_like(own, dtype=torch.bool)
        )
        slots: dict[int, list[Tensor]] = {}
        for number, part in enumerate(part for part in fields if part[0] == f):
            _, kind, a, b, p, rows, _, base, stride, width, column, signed = part
            keys = _keys(own, kind, a, b, p)
            row = _divide(keys, rows)[1]
            index = base + (row * stride)[:, None] + torch.arange(width, device=ids.device)
            values = table[index].to(dtype)
            if signed:
                values = torch.where((keys >> 31 & 1 == 1)[:, None], -values, values)
            if weights is not None and weights.dim() == 2:
                values = values * weights[positions, number, None]
            slots.setdefault(column, []).append(values)
        combined = []
        for slot in slots.values():
            total = slot[0]
            for other in slot[1:]:
                total = total * other if combine == _PRODUCT else total + other
            combined.append(total / len(slot) if combine == _MEAN else total)
        vectors = torch.cat(combined, 1)
        if weights is not None and weights.dim() == 1:
            vectors = vectors * weights[positions, None]
        where = bag_of[used]
        vectors = vectors[used]
        pooled = vectors.new_zeros(bags, vectors.shape[1])
        if bag_mode == _BAG_MAX:
            pooled, winner = _first_maximum(vectors, where, positions[used], bags)
            winners.append(winner)
        else:
            pooled = pooled.index_add(0, where, vectors)
            if bag_mode == _BAG_MEAN:
                sizes = torch.bincount(where, minlength=bags).clamp(min=1)
                pooled = pooled / sizes[:, None]
        columns.append(pooled)
    out = torch.cat(columns, 1)
    argmax = torch.cat(winners, 1) if winners else ids.new_empty(0, out.shape[1], dtype=torch.int32)
    return out.to(table.dtype), argmax


def _first_maximum(
    vectors: Tensor, bag_of: Tensor, positions: Tensor, bags: int
) -> tuple[Tensor, Tensor]:
    """Maxima of bags, zero for empty ones, and the position of the first id that has each."""
    out, winners = [], []
    for b in range(bags):
        mine = (bag_of == b).nonzero()[:, 0]
        if len(mine) == 0:
            out.append(vectors.new_zeros(vectors.shape[1]))
            winners.append(torch.full_like(out[-1], -1, dtype=torch.int32))
            continue
        best = vectors[mine].amax(0)
        first = (vectors[mine] == best).int().argmax(0)
        out.append(vectors[mine].gather(0, first[None])[0])
        winners.append(positions[mine][first].int())
    if not out:
        empty = vectors.new_zeros(0, vectors.shape[1])
        return empty, empty.int()
    return torch.stack(out), torch.stack(winners)


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
    """Gradients of :func:`compose_bag` with respect to the table and the weights, flat."""
    dtype = torch.float64 if table.dtype == torch.float64 else torch.float32
    with torch.enable_grad():
        wide = table.detach().to(dtype).requires_grad_()
        leaf = None if weights is None else weights.detach().clone().requires_grad_()
        out, _ = compose_bag(ids, wide, offsets, leaf, parts, combine, bag_mode, padding_id)
        wanted = [wide] if leaf is None else [wide, leaf]
        grads = (
            torch.autograd.grad(out, wanted, grad_out.to(dtype), allow_unused=True)
            if out.requires_grad
            else [None for _ in wanted]  # maxima over no ids at all
        )
    found = [
        torch.zeros_like(leaf) if grad is None else grad
        for leaf, grad in zip(wanted, grads, strict=True)
    ]
    nothing = wide.detach().new_empty(0)
    return (
        found[0].to(table.dtype) if need_table else table.detach().new_empty(0),
        found[1].flatten() if need_weights else nothing,
    )


def _rows_in_use(
    ids: Tensor, offsets: Tensor | None, parts: list[int], padding_id: int | None
) -> dict[tuple[int, int], Tensor]:
    """Rows that the ids use, rising, of each table: (base, width) -> numbers."""
    fields = [parts[i : i + FIELDS] for i in range(0, len(parts), FIELDS)]
    features = _features(ids, offsets, fields[-1][0] + 1)
    rows: dict[tuple[int, int], list[Tensor]] = {}
    for f, kind, a, b, p, count, _, base, _, width, _, _ in fields:
        own = ids[features[f][0]]
        own = own if padding_id is None else own[own != padding_id]
        row = _divide(_keys(own, kind, a, b, p), count)[1]
        rows.setdefault((base, width), []).append(row)
    return {table: torch.cat(numbers).unique() for table, numbers in rows.items()}


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
    """Gradient of the one table as its rows in use; the rest of the arrays is zero."""
    grad, _ = compose_bag_backward(
        grad_out, ids, table, offsets, weights, argmax, parts, combine, bag_mode, padding_id,
        True, False,
    )  # fmt: skip
    (((base, width), used),) = _rows_in_use(ids, offsets, parts, padding_id).items()
    fields = [parts[i : i + FIELDS] for i in range(0, len(parts), FIELDS)]
    most = _most_lookups(ids, offsets, fields)
    rows = ids.new_zeros(most)
    values = table.new_zeros(most, width)
    rows[: len(used)] = used
    values[: len(used)] = grad[base:][: grad[base:].numel() // width * width].view(-1, width)[used]
    return rows, values, ids.new_tensor([len(used)])


def _most_lookups(ids: Tensor, offsets: Tensor | None, fields: list[list[int]]) -> int:
    counts = [len(own) for own, _, _ in _features(ids, offsets, fields[-1][0] + 1)]
    return sum(counts[field[0]] for field in fields)


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
    """One step of an optimizer on the rows in use, in place; see ``emblas.tables.optim``."""
    dtype = torch.float64 if table.dtype == torch.float64 else torch.float32
    wide = table.detach().to(dtype)
    arguments = (offsets, weights, argmax, parts, combine, bag_mode, padding_id, True, False)
    grad, _ = compose_bag_backward(grad_out.to(dtype), ids, wide, *arguments)
    step += 1
    now, first_row = int(step), 0
    for (base, width), used in sorted(_rows_in_use(ids, offsets, parts, padding_id).items()):
        fields = [parts[i : i + FIELDS] for i in range(0, len(parts), FIELDS)]
        rows = max(f[5] for f in fields if (f[7], f[9]) == (base, width))
        region = slice(base, base + rows * width)
        w, g = wide[region].view(rows, width)[used], grad[region].view(rows, width)[used]
        numbers = first_row + used
        first_row += rows
        views: Any = [state[region].view(rows, width) if state.numel() == table.numel() else None
                      for state in (first, second)]  # fmt: skip
        if optimizer != ADAM:
            g = g + weight_decay * w
        if optimizer == SGD:
            w = w - learning_rate * g
        elif optimizer == ROW_WISE_ADAGRAD:
            first[numbers] += g.square().mean(1)
            w = w - learning_rate * g / (first[numbers].sqrt() + epsilon)[:, None]
        elif optimizer == ADAGRAD:
            views[0][used] += g.square()
            w = w - learning_rate * g / (views[0][used].sqrt() + epsilon)
        else:
            elapsed = (now - last_step[numbers]).to(dtype)[:, None]
            last_step[numbers] = now
            views[0][used] = beta1**elapsed * views[0][used] + (1 - beta1) * g
            views[1][used] = beta2**elapsed * views[1][used] + (1 - beta2) * g.square()
            denominator = (views[1][used] / (1 - beta2**now)).sqrt() + epsilon
            shrink = (1 - learning_rate * weight_decay) ** elapsed
            w = shrink * w - learning_rate / (1 - beta1**now) * views[0][used] / denominator
        table[region].view(rows, width)[used] = w.to(table.dtype)
