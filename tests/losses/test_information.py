"""The bound of mutual information beside its definition over all pairs."""

from __future__ import annotations

import math

import pytest
import torch
from contract import check_compiled, tolerance
from emblas.losses import information_bound

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def problem(n, dtype=torch.float64, dim=3):
    return (
        torch.randn(n, dim, dtype=dtype) + 2,
        torch.randn(n, dim, dtype=dtype),
        torch.randn(n, dim, dtype=dtype) / 2,
    )


def oracle(y, mean, log_variance):
    """Of the definition, pair by pair."""
    y, mean, log_variance = (x.double().tolist() for x in (y, mean, log_variance))

    def log_q(i, j):
        return sum(
            -0.5 * ((b - m) ** 2 / math.exp(s) + s + math.log(2 * math.pi))
            for b, m, s in zip(y[j], mean[i], log_variance[i], strict=True)
        )

    n = len(y)
    own = sum(log_q(i, i) for i in range(n)) / n
    return own - sum(log_q(i, j) for i in range(n) for j in range(n)) / n**2


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n", [1, 2, 7])
def test_equals_oracle(n, dtype):
    inputs = problem(n, dtype)
    actual = information_bound(*inputs)
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = torch.tensor(oracle(*inputs), dtype=torch.float64)
    torch.testing.assert_close(actual.double(), expected, **tolerance(actual.dtype, 400))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(information_bound(*inputs), actual)


def test_no_texts_and_no_information():
    inputs = [x.requires_grad_() for x in problem(0)]
    information_bound(*inputs).backward()
    assert all(x.grad is not None for x in inputs)
    y, mean, log_variance = problem(5)
    same = information_bound(y, mean[:1].expand(5, -1), log_variance[:1].expand(5, -1))
    assert same.item() == pytest.approx(0, abs=1e-12)  # predicted without a look at the text


def test_gradients():
    inputs = [x.requires_grad_() for x in problem(5)]
    assert torch.autograd.gradcheck(information_bound, inputs)


def test_compiled():
    calls = [problem(n, torch.float32) for n in (4, 7, 12)]
    check_compiled(lambda *x: information_bound(*x) * 2, calls, backward=True)


def test_bad_arguments():
    y, mean, log_variance = problem(4)
    with pytest.raises(ValueError, match="y must have 2 dimensions"):
        information_bound(y[0], mean, log_variance)
    with pytest.raises(ValueError, match=r"mean must have shape \(4, 3\)"):
        information_bound(y, mean[:2], log_variance)
    with pytest.raises(ValueError, match="log_variance must have shape"):
        information_bound(y, mean, log_variance[:, :1])
    with pytest.raises(TypeError, match="y must have dtype"):
        information_bound(y.long(), mean, log_variance)
