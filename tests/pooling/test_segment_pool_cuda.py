"""What only the CUDA kernels have: chunks, workspaces, launch shapes, offsets that nobody checked.

That they compute the right thing is in test_segment_pool.py, which they run like every executor.
"""

from __future__ import annotations

import pytest
import torch
from contract import layouts, packed, tolerance
from emblas.pooling import reference
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
    offsets = 2 * cu_seqlens.nbytes  # each of the two kernels
    assert forward["distinct_read"] == x.nbytes + batch * row + offsets
    assert forward["distinct_write"] == 3 * batch * row  # partial sums, the kept sum, out
    assert backward["distinct_write"] == x.nbytes + batch * (row + 8)
    assert backward["distinct_read"] == batch * (3 * row + 8) + offsets


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
    ):
        with pytest.raises(RuntimeError, match="emblas: "):
            ops.segment_pool_cuda(*args)
    for args in (
        (out[:, :2], x, out, norm, cu_seqlens, None, True, True, True),
        (out.double(), x, out, norm, cu_seqlens, None, True, True, True),
        (out, x, out, norm[:0], cu_seqlens, None, True, True, True),
        (out, x, out, norm, cu_seqlens, norm.double(), True, True, True),
    ):
        with pytest.raises(RuntimeError, match="emblas: "):
            ops.segment_pool_backward_cuda(*args)


def test_nothing_wanted(ops):
    x, cu_seqlens = torch.randn(5, 3), packed((5,))
    out, norm = ops.segment_pool_cuda(x, cu_seqlens, None, False)
    grads = ops.segment_pool_backward_cuda(out, x, out, norm, cu_seqlens, None, False, False, False)
    assert [g.shape for g in grads] == [(0,), (0,)]
