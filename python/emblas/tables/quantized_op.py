"""The quantized table operators: specification, tracing, gradient, routing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emblas._op import Op, check_offsets, needs_grad, use_reference
from emblas.tables.compose_op import MODES
from emblas.tables.packed_codes import unpack_codes
from emblas.tables.reference import bag_of


def _check_ids(ids: Tensor, rows: int, padding_id: int | None) -> None:
    outside = (ids < 0) | (ids >= rows)
    if padding_id is not None:
        outside &= ids != padding_id
    if outside.any():
        raise ValueError(f"ids must be 0 to {rows - 1}, got {int(ids[outside][0])}")


def _rows(
    ids: Tensor,
    packed: Tensor,
    scale: Tensor,
    bits: int,
    dim: int,
    padding_id: int | None,
    zero_point: Tensor | None,
) -> Tensor:
    """Rows of all ids as numbers, zero for the padding id."""
    used = torch.ones_like(ids, dtype=torch.bool) if padding_id is None else ids != padding_id
    dtype = torch.float64 if scale.dtype == torch.float64 else torch.float32
    rows = torch.zeros(ids.shape[0], dim, dtype=dtype, device=ids.device)
    codes = unpack_codes(packed[ids[used]], bits, dim)
    zero = 2 ** (bits - 1) if zero_point is None else zero_point[ids[used], None]
    rows[used] = (codes - zero) * scale.to(dtype)[ids[used], None]
    return rows


def reference(
    ids: Tensor,
    packed: Tensor,
    scale: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    bits: int,
    dim: int,
    mode: int,
    padding_id: int | None,
    zero_point: Tensor | None = None,
) -> Tensor:
    """Rows of integers times their scales, pooled in bags; see ``csrc/tables/quantized.h``."""
    _check_ids(ids, packed.shape[0], padding_id)
    rows = _rows(ids, packed, scale, bits, dim, padding_id, zero_point)
    if weights is not None:
        rows = rows * weights[:, None]
    if offsets is None:
        return rows.to(scale.dtype)
    used = torch.ones_like(ids, dtype=torch.bool) if padding_id is None else ids != padding_id
    where = bag_of(ids, offsets)[used]
    out = rows.new_zeros(offsets.shape[0] - 1, dim)
    if MODES[mode] == "max":
        index = where[:, None].expand(-1, dim)
        out = out.scatter_reduce(0, index, rows[used], "amax", include_self=False)
    else:
        out = out.index_add(0, where, rows[used])
    if MODES[mode] == "mean":
        out = out / torch.bincount(where, minlength=len(out)).clamp(min=1)[:, None]
    return out.to(scale.dtype)


def reference_backward(
    grad_out: Tensor,
    ids: Tensor,
    packed: Tensor,
    scale: Tensor,
    offsets: Tensor | None,
    bits: int,
    dim: int,
    padding_id: int | None,
    zero_point: Tensor | None = None,
) -> Tensor:
    """Gradient of the weights, which stand inside a sum."""
    rows = _rows(ids, packed, scale, bits, dim, padding_id, zero_point)
    return (rows * grad_out.to(rows.dtype)[bag_of(ids, offsets)]).sum(1)


def _fake(
    ids: Tensor,
    packed: Tensor,
    scale: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    bits: int,
    dim: int,
    mode: int,
    padding_id: int | None,
    zero_point: Tensor | None = None,
) -> Tensor:
    return scale.new_empty(ids.shape[0] if offsets is None else offsets.shape[0] - 1, dim)


def _backward_fake(
    grad_out: Tensor,
    ids: Tensor,
    packed: Tensor,
    scale: Tensor,
    offsets: Tensor | None,
    bits: int,
    dim: int,
    padding_id: int | None,
    zero_point: Tensor | None = None,
) -> Tensor:
    dtype = torch.float64 if scale.dtype == torch.float64 else torch.float32
    return scale.new_empty(ids.shape[0], dtype=dtype)


def _check_values(
    ids: Tensor,
    packed: Tensor,
    scale: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    bits: int,
    dim: int,
    mode: int,
    padding_id: int | None,
    zero_point: Tensor | None = None,
) -> None:
    if offsets is not None:
        check_offsets("offsets", offsets, ids.shape[0], "ids")
    _check_ids(ids, packed.shape[0], padding_id)


_quantized_bag = Op(
    "quantized_bag",
    reference=reference,
    fake=_fake,
    backward="quantized_bag_backward",
    triton="emblas.tables.triton",
    check_values=_check_values,
)
_backward = Op(
    "quantized_bag_backward",
    reference=reference_backward,
    fake=_backward_fake,
    triton="emblas.tables.triton",
)


class _QuantizedBag(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        packed: Tensor,
        scale: Tensor,
        offsets: Tensor | None,
        weights: Tensor,
        bits: int,
        dim: int,
        padding_id: int | None,
        zero_point: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(ids, packed, scale, offsets, zero_point)
        ctx.layout = bits, dim, padding_id
        sum_of_bags = MODES.index("sum")
        return _quantized_bag(
            ids, packed, scale, offsets, weights, bits, dim, sum_of_bags, padding_id, zero_point
        )

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        *table, zero_point = ctx.saved_tensors
        grad_weights = _backward(grad_out.contiguous(), *table, *ctx.layout, zero_point)
        return None, None, None, None, grad_weights, None, None, None, None


def quantized_bag(
    ids: Tensor,
    packed: Tensor,
    scale: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    bits: int,
    dim: int,
    mode: str,
    padding_id: int | None,
    zero_point: Tensor | None,
) -> Tensor:
    """Look up checked arguments; see :func:`emblas.tables.quantized_bag`."""
    scale = scale.detach()
    zero_point = None if zero_point is None else zero_point.detach()
    if weights is not None and needs_grad(weights) and not use_reference():
        return _QuantizedBag.apply(
            ids, packed, scale, offsets, weights, bits, dim, padding_id, zero_point
        )
    call = reference if use_reference() else _quantized_bag
    number = MODES.index(mode)
    return call(ids, packed, scale, offsets, weights, bits, dim, number, padding_id, zero_point)
