"""Every executor of every operator against the reference in float64, on the same calls."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from cases import CASES
from contract import packed, tolerance
from emblas import _op, use_backend
from emblas.attention import varlen_attention
from executors import EXECUTORS as IMPLEMENTATIONS
from executors import executors

EXECUTORS = {(name, executor): run for name in CASES for executor, run in executors(name).items()}
CELLS = [(*cell, case) for cell in EXECUTORS for case in CASES[cell[0]]]


def wide(value):
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.double() if is_float else value


def results(value):
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize(("name", "executor", "case"), CELLS)
def test_equals_oracle(name, executor, case):
    made = CASES[name][case]()
    expected = results(_op.ops()[name].reference(*map(wide, made.args)))
    actual = results(EXECUTORS[name, executor](*made.args))
    assert len(actual) == len(expected)
    dtypes = [a.dtype for a in made.args if isinstance(a, torch.Tensor) and a.is_floating_point()]
    for a, e in zip(actual, expected, strict=True):
        if not a.is_floating_point():
            assert torch.equal(a, e)
            continue
        # A result may be stored in another dtype than the first argument.
        dtype = max((dtypes or [torch.float64])[0], a.dtype, key=lambda d: torch.finfo(d).eps)
        limit = tolerance(dtype, made.length)
        torch.testing.assert_close(
            a.double(), e.double(), rtol=4 * limit["rtol"], atol=8 * limit["atol"], equal_nan=True
        )


GPU = ("simt", "triton-interpreted", "cuda", "triton")


@pytest.mark.parametrize("executor", [e for n, e in EXECUTORS if n == "rotary" and e in GPU])
@pytest.mark.parametrize("interleaved", [False, True])
def test_wrong_positions_stay_in_bounds(executor, interleaved):
    """Kernels for GPUs check no values: wrong ones take the first or the last row."""
    x, cos, sin = torch.randn(4, 2, 16), torch.randn(9, 8), torch.randn(9, 8)
    wrong, clamped = torch.tensor([-1, 9, -(2**40), 2**40]), torch.tensor([0, 8, 0, 8])
    run = EXECUTORS["rotary", executor]
    expected = run(x, cos, sin, clamped, interleaved)
    assert torch.equal(run(x, cos, sin, wrong, interleaved), expected)


@pytest.mark.parametrize("executor", [e for n, e in EXECUTORS if n == "varlen_attention_backward"])
def test_attention_trains(executor):
    """The public function reaches the kernels of an executor, forward and backward."""
    x, cu = torch.randn(43, 3, 2, 16), packed((3, 0, 40))
    names = ("varlen_attention", "varlen_attention_backward")
    grads = []
    for run, leaf in ((executor, x.clone()), ("reference", x.double())):
        with IMPLEMENTATIONS[run](names) if run in IMPLEMENTATIONS else use_backend(run):
            leaf.requires_grad_()
            attend = partial(varlen_attention, *leaf.unbind(1), cu, cu, 40, 40)
            out, lse = attend(window_size=(9, 30), return_lse=True)
            (out.square().sum() + lse.sum()).backward()
        grads.append(leaf.grad.double())
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def attention_gradients(executor):
    """Attention's gradients where queries, keys, values and results are the same vectors."""
    run = EXECUTORS["varlen_attention_backward", executor]

    def gradients(q, grad, cu, longest, window=(-1, -1), cu_k=None):
        numbers = (cu, cu if cu_k is None else cu_k, longest, longest, None, *window)
        lse = torch.zeros(q.shape[1], q.shape[0])
        return run(grad, None, q, q, q, q, lse, *numbers)[:3]

    return gradients


ATTENTION = [e for n, e in EXECUTORS if n == "varlen_attention_backward" and e in GPU]


@pytest.mark.parametrize("executor", ATTENTION)
@pytest.mark.parametrize(
    "offsets", [[5, 900, -3, 2], [-7, 2**31 - 1, 2**31 - 1, -(2**31)], [80, 70, 60, 3]]
)
def test_attention_gradients_stay_in_bounds(executor, offsets):
    """Whatever the offsets hold; results are whatever they are. No two sequences overlap."""
    cu, right = torch.tensor(offsets, dtype=torch.int32), packed((3, 0, 40))
    gradients, q, grad = attention_gradients(executor), *torch.randn(2, 43, 1, 16)
    for cu_q, cu_k in ((cu, cu), (cu, right), (right, cu)):
        gradients(q, grad, cu_q, 43, cu_k=cu_k)


@pytest.mark.parametrize("executor", ATTENTION)
def test_attention_gradients_depend_on_the_own_sequence_only(executor):
    gradients, q, grad = attention_gradients(executor), *torch.randn(2, 43, 2, 16)
    cu, window = packed((3, 0, 40)), (9, 9)
    whole = gradients(q, grad, cu, 43, window)
    again = gradients(q, grad, cu, 43, window)  # programs in another order
    alone = gradients(q[3:], grad[3:], packed((40,)), 40, window)
    for x, y, z in zip(whole, again, alone, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x[3:], z)
