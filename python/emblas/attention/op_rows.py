"""Chosen rows of attention as operators: tracing, gradient and routing.

Products of chosen vectors with the tokens that they meet; each operator's gradients are the two
others. The formulas stand in ``csrc/attention/attention_rows.h``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emblas import _op
from emblas._op import Op, needs_grad
from emblas.attention import reference


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check_values(*args: Any) -> None:
    rows, cu_seqlens = args[2], args[3]
    if (rows >= cu_seqlens[-1]).any():
        raise ValueError("rows must be less than the number of tokens")


def _dots_fake(x: Tensor, y: Tensor, rows: Tensor, cu_seqlens: Tensor, max_length: int) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], max_length, dtype=_accumulator(x))


def _sums_fake(s: Tensor, y: Tensor, rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    return y.new_empty(s.shape[0], s.shape[1], y.shape[2])


def _outer_fake(
    s: Tensor, x: Tensor, rows: Tensor, cu_seqlens: Tensor, tokens: int, key_heads: int
) -> Tensor:
    return s.new_empty(tokens, key_heads, x.shape[2])


_dots = Op(
    "row_dots",
    reference=reference.row_dots,
    fake=_dots_fake,
    triton="emblas.attention.triton",
    check_values=_check_values,
    backward="row_outer",
)
_sums = Op(
    "row_sums",
    reference=reference.row_sums,
    fake=_sums_fake,
    triton="emblas.attention.triton",
    check_values=_check_values,
    backward="row_outer",
)
_outer = Op(
    "row_outer",
    reference=reference.row_outer,
    fake=_outer_fake,
    triton="emblas.attention.triton",
)


class _Dots(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, rows: Tensor, cu_seqlens: Tensor, max_length: int
    ) -> Tensor:
        ctx.save_for_backward(x, y, rows, cu_seqlens)
        return _dots(x, y, rows, cu_seqlens, max_length)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, *of_rows = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = _sums(grad, y, *of_rows) if ctx.needs_input_grad[0] else None
        grad_y = None
        if ctx.needs_input_grad[1]:
            grad_y = _outer(grad, x, *of_rows, y.shape[0], y.shape[1]).to(y.dtype)
        return grad_x, grad_y, None, None, None


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, s: Tensor, y: Tensor, rows: Tensor, cu_seqlens: Tensor) -> Tensor:
        ctx.save_for_backward(s, y, rows, cu_seqlens)
        return _sums(s, y, rows, cu_seqlens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        s, y, *of_rows = ctx.saved_tensors
        grad = _op.rows(grad)
        grad_s = _dots(grad, y, *of_rows, s.shape[2]) if ctx.needs_input_grad[0] else None
        grad_y = None
        if ctx.needs_input_grad[1]:
            grad_y = _outer(s, grad, *of_rows, y.shape[0], y.shape[1]).to(y.dtype)
        return grad_s, grad_y, None, None


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, rows: Tensor, cu_seqlens: Tensor, ones: Tensor) -> Tensor:
        largest = scores.amax(2, keepdim=True)
        exponentials = (scores - largest.masked_fill(largest == -torch.inf, 0)).exp()
        total = _sums(exponentials, ones, rows, cu_seqlens)
        weights = exponentials / total.masked_fill(total == 0, 1)
        ctx.save_for_backward(weights, rows, cu_seqlens, ones)
        return weights

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, rows, cu_seqlens, ones = ctx.saved_tensors
        along = _sums(weights * grad, ones, rows, cu_seqlens)
        return weights * (grad - along), None, None, None


def row_softmax(scores: Tensor, rows: Tensor, cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Return the softmax of each row, zeros where it has no score but -inf.

    torch's own sums in an order that depends on ``max_length``, and on threads in backward: here
    the bits of a row depend on its sequence alone.

    Parameters
    ----------
    scores : Tensor
        ``(rows, heads, max_length)``, float32 or float64; -inf where hidden, and beyond the
        sequence's end.
    rows, cu_seqlens
        As in :func:`row_dots`.
    tokens : int
        Of all sequences.

    Returns
    -------
    Tensor
        Like ``scores``.
    """
    if scores.shape[2] == 0:
        return scores
    ones = scores.new_ones(tokens, 1, 1)
    weights: Tensor = _Softmax.apply(scores, rows, cu_seqlens, ones)
    return weights


def row_dots(x: Tensor, y: Tensor, rows: Tensor, cu_seqlens: Tensor, max_length: int) -> Tensor:
    """Multiply the vectors of chosen rows with those of all tokens that they meet.

    Parameters
    ----------
    x : Tensor
        ``(rows, heads, dim)``.
    y : Tensor
        ``(tokens, key_heads, dim)``, of the dtype of ``x``; ``key_heads`` divides ``heads``.
    rows : Tensor
        int64 ``(rows,)``: the tokens whose vectors these are; each meets those of its sequence.
        Negative: nobody's, which meets none.
    cu_seqlens : Tensor
        int32 offsets ``(batch + 1,)`` of the sequences.
    max_length : int
        At least the longest sequence of a row.

    Returns
    -------
    Tensor
        ``(rows, heads, max_length)``, float32 (float64 for float64), 0 beyond the sequence's end.
    """
    arguments = (_op.rows(x), _op.rows(y), rows, cu_seqlens, max_length)
    if needs_grad(x, y):
        result: Tensor = _Dots.apply(*arguments)
        return result
    return _dots(*arguments)


def row_sums(s: Tensor, y: Tensor, rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum the vectors of the tokens that chosen rows meet, by weights.

    Parameters
    ----------
    s : Tensor
        Weights ``(rows, heads, max_length)``, float32 (float64 where ``y`` is).
    y, rows, cu_seqlens
        As in :func:`row_dots`.

    Returns
    -------
    Tensor
        ``(rows, heads, dim)``, of the dtype of ``y``.
    """
    arguments = (s.contiguous(), _op.rows(y), rows, cu_seqlens)
    if needs_grad(s, y):
        result: Tensor = _Sums.apply(*arguments)
        return result
    return _sums(*arguments)
