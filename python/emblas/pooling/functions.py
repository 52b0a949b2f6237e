"""The public functions of pooling: arguments are checked here, by name."""

from __future__ import annotations

import torch
from torch import Tensor

from emblas import _op
from emblas.pooling import op

MODES = ("mean",)


def segment_pool(
    x: Tensor,
    cu_seqlens: Tensor | None = None,
    mode: str = "mean",
    *,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    normalize: bool = False,
) -> Tensor:
    """Pool the token vectors of every sequence into one vector.

    A sequence without tokens, or whose weights sum to zero, gives the zero vector and receives no
    gradient.

    Parameters
    ----------
    x : Tensor
        Token vectors: packed ``(tokens, dim)`` with ``cu_seqlens``, or padded
        ``(batch, length, dim)`` with ``mask``. float32, float64, bfloat16 or float16; sums are kept
        in float32 (float64 for float64). Padded input is read in place; tokens may be any stride
        apart.
    cu_seqlens : Tensor, optional
        Offsets ``(batch + 1,)``, int32 or int64: sequence ``b`` owns the tokens
        ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``. The first is 0, the last is the number of
        tokens, and they never decrease.
    mode : {"mean"}, default "mean"
        ``mean``: the (weighted) mean of the tokens.
    mask : Tensor, optional
        ``(batch, length)``, bool or number: the padded counterpart of ``cu_seqlens``. Tokens where
        it is 0 are not read. Holes and padding on either side are legal.
    weights : Tensor, optional
        Weight of each token, ``(tokens,)`` or ``(batch, length)``; default 1. Gradients flow to
        floating-point weights.
    normalize : bool, default False
        Divide each result by its Euclidean length (at least 1e-12).

    Returns
    -------
    Tensor
        ``(batch, dim)``, in the dtype of ``x``. The bits of a row depend on its own sequence only,
        not on the rest of the batch nor on the number of threads.

    Raises
    ------
    TypeError
        If an argument has the wrong type or dtype.
    ValueError
        If shapes, devices or offsets don't fit together, or not exactly one of ``cu_seqlens`` and
        ``mask`` is given.

    Notes
    -----
    Normalizing follows ``torch.nn.functional.normalize``. Forward and backward formulas stand in
    ``csrc/pooling/pooling.h``. ``torch.func`` transforms are not supported.

    Examples
    --------
    >>> x = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]])
    >>> segment_pool(x, torch.tensor([0, 2, 3]))
    tensor([[2., 0.],
            [0., 2.]])
    """
    _op.check_choice("mode", mode, MODES)
    if (cu_seqlens is None) == (mask is None):
        raise ValueError("give either cu_seqlens (packed x) or mask (padded x), not both or none")
    _op.check_tensor("x", x, ndim=2 if mask is None else 3, dtypes=_op.FLOATS)
    if mask is None:
        tokens = x.shape[:1]
        offsets = _op.offsets("cu_seqlens", cu_seqlens, x.device)
    else:
        _op.check_tensor("mask", mask, ndim=2, device=x.device)
        tokens = x.shape[:2]
        if mask.shape != tokens:
            raise ValueError(
                f"mask must have the shape (batch, length) of x, {tuple(tokens)}, "
                f"got {tuple(mask.shape)}"
            )
        batch, length = tokens
        offsets = torch.arange(batch + 1, dtype=torch.int32, device=x.device) * length
    if weights is not None:
        _op.check_tensor("weights", weights, device=x.device)
        if weights.shape != tokens:
            raise ValueError(
                f"weights must have one value per token of x, {tuple(tokens)}, "
                f"got {tuple(weights.shape)}"
            )
    token_weights = weights
    if mask is not None:
        token_weights = mask if weights is None else mask * weights
    if token_weights is not None:
        accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
        token_weights = token_weights.reshape(-1).to(accumulator).contiguous()
    return op.segment_pool(_op.rows(x.flatten(0, -2)), offsets, token_weights, normalize)
