"""Every executor of every operator against the reference in float64, on the same calls."""

from __future__ import annotations

import pytest
import torch
from cases import CASES
from contract import tolerance
from emblas import _op
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


@pytest.mark.parametrize(
    ("name", "executor"),
    [
        (n, e)
        for n, e in EXECUTORS
        if n.startswith("vocab_sum") and e in GPU
        and (n, e) != ("vocab_sum", "simt")  # reads what nobody wrote: test_vocab_sum_cuda.py
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "wrong", [[2**31 - 1, -5, 3, -(2**31), 9], [0, 90, 2**31 - 1, 5, 30], [-(2**31), 73, 70, 1, 0]]
)
def test_wrong_offsets_of_summed_vocabularies_stay_in_bounds(name, executor, wrong):
    """Emulator and interpreter would notice; results are whatever they are."""
    x, weight, bias = torch.randn(73, 9), torch.randn(70, 9), torch.randn(70)
    wrong = torch.tensor(wrong, dtype=torch.int32)
    for starts, ends, batch in ((wrong, None, 4), (wrong, wrong.flip(0), 5)):
        args = x, weight, bias, starts, 2, torch.ones(73), ends
        if name == "vocab_sum":
            found = (EXECUTORS[name, executor](*args),)
        else:
            found = EXECUTORS[name, executor](torch.randn(batch, 70), *args, True, True, True)
        assert all(result.isfinite().all() for result in found)
