from __future__ import annotations

from itertools import pairwise

import executors
import numpy as np
import pytest
import torch
from contract import (
    check_compiled,
    check_gradients,
    check_op,
    check_threads,
    layouts,
    only_kernels,
    packed,
    tolerance,
)
from emblas import use_backend
from emblas.pooling import Pooling, arrays, segment_pool
from hypothesis import given
from hypothesis import strategies as st

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LENGTHS = (0, 5, 1, 0, 9, 70, 4, 0)

executor = executors.fixture("segment_pool", "segment_pool_backward")
kernel_executor = executors.fixture("segment_pool", "segment_pool_backward", without=("reference",))


def oracle(x, cu_seqlens, weights=None, normalize=False):
    """The definition, one sequence at a time, in float64."""
    out = torch.zeros(len(cu_seqlens) - 1, x.shape[1], dtype=torch.float64)
    for b, (begin, end) in enumerate(pairwise(cu_seqlens)):
        tokens = x[begin:end].double()
        w = torch.ones(len(tokens)).double() if weights is None else weights[begin:end].double()
        tokens, w = tokens[w != 0], w[w != 0]
        if w.sum() != 0:
            out[b] = (w[:, None] * tokens).sum(0) / w.sum()
        if normalize:
            out[b] /= max(out[b].norm(), 1e-12)
    return out


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_oracle(executor, dtype, normalize, weighted):
    cu_seqlens = packed(LENGTHS)
    for dim in (1, 7, 16, 33, 384):
        x = torch.randn(int(cu_seqlens[-1]), dim).to(dtype)
        weights = torch.rand(len(x)) if weighted else None
        expected = oracle(x, cu_seqlens, weights, normalize)
        for name, view in layouts(x).items():
            actual = segment_pool(view, cu_seqlens, weights=weights, normalize=normalize)
            assert actual.dtype == dtype
            torch.testing.assert_close(
                actual.double(), expected, **tolerance(dtype, max(LENGTHS)), msg=name
            )


@given(
    lengths=st.lists(st.integers(0, 40), max_size=9),
    dim=st.integers(1, 70),
    seed=st.integers(0, 2**31),
    normalize=st.booleans(),
    wide_offsets=st.booleans(),
)
def test_any_shape(lengths, dim, seed, normalize, wide_offsets):
    generator = torch.Generator().manual_seed(seed)
    cu_seqlens = packed(lengths, torch.int64 if wide_offsets else torch.int32)
    x = torch.randn(sum(lengths), dim, generator=generator)
    actual = segment_pool(x, cu_seqlens, normalize=normalize)
    expected = oracle(x, cu_seqlens, None, normalize)
    torch.testing.assert_close(actual.double(), expected, **tolerance(x.dtype, 40))


@given(seed=st.integers(0, 2**31), dim=st.integers(1, 40))
def test_mask_with_holes(seed, dim):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(4, 9, generator=generator) < 0.5
    mask[2] = False
    x = torch.randn(4, 9, dim, generator=generator)
    expected = torch.stack([row[keep].double().sum(0) / max(int(keep.sum()), 1)
                            for row, keep in zip(x, mask, strict=True)])  # fmt: skip
    x[~mask] = float("nan")  # masked tokens are not read
    for dtype in (torch.bool, torch.int64, torch.float32):
        actual = segment_pool(x, mask=mask.to(dtype))
        torch.testing.assert_close(actual.double(), expected, **tolerance(torch.float32, 9))


def test_padded_equals_packed(executor):
    lengths = (3, 0, 8, 5)
    cu_seqlens = packed(lengths)
    x = torch.randn(int(cu_seqlens[-1]), 24)
    weights = torch.rand(len(x))
    expected = segment_pool(x, cu_seqlens, weights=weights, normalize=True)
    for side in ("left", "right"):
        padded, mask, w = torch.full((4, 8, 24), torch.nan), torch.zeros(4, 8), torch.ones(4, 8)
        for b, length in enumerate(lengths):
            at = slice(8 - length, 8) if side == "left" else slice(0, length)
            padded[b, at] = x[cu_seqlens[b] : cu_seqlens[b + 1]]
            w[b, at] = weights[cu_seqlens[b] : cu_seqlens[b + 1]]
            mask[b, at] = 1
        actual = segment_pool(padded, mask=mask, weights=w, normalize=True)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("normalize", [False, True])
def test_gradients(kernel_executor, normalize):
    names = ("segment_pool", "segment_pool_backward")
    cu_seqlens = packed((3, 0, 1, 6))
    x, weights = torch.randn(10, 5), torch.rand(10) + 0.1
    weights[4] = 0
    check_gradients(lambda x: segment_pool(x, cu_seqlens, normalize=normalize), [x], names)
    check_gradients(
        lambda x: segment_pool(x, cu_seqlens, weights=weights, normalize=normalize), [x], names
    )
    weights = torch.rand(10) + 0.1
    check_gradients(
        lambda x, w: segment_pool(x, cu_seqlens, weights=w, normalize=normalize),
        [x, weights],
        names,
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_backward_equals_reference(executor, dtype, normalize):
    cu_seqlens = packed(LENGTHS)
    results = []
    x, w = torch.randn(89, 37).to(dtype), torch.rand(89) + 0.1
    grad = torch.randn(len(LENGTHS), 37).to(dtype)
    for backend in ("auto", "reference"):
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        with use_backend(backend):
            out = segment_pool(leaves[0], cu_seqlens, weights=leaves[1], normalize=normalize)
        out.backward(grad)
        results.append([out.detach(), leaves[0].grad, leaves[1].grad])
    for actual, expected in zip(*results, strict=True):
        limit = tolerance(dtype, 70)
        torch.testing.assert_close(actual, expected, rtol=4 * limit["rtol"], atol=8 * limit["atol"])


def test_empty_means_zero(executor):
    x = torch.randn(4, 6, requires_grad=True)
    weights = torch.tensor([0.0, 0.0, 1.0, -1.0])  # a masked segment, one whose weights cancel
    out = segment_pool(x, packed((0, 2, 2, 0)), weights=weights, normalize=True)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(4, 6))
    assert torch.equal(x.grad, torch.zeros(4, 6))
    assert segment_pool(torch.empty(0, 6), packed(())).shape == (0, 6)
    assert segment_pool(torch.empty(0, 6), packed((0, 0))).tolist() == [[0.0] * 6] * 2
    assert segment_pool(torch.empty(4, 0), packed((4,))).shape == (1, 0)


def test_masked_rows_get_zero_gradient(executor):
    x = torch.randn(2, 3, 4)
    x[0, 1] = torch.nan
    x.requires_grad_()
    mask = torch.tensor([[1, 0, 1], [0, 0, 1]])
    segment_pool(x, mask=mask).sum().backward()
    expected = torch.tensor([[0.5, 0, 0.5], [0, 0, 1.0]])
    assert torch.equal(x.grad, expected[:, :, None].expand(2, 3, 4))


def test_no_neighbour_and_no_batch_in_the_bits(kernel_executor):
    x = torch.randn(100, 48)
    cu_seqlens = packed((10, 0, 60, 30))
    whole = segment_pool(x, cu_seqlens, normalize=True)
    alone = segment_pool(x[10:70], packed((60,)), normalize=True)
    assert torch.equal(whole[2], alone[0])
    x[70:] = torch.nan
    assert torch.equal(segment_pool(x, cu_seqlens, normalize=True)[2], whole[2])


def test_same_bits_for_any_thread_count(isa):
    x = torch.randn(5000, 96, requires_grad=True)
    cu_seqlens = packed((1000, 0, 1, 2000, 1999))

    def run():
        x.grad = None
        out = segment_pool(x, cu_seqlens, normalize=True)
        out.pow(2).sum().backward()
        return out.detach(), x.grad

    check_threads(run)


def test_operator_contract():
    x, cu_seqlens, weights = torch.randn(10, 5), packed((3, 0, 7)), torch.rand(10)
    for normalize in (False, True):
        check_op("segment_pool", x, cu_seqlens, None, normalize)
        check_op("segment_pool", x, cu_seqlens, weights, normalize)
        out, norm = torch.ops.emblas.segment_pool(x, cu_seqlens, weights, normalize)
        check_op("segment_pool_backward", torch.ones_like(out), x, out, norm, cu_seqlens, weights,
                 normalize, True, True)  # fmt: skip


def test_compiled():
    calls = [
        (torch.randn(sum(lengths), 24), packed(lengths), torch.rand(sum(lengths)) + 0.1)
        for lengths in ((3, 4), (5, 0, 9), (2, 2, 2, 40), (8, 30, 11))
    ]

    def pool(x, cu_seqlens, weights):
        return segment_pool(x * 2, cu_seqlens, weights=weights, normalize=True).relu()

    check_compiled(pool, calls, backward=False)
    check_compiled(pool, calls, backward=True)


def test_module():
    x = torch.randn(7, 5)
    module = Pooling(normalize=True)
    expected = segment_pool(x, packed((3, 4)), normalize=True)
    assert torch.equal(module(x, packed((3, 4))), expected)
    assert repr(module) == "Pooling(mode='mean', normalize=True)"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numpy_door(isa, dtype):
    x = np.random.default_rng(0).normal(size=(12, 19)).astype(dtype)
    weights = np.linspace(0, 1, 12, dtype=dtype)
    cu_seqlens = np.array([0, 5, 5, 12], np.int32)
    for w in (None, weights):
        actual = arrays.segment_pool(x, cu_seqlens, weights=w, normalize=True)
        expected = segment_pool(
            torch.from_numpy(x),
            torch.from_numpy(cu_seqlens),
            weights=None if w is None else torch.from_numpy(w),
            normalize=True,
        )
        np.testing.assert_array_equal(actual, expected.numpy())
    with pytest.raises(TypeError, match="x must be a C-contiguous array"):
        arrays.segment_pool(x[:, ::2], cu_seqlens)
    with pytest.raises(ValueError, match="cu_seqlens must start at 0"):
        arrays.segment_pool(x, np.array([0, 13], np.int32))
    with pytest.raises(ValueError, match="weights must hold one weight per token"):
        arrays.segment_pool(x, cu_seqlens, weights=weights[:3])


X, CU = torch.zeros(4, 3), packed((4,))


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "x must be a torch.Tensor, got list", lambda: segment_pool([1.0], CU)),
        (TypeError, "x must have dtype .* got int64", lambda: segment_pool(X.long(), CU)),
        (ValueError, "x must have 2 dimensions", lambda: segment_pool(X[0], CU)),
        (
            ValueError,
            "mode must be one of .* got .men.",
            lambda: segment_pool(X, CU, "men"),
        ),
        (ValueError, "either cu_seqlens .* or mask", lambda: segment_pool(X)),
        (ValueError, "cu_seqlens must have at least one", lambda: segment_pool(X, CU[:0])),
        (TypeError, "cu_seqlens must have dtype int32, int64", lambda: segment_pool(X, CU.float())),
        (ValueError, "cu_seqlens must start at 0", lambda: segment_pool(X, packed((5,)))),
        (ValueError, "cu_seqlens must start at 0", lambda: segment_pool(X, packed((5, -1)))),
        (ValueError, "cu_seqlens must start at 0", lambda: segment_pool(X, CU + 1)),
        (ValueError, "cu_seqlens must start at 0", lambda: segment_pool(X, CU.long() + 2**32)),
        (ValueError, "cu_seqlens must start at 0", lambda: segment_pool(X, CU.long() * 2**31)),
        (ValueError, "cu_seqlens must be on device", lambda: segment_pool(X, CU.to("meta"))),
        (ValueError, "weights must have one value", lambda: segment_pool(X, CU, weights=X[0])),
        (ValueError, "mask must have the shape", lambda: segment_pool(X[None], mask=X)),
    ],
)
def test_bad_arguments(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_direct_call_is_guarded():
    """C++ guards memory whatever Python lets through."""
    op = torch.ops.emblas.segment_pool
    for args in (
        (X.long(), CU, None, False),
        (X.t(), CU, None, False),
        (X, CU.long(), None, False),
        (X, CU, X[0], False),
        (X, packed((2**30,)), None, False),
    ):
        with pytest.raises(RuntimeError, match="emblas: "):
            op(*args)


def test_kernels_run():
    with only_kernels("segment_pool", "segment_pool_backward"):
        segment_pool(X.clone().requires_grad_(), CU).sum().backward()
