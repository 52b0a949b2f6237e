"""Losses over all pairs, a block of rows at a time: nothing of the size of the pairs is kept."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from emblas.losses.op import BLOCK_BYTES


def by_blocks(
    function: Callable[..., Tensor], rows: int, width: int, x: Tensor, *arguments: object
) -> list[Tensor]:
    """Call ``function(begin, end, x, *arguments)`` for blocks of rows.

    Parameters
    ----------
    function : callable
        Keeps ``end - begin`` rows of ``width`` numbers of the dtype of ``x``. Where there are
        several blocks, it is called again for the gradient, and what it has kept is dropped.
    rows, width : int
        Of the whole matrix.
    x, *arguments
        Handed on.

    Returns
    -------
    list of Tensor
        One result per block, at least one.
    """
    step = max(1, BLOCK_BYTES // (max(width, 1) * x.dtype.itemsize))
    if rows <= step:
        return [function(0, rows, x, *arguments)]
    return [
        checkpoint(function, begin, min(begin + step, rows), x, *arguments, use_reentrant=False)
        for begin in range(0, rows, step)
    ]
