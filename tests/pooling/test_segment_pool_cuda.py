"""What only the CUDA kernels have: chunks, workspaces, launch shapes, offsets that nobody checked.

That they compute the right thing is in test_segment_pool.py, which they run like every executor.
"""

from __future__ import annotations

import pytest
import torch
from contract import layouts, packed, tolerance
from emblas.pooling import reference
from emblas.pooling.reference import Mode
from hypothesis import given
from hypothesis import strategies as st
from simt import emulator

pytestmark = pytest.mark.skipif(bool(emulator.why_not()), reason=emulator.why_not() or "")

CHUNK = 128  # rows that one block adds up


@pytest.fixture(scope="module")
def ops():
    emulator.library()
    return torch.ops.emblas_simt


def both(ops, x, cu_seqlens, weights=None, normalize=True):
    """Forward and backward by the CUDA kernels."""
    out, norm = ops.segment_pool_cuda(x, cu_seqlens, weights, normalize)
    grad = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(x.dtype)
    grads = ops.segment_pool_backward_cuda(grad, x, out, norm, cu_seqlens, weights, normalize,
                                           True, True)  # fmt: skip
    return grad, (out, norm, *grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dim", [3, 8, 140])
def test_chunks(ops, dim, dtype):
    """Segments around multiples of a chunk, starting anywhere in it."""
    lengths = (CHUNK - 1, CHUNK, CHUNK + 1, 0, 0, 1, 2 * CHUNK, 2 * CHUNK + 1)
    cu_seqlens = packed(lengths)
    x = torch.randn(sum(lengths), dim).to(dtype)
    weights = torch.rand(len(x), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    grad, results = both(ops, x, cu_seqlens, weights)
    expected = reference.segment_pool(x, cu_seqlens, weights, True)
    expected += reference.segment_pool_backward(
        grad, x, *results[:2], cu_seqlens, weights, True, True, True
    )
    for actual, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(actual, wanted, **tolerance(dtype, max(lengths)))


@given(
    lengths=st.lists(st.integers(0, 2 * CHUNK + 2), max_size=5),
    dim=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    padding=st.integers(0, 9),
    seed=st.integers(0, 2**31),
    weighted=st.booleans(),
    normalize=st.booleans(),
)
def test_any_shape(ops, lengths, dim, dtype, padding, seed, weighted, normalize):
    generator = torch.Generator().manual_seed(seed)
    cu_seqlens = packed(lengths)
    wide = torch.randn(sum(lengths), dim + padding, generator=generator).to(dtype)
    x = wide[:, padding // 2 : padding // 2 + dim]  # the rest must not be read
    # Small weights would magnify the rounding of `out` in the gradients of the weights.
    weights = torch.rand(len(x), generator=generator) + 0.5 if weighted else None
    if weighted and dtype == torch.float64:
        weights = weights.double()
    with emulator.schedule("random", seed):
        grad, results = both(ops, x, cu_seqlens, weights, normalize)
    expected = reference.segment_pool(x, cu_seqlens, weights, normalize)
    expected += reference.segment_pool_backward(
        grad, x, *results[:2], cu_seqlens, weights, normalize, True, True
    )
    limit = tolerance(dtype, 4 * CHUNK)
    for actual, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=limit["rtol"], atol=8 * limit["atol"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_same_bits_in_any_order(ops, dtype):
    """Block and thread order, interruptions and memory layout change nothing."""
    cu_seqlens, weights = packed((0, 150, 3, 20)), torch.rand(173)
    x = torch.randn(173, 24).to(dtype)
    _, expected = both(ops, x, cu_seqlens, weights)
    for order, seed, preemption in (("reverse", 0, 0), ("random", 1, 0), ("random", 2, 0.1)):
        with emulator.schedule(order, seed, preemption):
            _, actual = both(ops, x, cu_seqlens, weights)
        assert all(map(torch.equal, actual, expected))
    for view in layouts(x).values():
        _, actual = both(ops, view if view.stride(1) == 1 else x, cu_seqlens, weights)
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other, **tolerance(dtype, 24))


@pytest.mark.parametrize(
    "offsets",
    [
        [0, 2**31 - 1, -(2**31), 7],
        [-5, 500, 500, 20],
        [300, 200, 100, 0],
        [2**31 - 1] * 4,
        [-1] * 4,
        [0, 129, 128, 300],
    ],
)
@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_wrong_offsets_stay_in_bounds(ops, offsets, order):
    """Results mean nothing then, but no byte outside the arguments is touched."""
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
    x, weights = torch.randn(300, 9), torch.rand(300)
    # Segments that overlap write the same bytes, idle chunks leave partial sums unwritten.
    with emulator.schedule(order, check_uninitialized=False, check_races=False):
        both(ops, x, cu_seqlens, weights)


def segments(ops, x, *args):
    """Forward and backward of segments of any form: x, starts, weights, mode, ends, skip, index."""
    starts, weights, mode, *others = args
    options = (starts, weights, True, mode, *others)
    out, norm = ops.segment_pool_cuda(x, *options)
    grad = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(x.dtype)
    needs = (True, True, mode)
    grads = ops.segment_pool_backward_cuda(
        grad, x, out, norm, starts, weights, True, *needs, *others
    )
    return out, norm, *grads


def spans(count, tokens, seed=0):
    """Overlapping, nested, empty, equal, in no order; some longer than a chunk."""
    generator = torch.Generator().manual_seed(seed)
    bounds = torch.randint(0, tokens + 1, (2, count), generator=generator).sort(0).values.int()
    bounds[:, ::5] = bounds[:, :1]
    bounds[1, 1::4] = bounds[0, 1::4]
    return bounds[0].contiguous(), bounds[1].contiguous()


@pytest.mark.parametrize("mode", list(Mode), ids=str)
def test_first_and_last_tokens_are_far_away(ops, mode):
    """Most weights are 0, over several steps of a warp's search."""
    x, weights = torch.randn(4 * 70, 5), torch.zeros(4 * 70)
    weights[[0, 69, 70 + 33, 140 + 31, 140 + 32, 140 + 63]] = torch.tensor([1.0, 2, 3, 4, 5, 6])
    for skip in (None, torch.tensor([1, 33, 32, 0]).int(), torch.tensor([70, 99, 64, 1]).int()):
        args = packed((70,) * 4), weights, int(mode), None, skip, None, False
        actual = segments(ops, x, *args)
        expected = reference.segment_pool(x, *args[:2], True, *args[2:])
        for a, e in zip(actual, expected, strict=False):
            torch.testing.assert_close(a, e, **tolerance(torch.float32, 70))


def test_whole_segments_have_the_bits_of_chunks(ops):
    """A block that takes a segment adds up as the blocks that take its chunks do."""
    lengths = (CHUNK, 5, 2 * CHUNK + 3, 0, CHUNK + 1)
    x, weights, cu_seqlens = torch.randn(sum(lengths), 9), torch.rand(sum(lengths)), packed(lengths)
    skip = torch.tensor([3, 0, CHUNK, 2, 0], dtype=torch.int32)
    for mode in (Mode.mean, Mode.weighted_mean):
        chunks = segments(ops, x, cu_seqlens, weights, int(mode), None, skip)
        starts, ends = cu_seqlens[:-1].contiguous(), cu_seqlens[1:].contiguous()
        for order, seed in (("forward", 0), ("random", 3)):
            with emulator.schedule(order, seed):
                whole = segments(ops, x, starts, weights, int(mode), ends, skip)
            assert all(map(torch.equal, whole, chunks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("count", [7, 70])
def test_spans_in_any_order(ops, dtype, count):
    """Gradients are right, and have the same bits however spans are ordered."""
    starts, ends = spans(count, 300)
    skip = torch.arange(count, dtype=torch.int32) % 3
    x = torch.randn(300, 8).to(dtype)
    weights = (torch.rand(300) + 0.5).to(reference.accumulator(dtype))
    results = []
    for seed in range(3):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        out = torch.empty(count, 8, dtype=dtype)
        grad = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(dtype)
        args = starts[order], weights, True
        others = int(Mode.weighted_mean), ends[order], skip[order]
        out, norm = ops.segment_pool_cuda(x, *args, *others)
        inputs = (grad[order], x, out, norm, *args, True, True, *others)
        results.append(ops.segment_pool_backward_cuda(*inputs))
        expected = reference.segment_pool_backward(*inputs)
        for a, e in zip(results[-1], expected, strict=True):
            limit = tolerance(dtype, 300)
            torch.testing.assert_close(a, e, rtol=8 * limit["rtol"], atol=16 * limit["atol"])
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


def test_lists_in_any_schedule(ops):
    """Rows that many positions list, and rows that none does."""
    x, index = torch.randn(9, 5), torch.randint(0, 6, (200,), dtype=torch.int32)
    cu_seqlens, weights = packed((150, 0, 3, 47)), torch.rand(200) + 0.5
    args = cu_seqlens, weights, int(Mode.weighted_mean), None, None, index
    expected = segments(ops, x, *args)
    assert (expected[2][6:] == 0).all()
    for order, seed, preemption in (("reverse", 0, 0), ("random", 1, 0.1)):
        with emulator.schedule(order, seed, preemption):
            assert all(map(torch.equal, segments(ops, x, *args), expected))


def test_wrong_segments_stay_in_bounds(ops):
    x, wrong = torch.randn(7, 5), torch.tensor([2**31 - 1, -5, 3, -(2**31), 9], dtype=torch.int32)
    weights, index = torch.ones(5), torch.tensor([-1, 7, 2**31 - 1, 0, -(2**31)]).int()
    for mode in Mode:
        for starts, ends, of in ((wrong, wrong.flip(0), None), (wrong.abs() % 5, wrong, index)):
            with emulator.schedule("forward", check_uninitialized=False, check_races=False):
                w = None if of is None else weights
                segments(ops, x, starts, w, int(mode), ends, wrong, of)


def test_bytes_moved(ops):
    """x is read once; grad_x is written once."""
    tokens, dim, batch = 512, 128, 4
    x, cu_seqlens = torch.randn(tokens, dim), packed((CHUNK,) * batch)
    emulator.take_traffic()
    out, norm = ops.segment_pool_cuda(x, cu_seqlens, None, False)
    forward = emulator.take_traffic()
    grad = torch.ones_like(out)
    ops.segment_pool_backward_cuda(grad, x, out, norm, cu_seqlens, None, False, True, False)
    backward = emulator.take_traffic()
    row = dim * 4
    assert forward["distinct_read"] == x.nbytes + batch * row + 2 * cu_seqlens.nbytes
    assert forward["distinct_write"] == 2 * batch * row  # partial sums, out
    assert backward["distinct_write"] == x.nbytes + batch * (row + 12)
    assert backward["distinct_read"] == batch * (3 * row + 12) + cu_seqlens.nbytes


def test_bad_arguments(ops):
    x, cu_seqlens = torch.zeros(4, 3), packed((4,))
    out, norm = ops.segment_pool_cuda(x, cu_seqlens, None, True)
    for args in (
        (x.long(), cu_seqlens, None, False),
        (torch.zeros(3, 4).t(), cu_seqlens, None, False),
        (x[0], cu_seqlens, None, False),
        (x, cu_seqlens.long(), None, False),
        (x, cu_seqlens[:0], None, False),
        (x, cu_seqlens, x[0], False),
        (x.double(), cu_seqlens, torch.zeros(4), False),
        (x, cu_seqlens, None, False, 6),
        (x, cu_seqlens, None, False, -1),
        (x, cu_seqlens, None, False, 0, cu_seqlens[1:]),
        (x, cu_seqlens, None, False, 0, None, cu_seqlens),
        (x, cu_seqlens, None, False, 0, None, None, cu_seqlens.long()),
    ):
        with pytest.raises(RuntimeError, match="emblas: "):
            ops.segment_pool_cuda(*args)
    for args in (
        (out[:, :2], x, out, norm, cu_seqlens, None, True, True, True),
        (out.double(), x, out, norm, cu_seqlens, None, True, True, True),
        (out, x, out, norm[:0], cu_seqlens, None, True, True, True),
        (out, x, out, norm, cu_seqlens, norm.double(), True, True, True),
        (out, x, out[0], norm, cu_seqlens, None, True, True, True),
        (out, x, out, norm, cu_seqlens, None, True, True, True, 9),
        (
            out.half(),
            x.half(),
            out.half(),
            norm,
            cu_seqlens,
            None,
            True,
            True,
            True,
            0,
            None,
            None,
            None,
            True,
        ),
    ):
        with pytest.raises(RuntimeError, match="emblas: "):
            ops.segment_pool_backward_cuda(*args)


def test_nothing_wanted(ops):
    x, cu_seqlens = torch.randn(5, 3), packed((5,))
    out, norm = ops.segment_pool_cuda(x, cu_seqlens, None, False)
    grads = ops.segment_pool_backward_cuda(out, x, out, norm, cu_seqlens, None, False, False, False)
    assert [g.shape for g in grads] == [(0,), (0,)]
