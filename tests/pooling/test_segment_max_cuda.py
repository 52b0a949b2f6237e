"""What only the CUDA kernels of max pooling have: warps, tiles of columns, alignment, shared rows.

That they compute the right thing is in test_executors.py too.
"""

from __future__ import annotations

import pytest
import torch
from contract import layouts, packed
from emblas.pooling import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from simt import emulator

pytestmark = pytest.mark.skipif(bool(emulator.why_not()), reason=emulator.why_not() or "")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WARPS = 8  # which take turns at the rows of a segment
OWN = 8  # segments of a thread of the gradient


@pytest.fixture(scope="module")
def ops():
    emulator.library()
    return torch.ops.emblas_simt


def values(rows, dim, dtype=torch.float32):
    """Many equal values, NaN, infinities."""
    x = torch.randint(-2, 3, (rows, dim)).to(dtype)
    x[torch.rand(x.shape) < 0.03] = torch.nan
    x[torch.rand(x.shape) < 0.03] = -torch.inf
    return x


def check(ops, x, starts, weights=None, ends=None, skip=None, index=None):
    args = x, starts, weights, ends, skip, index
    out, argmax = ops.segment_max_cuda(*args)
    expected, expected_argmax = reference.segment_max(*args)
    assert torch.equal(argmax, expected_argmax)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    rows = x.shape[:-1].numel()
    grad = torch.randint(-3, 4, out.shape).to(x.dtype)  # sums are exact
    actual = ops.segment_max_backward_cuda(grad, argmax, rows)
    assert torch.equal(actual, reference.segment_max_backward(grad, argmax, rows))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tile_edges(ops, dtype):
    columns = 32 * 16 // dtype.itemsize
    lengths = (WARPS - 1, WARPS, WARPS + 1, 0, 1)
    for dim in (1, 7, columns - 1, columns, columns + 8):
        check(ops, values(sum(lengths), dim, dtype), packed(lengths))
    check(ops, values(3, 257, dtype), packed((3,)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(ops, dtype):
    for x in layouts(values(11, 40, dtype)).values():
        if x.stride(1) == 1:
            check(ops, x, packed((4, 7)))


@pytest.mark.parametrize("batch", [OWN - 1, OWN, OWN + 1, 2 * OWN + 3])
def test_segments_share_rows(ops, batch):
    """Every row is the largest of several segments, of this thread and of others."""
    x = values(20, 5)
    starts = torch.randint(0, 10, (batch,), dtype=torch.int32)
    ends = starts + torch.randint(0, 10, (batch,), dtype=torch.int32)
    check(ops, x, starts, None, ends)
    check(ops, x, packed((3,) * batch), None, None, None, torch.randint(0, 20, (3 * batch,)).int())


def test_every_argument(ops):
    wide = values(48, 9).view(3, 16, 9)
    starts = torch.tensor([0, 5, 10], dtype=torch.int32)
    weights = torch.randint(0, 2, (15,)).float()
    skip = torch.tensor([0, 2, 9], dtype=torch.int32)
    for x in (wide[:, 3:8], wide[:, :5], wide[:1, :15]):
        check(ops, x, starts, weights, starts + 5, skip)
    planes = values(48, 8).view(3, 16, 8)[:, :5]  # of whole vectors
    check(ops, planes, starts, None, starts + 3)


@settings(max_examples=15)
@given(
    lengths=st.lists(st.integers(0, 20), max_size=12),
    dim=st.integers(0, 40),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_any_shape(ops, lengths, dim, dtype, seed):
    with emulator.schedule("random", seed, 0.01):
        check(ops, values(sum(lengths), dim, dtype), packed(lengths))


def test_wrong_arguments_stay_in_bounds(ops):
    """Results mean nothing then, but no byte outside the arguments is touched."""
    x, wrong = torch.randn(7, 5), torch.tensor([2**31 - 1, -5, 3, -(2**31), 9], dtype=torch.int32)
    weights, index = torch.ones(5), torch.tensor([-1, 7, 2**31 - 1, 0, -(2**31)]).int()
    ops.segment_max_cuda(x, wrong, None)
    ops.segment_max_cuda(x, packed((5,)), weights, None, None, index)
    for starts, ends in ((wrong, wrong.flip(0)), (wrong.abs() % 5, wrong)):
        ops.segment_max_cuda(x, starts, weights, ends, wrong, index)
    argmax = torch.tensor([-1, 7, 2**31 - 1, 0, -(2**31)]).int()[:, None].repeat(1, 5)
    grad_x = ops.segment_max_backward_cuda(torch.ones(5, 5), argmax, 7)
    assert grad_x[0].tolist() == [1] * 5
    assert (grad_x[1:] == 0).all()


def test_bytes_moved(ops):
    """Rows of weight 0 are not read."""
    x, cu_seqlens, weights = torch.randn(20, 40), packed((12, 8)), torch.ones(20)
    weights[::4] = 0
    emulator.take_traffic()
    out, argmax = ops.segment_max_cuda(x, cu_seqlens, weights)
    traffic = emulator.take_traffic()
    assert traffic["distinct_read"] == x[:15].nbytes + weights.nbytes + cu_seqlens.nbytes
    assert traffic["distinct_write"] == out.nbytes + argmax.nbytes
    ops.segment_max_backward_cuda(out, argmax, 20)
    traffic = emulator.take_traffic()
    assert traffic["distinct_read"] == out.nbytes + argmax.nbytes
    assert traffic["distinct_write"] == out.nbytes  # into zeros


def test_bad_arguments(ops):
    x, cu_seqlens = torch.zeros(4, 3), packed((4,))
    ends, index = cu_seqlens[1:], torch.zeros(2, dtype=torch.int32)
    for args in (
        (x.long(), cu_seqlens, None),
        (torch.zeros(3, 4).t(), cu_seqlens, None),
        (x[0], cu_seqlens, None),
        (x, cu_seqlens.long(), None),
        (x, cu_seqlens[:0], None),
        (x, cu_seqlens, x[0]),
        (x.double(), cu_seqlens, torch.zeros(4)),
        (x, cu_seqlens, None, ends),
        (x, cu_seqlens, None, None, cu_seqlens),
        (x, cu_seqlens, None, None, None, index.long()),
        (x, cu_seqlens, torch.zeros(4), None, None, index),
        (x[:0], cu_seqlens, None, None, None, index),
    ):
        with pytest.raises(RuntimeError, match="emblas: "):
            ops.segment_max_cuda(*args)
    grad, argmax = torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.int32)
    for args in (
        (grad[0], argmax, 4),
        (grad.int(), argmax, 4),
        (grad, argmax.long(), 4),
        (grad, argmax[:, :2], 4),
        (grad, argmax, -1),
    ):
        with pytest.raises(RuntimeError, match="emblas: "):
            ops.segment_max_backward_cuda(*args)
