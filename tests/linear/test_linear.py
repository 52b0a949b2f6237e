"""Linear layers: the product itself, and the bits of a row whatever its batch."""

from __future__ import annotations

import math

import pytest
import torch
from contract import check_compiled, check_op, check_threads, layouts, only_kernels, tolerance
from emblas import use_backend
from emblas._load import _C
from emblas.linear import linear
from hypothesis import given
from hypothesis import strategies as st

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": lambda x: x.clamp_min(0),
    "gelu": lambda x: x * torch.erfc(-x / math.sqrt(2)) / 2,
    "gelu_tanh": lambda x: x / (1 + torch.exp(-math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}
SHAPES = [(0, 5, 3), (3, 0, 2), (4, 7, 0), (1, 1, 1), (5, 33, 65), (13, 384, 96), (25, 500, 17)]


def problem(rows, columns, depth, dtype=torch.float32):
    """Values in [-1, 1): a sum grows in order, and its rounding errors with it."""
    shapes = (rows, depth), (columns, depth), (columns,)
    return tuple(2 * torch.rand(shape, dtype=dtype) - 1 for shape in shapes)


def check(x, weight, bias, depth):
    expected = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    with only_kernels("linear"):
        actual = linear(x, weight, bias)
    assert actual.dtype == x.dtype
    torch.testing.assert_close(actual.double(), expected, **tolerance(x.dtype, depth))


@pytest.fixture(params=_C.supported_isas())
def isa(request):
    """Each instruction set in turn."""
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("isa")
def test_equals_oracle(shape, dtype):
    x, weight, bias = problem(*shape, dtype)
    check(x, weight, bias, shape[2])
    check(x, weight, None, shape[2])


@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 900))
def test_shapes(rows, columns, depth):
    check(*problem(rows, columns, depth), depth)


@pytest.mark.parametrize("depth", [7, 800])
def test_layouts(depth):
    x, weight, bias = problem(14, 34, depth)
    for left in layouts(x).values():
        for right in layouts(weight).values():
            check(left, right, bias, depth)
    check(x, weight, bias.repeat_interleave(2)[::2], depth)


def test_a_row_has_the_same_bits_in_every_batch():
    x, weight, bias = problem(40, 50, 700)
    whole = linear(x, weight, bias)
    for rows in (slice(0, 1), slice(3, 8), slice(11, 24), slice(39, 40)):
        assert torch.equal(linear(x[rows], weight, bias), whole[rows])


def test_threads():
    x, weight, bias = problem(300, 100, 200)
    check_threads(lambda: linear(x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.usefixtures("isa")
def test_activations_and_residuals(activation, dtype):
    x, weight, bias = problem(15, 37, 400, dtype)
    residual = torch.randn(15, 37, dtype=dtype)
    product = x.double() @ weight.double().t() + bias.double()
    expected = ACTIVATIONS[activation](product)
    with only_kernels("linear"):
        plain = linear(x, weight, bias, activation=activation)
        added = {
            name: linear(x, weight, bias, activation=activation, residual=layout)
            for name, layout in layouts(residual).items()
        }
    close = tolerance(dtype, 400)
    torch.testing.assert_close(plain.double(), expected, **close)
    for actual in added.values():
        torch.testing.assert_close(actual.double(), expected + residual.double(), **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.usefixtures("isa")
def test_activations_to_the_last_digit(activation, dtype):
    """Of sums that are exact: errors of a few units in the last place of x, at any x."""
    x = torch.cat([torch.linspace(-20, 20, 4001), torch.tensor([0.0, -0.0, 1e-30, 1e4, -1e4])])
    x = x.to(dtype)[:, None]
    actual = linear(x, torch.ones(1, 1, dtype=dtype), activation=activation).double()
    expected = ACTIVATIONS[activation](x.double())
    assert ((actual - expected).abs() <= 4 * torch.finfo(dtype).eps * x.abs()).all()
    x = torch.full((1, 1), -torch.finfo(dtype).max, dtype=dtype)
    actual = linear(x, torch.ones(1, 1, dtype=dtype), activation=activation)
    assert actual == (x if activation == "none" else 0)
    for value in (torch.nan, torch.inf):
        x = torch.full((1, 1), value, dtype=dtype)
        actual = linear(x, torch.ones(1, 1, dtype=dtype), activation=activation)
        torch.testing.assert_close(actual, x, equal_nan=True)


def test_nothing_is_kept_of_a_weight():
    x, weight, bias = problem(4, 5, 6)
    linear(x, weight, bias)
    weight.data.mul_(2)
    check(x, weight, bias, 6)


def test_operator():
    x, weight, bias = problem(4, 5, 6)
    check_op("linear", x, weight, bias)
    check_op("linear", x, weight)
    check_op("linear", x, weight, bias, torch.ones(4, 5), 2)


def test_gradients_come_from_torch():
    inputs = [x.requires_grad_() for x in problem(4, 5, 6, torch.float64)]
    assert torch.autograd.gradcheck(linear, inputs)
    with use_backend("reference"):
        torch.testing.assert_close(linear(*inputs), linear(*(x.detach() for x in inputs)))
    residual = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, w, b, r: linear(x, w, b, activation="gelu", residual=r), (*inputs, residual)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(dtype):
    x, weight, bias = problem(4, 5, 6, dtype)
    expected = x.double() @ weight.double().t() + bias.double()
    torch.testing.assert_close(linear(x, weight, bias).double(), expected, rtol=0.02, atol=0.02)


def test_compiled():
    calls = [problem(*shape) for shape in ((4, 6, 5), (7, 9, 3), (12, 40, 70))]
    check_compiled(lambda *args: linear(*args, activation="gelu") * 2, calls, backward=False)


X, W = torch.ones(2, 3), torch.ones(4, 3)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "x must be a torch.Tensor", lambda: linear([1], W)),
        (TypeError, "x must have dtype float32", lambda: linear(X.int(), W)),
        (ValueError, "x must have 2 dimensions", lambda: linear(X[0], W)),
        (TypeError, "weight must have dtype float32", lambda: linear(X, W.double())),
        (ValueError, "weight must have 3 elements in a row", lambda: linear(X, W[:, :2])),
        (ValueError, "weight must be on device cpu", lambda: linear(X, W.to("meta"))),
        (TypeError, "bias must have dtype float32", lambda: linear(X, W, torch.ones(4).int())),
        (ValueError, "bias must have 4 elements, got 3", lambda: linear(X, W, torch.ones(3))),
        (ValueError, "activation must be one of 'none'", lambda: linear(X, W, activation="tanh")),
        (TypeError, "residual must have dtype", lambda: linear(X, W, residual=X.double())),
        (ValueError, r"residual must have shape \(2, 4\)", lambda: linear(X, W, residual=X)),
    ],
)
def test_bad_arguments(error, message, call):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("message", "args"),
    [
        ("x must be float32 or float64", (X.half(), W.half())),
        ("weight must have the dtype of x", (X, W.double())),
        ("weight must have as many elements", (X, W[:, :2])),
        ("x must be a CPU tensor", (X.t().contiguous().t(), W)),
        ("bias must be a contiguous vector", (X, W, torch.ones(3))),
        ("residual must be a CPU tensor", (X, W, None, torch.ones(4, 2).t())),
        ("residual must have the dtype of x", (X, W, None, torch.ones(2, 3))),
        ("activation must be 0 to 4", (X, W, None, None, 5)),
    ],
)
def test_guards_of_the_operator(message, args):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.emblas.linear(*args)
