from __future__ import annotations

import numpy as np
import pytest
import torch
from contract import check_compiled, check_op, check_threads, only_kernels, tolerance
from emblas import use_backend
from emblas.binary import (
    Int8Quantizer,
    asymmetric_topk,
    dense_topk,
    hamming_topk,
    pack_sign,
    rescore,
    rescored_topk,
)
from hypothesis import given
from hypothesis import strategies as st

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


def vectors(rows, dim, dtype=torch.float32, seed=0):
    """Small whole numbers: every product and sum is exact, ties abound."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, (rows, dim), generator=generator).to(dtype)


def oracle(queries, documents, metric):
    q, d = queries.double().numpy(), documents.double().numpy()
    if metric == "l2":
        return -((q[:, None] - d[None]) ** 2).sum(2)
    dots = q @ d.T
    if metric == "cosine":
        lengths = np.linalg.norm(q, axis=1)[:, None] * np.linalg.norm(d, axis=1)
        return np.divide(dots, lengths, out=np.zeros_like(dots), where=lengths > 0)
    return dots


def check_topk(found, scores, k, error=0.0, allowed=None):
    """Scores in order and right, ids theirs, none better left out."""
    for q, exact in enumerate(scores):
        rows = np.arange(len(exact)) if allowed is None else np.flatnonzero(allowed[q])
        values, ids = found[0][q].double().numpy(), found[1][q].numpy()
        count = min(k, len(rows))
        assert (ids[count:] == -1).all()
        assert (values[count:] == -np.inf).all()
        values, ids = values[:count], ids[:count]
        assert len(set(ids.tolist())) == count
        assert set(ids.tolist()) <= set(rows.tolist())
        np.testing.assert_allclose(values, exact[ids], atol=error, rtol=0)
        keys = list(zip(-values, ids, strict=True))
        assert keys == sorted(keys)
        if error == 0:
            order = rows[np.lexsort((rows, -exact[rows]))][:count]
            np.testing.assert_array_equal(ids, order)
        elif count:
            left = np.setdiff1d(rows, ids)
            assert not len(left) or exact[left].max() <= values.min() + 2 * error


@pytest.mark.parametrize("metric", ["dot", "cosine", "l2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_topk(isa, dtype, metric):
    error = 1e-5 if metric == "cosine" else 0.0
    for queries, rows, dim in ((1, 300, 7), (9, 700, 33), (70, 30, 64)):
        documents = vectors(rows, dim, dtype)
        documents[3] = 0
        wanted = vectors(queries, dim, seed=1)
        found = dense_topk(wanted, documents, 12, metric=metric)
        check_topk(found, oracle(wanted, documents, metric), 12, error)


@given(
    rows=st.integers(0, 60),
    queries=st.integers(0, 9),
    dim=st.integers(0, 40),
    k=st.integers(1, 70),
    metric=st.sampled_from(["dot", "l2"]),
    share=st.sampled_from([None, 0.0, 0.3]),
)
def test_any_shape(rows, queries, dim, k, metric, share):
    wanted, documents = vectors(queries, dim, seed=1), vectors(rows, dim)
    masks = None if share is None else torch.rand(queries, rows) < share
    found = dense_topk(wanted, documents, k, metric=metric, filter=masks)
    check_topk(found, oracle(wanted, documents, metric), k, 0.0, masks)
    if share is not None and queries:
        shared = dense_topk(wanted, documents, k, metric=metric, filter=masks[0])
        ids = dense_topk(wanted, documents, k, metric=metric, filter=masks[0].nonzero()[:, 0])
        check_topk(
            shared, oracle(wanted, documents, metric), k, 0.0, masks[0].expand(queries, rows)
        )
        assert torch.equal(shared[1], ids[1])


def test_real_numbers(isa):
    documents, wanted = torch.randn(2000, 100), torch.randn(6, 100)
    limit = tolerance(torch.float32, 100)["atol"] * 30
    for metric in ("dot", "l2"):
        scores = oracle(wanted, documents, metric)
        check_topk(dense_topk(wanted, documents, 10, metric=metric), scores, 10, limit)


def test_does_not_depend_on_batch_threads_or_layout(isa):
    documents, wanted = torch.randn(3000, 37), torch.randn(11, 37)
    together = dense_topk(wanted, documents, 9)
    wide = torch.zeros(3000, 50)
    wide[:, 5:42] = documents
    for view in (wide[:, 5:42], documents.t().contiguous().t()):
        assert torch.equal(dense_topk(wanted, view, 9)[0], together[0])
    for q in range(11):
        alone = dense_topk(wanted[q : q + 1], documents, 9)
        assert torch.equal(alone[0][0], together[0][q])
        assert torch.equal(alone[1][0], together[1][q])
    check_threads(lambda: dense_topk(wanted, documents, 9))


@pytest.mark.parametrize("metric", ["dot", "cosine", "l2"])
def test_int8_equals_its_float32(isa, metric):
    """Rounded queries choose what is multiplied; bits don't change, however badly they round."""
    for rows, dim in ((700, 37), (300, 5000)):
        documents = torch.randint(-128, 128, (rows, dim), dtype=torch.int8)
        documents[5] = -128
        documents[100:200] = documents[7]  # ties
        wanted = torch.randn(9, dim)
        wanted[0] = 0
        wanted[1, 3] = 1e6
        wanted[2] = wanted[2].clamp(-3, 3) * 1e38  # products overflow
        wanted[3] *= 1e-42
        wanted[4] = documents[7]
        found = dense_topk(wanted, documents, 20, metric=metric)
        expected = dense_topk(wanted, documents.float(), 20, metric=metric)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


def test_nan_comes_last():
    documents = vectors(5, 4)
    documents[2] = torch.nan
    scores, ids = dense_topk(vectors(1, 4, seed=1), documents, 5)
    assert ids[0, -1] == 2
    assert scores[0, -1] == -torch.inf


# --- rescoring ---------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["dot", "cosine", "l2"])
def test_rescore(isa, metric):
    documents, wanted = vectors(50, 20), vectors(4, 20, seed=1)
    ids = torch.stack([torch.randperm(50)[:15] for _ in range(4)])
    ids[0, 4:6] = -1
    ids[1] = -1
    scores = oracle(wanted, documents, metric)
    allowed = np.zeros((4, 50), bool)
    for q in range(4):
        allowed[q, ids[q][ids[q] >= 0].numpy()] = True
    error = 1e-5 if metric == "cosine" else 0.0
    for k in (3, 15, 20):
        check_topk(rescore(wanted, documents, ids, k, metric=metric), scores, k, error, allowed)


def test_int8_quantizer():
    x = torch.randn(500, 12) * torch.arange(1, 13)
    x[:, 3] = 7.0  # a constant dimension
    quantizer = Int8Quantizer.fit(x)
    codes = quantizer.quantize(x)
    assert codes.dtype == torch.int8
    error = (quantizer.dequantize(codes) - x).abs()
    assert (error <= quantizer.step / 2 + 1e-5).all()
    assert (quantizer.quantize(x * 10) - codes.int()).abs().max() <= 255  # clipped, not wrapped
    assert int(quantizer.quantize(torch.full((1, 12), 1e6)).min()) == 127
    queries = torch.randn(3, 12)
    scaled, constant = quantizer.fold(queries)
    torch.testing.assert_close(
        scaled @ codes.float().T + constant,
        queries @ quantizer.dequantize(codes).T,
        rtol=1e-4,
        atol=1e-2,
    )
    with pytest.raises(ValueError, match="at least one row"):
        Int8Quantizer.fit(x[:0])


def test_rescored_topk(tmp_path):
    documents = torch.nn.functional.normalize(torch.randn(800, 50), dim=1)
    queries = documents[:20] + 0.05 * torch.randn(20, 50)
    codes = pack_sign(documents)
    # All of the corpus as candidates: the answer is that of the exact search.
    scores, ids = rescored_topk(queries, codes, 10, documents=documents, multiplier=80)
    expected = dense_topk(queries, documents, 10, metric="cosine")
    torch.testing.assert_close(scores, expected[0])
    assert torch.equal(ids, expected[1])
    # Bits alone decide like an asymmetric search, on the scale of a cosine.
    scores, ids = rescored_topk(queries, codes, 10, multiplier=80)
    best, best_ids = asymmetric_topk(queries, codes, 10)
    assert torch.equal(ids, best_ids)
    length = queries.norm(dim=1, keepdim=True) * 50**0.5
    torch.testing.assert_close(scores, best / length, rtol=1e-4, atol=1e-5)
    # One candidate per result: the Hamming result in a new order.
    _, ids = rescored_topk(queries, codes, 10, documents=documents, multiplier=1)
    assert torch.equal(ids.sort(1).values, hamming_topk(pack_sign(queries), codes, 10)[1]
                       .sort(1).values)  # fmt: skip
    # int8 from a memory map, narrowed by the bits' scores; filtered.
    quantizer = Int8Quantizer.fit(documents)
    np.save(tmp_path / "int8.npy", quantizer.quantize(documents).numpy())
    stored = torch.from_numpy(np.load(tmp_path / "int8.npy", mmap_mode="c"))
    mask = torch.rand(800) < 0.5
    scores, ids = rescored_topk(
        queries, codes, 5, documents=stored, quantizer=quantizer, multiplier=40, narrow=20,
        filter=mask,
    )  # fmt: skip
    expected = dense_topk(queries, documents, 5, metric="cosine", filter=mask)
    assert mask[ids].all()
    assert (ids[:, 0] == expected[1][:, 0]).float().mean() > 0.9
    torch.testing.assert_close(scores[:, 0], expected[0][:, 0], rtol=0, atol=0.02)


def test_query_offset():
    """A query encoder that has drifted by a constant is brought back."""
    documents = torch.randn(300, 64)
    drift = torch.randn(64)
    codes = pack_sign(documents)
    exact = rescored_topk(documents[:9], codes, 3, documents=documents)
    shifted = rescored_topk(
        documents[:9] + drift, codes, 3, documents=documents, query_offset=-drift
    )
    assert torch.equal(exact[1], shifted[1])


def test_fewer_documents_than_results():
    documents = torch.randn(3, 8)
    scores, ids = rescored_topk(documents, pack_sign(documents), 5, documents=documents)
    assert (ids[:, :3].sort(1).values == torch.arange(3)).all()
    assert (ids[:, 3:] == -1).all()
    assert (scores[:, 3:] == -torch.inf).all()


def test_reference():
    documents, wanted = vectors(40, 12), vectors(5, 12, seed=1)
    ids = torch.randint(-1, 40, (5, 9))
    for metric in ("dot", "l2"):
        calls = [
            lambda m=metric: dense_topk(wanted, documents, 50, metric=m),
            lambda m=metric: rescore(wanted, documents, ids, 9, metric=m),
        ]
        for call in calls:
            with use_backend("reference"):
                expected = call()
            for one, other in zip(call(), expected, strict=True):
                assert torch.equal(one, other)
                assert one.dtype == other.dtype


def test_operator_contract():
    documents, wanted = vectors(40, 12, torch.float16), vectors(5, 12, seed=1)
    check_op("dense_topk", wanted, documents, 6, 2, torch.arange(0, 40, 3))
    check_op("gather_scores", wanted, documents, torch.randint(-1, 40, (5, 9)), 1)
    with only_kernels("dense_topk", "gather_scores"):
        dense_topk(wanted, documents, 6)
        rescore(wanted, documents, torch.randint(-1, 40, (5, 9)), 4)


def test_compiled():
    def search(queries, documents):
        _, ids = dense_topk(queries, documents, 8, metric="l2")
        return rescore(queries, documents, ids, 3, metric="cosine")

    calls = [(torch.randn(q, 20), torch.randn(n, 20)) for q, n in ((2, 30), (3, 50), (7, 41))]
    check_compiled(search, calls, backward=False)


X, CODES = torch.zeros(3, 8), torch.zeros(3, 1, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "queries must have dtype", lambda: dense_topk(CODES, X, 1)),
        (TypeError, "documents must have dtype", lambda: dense_topk(X, X.double(), 1)),
        (ValueError, "same dimensions, got 8 and 7", lambda: dense_topk(X, X[:, :7], 1)),
        (ValueError, "metric must be one of", lambda: dense_topk(X, X, 1, metric="angle")),
        (ValueError, "k must be at least 1, got 0", lambda: dense_topk(X, X, 0)),
        (ValueError, "k must be at least 1", lambda: rescore(X, X, torch.zeros(3, 1).long(), 0)),
        (ValueError, "k must be at least 1", lambda: rescored_topk(X, CODES, 0)),
        (ValueError, "queries must be finite", lambda: dense_topk(X / 0, X, 1)),
        (ValueError, "ids must have 3 rows", lambda: rescore(X, X, torch.zeros(2, 1).long(), 1)),
        (ValueError, "ids must be rows", lambda: rescore(X, X, torch.full((3, 1), 3), 1)),
        (ValueError, "multiplier must be", lambda: rescored_topk(X, CODES, 1, multiplier=0)),
        (ValueError, "narrow must be left out", lambda: rescored_topk(X, CODES, 1, narrow=2)),
        (
            ValueError,
            "documents must have 3 rows",
            lambda: rescored_topk(X, CODES, 1, documents=X[:2]),
        ),
        (
            ValueError,
            "quantizer must be given",
            lambda: rescored_topk(X, CODES, 1, documents=X.to(torch.int8)),
        ),
    ],
)
def test_bad_arguments(error, message, call):
    with pytest.raises(error, match=message):
        call()
