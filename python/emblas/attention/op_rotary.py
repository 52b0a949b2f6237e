"""Rotary position embedding as operators: tracing, gradient and routing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding

from emblas._op import Op, needs_grad, rows, use_reference
from emblas.attention import reference


def _fake(
    x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool
) -> Tensor:
    return x.new_empty(x.shape)


def _in_place_fake(*args: Any) -> None:
    return None


def _check_values(
    x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool
) -> None:
    if position_ids is None:
        if len(cos) != len(x):
            raise ValueError("cos and sin must have a row per token without position_ids")
    elif ((position_ids < 0) | (position_ids >= len(cos))).any():
        raise ValueError("position_ids must be rows of cos and sin")


_rotary = Op(
    "rotary",
    reference=reference.rotary,
    fake=_fake,
    triton="emblas.attention.triton",
    check_values=_check_values,
    backward="rotary_backward",
)
_rotary_backward = Op(
    "rotary_backward",
    reference=reference.rotary_backward,
    fake=_fake,
    triton="emblas.attention.triton",
    check_values=_check_values,
)
_rotary_in_place = Op(
    "rotary_",
    reference=reference.rotary_,
    fake=_in_place_fake,
    triton="emblas.attention.triton",
    check_values=_check_values,
    backward="rotary_backward",
)


def _pairs(x: Tensor, tables: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Return the elements (tokens, heads, pairs) that turn, in the dtype of the tables."""
    pairs = tables.shape[1]
    turned = x[..., : 2 * pairs].to(tables.dtype)
    if interleaved:
        return turned[..., 0::2], turned[..., 1::2]
    return turned[..., :pairs], turned[..., pairs:]


class _Rotary(torch.autograd.Function):
    """Tables that need a gradient have a row for each token, see :func:`_row_per_token`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        position_ids: Tensor | None,
        interleaved: bool,
        in_place: bool,
    ) -> Tensor:
        kept = None
        if any(ctx.needs_input_grad[1:3]):
            kept = x.clone() if in_place else x
        ctx.save_for_backward(cos, sin, position_ids, kept)
        ctx.interleaved = interleaved
        if not in_place:
            return _rotary(x, cos, sin, position_ids, interleaved)
        _rotary_in_place(x, cos, sin, position_ids, interleaved)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, position_ids, x = ctx.saved_tensors
        grad_x = grad_cos = grad_sin = None
        if ctx.needs_input_grad[0]:
            grad_x = _rotary_backward(rows(grad_out), cos, sin, position_ids, ctx.interleaved)
        if x is not None:
            a, b = _pairs(x, cos, ctx.interleaved)
            grad_a, grad_b = _pairs(grad_out, cos, ctx.interleaved)
            grad_cos = (a * grad_a + b * grad_b).sum(1)
            grad_sin = (a * grad_b - b * grad_a).sum(1)
        return grad_x, grad_cos, grad_sin, None, None, None


def _row_per_token(
    x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Lay out tables that need a gradient by token, so that torch adds the tokens of a row."""
    if position_ids is None or not needs_grad(cos, sin):
        return cos, sin, position_ids
    if not x.is_cuda and not torch.compiler.is_compiling():
        _check_values(x, cos, sin, position_ids, False)
    return embedding(position_ids, cos), embedding(position_ids, sin), None


def rotary(
    x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool
) -> Tensor:
    """Rotate checked arguments; see :func:`emblas.attention.rotary`."""
    if use_reference():
        return reference.rotary(x, cos, sin, position_ids, interleaved)
    if needs_grad(x, cos, sin):
        tables = _row_per_token(x, cos, sin, position_ids)
        return _Rotary.apply(x, *tables, interleaved, False)
    return _rotary(x, cos, sin, position_ids, interleaved)


def rotary_(
    x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool
) -> Tensor:
    """Rotate checked arguments in place; see :func:`emblas.attention.rotary_`."""
    if use_reference():
        reference.rotary_(x, cos, sin, position_ids, interleaved)
        return x
    if needs_grad(x, cos, sin):
        tables = _row_per_token(x, cos, sin, position_ids)
        return _Rotary.apply(x, *tables, interleaved, True)
    _rotary_in_place(x, cos, sin, position_ids, interleaved)
    return x
