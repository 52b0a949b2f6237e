from __future__ import annotations

import math

import pytest
import torch
from contract import check_compiled
from emblas.binary import lorentz_distance, poincare_distance
from torch.autograd import gradcheck, gradgradcheck

mpmath = pytest.importorskip("mpmath", reason="comes with torch, through sympy")


def exact_poincare(x, y, curvature=1.0):
    """The textbook form with arcosh, in 80 digits."""
    with mpmath.workdps(80):
        c = mpmath.mpf(curvature)
        p, q = ([mpmath.mpf(v) for v in one.tolist()] for one in (x.double(), y.double()))
        square = sum((a - b) ** 2 for a, b in zip(p, q, strict=True))
        deficits = [1 - c * sum(a * a for a in one) for one in (p, q)]
        inner = 1 + 2 * c * square / (deficits[0] * deficits[1])
        return float(mpmath.acosh(inner) / mpmath.sqrt(c))


def exact_lorentz(x, y, curvature=1.0):
    with mpmath.workdps(80):
        c = mpmath.mpf(curvature)
        p, q = ([mpmath.mpf(v) for v in one.tolist()] for one in (x.double(), y.double()))
        times = [mpmath.sqrt(1 / c + sum(a * a for a in one)) for one in (p, q)]
        inner = times[0] * times[1] - sum(a * b for a, b in zip(p, q, strict=True))
        return float(mpmath.acosh(max(c * inner, 1)) / mpmath.sqrt(c))


def ball(rows, dim, radius, dtype=torch.float32):
    """Points at exactly about this share of the radius."""
    x = torch.nn.functional.normalize(torch.randn(rows, dim, dtype=torch.float64), dim=1) * radius
    return x.to(dtype)


@pytest.mark.parametrize("curvature", [1.0, 0.25])
@pytest.mark.parametrize("radius", [0.0, 1e-6, 0.5, 0.99, 1 - 1e-6])
def test_poincare(radius, curvature):
    scale = radius / math.sqrt(curvature)
    x, y = ball(20, 7, scale), ball(20, 7, scale * 0.9)
    close = x * (1 - 1e-6)
    for other in (y, close, torch.zeros_like(x)):
        actual = poincare_distance(x, other, curvature=curvature)
        expected = [exact_poincare(a, b, curvature) for a, b in zip(x, other, strict=True)]
        assert actual.dtype == torch.float32
        torch.testing.assert_close(
            actual, torch.tensor(expected, dtype=torch.float32), rtol=1e-6, atol=1e-20
        )


@pytest.mark.parametrize("curvature", [1.0, 4.0])
@pytest.mark.parametrize("size", [0.0, 1e-8, 1.0, 1e4, 1e8])
def test_lorentz(size, curvature):
    x, y = torch.randn(20, 6) * size, torch.randn(20, 6) * size
    nearby = x * 1.0001
    for other in (y, nearby, torch.zeros_like(x)):
        actual = lorentz_distance(x, other, curvature=curvature)
        expected = [exact_lorentz(a, b, curvature) for a, b in zip(x, other, strict=True)]
        torch.testing.assert_close(
            actual, torch.tensor(expected, dtype=torch.float32), rtol=1e-4, atol=1e-20
        )


def test_models_agree():
    """The map from the hyperboloid to the ball keeps distances."""
    x, y = torch.randn(2, 30, 5, dtype=torch.float64).unbind()
    images = [p / (1 + (1 + p.square().sum(1)).sqrt())[:, None] for p in (x, y)]
    torch.testing.assert_close(lorentz_distance(x, y), poincare_distance(*images))


@pytest.mark.parametrize("distance", [poincare_distance, lorentz_distance])
def test_is_a_metric(distance):
    x, y, z = ball(40, 4, 0.9), ball(40, 4, 0.7), ball(40, 4, 0.99)
    assert torch.equal(distance(x, y), distance(y, x))
    assert (distance(x, x) == 0).all()
    assert (distance(x, y) > 0).all()
    assert (distance(x, z) <= distance(x, y) + distance(y, z) + 1e-5).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_shapes_and_dtypes(dtype):
    x, y = ball(6, 3, 0.5, dtype), ball(4, 3, 0.8, dtype)
    for distance in (poincare_distance, lorentz_distance):
        pairs = distance(x[:, None], y)
        assert pairs.shape == (6, 4)
        assert pairs.dtype == dtype
        assert torch.equal(pairs[2, 3], distance(x[2], y[3]))
        assert distance(x[:0], y[:0]).shape == (0,)
        assert (distance(x[:, :0], y[0, :0]) == 0).all()


@pytest.mark.parametrize("radius", [0.1, 0.9, 1 - 1e-4])
def test_gradients(radius):
    x, y = ball(3, 4, radius, torch.float64), ball(3, 4, radius / 2, torch.float64)
    x.requires_grad_()
    y.requires_grad_()
    step = 1e-7 * (1 - radius)
    assert gradcheck(poincare_distance, (x, y), eps=step, atol=1e-3, rtol=1e-4)
    assert gradcheck(lorentz_distance, (x, y))
    if radius < 0.99:
        assert gradgradcheck(poincare_distance, (x, y))
        assert gradgradcheck(lorentz_distance, (x, y))


def test_gradient_of_the_same_point():
    for distance in (poincare_distance, lorentz_distance):
        x = ball(3, 4, 0.999).requires_grad_()
        distance(x, x.detach()).sum().backward()
        assert (x.grad == 0).all()


def test_training_embeds_a_tree():
    """A binary tree finds its place with less distortion than in the plane."""
    edges = [(i, (i - 1) // 2) for i in range(1, 15)]
    far = torch.zeros(15, 15).fill_(99).fill_diagonal_(0)
    for a, b in edges:
        far[a, b] = far[b, a] = 1
    for via in range(15):
        far = torch.minimum(far, far[:, via : via + 1] + far[via])
    upper = torch.triu_indices(15, 15, 1)

    def fit(distance):
        x = (torch.randn(15, 2) * 0.1).requires_grad_()
        optimizer = torch.optim.Adam([x], 0.05)
        for _ in range(400):
            ratio = distance(x[upper[0]], x[upper[1]]) / far[upper[0], upper[1]]
            loss = (ratio - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    plane = fit(lambda a, b: (a - b).norm(dim=1))
    assert fit(lorentz_distance) < 0.75 * plane


def test_boundary_on_a_device_without_checks(monkeypatch):
    x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [2.0, 0.0], [0.5, 0.0]], requires_grad=True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    distance = poincare_distance(x, x[3])
    assert distance.tolist() == [math.inf, math.inf, math.inf, 0]
    assert poincare_distance(x[2], x[2]) == math.inf
    distance[3].backward()
    assert x.grad.isfinite().all()


def test_compiled():
    def both(x, y):
        return poincare_distance(x[:, None], y) + lorentz_distance(x[:, None], y)

    calls = [(ball(q, 5, 0.7), ball(n, 5, 0.9)) for q, n in ((2, 30), (3, 50), (7, 41))]
    check_compiled(both, calls, backward=True)


X = torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "x must have dtype", lambda: poincare_distance(X.long(), X)),
        (TypeError, "y must have dtype float32", lambda: lorentz_distance(X, X.double())),
        (ValueError, "same dimension", lambda: poincare_distance(X, X[:, :1])),
        (ValueError, "same dimension", lambda: lorentz_distance(X[0, 0], X)),
        (ValueError, "curvature must be", lambda: poincare_distance(X, X, curvature=0)),
        (ValueError, "curvature must be", lambda: lorentz_distance(X, X, curvature=-1.0)),
        (ValueError, "x must lie inside", lambda: poincare_distance(X + 1, X)),
        (ValueError, "y must lie inside", lambda: poincare_distance(X, X + torch.eye(3, 2))),
        (ValueError, "x must lie inside", lambda: poincare_distance(X / 0, X)),
        (ValueError, "got 1.44", lambda: poincare_distance(X + 0.6, X, curvature=2)),
    ],
)
def test_bad_arguments(error, message, call):
    with pytest.raises(error, match=message):
        call()
