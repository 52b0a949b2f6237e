"""The composed table operators: tracing, gradient, routing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from emblas._op import Op, check_offsets, needs_grad, use_reference
from emblas.tables import compose_reference as reference
from emblas.tables.composition import (
    COMBINES,
    FIELDS,
    Composition,
    rows_are_apart,
    tables_of,
)

if TYPE_CHECKING:
    from emblas.tables.optim import FusedOptimizer

MODES = ("sum", "mean", "max")  # in the order of csrc/tables/compose.h


def _sizes(ids: Tensor, offsets: Tensor | None, parts: list[int]) -> tuple[int, int]:
    """Return the shape of the result: bags and columns."""
    features = parts[-FIELDS] + 1
    bags = ids.shape[0] // features if offsets is None else (offsets.shape[0] - 1) // features
    return bags, parts[-3] + parts[-2]


def _compose_bag_fake(
    ids: Tensor,
    table: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    parts: list[int],
    combine: int,
    bag_mode: int,
    padding_id: int | None,
) -> tuple[Tensor, Tensor]:
    bags, dim = _sizes(ids, offsets, parts)
    has_maximum = MODES[bag_mode] == "max"
    return table.new_empty(bags, dim), table.new_empty(
        bags if has_maximum else 0, dim, dtype=torch.int32
    )


def _backward_fake(
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
    dtype = torch.float64 if table.dtype == torch.float64 else torch.float32
    return (
        table.new_empty(table.numel() if need_table else 0),
        table.new_empty(weights.numel() if need_weights and weights is not None else 0,
                        dtype=dtype),
    )  # fmt: skip


def _backward_rows_fake(
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
    features = parts[-FIELDS] + 1
    most: Any
    if offsets is None or features == 1:
        most = ids.shape[0] // features * (len(parts) // FIELDS)
    else:  # how the ids are shared out among the features is in the offsets
        most = torch.library.get_ctx().new_dynamic_size()
    return (
        ids.new_empty(most),
        table.new_empty(most, parts[-3]),
        ids.new_empty(1),
    )


def _update_fake(*args: Any) -> None:
    return None


def _check_values(
    ids: Tensor,
    table: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    parts: list[int],
    combine: int,
    bag_mode: int,
    padding_id: int | None,
) -> None:
    if offsets is not None:
        check_offsets("offsets", offsets, ids.shape[0], "ids")
    reference.check_limits(ids, offsets, parts, padding_id)


def _cuda_supports(
    ids: Tensor,
    table: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    parts: list[int],
    *others: Any,
) -> bool:
    # Parts travel in the arguments of the kernels. Rows and ids are numbered by 32 bits.
    rows = sum(rows for _, rows in tables_of(parts))
    return len(parts) <= 32 * FIELDS and rows < 2**31 - 1 and ids.shape[0] < 2**31


def _cuda_backward_supports(
    grad_out: Tensor,
    ids: Tensor,
    table: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    argmax: Tensor | None,
    parts: list[int],
    *others: Any,
) -> bool:
    # Rows that overlap would need a second pass.
    features = parts[::FIELDS]
    lookups = ids.shape[0] * max(features.count(f) for f in features)
    fits = _cuda_supports(ids, table, offsets, weights, parts)
    return fits and lookups < 2**31 and rows_are_apart(parts)


_compose_bag = Op(
    "compose_bag",
    reference=reference.compose_bag,
    fake=_compose_bag_fake,
    backward="compose_bag_backward",
    triton="emblas.tables.triton",
    cuda_supports=_cuda_supports,
    check_values=_check_values,
)
_backward = Op(
    "compose_bag_backward",
    reference=reference.compose_bag_backward,
    fake=_backward_fake,
    triton="emblas.tables.triton",
    cuda_supports=_cuda_backward_supports,
)
_backward_rows = Op(
    "compose_bag_backward_rows",
    reference=reference.compose_bag_backward_rows,
    fake=_backward_rows_fake,
    triton="emblas.tables.triton",
    cuda_supports=_cuda_backward_supports,
)
_update = Op(
    "compose_bag_update_",
    reference=reference.compose_bag_update_,
    fake=_update_fake,
    triton="emblas.tables.triton",
    cuda_supports=_cuda_backward_supports,
)


def _chosen(op: Op) -> Callable[..., Any]:
    return op.reference if use_reference() else op


class _ComposeBag(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        table: Tensor,
        offsets: Tensor | None,
        weights: Tensor | None,
        composition: tuple[Any, ...],
        sparse: bool,
        optimizer: FusedOptimizer | None,
    ) -> Tensor:
        out, argmax = _chosen(_compose_bag)(ids, table.view(-1), offsets, weights, *composition)
        ctx.save_for_backward(ids, table, offsets, weights, argmax)
        ctx.composition, ctx.sparse, ctx.optimizer = composition, sparse, optimizer
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        ids, table, offsets, weights, argmax = ctx.saved_tensors
        _, need_table, _, need_weights, *_ = ctx.needs_input_grad
        arguments = (
            grad_out.contiguous(), ids, table.view(-1), offsets, weights, argmax, *ctx.composition,
        )  # fmt: skip
        grad_table = grad_weights = None
        dense = need_table and not ctx.sparse and ctx.optimizer is None
        if dense or need_weights:
            flat_table, flat_weights = _chosen(_backward)(*arguments, dense, need_weights)
            grad_table = flat_table.view(table.shape) if dense else None
            grad_weights = flat_weights.view(weights.shape) if need_weights else None
        # The weights' gradient reads the table, so an optimizer comes after it.
        if need_table and ctx.optimizer is not None:
            with torch.no_grad():
                _chosen(_update)(*arguments, *ctx.optimizer.arguments(table))
        elif need_table and ctx.sparse:
            rows, values, count = _chosen(_backward_rows)(*arguments)
            used = int(count)
            grad_table = torch.sparse_coo_tensor(
                rows[None, :used], values[:used], table.shape, is_coalesced=True,
                check_invariants=False,
            )  # fmt: skip
        return None, grad_table, None, grad_weights, None, None, None


def compose_bag(
    ids: Tensor,
    table: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    composition: Composition,
    mode: str,
    padding_id: int | None,
    *,
    sparse: bool = False,
    optimizer: FusedOptimizer | None = None,
) -> Tensor:
    """Look up checked arguments; see :func:`emblas.tables.compose_bag`."""
    how = (
        composition.fields,
        COMBINES.index(composition.combine),
        MODES.index(mode),
        padding_id,
    )
    if needs_grad(table, weights):
        return _ComposeBag.apply(ids, table, offsets, weights, how, sparse, optimizer)
    return _chosen(_compose_bag)(ids, table.view(-1), offsets, weights, *how)[0]
