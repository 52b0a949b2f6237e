"""Agreement of two lists of numbers, such as cosines and human judgements."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emblas.evaluation import checks


def pearson(x: Any, y: Any) -> float:
    """Pearson's correlation of two equally long lists of numbers.

    Returns
    -------
    float
        From -1 to 1; 0 if either is constant or empty, where nothing can be said.

    Raises
    ------
    ValueError
        If the lengths differ or a number is not finite.
    """
    x = checks.numbers("x", x)
    y = checks.numbers("y", y, rows=len(x))
    if not len(x) or (x == x[0]).all() or (y == y[0]).all():
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    return float(checks.unit(x) @ checks.unit(y))


def spearman(x: Any, y: Any) -> float:
    """Spearman's correlation: Pearson's of the ranks, ties sharing their mean rank.

    Result and errors are those of :func:`pearson`.
    """
    x = checks.numbers("x", x)
    y = checks.numbers("y", y, rows=len(x))
    return pearson(_ranks(x), _ranks(y))


def _ranks(x: Tensor) -> Tensor:
    _, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    return (last - (counts - 1) / 2)[inverse]
