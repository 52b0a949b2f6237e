"""How embeddings fill their space."""

from __future__ import annotations

import math
from typing import Any

import torch

from emblas.evaluation import checks

BLOCK = 1024  # rows whose distances are held at a time


def isoscore(x: Any) -> float:
    r"""How evenly the variance fills all dimensions: 1 for all alike, 0 for one alone.

    With the variances :math:`\lambda` along the principal axes, :math:`\hat\lambda = \sqrt d
    \lambda / \|\lambda\|` and the isotropy defect :math:`\delta = \|\hat\lambda - 1\| /
    \sqrt{2 (d - \sqrt d)}`, the share of dimensions used is :math:`\phi = (d - \delta^2 (d - \sqrt
    d))^2 / d^2` and the score :math:`(d \phi - 1) / (d - 1)`.

    Parameters
    ----------
    x : array-like
        Vectors ``(n, dim)``, at least two of at least two dimensions.

    Returns
    -------
    float
        From 0 to 1; 0 if all vectors are equal.

    Notes
    -----
    Rudman et al. 2022, arXiv 2108.07344 (algorithm 1).
    """
    x = checks.vectors("x", x, least=2)
    d = x.shape[1]
    if d < 2:
        raise ValueError(f"x must have at least 2 dimensions, got {d}")
    if (x == x[0]).all():  # whose mean may differ from them by rounding
        return 0.0
    centered = checks.scaled(x - x.mean(0))
    variances = torch.linalg.eigvalsh(torch.cov(centered.T)).clamp_min(0)
    spread = math.sqrt(d) * checks.unit(variances)
    root = d - math.sqrt(d)
    defect = float((spread - 1).norm()) / math.sqrt(2 * root)
    used = (d - defect**2 * root) ** 2 / d**2
    return min(1.0, max(0.0, (d * used - 1) / (d - 1)))


def alignment(x: Any, y: Any, alpha: float = 2.0) -> float:
    r"""Mean of :math:`\|\hat x_i - \hat y_i\|^\alpha` over pairs that belong together; 0 is best.

    Parameters
    ----------
    x, y : array-like
        Vectors ``(n, dim)``.
    alpha : float, default 2
        :math:`\alpha`.

    Notes
    -----
    Wang and Isola 2020, arXiv 2005.10242 (section 4.1).
    """
    x = checks.vectors("x", x)
    y = checks.vectors("y", y, rows=len(x))
    return float((checks.unit(x) - checks.unit(y)).norm(dim=1).pow(alpha).mean())


def uniformity(x: Any, t: float = 2.0) -> float:
    r"""Log of the mean of :math:`e^{-t \|\hat x_i - \hat x_j\|^2}` over :math:`i \neq j`.

    Parameters
    ----------
    x : array-like
        Vectors ``(n, dim)``, at least two.
    t : float, default 2
        :math:`t`.

    Returns
    -------
    float
        At most 0; lower is more uniform.

    Notes
    -----
    Wang and Isola 2020, arXiv 2005.10242 (section 4.1).
    """
    x = checks.unit(checks.vectors("x", x, least=2))
    n, logs = len(x), []
    for begin in range(0, n, BLOCK):
        part = x[begin : begin + BLOCK]
        exponents = -t * torch.cdist(part, x).square()
        rows = torch.arange(len(part))
        exponents[rows, rows + begin] = -torch.inf
        logs.append(exponents.logsumexp((0, 1)))  # the sum itself may be too small for a float
    return float(torch.stack(logs).logsumexp(0)) - math.log(n * (n - 1))


def two_nn(x: Any) -> float:
    r"""Intrinsic dimension from the distances to the two nearest neighbors.

    :math:`n / \sum_i \ln (r_{i2} / r_{i1})`, the maximum likelihood of a locally even density.
    Repeated vectors count once.

    Parameters
    ----------
    x : array-like
        Vectors ``(n, dim)``, at least three different ones.

    Notes
    -----
    Facco et al. 2017, "Estimating the intrinsic dimension of datasets by a minimal neighborhood
    information" (eq. 5 gives the distribution of the ratio; they fit it by a line).
    """
    x = checks.vectors("x", x).unique(dim=0)
    if len(x) < 3:
        raise ValueError(f"x must have at least 3 different rows, got {len(x)}")
    logs = []
    for begin in range(0, len(x), BLOCK):
        part = x[begin : begin + BLOCK]
        # Differences, not products: distances of near neighbors must not cancel.
        distance = torch.cdist(part, x, compute_mode="donot_use_mm_for_euclid_dist")
        rows = torch.arange(len(part))
        distance[rows, rows + begin] = torch.inf
        nearest = distance.topk(2, 1, largest=False).values
        logs.append((nearest[:, 1] / nearest[:, 0]).log())
    total = float(torch.cat(logs).sum())
    return len(x) / total if total else math.inf
