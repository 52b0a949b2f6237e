"""What only the CUDA kernels of attention pooling have: parts, steps, groups of queries, alignment.

That they compute the right thing is in test_executors.py too.
"""

from __future__ import annotations

import pytest
import torch
from contract import layouts, packed, tolerance
from emblas.pooling import op_attention
from hypothesis import given, settings
from hypothesis import strategies as st
from simt import emulator

pytestmark = pytest.mark.skipif(bool(emulator.why_not()), reason=emulator.why_not() or "")

PART = 128  # tokens that one block sums up
STEP = 8  # tokens that it has at hand, one for each warp
GROUP = 4  # queries of a block
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(scope="module")
def ops():
    emulator.library()
    return torch.ops.emblas_simt


def both(ops, x, queries, starts, weights=None, ends=None):
    out, lse = ops.attention_pool_cuda(x, queries, starts, 0.6, weights, ends)
    grad = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out.dtype)
    rest = (starts, 0.6, weights, ends)
    grads = ops.attention_pool_backward_cuda(grad, x, queries, out, lse, *rest)
    return out, lse, *grads


def check(ops, x, heads, starts, weights=None, ends=None):
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    queries = torch.randn(heads, x.shape[-1], dtype=wide)
    out, lse, grad_x, grad_queries = both(ops, x, queries, starts, weights, ends)
    xs, qs = x.double().requires_grad_(), queries.double().requires_grad_()
    expected, expected_lse = op_attention._reference(xs, qs, starts, 0.6, weights, ends)
    grad = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
    expected.backward(grad.double())
    limit = {name: 16 * value for name, value in tolerance(wide, 2 * PART).items()}
    torch.testing.assert_close(out.double(), expected, **limit)
    torch.testing.assert_close(lse.double(), expected_lse, **limit)
    torch.testing.assert_close(grad_queries.double().sum(0), qs.grad, **limit)
    eps = 4 * torch.finfo(x.dtype).eps
    limit = {name: value + eps for name, value in limit.items()}
    torch.testing.assert_close(grad_x.double(), xs.grad, **limit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_and_parts(ops, dtype):
    steps = (STEP - 1, STEP, STEP + 1, 0, 2 * STEP)
    check(ops, torch.randn(sum(steps), 9).to(dtype), 2, packed(steps))
    parts = (PART - 1, 0, PART, PART + 1, 0, 0, 1, 2 * PART + 3)
    check(ops, torch.randn(sum(parts), 8).to(dtype), 1, packed(parts))


@pytest.mark.parametrize("heads", [1, GROUP - 1, GROUP, GROUP + 1, 2 * GROUP + 1])
@pytest.mark.parametrize("dim", [5, 16])
def test_groups_of_queries(ops, heads, dim):
    check(ops, torch.randn(13, dim), heads, packed((3, 10)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns(ops, dtype):
    """More than a warp's and a block's share, of whole vectors and of single values."""
    vector = 16 // dtype.itemsize
    for dim in (256 * vector, 256 * vector + vector, 257):
        check(ops, torch.randn(4, dim).to(dtype) / dim**0.5, 1, packed((1, 3)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(ops, dtype):
    for x in layouts(torch.randn(11, 16).to(dtype)).values():
        if x.stride(1) == 1:
            check(ops, x, 2, packed((4, 7)))
    storage = torch.randn(2 * 16 + 1)
    queries, x = storage[1:].view(2, 16), torch.randn(5, 16)
    expected = both(ops, x, queries.clone(), packed((5,)))
    for actual, wanted in zip(both(ops, x, queries, packed((5,))), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_unaligned_gradient(ops):
    """The other arguments are aligned."""
    x, queries, starts = torch.randn(5, 16), torch.randn(2, 16), packed((2, 3))
    out, lse = ops.attention_pool_cuda(x, queries, starts, 1.0)
    results = []
    for grad_offset, out_offset in ((0, 0), (1, 0), (0, 1)):
        moved = []
        for offset, values in ((grad_offset, out.sin()), (out_offset, out)):
            storage = torch.empty(out.numel() + offset)
            storage[offset:] = values.flatten()
            moved.append(storage[offset:].view(out.shape))
        args = (moved[0], x, queries, moved[1], lse, starts, 1.0)
        results.append(ops.attention_pool_backward_cuda(*args))
    for result in results[1:]:
        for actual, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(actual, expected)


def test_weights_and_planes(ops):
    """Rows without a token may hold anything; parts without a token are none."""
    x = torch.randn(2 * PART + 9, 12)
    weights = (torch.rand(len(x)) < 0.5).float()
    weights[:PART] = 0
    weights[-9:] = 0
    for lengths in ((len(x),), (PART, PART, 9)):
        cu_seqlens, masked = packed(lengths), x.masked_fill(weights[:, None] == 0, torch.nan)
        out, lse, grad_x, grad_queries = both(ops, masked, x[:3], cu_seqlens, weights)
        expected = both(ops, x, x[:3], cu_seqlens, weights)
        assert all(map(torch.equal, (out, lse, grad_x, grad_queries), expected))
        assert (grad_x[weights == 0] == 0).all()
        check(ops, x, 3, cu_seqlens, weights)
    planes = torch.randn(3, 20, 9)[:, :7]
    starts = torch.tensor([0, 8, 14], dtype=torch.int32)
    check(ops, planes, 2, starts, None, starts + 5)
    check(ops, torch.randn(3, 20, 16)[:, :7], 2, starts, None, starts + 5)


def test_large_scores(ops):
    """Scores of hundreds, rising and falling over steps and parts."""
    x = torch.linspace(-1, 1, 2 * PART + 5)[:, None].repeat(1, 4)
    for rows in (x, x.flip(0), x.abs(), -x.abs()):
        queries, starts = torch.full((1, 4), 300.0), packed((len(x),))
        out, lse = ops.attention_pool_cuda(rows, queries, starts, 1.0)
        expected, expected_lse = op_attention._reference(rows.double(), queries.double(), starts, 1)
        torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-3)


def test_scores_of_different_queries(ops):
    """Exponentials of a query underflow where its scores are compared with another one's."""
    x = torch.rand(PART + 9, 4) + 0.5
    queries = torch.tensor([-300.0, 300.0, 0.0, -9.0, 80.0])[:, None].repeat(1, 4)
    out, lse = ops.attention_pool_cuda(x, queries, packed((len(x),)), 1.0)
    expected, expected_lse = op_attention._reference(
        x.double(), queries.double(), packed((len(x),)), 1.0
    )
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-3)


def test_missing_values(ops):
    x = torch.randn(20, 4)
    x[3] = torch.nan
    out, lse, grad_x, _ = both(ops, x, torch.randn(1, 4), packed((2, 10, 8)))
    assert out.isnan().all((1, 2)).tolist() == [False, True, False]
    assert lse[:, 0].isnan().tolist() == [False, True, False]
    assert grad_x.isnan().any(1).nonzero().flatten().tolist() == [*range(2, 12)]


@settings(max_examples=10)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=6),
    heads=st.integers(1, 5),
    dim=st.integers(1, 24),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_any_shape(ops, lengths, heads, dim, dtype, seed):
    with emulator.schedule("random", seed, 0.01):
        check(ops, torch.randn(sum(lengths), dim).to(dtype), heads, packed(lengths))


def test_same_bits_in_any_schedule_and_batch(ops):
    lengths, dim = (7, PART + 20, 9), 12
    x, queries = torch.randn(sum(lengths), dim), torch.randn(5, dim)
    expected = both(ops, x, queries, packed(lengths))
    for order, seed in (("reverse", 0), ("random", 1)):
        with emulator.schedule(order, seed, 0.01):
            assert all(map(torch.equal, both(ops, x, queries, packed(lengths)), expected))
    alone = ops.attention_pool_cuda(x[7:-9], queries, packed(lengths[1:2]), 0.6)
    for actual, wanted in zip(alone, expected, strict=False):
        assert torch.equal(actual[0], wanted[1])


def test_wrong_offsets_stay_in_bounds(ops):
    """Results mean nothing then, but no byte outside the arguments is touched."""
    x, queries = torch.randn(140, 5), torch.randn(2, 5)
    with emulator.schedule(check_uninitialized=False, check_races=False):
        for wrong in ([2**31 - 1, -5, 3, -(2**31), 9], [50, 40, 135, 0, 500], [-3, 9, 1, 8, 200]):
            starts = torch.tensor(wrong, dtype=torch.int32)
            both(ops, x, queries, starts)
            both(ops, x, queries, starts, torch.ones(140), starts.flip(0))


def test_bytes_moved(ops):
    """Rows of weight 0 are not read; the gradient does not read x for a second time."""
    x, queries, starts, weights = torch.randn(20, 8), torch.randn(1, 8), packed((12, 8)), None
    weights = torch.ones(20)
    weights[::4] = 0
    small = queries.nbytes + weights.nbytes + starts.nbytes
    emulator.take_traffic()
    out, lse = ops.attention_pool_cuda(x, queries, starts, 1.0, weights)
    launches = emulator.take_launches()
    assert launches[0][1]["distinct_read"] == x[:15].nbytes + small
    assert launches[1][1]["distinct_write"] == out.nbytes + lse.nbytes + 8  # and factors
    ops.attention_pool_backward_cuda(out, x, queries, out, lse, starts, 1.0, weights)
    slopes, _, rows = (counts for _, counts in emulator.take_launches())
    assert slopes["distinct_read"] == x[:15].nbytes + small + out.nbytes + lse.nbytes
    assert rows["distinct_read"] == 15 * 2 * 4 + small + out.nbytes
    assert rows["distinct_write"] == x.nbytes


def test_bad_arguments(ops):
    x, queries, cu_seqlens = torch.zeros(4, 3), torch.zeros(2, 3), packed((4,))
    for args in (
        (x.long(), queries, cu_seqlens),
        (x[0], queries, cu_seqlens),
        (x, queries.double(), cu_seqlens),
        (x, queries[0], cu_seqlens),
        (x, queries[:, :2], cu_seqlens),
        (x.double(), queries, cu_seqlens),
        (x, queries, cu_seqlens.long()),
        (x, queries, cu_seqlens[:0]),
    ):
        with pytest.raises(RuntimeError, match="emblas: "):
            ops.attention_pool_cuda(*args, 1.0)
    for weights, ends in ((x[0], None), (None, cu_seqlens[:1])):
        with pytest.raises(RuntimeError, match="emblas: "):
            ops.attention_pool_cuda(x, queries, cu_seqlens, 1.0, weights, ends)
    grad, lse = torch.zeros(1, 2, 3), torch.zeros(1, 2)
    for args in (
        (grad[0], x, queries, grad, lse),
        (grad.double(), x, queries, grad, lse),
        (grad, x, queries, grad[:, :1], lse),
        (grad, x, queries, grad, lse[:0]),
        (grad, x, queries[:1], grad, lse),
    ):
        with pytest.raises(RuntimeError, match="emblas: "):
            ops.attention_pool_backward_cuda(*args, cu_seqlens, 1.0)
