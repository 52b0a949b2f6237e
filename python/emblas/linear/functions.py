"""The public function: arguments are checked here, by name."""

from __future__ import annotations

import torch
from torch import Tensor

from emblas import _op
from emblas.linear import op, reference


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply the tokens of a packed batch with a weight.

    Parameters
    ----------
    x : Tensor
        ``(rows, depth)``, float32 or float64 (bfloat16 and float16 by torch).
    weight : Tensor
        ``(columns, depth)``, of the dtype of ``x``.
    bias : Tensor, optional
        ``(columns,)``, of the dtype of ``x``; default: zeros.

    Returns
    -------
    Tensor
        ``(rows, columns)``: ``x @ weight.T + bias``.

    Raises
    ------
    TypeError
        If an argument is no tensor or of another dtype.
    ValueError
        If shapes or devices don't fit together.

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
    if (
        x.device.type != "cpu"
        or x.dtype not in (torch.float32, torch.float64)
        or _op.use_reference()
        or _op.needs_grad(x, weight, bias)
    ):
        return reference.linear(x, weight, bias)
    bias = None if bias is None else bias.contiguous()
    return op.linear(_op.rows(x), _op.rows(weight), bias)
