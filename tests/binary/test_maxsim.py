from __future__ import annotations

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
from emblas.binary import maxsim, maxsim_topk, pack_sign, unpack_sign
from hypothesis import given
from hypothesis import strategies as st

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def oracle(queries, documents, query_offsets, document_offsets):
    """One pair of sets after the other, in float64."""
    q, d = queries.double(), documents.double()
    starts, document_starts = query_offsets.tolist(), document_offsets.tolist()
    scores = torch.zeros(len(starts) - 1, len(document_starts) - 1, dtype=torch.float64)
    for b in range(scores.shape[0]):
        for n in range(scores.shape[1]):
            one = q[starts[b] : starts[b + 1]]
            other = d[document_starts[n] : document_starts[n + 1]]
            if len(one) and len(other):
                scores[b, n] = (one @ other.T).max(1).values.sum()
    return scores


QUERIES, DOCUMENTS = packed((5, 0, 1, 9)), packed((3, 700, 0, 1, 64))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_floats(isa, dtype):
    for dim in (1, 20, 128):
        q, d = torch.randn(15, dim).to(dtype), torch.randn(768, dim).to(dtype)
        scores = maxsim(q, d, QUERIES, DOCUMENTS)
        assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        limit = tolerance(scores.dtype, dim)["atol"] * 10 * dim**0.5
        torch.testing.assert_close(
            scores.double(), oracle(q, d, QUERIES, DOCUMENTS), atol=limit, rtol=0
        )


@pytest.mark.parametrize("dim", [1, 9, 64, 130])
def test_bits(isa, dim):
    q, d = torch.randn(15, dim), pack_sign(torch.randn(768, dim))
    signs = unpack_sign(d, dim)
    torch.testing.assert_close(
        maxsim(q, d, QUERIES, DOCUMENTS).double(),
        oracle(q, signs, QUERIES, DOCUMENTS),
        atol=1e-4 * dim**0.5,
        rtol=0,
    )
    codes = pack_sign(q)
    expected = oracle(unpack_sign(codes, dim), signs, QUERIES, DOCUMENTS).float()
    assert torch.equal(maxsim(codes, d, QUERIES, DOCUMENTS, dim=dim), expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_queries_of_any_dtype_against_bits(dtype):
    q, d = torch.randn(15, 9).to(dtype), pack_sign(torch.randn(768, 9))
    expected = maxsim(q.float(), d, QUERIES, DOCUMENTS)
    assert torch.equal(maxsim(q, d, QUERIES, DOCUMENTS), expected)


@given(
    queries=st.lists(st.integers(0, 5), max_size=4),
    documents=st.lists(st.integers(0, 9), max_size=6),
    dim=st.integers(0, 20),
    wide=st.booleans(),
)
def test_any_shape(queries, documents, dim, wide):
    dtype = torch.int64 if wide else torch.int32
    starts, document_starts = packed(queries, dtype), packed(documents, dtype)
    q = torch.randint(-3, 4, (sum(queries), dim)).float()
    d = torch.randint(-3, 4, (sum(documents), dim)).float()
    expected = oracle(q, d, starts, document_starts).float()
    assert torch.equal(maxsim(q, d, starts, document_starts), expected)
    with use_backend("reference"):
        assert torch.equal(maxsim(q, d, starts, document_starts), expected)
    scores, ids = maxsim_topk(q, d, starts, document_starts, 4)
    for b in range(len(queries)):
        order = sorted(range(len(documents)), key=lambda n: (-expected[b, n], n))[:4]
        assert ids[b].tolist() == (order + [-1] * 4)[:4]
        assert torch.equal(scores[b, : len(order)], expected[b, order])


def test_gradients(isa):
    names = ("maxsim", "maxsim_backward")
    starts, document_starts = packed((3, 0, 2)), packed((4, 0, 1, 3))
    q, d = torch.randn(5, 6), torch.randn(8, 6)
    check_gradients(lambda a, b: maxsim(a, b, starts, document_starts), (q, d), names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_equal_autograd(isa, dtype):
    q, d = torch.randn(15, 20).to(dtype), torch.randn(768, 20).to(dtype)
    weights = torch.randn(4, 5)
    grads = []
    for reference in (False, True):
        leaves = [x.clone().requires_grad_() for x in (q, d)]
        if reference:
            with use_backend("reference"):
                scores = maxsim(*leaves, QUERIES, DOCUMENTS)
        else:
            scores = maxsim(*leaves, QUERIES, DOCUMENTS)
        (scores * weights).sum().backward()
        grads.append([x.grad for x in leaves])
    for ours, theirs in zip(*grads, strict=True):
        assert ours.dtype == dtype
        limit = 1e-4 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=limit)


def test_ties_go_to_the_first_token():
    q = torch.ones(1, 2, requires_grad=True)
    d = torch.ones(5, 2, requires_grad=True)
    maxsim(q, d, packed((1,)), packed((2, 3))).sum().backward()
    assert d.grad[:, 0].tolist() == [1, 0, 1, 0, 0]


def test_same_bits_for_any_thread_count_and_batch(isa):
    q, d = torch.randn(15, 20), torch.randn(768, 20)
    together = maxsim(q, d, QUERIES, DOCUMENTS)
    check_threads(lambda: maxsim(q, d, QUERIES, DOCUMENTS))
    alone = maxsim(q[:5], d[3:703], packed((5,)), packed((700,)))
    assert torch.equal(alone[0, 0], together[0, 1])

    def gradients():
        leaves = [x.clone().requires_grad_() for x in (q, d)]
        maxsim(*leaves, QUERIES, DOCUMENTS).sum().backward()
        return tuple(x.grad for x in leaves)

    check_threads(gradients)


def test_operator_contract():
    q, d = torch.randn(15, 20), torch.randn(768, 20)
    check_op("maxsim", q, QUERIES, d, DOCUMENTS, 20, True)
    check_op("maxsim", q.half(), QUERIES, d.half(), DOCUMENTS, 20, True)
    check_op("maxsim", pack_sign(q), QUERIES, pack_sign(d), DOCUMENTS, 20, False)
    argmax = torch.ops.emblas.maxsim(q, QUERIES, d, DOCUMENTS, 20, True)[1]
    check_op("maxsim_backward", torch.randn(4, 5), q, QUERIES, d, DOCUMENTS, argmax)
    with only_kernels("maxsim"):
        maxsim(q, d, QUERIES, DOCUMENTS)


def test_compiled():
    def score(q, d, starts, document_starts):
        return maxsim(q * 2, d, starts, document_starts)

    calls = [
        (torch.randn(sum(a), 6), torch.randn(sum(b), 6), packed(a), packed(b))
        for a, b in (((2, 3), (4, 5, 6)), ((1, 0, 4), (2, 2)), ((7, 2), (3, 0, 1, 9)))
    ]
    check_compiled(score, calls, backward=True)


Q, D, ONE = torch.zeros(2, 8), torch.zeros(3, 1, dtype=torch.uint8), packed((2,))
THREE = packed((3,))


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "dtype of documents", lambda: maxsim(Q, Q.double(), ONE, ONE)),
        (TypeError, "dtype of documents", lambda: maxsim(D, Q, THREE, ONE)),
        (ValueError, "dim must be given", lambda: maxsim(D, D, THREE, THREE)),
        (ValueError, "must have 2 columns", lambda: maxsim(D, D, THREE, THREE, dim=9)),
        (ValueError, "documents must have 8 columns", lambda: maxsim(Q, Q[:, :7], ONE, ONE)),
        (ValueError, "query_offsets must start at 0", lambda: maxsim(Q, Q, THREE, ONE)),
        (ValueError, "document_offsets must start", lambda: maxsim(Q, Q, ONE, THREE)),
        (ValueError, "k must be at least 1, got 0", lambda: maxsim_topk(Q, Q, ONE, ONE, 0)),
    ],
)
def test_bad_arguments(error, message, call):
    with pytest.raises(error, match=message):
        call()
