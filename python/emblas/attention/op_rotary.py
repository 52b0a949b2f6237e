"""Rotary position embedding as operators: tracing, gradient and routing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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


class _Rotary(torch.autograd.Function):
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
        ctx.save_for_backward(cos, sin, position_ids)
        ctx.interleaved = interleaved
        if not in_place:
            return _rotary(x, cos, sin, position_ids, interleaved)
        _rotary_in_place(x, cos, sin, position_ids, interleaved)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, position_ids = ctx.saved_tensors
        grad = _rotary_backward(rows(grad_out), cos, sin, position_ids, ctx.interleaved)
        return grad, None, None, None, None, None


def rotary(
    x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool
) -> Tensor:
    """Rotate checked arguments; see :func:`emblas.attention.rotary`."""
    if use_reference():
        return reference.rotary(x, cos, sin, position_ids, interleaved)
    if needs_grad(x):
        return _Rotary.apply(x, cos, sin, position_ids, interleaved, False)
    return _rotary(x, cos, sin, position_ids, interleaved)


def rotary_(
    x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool
) -> Tensor:
    """Rotate checked arguments in place; see :func:`emblas.attention.rotary_`."""
    if use_reference():
        reference.rotary_(x, cos, sin, position_ids, interleaved)
        return x
    if needs_grad(x):
        return _Rotary.apply(x, cos, sin, position_ids, interleaved, True)
    _rotary_in_place(x, cos, sin, position_ids, interleaved)
    return x
