"""The public function: arguments are checked here, by name."""

from __future__ import annotations

import torch
from torch import Tensor

from emblas import _op
from emblas.linear import op, reference

ACTIVATIONS = tuple(reference.ACTIVATIONS)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """Multiply the tokens of a packed batch with a weight, and what follows on it in one pass.

    Parameters
    ----------
    x : Tensor
        ``(rows, depth)``, float32 or float64 (bfloat16 and float16 by torch).
    weight : Tensor
        ``(columns, depth)``, of the dtype of ``x``.
    bias : Tensor, optional
        ``(columns,)``, of the dtype of ``x``; default: zeros.
    activation : {"none", "relu", "gelu", "gelu_tanh", "silu"}, default "none"
        What the sums go through: ``f``. ``gelu_tanh`` is GELU approximated by tanh (Hendrycks
        and Gimpel 2016, arXiv 1606.08415, section 2).
    residual : Tensor, optional
        ``(rows, columns)``, of the dtype of ``x``: what is added in the end; default: zeros.

    Returns
    -------
    Tensor
        ``(rows, columns)``: ``f(x @ weight.T + bias) + residual``.

    Raises
    ------
    TypeError
        If an argument is no tensor or of another dtype.
    ValueError
        If shapes or devices don't fit together, or there is no such activation.

    Notes
    -----
    A row of the result has the same bits in every batch and with any number of threads, which is
    not so for :func:`torch.nn.functional.linear`. That one runs where a gradient is wanted, on
    other devices and for 16-bit dtypes.

    Weights are packed for the kernel anew in each call, which costs as much as 7 to 30 further
    rows: nothing is kept that could be stale.

    Examples
    --------
    >>> linear(torch.eye(2), torch.tensor([[1.0, 2.0]]), torch.ones(1))
    tensor([[2.],
            [3.]])
    """
    _op.check_tensor("x", x, ndim=2, dtypes=_op.FLOATS)
    _op.check_tensor("weight", weight, ndim=2, dtypes=(x.dtype,), device=x.device)
    if weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"weight must have {x.shape[1]} elements in a row, as x has, got shape "
            f"{tuple(weight.shape)}"
        )
    if bias is not None:
        _op.check_tensor("bias", bias, ndim=1, dtypes=(x.dtype,), device=x.device)
        if bias.shape[0] != weight.shape[0]:
            raise ValueError(f"bias must have {weight.shape[0]} elements, got {bias.shape[0]}")
    if residual is not None:
        _op.check_tensor("residual", residual, ndim=2, dtypes=(x.dtype,), device=x.device)
        if residual.shape != (x.shape[0], weight.shape[0]):
            raise ValueError(
                f"residual must have shape {(x.shape[0], weight.shape[0])}, as the result has, got "
                f"{tuple(residual.shape)}"
            )
    _op.check_choice("activation", activation, ACTIVATIONS)
    number = ACTIVATIONS.index(activation)
    if (
        x.device.type != "cpu"
        or x.dtype not in (torch.float32, torch.float64)
        or _op.use_reference()
        or _op.needs_grad(x, weight, bias, residual)
    ):
        return reference.linear(x, weight, bias, residual, number)
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else _op.rows(residual)
    return op.linear(_op.rows(x), _op.rows(weight), bias, residual, number)
