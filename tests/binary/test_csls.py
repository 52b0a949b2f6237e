from __future__ import annotations

import numpy as np
import pytest
import torch
from contract import check_threads, only_kernels
from emblas.binary import csls, csls_topk, dense_topk
from emblas.evaluation import csls as csls_matrix

unit = torch.nn.functional.normalize


def check(queries, documents, k, neighbors=10, reference=None):
    """Against the matrix of the evaluation measures, in float64."""
    exact = csls_matrix(queries, documents.float(), neighbors).numpy()
    if reference is not None:
        cosines = unit(queries.double(), dim=1) @ unit(documents.double(), dim=1).T
        near = unit(reference.double(), dim=1) @ unit(documents.double(), dim=1).T
        exact = (
            2 * cosines
            - cosines.topk(min(neighbors, len(documents)), 1).values.mean(1)[:, None]
            - near.topk(min(neighbors, len(reference)), 0).values.mean(0)
        ).numpy()
    scores, ids = csls_topk(queries, documents, k, neighbors=neighbors, reference=reference)
    count = min(k, len(documents))
    assert (ids[:, count:] == -1).all()
    assert (scores[:, count:] == -torch.inf).all()
    scores, ids = scores[:, :count].numpy(), ids[:, :count].numpy()
    best = np.take_along_axis(exact, ids, 1)
    np.testing.assert_allclose(scores, best, atol=3e-6)
    np.testing.assert_allclose(best, -np.sort(-exact, 1)[:, :count], atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_scores(dtype):
    documents = torch.randn(300, 20).to(dtype)
    queries = torch.randn(40, 20)
    check(queries, documents, 12)
    check(queries, documents, 3, neighbors=1)
    check(queries, documents, 5, reference=torch.randn(70, 20))


def test_small_sets():
    check(torch.randn(2, 5), torch.randn(3, 5), 7)
    check(torch.randn(1, 5), torch.randn(1, 5), 1, neighbors=1)
    assert csls_topk(torch.randn(2, 5), torch.randn(0, 5), 2)[1].tolist() == [[-1, -1]] * 2
    assert csls_topk(torch.randn(0, 5), torch.randn(4, 5), 2)[1].shape == (0, 2)


def test_int8_and_tiles(monkeypatch):
    documents = torch.randint(-127, 128, (150, 16), dtype=torch.int8)
    queries = torch.randn(9, 16)
    together = csls_topk(queries, documents, 20)
    check(queries, documents, 20)
    monkeypatch.setattr(csls, "_ROWS", 40)
    for one, other in zip(csls_topk(queries, documents, 20), together, strict=True):
        assert torch.equal(one, other)
    check_threads(lambda: csls_topk(queries, documents, 20))
    with only_kernels("dense_topk"):
        csls_topk(queries, documents, 20)


def test_hubs_lose():
    """A document in the middle of everything is the nearest of most, but the match of few."""
    documents = torch.randn(200, 30)
    queries = documents + 0.9 * torch.randn(200, 30) + 1.5
    hub = torch.ones(1, 30)
    both = torch.cat((documents, hub))
    truth = torch.arange(200)
    _, plain = dense_topk(queries, both, 1, metric="cosine")
    _, corrected = csls_topk(queries, both, 1)
    assert (plain[:, 0] == 200).float().mean() > 0.5
    assert (corrected[:, 0] == truth).float().mean() > (plain[:, 0] == truth).float().mean() + 0.3


X = torch.ones(3, 4)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "queries must have dtype", lambda: csls_topk(X.long(), X, 1)),
        (ValueError, "same dimensions", lambda: csls_topk(X, X[:, :3], 1)),
        (ValueError, "k must be at least 1, got 0", lambda: csls_topk(X, X, 0)),
        (ValueError, "neighbors must be at least 1", lambda: csls_topk(X, X, 1, neighbors=0)),
        (ValueError, "reference must have 4", lambda: csls_topk(X, X, 1, reference=X[:, :3])),
        (ValueError, "queries must be finite", lambda: csls_topk(X / 0, X, 1, reference=X)),
        (ValueError, "documents must be finite", lambda: csls_topk(X, X / 0, 1)),
        (ValueError, "reference must be finite", lambda: csls_topk(X, X, 1, reference=X / 0)),
    ],
)
def test_bad_arguments(error, message, call):
    with pytest.raises(error, match=message):
        call()
