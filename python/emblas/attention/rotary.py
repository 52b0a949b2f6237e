"""Rotary position embedding of packed queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from emblas import _op
from emblas.attention import op_rotary
from emblas.attention.arguments import accumulator


def rotary_tables(
    inverse_frequencies: Tensor,
    length: int,
    *,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of the positions 0 to ``length - 1``, for :func:`rotary`.

    Parameters
    ----------
    inverse_frequencies : Tensor
        Angles ``(pairs,)`` that a pair turns by at each step, as
        :mod:`emblas.attention.frequencies` gives them; or ``(tables, pairs)``, for sequences that
        differ in theirs.
    length : int
        Number of positions.
    scale : float, default 1.0
        Factor of cosines and sines (YaRN).
    dtype : torch.dtype, default torch.float32
        Of the results. Angles are computed in float64.

    Returns
    -------
    cos, sin : Tensor
        ``(length, pairs)`` each; of several tables ``(tables * length, pairs)``, one after the
        other: a token at position p of table t has ``position_ids`` ``t * length + p``.

    Raises
    ------
    ValueError
        If ``inverse_frequencies`` isn't of one or two dimensions.
    """
    _op.check_tensor("inverse_frequencies", inverse_frequencies, dtypes=_op.FLOATS)
    if inverse_frequencies.dim() not in (1, 2):
        raise ValueError(
            "inverse_frequencies must have the shape (pairs,) or (tables, pairs), got "
            f"{tuple(inverse_frequencies.shape)}"
        )
    steps = inverse_frequencies.double()
    position = torch.arange(length, dtype=torch.float64, device=steps.device)
    angles = (position[:, None] * steps[..., None, :]).flatten(0, -2)
    return (scale * angles.cos()).to(dtype), (scale * angles.sin()).to(dtype)


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: bool = False,
) -> Tensor:
    """Turn the pairs of each head by the angles of the token's position.

    Parameters
    ----------
    x : Tensor
        Queries or keys ``(tokens, heads, head_dim)``, float32, float64, bfloat16 or float16. Tokens
        and heads may be any stride apart. The queries and keys of one projection ``(tokens, 3,
        heads, head_dim)`` are turned together as ``qkv[:, :2].flatten(1, 2)``, which is a view.
    cos, sin : Tensor
        ``(rows, pairs)`` each, floating point; see :func:`rotary_tables`. The first ``2 * pairs``
        elements of a head are turned, the others stay as they are. (transformers holds each number
        twice: take the first half of its columns.)
    position_ids : Tensor, optional
        Row ``(tokens,)`` of each token, int64 or int32. Without it token t has row t.
    interleaved : bool, default False
        Whether neighbours make a pair, ``x[2 i]`` and ``x[2 i + 1]`` (GPT-J), or elements ``pairs``
        apart, ``x[i]`` and ``x[pairs + i]`` (GPT-NeoX, and most models of today).

    Returns
    -------
    Tensor
        Like ``x``, contiguous: ``(a cos - b sin, b cos + a sin)`` for each pair ``(a, b)``,
        computed in float32 (float64 for float64) and rounded once. Gradients flow to ``x``, and to
        ``cos`` and ``sin`` where they need one, in plain torch.

    Raises
    ------
    TypeError
        If an argument has the wrong type or dtype.
    ValueError
        If shapes or devices don't fit together, or a position has no row.

    See Also
    --------
    rotary_ : the same in place.

    Notes
    -----
    Su et al., 2021 (arXiv 2104.09864), equation 34.
    """
    return op_rotary.rotary(*_arguments(x, cos, sin, position_ids), interleaved)


def rotary_(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: bool = False,
) -> Tensor:
    """Turn the pairs of each head in place, and return ``x``; see :func:`rotary`.

    The last dimension of ``x`` must be contiguous. Where a gradient is wanted, ``x`` must be
    something that torch lets change in place (no leaf, no slice out of ``unbind``); a gradient of
    ``cos`` or ``sin`` has it copied before.

    Raises
    ------
    ValueError
        Also if the last dimension of ``x`` isn't contiguous.
    """
    arguments = _arguments(x, cos, sin, position_ids)
    if arguments[0] is not x:
        raise ValueError(f"x must have a contiguous last dimension, got strides {x.stride()}")
    return op_rotary.rotary_(*arguments, interleaved)


def _arguments(
    x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    _op.check_tensor("x", x, ndim=3, dtypes=_op.FLOATS)
    tables = []
    for name, table in (("cos", cos), ("sin", sin)):
        _op.check_tensor(name, table, ndim=2, dtypes=_op.FLOATS, device=x.device)
        tables.append(table.to(accumulator(x)).contiguous())
    if cos.shape != sin.shape:
        raise ValueError(
            f"cos and sin must have one shape, got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if 2 * cos.shape[1] > x.shape[2]:
        raise ValueError(
            f"cos must have at most head_dim / 2 = {x.shape[2] // 2} columns, got {cos.shape[1]}"
        )
    if position_ids is None:
        if cos.shape[0] != x.shape[0]:
            raise ValueError(
                f"cos must have a row for each of {x.shape[0]} tokens, got {cos.shape[0]}; or pass "
                "position_ids"
            )
    else:
        integers = (torch.int32, torch.int64)
        _op.check_tensor("position_ids", position_ids, ndim=1, dtypes=integers, device=x.device)
        if position_ids.shape[0] != x.shape[0]:
            raise ValueError(
                f"position_ids must have one element for each of {x.shape[0]} tokens, got "
                f"{position_ids.shape[0]}"
            )
        position_ids = position_ids.long().contiguous()
    return _op.rows(x), tables[0], tables[1], position_ids
