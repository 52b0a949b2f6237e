"""The table operators: tracing, gradient, routing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emblas._op import Op, check_offsets, needs_grad, use_reference
from emblas.tables import reference
from emblas.tables.spec import TableSpec


def _hash_keys_fake(
    ids: Tensor, family: int, seed: int, num_hashes: int, num_embeddings: int
) -> Tensor:
    return ids.new_empty(ids.shape[0], num_hashes)


def _hash_bag_fake(
    ids: Tensor,
    table: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    family: int,
    seed: int,
    num_hashes: int,
    padding_id: int | None,
) -> Tensor:
    bags = ids.shape[0] if offsets is None else offsets.shape[0] - 1
    return table.new_empty(bags, table.shape[1])


def _hash_bag_backward_fake(
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
    dtype = torch.float64 if table.dtype == torch.float64 else torch.float32
    return (
        table.new_empty(table.shape[0] if need_table else 0, table.shape[1]),
        table.new_empty(ids.shape[0] if need_weights else 0, dtype=dtype),
    )


def _check_values(ids: Tensor, table: Tensor, offsets: Tensor | None, *others: Any) -> None:
    if offsets is not None:
        check_offsets("offsets", offsets, ids.shape[0], "ids")


def _cuda_backward_supports(
    grad_out: Tensor,
    ids: Tensor,
    table: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    family: int,
    seed: int,
    num_hashes: int,
    *others: Any,
) -> bool:
    # Rows and lookups are numbered by 32 bits.
    return table.shape[0] < 2**31 and ids.shape[0] * num_hashes < 2**31


_hash_keys = Op(
    "hash_keys",
    reference=reference.hash_keys,
    fake=_hash_keys_fake,
    triton="emblas.tables.triton",
)
_hash_bag = Op(
    "hash_bag",
    reference=reference.hash_bag,
    fake=_hash_bag_fake,
    backward="hash_bag_backward",
    triton="emblas.tables.triton",
    check_values=_check_values,
)
_hash_bag_backward = Op(
    "hash_bag_backward",
    reference=reference.hash_bag_backward,
    fake=_hash_bag_backward_fake,
    triton="emblas.tables.triton",
    cuda_supports=_cuda_backward_supports,
)


class _HashBag(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        table: Tensor,
        offsets: Tensor | None,
        weights: Tensor | None,
        *hashing: int | None,
    ) -> Tensor:
        ctx.save_for_backward(ids, table, offsets, weights)
        ctx.hashing = hashing
        return _hash_bag(ids, table, offsets, weights, *hashing)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        _, need_table, _, need_weights, *others = ctx.needs_input_grad
        grad_table, grad_weights = _hash_bag_backward(
            grad_out.contiguous(), *ctx.saved_tensors, *ctx.hashing, need_table, need_weights
        )
        return (
            None,
            grad_table if need_table else None,
            None,
            grad_weights if need_weights else None,
            *(None for _ in others),
        )


def hash_keys(ids: Tensor, spec: TableSpec) -> Tensor:
    """Hash checked arguments; see :func:`emblas.tables.hash_keys`."""
    run = reference.hash_keys if use_reference() else _hash_keys
    return run(ids, spec.family, spec.seed, spec.num_hashes, spec.num_embeddings)


def hash_bag(
    ids: Tensor,
    table: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    spec: TableSpec,
    padding_id: int | None,
) -> Tensor:
    """Look up checked arguments; see :func:`emblas.tables.hash_bag`."""
    hashing = (spec.family, spec.seed, spec.num_hashes, padding_id)
    if use_reference():
        return reference.hash_bag(ids, table, offsets, weights, *hashing)
    if needs_grad(table, weights):
        return _HashBag.apply(ids, table, offsets, weights, *hashing)
    return _hash_bag(ids, table, offsets, weights, *hashing)
