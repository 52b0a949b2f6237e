"""Relations inside one space, and maps from one space to another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emblas.evaluation import checks


def three_cos_add(x: Any, a: Any, b: Any, c: Any, k: int = 1) -> Tensor:
    r"""Answer analogies "a is to b as c is to ?" by :math:`\cos(v, \hat b - \hat a + \hat c)`.

    Parameters
    ----------
    x : array-like
        Vectors ``(vocabulary, dim)``.
    a, b, c : array-like
        Rows of ``x``, integers ``(n,)`` each.
    k : int, default 1
        Answers to each.

    Returns
    -------
    Tensor
        Rows of ``x`` ``(n, k)``, best first; never ``a``, ``b`` or ``c`` themselves.

    Notes
    -----
    Mikolov et al. 2013; Levy and Goldberg 2014 (eq. 3).
    """
    x = checks.unit(checks.vectors("x", x))
    rows = [torch.as_tensor(i).cpu() for i in (a, b, c)]
    for name, i in zip("abc", rows, strict=True):
        checks.classes(name, i, len(rows[0]))
        if len(i) and not 0 <= int(i.min()) <= int(i.max()) < len(x):
            raise IndexError(
                f"{name} must lie between 0 and {len(x) - 1}, got {int(i.min())} to {int(i.max())}"
            )
    checks.count("k", k, len(x) - 3)
    start, end, other = (x[i] for i in rows)
    scores = (end - start + other) @ x.T
    scores.scatter_(1, torch.stack(rows, 1), -torch.inf)
    return scores.topk(k, 1).indices


def procrustes(x: Any, y: Any) -> Tensor:
    r"""Orthogonal map ``W`` that minimizes :math:`\|X W - Y\|_F`.

    :math:`W = U V^T` of the singular value decomposition :math:`X^T Y = U S V^T`.

    Parameters
    ----------
    x, y : array-like
        Vectors ``(n, dim)`` of the same things in two spaces.

    Returns
    -------
    Tensor
        ``(dim, dim)``, float64: ``x @ W`` is near ``y``.

    Notes
    -----
    Schonemann 1966; Smith et al. 2017, arXiv 1702.03859.
    """
    x = checks.vectors("x", x)
    y = checks.vectors("y", y, rows=len(x))
    if x.shape != y.shape:
        raise ValueError(f"y must have dimension {x.shape[1]}, as x, got {y.shape[1]}")
    u, _, vt = torch.linalg.svd(x.T @ y)
    return u @ vt


def least_squares_map(x: Any, y: Any, ridge: float = 0.0) -> Tensor:
    r"""Linear map ``W`` that minimizes :math:`\|X W - Y\|_F^2 + \rho \|W\|_F^2`.

    Parameters
    ----------
    x, y : array-like
        Vectors ``(n, dim)`` and ``(n, other_dim)`` of the same things in two spaces.
    ridge : float, default 0
        :math:`\rho`. With 0 and fewer vectors than dimensions, the smallest of all solutions.

    Returns
    -------
    Tensor
        ``(dim, other_dim)``, float64: ``x @ W`` is near ``y``.
    """
    x = checks.vectors("x", x)
    y = checks.vectors("y", y, rows=len(x))
    if not ridge >= 0:
        raise ValueError(f"ridge must not be negative, got {ridge}")
    # By singular values, not by X^T X, whose condition is the square.
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    if ridge == 0:
        keep = s > s.max() * max(x.shape) * torch.finfo(s.dtype).eps
        factor = torch.where(keep, 1 / torch.where(keep, s, 1), 0)
    else:
        factor = s / (s * s + ridge)
    return vt.T @ (factor[:, None] * (u.T @ y))


def csls(x: Any, y: Any, k: int = 10) -> Tensor:
    r"""Cosines corrected for hubs, vectors that are near to everything.

    :math:`2 \cos(x_i, y_j) - r(x_i) - r(y_j)`, where ``r`` is the mean cosine to the ``k`` nearest
    of the other set.

    Parameters
    ----------
    x, y : array-like
        Vectors ``(n, dim)`` and ``(m, dim)`` in one space.
    k : int, default 10
        Neighbors; fewer where a set is smaller.

    Returns
    -------
    Tensor
        ``(n, m)``, float64.

    Notes
    -----
    Conneau et al. 2018, arXiv 1710.04087 (section 2.3).
    """
    x, y = checks.vectors("x", x), checks.vectors("y", y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"y must have dimension {x.shape[1]}, as x, got {y.shape[1]}")
    checks.count("k", k)
    cosines = checks.unit(x) @ checks.unit(y).T
    near_x = cosines.topk(min(k, len(y)), 1).values.mean(1)
    near_y = cosines.topk(min(k, len(x)), 0).values.mean(0)
    return 2 * cosines - near_x[:, None] - near_y
