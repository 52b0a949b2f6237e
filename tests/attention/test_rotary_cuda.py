"""What only the CUDA kernel of rotary embedding has: vectors of pairs, alignment, clamped rows.

That it computes the right thing is in test_executors.py too.
"""

from __future__ import annotations

import pytest
import torch
from contract import tolerance
from emblas.attention import reference
from simt import emulator

pytestmark = pytest.mark.skipif(bool(emulator.why_not()), reason=emulator.why_not() or "")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(scope="module")
def ops():
    emulator.library()
    return torch.ops.emblas_simt


def tables(rows, pairs, dtype):
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.randn(2, rows, pairs, dtype=accumulator)


def check(ops, x, pairs, ids=None):
    cos, sin = tables(9 if ids is not None else len(x), pairs, x.dtype)
    for interleaved in (False, True):
        args = x, cos, sin, ids, interleaved
        for name in ("rotary", "rotary_backward"):
            actual = getattr(ops, f"{name}_cuda")(*args)
            wide = (x.double(), cos.double(), sin.double(), ids, interleaved)
            expected = getattr(reference, name)(*wide)
            limit = tolerance(x.dtype, 2)
            torch.testing.assert_close(
                actual.double(), expected, rtol=2 * limit["rtol"], atol=4 * limit["atol"]
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_edges_of_vectors(ops, dtype):
    vector = 16 // dtype.itemsize
    ids = torch.tensor([8, 0, 5])
    for pairs in (1, vector - 1, vector, vector + 1, 2 * vector):
        for rest in (0, 1, vector, vector + 1):
            check(ops, torch.randn(3, 2, 2 * pairs + rest).to(dtype), pairs, ids)
    check(ops, torch.randn(3, 2, 5).to(dtype), 0, ids)  # nothing turns


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(ops, dtype):
    wide = torch.randn(7, 3, 60).to(dtype)
    for x in (
        wide[:, :, 1:49],
        wide[:, :, :48],
        wide[:, 1:],
        wide.transpose(0, 1).contiguous().transpose(0, 1),
        wide[::2],
    ):
        check(ops, x, 16)


def test_many_blocks(ops):
    check(ops, torch.randn(40, 3, 70), 32)


@pytest.mark.parametrize("order", emulator.ORDERS)
def test_same_bits_in_any_order(ops, order):
    torch.manual_seed(1)
    x, (cos, sin) = torch.randn(20, 3, 36), tables(20, 16, torch.float32)
    expected = ops.rotary_cuda(x, cos, sin, None, False)
    with emulator.schedule(order, seed=3, preemption=0.2):
        assert torch.equal(ops.rotary_cuda(x, cos, sin, None, False), expected)


def test_wrong_positions_stay_in_bounds(ops):
    """They take the first or the last row."""
    x, (cos, sin) = torch.randn(4, 2, 16), tables(9, 8, torch.float32)
    wrong, clamped = torch.tensor([-1, 9, -(2**40), 2**40]), torch.tensor([0, 8, 0, 8])
    for interleaved in (False, True):
        expected = ops.rotary_cuda(x, cos, sin, clamped, interleaved)
        assert torch.equal(ops.rotary_cuda(x, cos, sin, wrong, interleaved), expected)


def test_refusals(ops):
    x, (cos, sin) = torch.randn(4, 2, 16), tables(4, 8, torch.float32)
    for args in (
        (x[0], cos, sin, None), (x, cos[:3], sin[:3], None), (x, cos, sin[:, :7], None),
        (x, *tables(4, 9, torch.float32), None), (x, cos.double(), sin.double(), None),
        (x, cos, sin, torch.arange(4).int()), (x, cos[:0], sin[:0], torch.arange(4)),
        (x.transpose(1, 2), cos, sin, None),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="emblas: "):
            ops.rotary_cuda(*args, False)
