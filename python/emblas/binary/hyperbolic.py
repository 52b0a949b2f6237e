"""Distances in hyperbolic space, where trees fit: two models of it, one formula.

With curvature -c and points p, q of the Poincare ball, c |p|^2 < 1, the distance is

    d(p, q) = 2 / sqrt(c) * asinh(sqrt(c) |p - q| / sqrt((1 - c |p|^2) (1 - c |q|^2)))

(Nickel and Kiela 2017, arXiv 1705.08039, equation 1, by arcosh(1 + 2 u^2) = 2 asinh(u)). The form
with arcosh loses small distances in the 1 that they are added to, and its gradient is infinite at
0; asinh has neither fault. What is left is the deficit 1 - c |p|^2 of points near the boundary,
where nearly all points of a trained model lie: it is computed in float64, in which the squares of
float32 numbers are exact.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from emblas import _op


def _check_points(x: Tensor, y: Tensor, curvature: float) -> tuple[Tensor, Tensor, torch.dtype]:
    """Return both as float64, in units of the radius of curvature, and the dtype of the result."""
    _op.check_tensor("x", x, dtypes=_op.FLOATS)
    _op.check_tensor("y", y, dtypes=(x.dtype,), device=x.device)
    if x.dim() == 0 or y.dim() == 0 or x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"x and y must end in the same dimension, got shapes {tuple(x.shape)} and "
            f"{tuple(y.shape)}"
        )
    if not 0 < curvature < math.inf:
        raise ValueError(f"curvature must be above 0 and finite, got {curvature}")
    root = math.sqrt(curvature)
    return x.double() * root, y.double() * root, x.dtype


def _distance(
    p: Tensor, q: Tensor, deficit_p: Tensor, deficit_q: Tensor, curvature: float
) -> Tensor:
    # The norm has gradient 0 where p = q.
    ratio = torch.linalg.vector_norm(p - q, dim=-1) / (deficit_p * deficit_q).sqrt()
    return torch.asinh(ratio) * (2 / math.sqrt(curvature))


def poincare_distance(x: Tensor, y: Tensor, *, curvature: float = 1.0) -> Tensor:
    """Distance of points of the Poincare ball.

    Parameters
    ----------
    x, y : Tensor
        ``(..., dim)``, broadcast against each other: ``x[:, None]`` and ``y`` for all pairs;
        float32, float64, bfloat16 or float16, of one dtype. Inside of the ball:
        ``curvature * |x|^2 < 1``.
    curvature : float, default 1.0
        c, above 0: the space has curvature -c, the ball the radius ``1 / sqrt(c)``.

    Returns
    -------
    Tensor
        ``(...)`` in the dtype of ``x``; differentiable, with gradient 0 where ``x = y``. Computed
        in float64.

    Raises
    ------
    TypeError
        If an argument has a wrong type.
    ValueError
        If shapes or devices don't fit together, ``curvature`` is out of range or a point lies on or
        outside of the boundary. On a GPU and in compiled code, which don't look at values, such a
        point is infinitely far from all others.

    Notes
    -----
    Nickel and Kiela 2017, arXiv 1705.08039, equation 1.

    Examples
    --------
    >>> x = torch.tensor([[0.6, 0.0], [0.0, 0.0]])
    >>> poincare_distance(x, torch.zeros(2))  # ln 4 and 0
    tensor([1.3863, 0.0000])
    """
    p, q, dtype = _check_points(x, y, curvature)
    deficits = [1 - point.square().sum(-1) for point in (p, q)]
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        for name, deficit in zip("xy", deficits, strict=True):
            if not bool((deficit > 0).all()):
                raise ValueError(
                    f"{name} must lie inside of the ball, curvature * |{name}|^2 < 1, got "
                    f"{1 - float(deficit.min())}"
                )
    outside = (deficits[0] <= 0) | (deficits[1] <= 0)
    inside = [torch.where(deficit > 0, deficit, 1.0) for deficit in deficits]
    distance = _distance(p, q, inside[0], inside[1], curvature)
    return distance.masked_fill(outside, torch.inf).to(dtype)


def lorentz_distance(x: Tensor, y: Tensor, *, curvature: float = 1.0) -> Tensor:
    """Distance of points of the hyperboloid, given without their first ("time") component.

    The space components are free: each vector is a point, with the time component
    ``sqrt(1 / c + |x|^2)``, so that nothing has to be kept on the hyperboloid in training. The
    distance is ``arcosh(-c <x, y>) / sqrt(c)`` with Lorentz' inner product (Nickel and Kiela 2018,
    arXiv 1806.03417, equation 4).

    Parameters
    ----------
    x, y : Tensor
        ``(..., dim)`` space components, broadcast against each other; float32, float64, bfloat16 or
        float16, of one dtype, finite.
    curvature : float, default 1.0
        c, above 0: the space has curvature -c.

    Returns
    -------
    Tensor
        ``(...)`` in the dtype of ``x``; differentiable, with gradient 0 where ``x = y``. Computed
        in float64.

    Raises
    ------
    TypeError
        If an argument has a wrong type.
    ValueError
        If shapes or devices don't fit together or ``curvature`` is out of range.

    Notes
    -----
    Computed as the distance of the points' images in the Poincare ball, ``x / (1 + t)`` for c = 1
    and the time component t. Their deficit ``2 / (1 + t)`` needs no subtraction; the inner product
    would be the difference of two numbers that are large far from the origin.

    Examples
    --------
    >>> x = torch.tensor([0.0, 0.75])
    >>> lorentz_distance(x, -x)  # 2 asinh(0.75) = 2 ln 2
    tensor(1.3863)
    """
    p, q, dtype = _check_points(x, y, curvature)
    shifted = [1 + (1 + point.square().sum(-1)).sqrt() for point in (p, q)]
    images = [point / shift[..., None] for point, shift in zip((p, q), shifted, strict=True)]
    deficits = [2 / shift for shift in shifted]
    return _distance(images[0], images[1], deficits[0], deficits[1], curvature).to(dtype)
