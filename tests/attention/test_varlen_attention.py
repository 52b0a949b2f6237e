from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from contract import (
    check_compiled,
    check_gradients,
    check_op,
    check_threads,
    only_kernels,
    packed,
    tolerance,
)
from emblas import use_backend
from emblas._op import FLOATS
from emblas.attention import PackedSelfAttention, arrays, varlen_attention
from hypothesis import given
from hypothesis import strategies as st

LENGTHS = (0, 5, 1, 0, 70, 200, 17, 0)


def oracle(q, k, v, cu_q, cu_k, scale=None, left=-1, right=-1):
    """The definition, one query and head at a time in effect, in float64."""
    out = torch.zeros(*q.shape[:2], v.shape[2], dtype=torch.float64)
    lse = torch.full((q.shape[1], q.shape[0]), -torch.inf, dtype=torch.float64)
    groups = q.shape[1] // k.shape[1]
    scale = q.shape[2] ** -0.5 if scale is None else scale
    for (qa, qb), (ka, kb) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        for i in range(qb - qa):
            position = i + (kb - ka) - (qb - qa)
            first = ka if left < 0 else ka + max(0, position - left)
            last = kb if right < 0 else min(kb, ka + position + right + 1)
            if first >= last:
                continue
            for h in range(q.shape[1]):
                keys = k[first:last, h // groups].double()
                scores = scale * (keys @ q[qa + i, h].double())
                lse[h, qa + i] = scores.logsumexp(0)
                out[qa + i, h] = scores.softmax(0) @ v[first:last, h // groups].double()
    return out, lse


def heads(tokens, count, dim, dtype=torch.float32):
    return torch.randn(tokens, count, dim).to(dtype)


def check(q, k, v, cu_q, cu_k, **kwargs):
    window = kwargs.pop("window", (-1, -1))
    causal = kwargs.pop("causal", False)
    out, lse = varlen_attention(
        q, k, v, cu_q, cu_k, 200, 200, window_size=window, causal=causal, return_lse=True
    )
    expected, expected_lse = oracle(
        q, k, v, cu_q, cu_k, None, window[0], 0 if causal else window[1]
    )
    limit = tolerance(q.dtype, 200)
    torch.testing.assert_close(out.double(), expected, **limit)
    limit = tolerance(lse.dtype, 200)
    torch.testing.assert_close(lse.double(), expected_lse, **limit)


@pytest.mark.parametrize("dim", [1, 16, 17, 24, 32, 40, 64, 128, 256, 512])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_equals_oracle(isa, dim, dtype):
    cu = packed((0, 5, 1, 0, 70, 33))
    q, k, v = (heads(109, 2, dim, dtype) for _ in range(3))
    check(q, k, v, cu, cu)


def test_values_of_another_width(isa):
    cu = packed((5, 70))
    q, k = heads(75, 2, 48), heads(75, 1, 48)
    for value_dim in (1, 30, 64):
        check(q, k, heads(75, 1, value_dim), cu, cu)


def test_long_sequences(isa):
    cu = packed(LENGTHS)
    check(*(heads(293, 1, 32) for _ in range(3)), cu, cu)


@pytest.mark.parametrize("window", [(-1, -1), (0, 0), (3, 5), (-1, 2), (40, -1), (100, 100)])
@pytest.mark.parametrize("causal", [False, True])
def test_windows(isa, window, causal):
    cu = packed((0, 5, 1, 130))
    check(*(heads(136, 1, 32) for _ in range(3)), cu, cu, window=window, causal=causal)


def test_queries_and_keys_of_different_lengths(isa):
    cu_q, cu_k = packed((3, 9, 0, 40, 7)), packed((80, 0, 5, 6, 7))
    for causal in (False, True):
        check(
            heads(59, 2, 32), heads(98, 1, 32), heads(98, 1, 32), cu_q, cu_k, causal=causal
        )  # fmt: skip


def test_queries_without_keys(isa):
    """They give zero, whatever the values are that others of their tile see."""
    q, k, v = heads(5, 2, 32), heads(3, 1, 32), torch.full((3, 1, 32), torch.nan)
    out, lse = varlen_attention(
        q, k, v, packed((5,)), packed((3,)), 5, 3, causal=True, return_lse=True
    )
    assert not out[:2].any()
    assert (lse[:, :2] == -torch.inf).all()


@given(
    lengths=st.lists(st.integers(0, 40), max_size=6),
    dim=st.sampled_from([16, 32, 48, 64]),
    key_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_any_shape(lengths, dim, key_heads, groups, seed):
    torch.manual_seed(seed)
    tokens, cu = sum(lengths), packed(lengths, torch.int64)
    check(
        heads(tokens, key_heads * groups, dim), heads(tokens, key_heads, dim),
        heads(tokens, key_heads, dim), cu, cu,
    )  # fmt: skip


def test_layouts(isa):
    cu, qkv = packed((30, 20)), torch.randn(50, 3, 4, 32)
    views = qkv.unbind(1)
    expected = varlen_attention(*(x.contiguous() for x in views), cu, cu, 30, 30)
    head_major = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in views]
    unaligned = torch.zeros(50, 4, 3 * 32 + 5)
    unaligned[:, :, 3:99] = torch.cat(views, 2)
    slices = unaligned[:, :, 3:99].split(32, 2)
    columns = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in views]
    for layout in (views, head_major, slices, columns):
        assert torch.equal(varlen_attention(*layout, cu, cu, 30, 30), expected)


def test_large_logits(isa):
    cu = packed((60,))
    q, k, v = (heads(60, 1, 32) for _ in range(3))
    check(q * 100, k * 10, v, cu, cu)


def test_no_neighbour_and_no_batch_in_the_bits(isa):
    cu = packed((50, 33, 80))
    q, k, v = (heads(163, 2, 32) for _ in range(3))
    before = varlen_attention(q, k, v, cu, cu, 80, 80)
    alone = varlen_attention(q[50:83], k[50:83], v[50:83], packed((33,)), packed((33,)), 33, 33)
    assert torch.equal(before[50:83], alone)
    for x in (q, k, v):
        x[:50], x[83:] = torch.nan, torch.inf
    assert torch.equal(varlen_attention(q, k, v, cu, cu, 80, 80)[50:83], alone)


def test_empty():
    for lengths in ((), (0,), (0, 0)):
        cu = packed(lengths)
        q = torch.empty(0, 2, 32)
        assert varlen_attention(q, q, q, cu, cu, 0, 0).shape == (0, 2, 32)
    q, k = heads(3, 2, 32), heads(0, 2, 32)  # queries without keys
    out, lse = varlen_attention(q, k, k, packed((3,)), packed((0,)), 3, 0, return_lse=True)
    assert torch.equal(out, torch.zeros(3, 2, 32))
    assert torch.equal(lse, torch.full((2, 3), -torch.inf))


def test_same_bits_for_any_thread_count(isa):
    cu = packed((500, 0, 3, 120))
    q, k, v = (heads(623, 3, 32) for _ in range(3))
    check_threads(lambda: varlen_attention(q, k, v, cu, cu, 500, 500, return_lse=True))


def test_reference():
    cu = packed((9, 0, 20))
    q, k, v = heads(29, 4, 32), heads(29, 2, 32), heads(29, 2, 32)
    with use_backend("reference"):
        check(q, k, v, cu, cu, window=(3, 4))


def test_gradients(isa):
    """float64, against finite differences: grouped heads, other widths of v, windows, lse."""
    cu_q, cu_k = packed((3, 0, 5, 1)), packed((4, 2, 3, 0))
    q, k, v = heads(9, 4, 8), heads(9, 2, 8), heads(9, 2, 5)
    names = ("varlen_attention", "varlen_attention_backward")
    for kwargs in ({}, {"causal": True}, {"window_size": (1, 1)}, {"return_lse": True}):

        def attend(q, k, v, kwargs=kwargs):
            result = varlen_attention(q, k, v, cu_q, cu_k, 5, 4, **kwargs)
            if "return_lse" not in kwargs:
                return result
            out, lse = result
            return out, torch.where(lse == -torch.inf, 0, lse)

        check_gradients(attend, [q, k, v], names)


def gradients(function, *inputs):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    torch.manual_seed(7)
    return torch.autograd.grad(out, leaves, torch.randn(out.shape).to(out.dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("dim", "value_dim"), [(32, 32), (64, 16), (24, 40), (17, 100)])
def test_backward_equals_reference(isa, dtype, dim, value_dim):
    cu = packed((0, 5, 1, 200, 0, 49))
    q, k, v = heads(255, 4, dim, dtype), heads(255, 2, dim, dtype), heads(255, 2, value_dim, dtype)

    def attend(q, k, v):
        return varlen_attention(q, k, v, cu, cu, 200, 200, window_size=(-1, 150))

    actual = gradients(attend, q, k, v)
    with use_backend("reference"):
        expected = gradients(attend, *(x.double() for x in (q, k, v)))
    limit = tolerance(dtype, 200)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), e, rtol=4 * limit["rtol"], atol=8 * limit["atol"])


def test_gradients_of_layouts(isa):
    """Views of one projection give the gradient that contiguous copies give."""
    cu, qkv = packed((30, 20)), torch.randn(50, 3, 4, 32)

    def attend(q, k, v):
        return varlen_attention(q, k, v, cu, cu, 30, 30)

    expected = gradients(attend, *qkv.unbind(1))
    (fused,) = gradients(lambda qkv: attend(*qkv.unbind(1)), qkv)
    assert torch.equal(fused, torch.stack(expected, 1))


def test_no_neighbour_and_no_batch_in_the_bits_of_gradients(isa):
    cu = packed((50, 33, 80))
    inputs = [heads(163, n, 32) for n in (4, 2, 2)]
    grad = torch.randn(163, 4, 32)

    def run(cu, longest, grad, *inputs):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = varlen_attention(*leaves, cu, cu, longest, longest)
        return torch.autograd.grad(out, leaves, grad)

    middle = slice(50, 83)
    alone = run(packed((33,)), 33, grad[middle], *(x[middle] for x in inputs))
    for x in inputs:
        x[:50], x[83:] = torch.nan, torch.inf
    together = run(cu, 80, grad, *inputs)
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b[middle])


def test_gradients_have_the_same_bits_for_any_thread_count(isa):
    cu = packed((300, 0, 3, 120))
    inputs = [heads(423, n, 32) for n in (4, 2, 2)]
    check_threads(lambda: gradients(lambda *x: varlen_attention(*x, cu, cu, 300, 300), *inputs))


def test_gradients_of_empty_sets_are_zero():
    q, k = heads(3, 2, 32), heads(4, 2, 32)  # queries without keys, keys without queries
    for grad in gradients(
        lambda q, k, v: varlen_attention(q, k, v, packed((3, 0)), packed((0, 4)), 3, 4), q, k, k
    ):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_memory_is_linear():
    """32k tokens: one row of scores per query would be 4 GiB."""
    cu = packed((32768,))
    q, k, v = (heads(32768, 1, 16) for _ in range(3))
    actual = gradients(
        lambda q, k, v: varlen_attention(q, k, v, cu, cu, 32768, 32768, window_size=(8, 8)), q, k, v
    )
    part = slice(0, 100)  # what the first sixty tokens give doesn't reach beyond
    cu = packed((100,))

    def attend(q, k, v):
        return varlen_attention(q, k, v, cu, cu, 100, 100, window_size=(8, 8))

    leaves = [x[part].clone().requires_grad_() for x in (q, k, v)]
    torch.manual_seed(7)
    grad = torch.randn(32768, 1, 16)[part]
    expected = torch.autograd.grad(attend(*leaves), leaves, grad)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a[:60], e[:60], rtol=1e-5, atol=1e-5)


def test_equals_torch():
    cu = packed((64, 100))
    q, k, v = (heads(164, 4, 64) for _ in range(3))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    expected = torch.cat(
        [
            sdpa(*(x[a:b].transpose(0, 1)[None] for x in (q, k, v)))[0].transpose(0, 1)
            for a, b in pairwise(cu.tolist())
        ]
    )
    actual = varlen_attention(q, k, v, cu, cu, 100, 100)
    torch.testing.assert_close(actual, expected, **tolerance(torch.float32, 100))


def test_operator_contract():
    cu, q, k, v = packed((9, 0, 20)), heads(29, 4, 32), heads(29, 2, 32), heads(29, 2, 24)
    for return_lse in (False, True):
        check_op("varlen_attention", q, k, v, cu, cu, 20, 20, 0.2, -1, 3, return_lse)
    out, lse = torch.ops.emblas.varlen_attention(q, k, v, cu, cu, 20, 20, 0.2, -1, 3, True)
    for grad_lse in (None, torch.ones_like(lse)):
        check_op("varlen_attention_backward", torch.ones_like(out), grad_lse, q, k, v, out, lse, cu,
                 cu, 20, 20, 0.2, -1, 3)  # fmt: skip
    with only_kernels("varlen_attention", "varlen_attention_backward"):
        varlen_attention(q.requires_grad_(), k, v, cu, cu, 20, 20).sum().backward()


def test_compiled():
    def attend(q, k, v, cu):
        return varlen_attention(q * 2, k, v, cu, cu, len(q), len(q)).relu()

    calls = [
        (*(heads(sum(lengths), 2, 32) for _ in range(3)), packed(lengths))
        for lengths in ((3, 4), (5, 0, 9), (2, 2, 2, 40), (8, 30, 11))
    ]
    check_compiled(attend, calls, backward=False)
    check_compiled(attend, calls, backward=True)


def test_module():
    torch.manual_seed(0)
    module, x, cu = PackedSelfAttention(64, 2), torch.randn(29, 64), packed((9, 20))
    with torch.no_grad():
        actual = module(x, cu, 20)
        q, k, v = module.qkv(x).view(29, 3, 2, 32).unbind(1)
        expected = module.output(varlen_attention(q, k, v, cu, cu, 20, 20).reshape(29, 64))
    assert torch.equal(actual, expected)
    with pytest.raises(ValueError, match="num_heads must divide hidden_size=64, got 5"):
        PackedSelfAttention(64, 5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numpy_door(isa, dtype):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(29, n, 32)).astype(dtype) for n in (4, 2, 2))
    cu = np.array([0, 9, 29], np.int32)
    actual = arrays.varlen_attention(q, k, v, cu, cu, window_size=(5, 3))
    tensors = [torch.from_numpy(x) for x in (q, k, v, cu, cu)]
    expected = varlen_attention(*tensors, 20, 20, window_size=(5, 3))
    np.testing.assert_array_equal(actual, expected.numpy())
    with pytest.raises(TypeError, match="k must be a C-contiguous array"):
        arrays.varlen_attention(q, k[:, ::2], v, cu, cu)
    with pytest.raises(ValueError, match="cu_seqlens must start at 0"):
        arrays.varlen_attention(q, k, v, cu, cu + 1)
    with pytest.raises(ValueError, match="heads of q must be a multiple"):
        arrays.varlen_attention(q[:, :3].copy(), k, v, cu, cu)


Q, CU = torch.zeros(4, 2, 32), packed((4,))


def call(q=Q, k=Q, v=Q, cu_q=CU, cu_k=CU, **kwargs):
    return varlen_attention(q, k, v, cu_q, cu_k, 4, 4, **kwargs)


@pytest.mark.parametrize(
    ("error", "message", "kwargs"),
    [
        (TypeError, "q must be a torch.Tensor", {"q": [1.0]}),
        (TypeError, "q must have dtype float32, float64", {"q": Q.long()}),
        (TypeError, "k must have the dtype of q", {"k": Q.double()}),
        (ValueError, "v must have 3 dimensions", {"v": Q[0]}),
        (ValueError, "k must be on the device of q", {"k": Q.to("meta")}),
        (ValueError, "head_dim of q must be from 1 to 512", {"q": torch.zeros(4, 2, 513)}),
        (ValueError, "head_dim of v must be from 1 to 512", {"v": Q[:, :, :0]}),
        (ValueError, "k must have the head_dim of q", {"q": Q[:, :, :20]}),
        (ValueError, "k and v must have the same tokens and heads", {"v": Q[:3]}),
        (ValueError, "heads of q must be a multiple", {"q": Q[:, :1]}),
        (ValueError, "cu_seqlens_q must start at 0", {"cu_q": packed((3,))}),
        (ValueError, "cu_seqlens_k must start at 0", {"cu_k": packed((5,))}),
        (ValueError, "must have the same length, got 2 and 3", {"cu_k": packed((2, 2))}),
        (ValueError, "window_size must hold radii", {"window_size": (-2, 0)}),
        (ValueError, "dropout_p must be at least 0 and less than 1", {"dropout_p": 1.0}),
        (ValueError, "softcap must not be negative", {"softcap": -1.0}),
    ],
)
def test_bad_arguments(error, message, kwargs):
    with pytest.raises(error, match=message):
        call(**kwargs)


def test_direct_call_is_guarded():
    op = torch.ops.emblas.varlen_attention
    rest = (4, 4, 1.0, -1, -1, False)
    for args in ((Q.half(), Q, Q, CU, CU), (Q, Q[:2], Q, CU, CU), (Q, Q, Q, CU, packed((9,))),
                 (Q, Q, Q, CU.long(), CU), (Q.transpose(1, 2), Q, Q, CU, CU)):  # fmt: skip
        with pytest.raises(RuntimeError, match="emblas: "):
            op(*args, *rest)
