from __future__ import annotations

import pytest
import torch
from contract import check_compiled, check_gradients, check_threads, packed, tolerance
from emblas import use_backend
from emblas.pooling import gather_pool, group_pool, segment_pool, span_pool
from hypothesis import given
from hypothesis import strategies as st
from pooling_oracles import MODES, pool, pool_spans

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SPANS = [(0, 12), (0, 4), (4, 9), (2, 6), (7, 7), (0, 12), (11, 12), (3, 10), (0, 12)]
STARTS, ENDS = torch.tensor(SPANS).unbind(1)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_spans_equal_oracle(isa, dtype, mode):
    for dim in (1, 19, 64):
        x = torch.randn(12, dim).to(dtype)
        for weights in (None, torch.rand(12)):
            expected = pool_spans(x, SPANS, mode, weights, skip=1)
            actual = span_pool(x, STARTS, ENDS, mode, weights=weights, skip_prefix=1)
            torch.testing.assert_close(
                actual.double(), expected, **{k: 8 * v for k, v in tolerance(dtype, 12).items()}
            )


@pytest.mark.parametrize("mode", MODES)
def test_span_gradients(mode):
    x, w = torch.rand(12, 3) + 0.1, torch.rand(12) + 0.1
    name = {"max": "segment_max", "gem": "segment_gem"}.get(mode, "segment_pool")
    names = (name, f"{name}_backward")
    check_gradients(lambda x: span_pool(x, STARTS, ENDS, mode, normalize=True), [x], names)
    index = torch.tensor([3, 3, 0, 11, 5, 2, 3, 0])
    offsets = packed((3, 0, 4, 1))
    check_gradients(lambda x: gather_pool(x, index, offsets, mode), [x], names)
    groups = torch.tensor([2, 0, 2, 1, 1, 0, 2, 2, 0, 4, 1, 1])
    check_gradients(lambda x: group_pool(x, groups, 5, mode), [x], names)
    if mode != "max":
        listed = torch.rand(8) + 0.1

        def gather(x, w):
            return gather_pool(x, index, offsets, mode, weights=w)

        check_gradients(gather, [x, listed], names)
    if mode not in ("max", "cls", "last"):  # those jump where a weight is 0
        w[5] = 0

        def spans(x, w):
            return span_pool(x, STARTS, ENDS, mode, weights=w, skip_prefix=1)

        check_gradients(spans, [x, w], names)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_backward_equals_reference(isa, dtype, mode):
    x = (torch.rand(12, 37) + 0.25).to(dtype)
    grad = torch.randn(len(SPANS), 37).to(dtype)
    results = []
    for backend in ("auto", "reference"):
        leaf = x.clone().requires_grad_()
        with use_backend(backend):
            out = span_pool(leaf, STARTS, ENDS, mode)
        out.backward(grad)
        results.append([out.detach(), leaf.grad])
    limit = tolerance(dtype, 12)
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(
            actual, expected, rtol=8 * limit["rtol"], atol=16 * limit["atol"]
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_gradient_bits_in_any_order_of_spans(mode, dtype):
    x = (torch.rand(12, 33) + 0.1).to(dtype)
    # Many spans over the same tokens, so that the order of a sum would show.
    starts, ends = STARTS.repeat(4), ENDS.repeat(4)
    grad = torch.randn(len(starts), 33).to(dtype)
    results = []
    for seed in range(4):
        order = torch.randperm(len(starts), generator=torch.Generator().manual_seed(seed))
        leaf, w = x.clone().requires_grad_(), (torch.arange(12) + 1.0).requires_grad_()
        weighted = mode not in ("max", "gem")
        out = span_pool(leaf, starts[order], ends[order], mode, weights=w if weighted else None)
        out.backward(grad[order])
        results.append((leaf.grad, w.grad if weighted else leaf.grad))
    for result in results[1:]:
        assert torch.equal(result[0], results[0][0])
        assert torch.equal(result[1], results[0][1])


def test_spans_that_tile_equal_segments():
    x, cu = torch.randn(20, 8, requires_grad=True), packed((3, 0, 17))
    a = segment_pool(x, cu, normalize=True)
    b = span_pool(x, cu[:-1], cu[1:], normalize=True)
    assert torch.equal(a, b)
    grads = [torch.autograd.grad(out.pow(2).sum(), x)[0] for out in (a, b)]
    assert torch.equal(*grads)


def test_padded_spans():
    x = torch.randn(2, 5, 3)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
    actual = span_pool(x, torch.tensor([1, 5]), torch.tensor([5, 10]), mask=mask)
    torch.testing.assert_close(actual, torch.stack([x[0, 1:3].mean(0), x[1, 2:].mean(0)]))


@given(
    lists=st.lists(st.lists(st.integers(0, 8), max_size=6), max_size=5),
    mode=st.sampled_from(MODES),
    weighted=st.booleans(),
)
def test_gather_equals_oracle(lists, mode, weighted):
    x = torch.randn(9, 5)
    index = torch.tensor([i for one in lists for i in one], dtype=torch.long)
    w = torch.rand(len(index)) if weighted else None
    offsets = packed([len(one) for one in lists])
    actual = gather_pool(x, index, offsets, mode, weights=w)
    assert actual.shape == (len(lists), 5)
    for row, begin, end in zip(actual, offsets[:-1], offsets[1:], strict=True):
        expected = pool(x[index[begin:end]], mode, None if w is None else w[begin:end])
        torch.testing.assert_close(row.double(), expected, rtol=1e-5, atol=1e-5)


def test_groups_equal_oracle():
    x = torch.randn(3, 7, 5)
    groups = torch.randint(0, 6, (3, 7))
    groups[groups == 4] = 5
    weights = torch.rand(3, 7)
    for mode in MODES:
        actual = group_pool(x, groups, 6, mode, weights=weights)
        for g in range(6):
            at = groups == g
            expected = pool(x[at], mode, weights[at])
            torch.testing.assert_close(actual[g].double(), expected, rtol=1e-5, atol=1e-5)


def test_same_bits_for_any_thread_count():
    x = torch.randn(5000, 48, requires_grad=True)
    starts = torch.randint(0, 4000, (60,))
    ends = starts + torch.randint(0, 1000, (60,))
    index, offsets = torch.randint(0, 5000, (9000,)), packed((4000, 0, 5000))

    def run():
        x.grad = None
        spans = span_pool(x, starts, ends, normalize=True)
        lists = gather_pool(x, index, offsets)
        (spans.pow(2).sum() + lists.pow(2).sum()).backward()
        return spans.detach(), lists.detach(), x.grad

    check_threads(run)


def test_compiled():
    calls = [
        (torch.randn(n, 24), torch.arange(s), torch.arange(s) + 3, torch.arange(n) % 5)
        for n, s in ((30, 4), (50, 9), (12, 7))
    ]

    def pools(x, starts, ends, groups):
        return (
            span_pool(x, starts, ends, normalize=True),
            span_pool(x, starts, ends, "max"),
            group_pool(x, groups, 5),
        )

    check_compiled(pools, calls, backward=True)


X, ONE = torch.zeros(4, 3), torch.tensor([1])


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "starts and ends must hold", lambda: span_pool(X, ONE, ONE + 4)),
        (ValueError, "starts and ends must hold", lambda: span_pool(X, ONE, ONE - 1)),
        (ValueError, "starts and ends must hold", lambda: span_pool(X, ONE - 2, ONE)),
        (ValueError, "starts and ends must hold", lambda: span_pool(X, ONE, ONE + 2**32)),
        (ValueError, "starts and ends must have", lambda: span_pool(X, ONE, ENDS)),
        (TypeError, "ends must have dtype", lambda: span_pool(X, ONE, ONE.float())),
        (ValueError, "x must have 2 or 3", lambda: span_pool(X[0], ONE, ONE)),
        (ValueError, "index must hold rows", lambda: gather_pool(X, ONE + 3, packed((1,)))),
        (ValueError, "index must hold rows", lambda: gather_pool(X, ONE + 2**32, packed((1,)))),
        (ValueError, "cu_seqlens must start", lambda: gather_pool(X, ONE, packed((2,)))),
        (ValueError, "weights must have one", lambda: gather_pool(X, ONE, packed((1,)), weights=X)),
        (ValueError, "groups must be between", lambda: group_pool(X, torch.arange(4), 3)),
        (ValueError, "groups must have the shape", lambda: group_pool(X, ONE, 3)),
        (ValueError, "num_groups must not", lambda: group_pool(X, torch.arange(4), -1)),
    ],
)
def test_bad_arguments(error, message, call):
    with pytest.raises(error, match=message):
        call()
