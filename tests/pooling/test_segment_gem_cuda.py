"""What only the CUDA kernels of the generalized mean have; gradients of spans and lists, all modes.

That they compute the right thing is in test_executors.py too.
"""

from __future__ import annotations

import pytest
import torch
from contract import check_gradients, layouts, packed, tolerance
from emblas.pooling import gather_pool, group_pool, reference, span_pool
from executors import EXECUTORS
from simt import emulator

pytestmark = pytest.mark.skipif(bool(emulator.why_not()), reason=emulator.why_not() or "")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CHUNK = 128  # rows that are added up together
EPSILON = 0.25


@pytest.fixture(scope="module")
def ops():
    emulator.library()
    return torch.ops.emblas_simt


def both(ops, x, starts, weights=None, power=3.0, ends=None, skip=None, index=None):
    """Inputs of the backward, and what the kernels find: out and gradients, none of weights."""
    dtype = reference.accumulator(x.dtype)
    options = weights, torch.tensor([power], dtype=dtype), EPSILON, ends, skip, index
    out = ops.segment_gem_cuda(x, starts, *options)
    grad = torch.linspace(-1, 1, out.numel(), dtype=dtype).reshape(out.shape)
    inputs = grad, x, out, starts, *options
    return inputs, (out, *ops.segment_gem_backward_cuda(*inputs))


def check(ops, x, *args, **options):
    inputs, actual = both(ops, x, *args, **options)
    _, x, _, *others = inputs
    expected = (reference.segment_gem(x, *others), *reference.segment_gem_backward(*inputs))
    limit = tolerance(x.dtype, x.numel())
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=8 * limit["rtol"], atol=8 * limit["atol"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tile_edges(ops, dtype):
    columns = 32 * 16 // dtype.itemsize
    lengths = (CHUNK - 1, 0, CHUNK + 1, 1)
    for dim in (1, 7, columns):
        check(ops, torch.rand(sum(lengths), dim).to(dtype), packed(lengths))
    for dim in (columns - 1, columns + 8):
        check(ops, torch.rand(9, dim).to(dtype), packed((4, 5)), power=2.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(ops, dtype):
    for x in layouts(torch.rand(11, 40).to(dtype)).values():
        if x.stride(1) == 1:
            check(ops, x, packed((4, 7)))
    planes = torch.rand(3, 16, 8).to(dtype)[:, :5]
    check(ops, planes, packed((5,) * 3)[:-1].contiguous(), ends=packed((5,) * 3)[1:].contiguous())


def test_weights(ops):
    """Rows of weight 0 are not read; weights that cancel leave nothing."""
    x, weights = torch.rand(12, 5), torch.rand(12) + 0.5
    weights[[1, 4, 5]] = 0
    x[[1, 4, 5]] = torch.nan
    weights[10:] = torch.tensor([1.0, -1.0])
    check(ops, x, packed((4, 2, 4, 2)), weights)
    _, (out, grad_x, grad_power, _) = both(ops, x, packed((4, 2, 4, 2)), weights)
    assert (out[[1, 3]] == 0).all()
    assert (grad_x[[1, 4, 5, 10, 11]] == 0).all()
    assert (grad_power[[1, 3]] == 0).all()


def test_same_bits_in_any_order(ops):
    """Of blocks, threads and spans."""
    x, weights = torch.rand(300, 9), torch.rand(300) + 0.5
    starts = torch.tensor([0, 0, 140, 0, 299, 20, 0], dtype=torch.int32)
    ends = torch.tensor([300, 150, 299, 300, 300, 20, 300], dtype=torch.int32)
    args = {"ends": ends, "skip": torch.arange(7, dtype=torch.int32)}
    check(ops, x, starts, weights, **args)
    _, expected = both(ops, x, starts, weights, **args)
    for seed in (1, 2):
        with emulator.schedule("random", seed, 0.05):
            _, actual = both(ops, x, starts, weights, **args)
        assert all(map(torch.equal, actual, expected))
    inputs, _ = both(ops, x, starts, weights, **args)
    grad, _, out, _, _, power, epsilon, _, skip, _ = inputs
    for order in (torch.arange(6, -1, -1), torch.tensor([3, 0, 6, 1, 5, 2, 4])):
        moved = [tensor[order] for tensor in (grad, out, starts, ends, skip)]
        grad_x, grad_power, _ = ops.segment_gem_backward_cuda(
            moved[0], x, moved[1], moved[2], weights, power, epsilon, *moved[3:], None
        )
        assert torch.equal(grad_x, expected[1])
        assert torch.equal(grad_power, expected[2][order])


def test_wrong_segments_stay_in_bounds(ops):
    x, wrong = torch.rand(7, 5), torch.tensor([2**31 - 1, -5, 3, -(2**31), 9], dtype=torch.int32)
    index = torch.tensor([-1, 7, 2**31 - 1, 0, -(2**31)]).int()
    for starts, ends, of in ((wrong, wrong.flip(0), None), (wrong.abs() % 5, wrong, index)):
        with emulator.schedule("forward", check_uninitialized=False, check_races=False):
            both(ops, x, starts, None, ends=ends, skip=wrong, index=of)


def test_bytes_moved(ops):
    """x is read once; the gradient reads it twice and is written once."""
    x, cu_seqlens, batch = torch.rand(2 * CHUNK, 128), packed((CHUNK, CHUNK)), 2
    inputs, _ = both(ops, x, cu_seqlens)
    row, offsets = 128 * 4, cu_seqlens.nbytes
    emulator.take_traffic()
    ops.segment_gem_cuda(x, *inputs[3:])
    traffic = emulator.take_traffic()
    assert traffic["distinct_read"] == x.nbytes + batch * row + 2 * (offsets + 4)
    assert traffic["distinct_write"] == 2 * batch * row  # partial sums, out
    ops.segment_gem_backward_cuda(*inputs)
    traffic = emulator.take_traffic()
    assert traffic["distinct_read"] == 2 * x.nbytes + batch * (3 * row + 12) + offsets + 8
    assert traffic["distinct_write"] == x.nbytes + batch * (row + 16)


def test_bad_arguments(ops):
    x, cu_seqlens, power = torch.zeros(4, 3), packed((4,)), torch.ones(1)
    out = ops.segment_gem_cuda(x, cu_seqlens, None, power, EPSILON)
    for args in (
        (x.long(), cu_seqlens, None, power),
        (x, cu_seqlens.long(), None, power),
        (x, cu_seqlens, None, torch.ones(2)),
        (x, cu_seqlens, None, power.double()),
        (x.double(), cu_seqlens, None, power),
    ):
        with pytest.raises(RuntimeError, match="emblas: "):
            ops.segment_gem_cuda(*args, EPSILON)
    for args in (
        (out[:, :2], x, out, cu_seqlens, None, power),
        (out, x, out[0], cu_seqlens, None, power),
        (out.double(), x, out, cu_seqlens, None, power),
        (out, x, out, cu_seqlens, None, torch.ones(2)),
    ):
        with pytest.raises(RuntimeError, match="emblas: "):
            ops.segment_gem_backward_cuda(*args, EPSILON)


@pytest.mark.parametrize("mode", ["weighted_mean", "mean_sqrt_len", "cls", "gem"])
def test_gradients_of_spans_and_lists(mode):
    """Through the front door, against finite differences."""
    name = "segment_gem" if mode == "gem" else "segment_pool"
    names = (name, f"{name}_backward")
    starts, ends = torch.tensor([0, 2, 0, 3, 0]), torch.tensor([6, 5, 6, 3, 2])
    index, offsets = torch.tensor([3, 3, 0, 5, 2]), packed((3, 0, 2))
    groups, x, w = torch.tensor([2, 0, 2, 1, 1, 0]), torch.rand(6, 3) + 0.3, torch.rand(6) + 0.1
    with EXECUTORS["simt"](names):
        check_gradients(lambda x: span_pool(x, starts, ends, mode, skip_prefix=1), [x], names)
        check_gradients(lambda x: gather_pool(x, index, offsets, mode), [x], names)
        check_gradients(lambda x: group_pool(x, groups, 4, mode), [x], names)
        if mode != "cls":
            check_gradients(lambda x, w: span_pool(x, starts, ends, mode, weights=w), [x, w], names)
            check_gradients(
                lambda x, w: gather_pool(x, index, offsets, mode, weights=w), [x, w[1:]], names
            )
