from __future__ import annotations

import numpy as np
import pytest
import torch
from emblas.integrations.quantization import PRECISIONS, quantize_embeddings, semantic_search

theirs = pytest.importorskip("sentence_transformers.util.quantization")

X = np.random.default_rng(0).normal(size=(150, 40)).astype(np.float32)
X /= np.linalg.norm(X, axis=1, keepdims=True)
RANGES = np.stack((X.min(0), X.max(0)))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_quantize_equals_theirs(precision):
    for ranges in (None, RANGES * 0.7):
        expected = theirs.quantize_embeddings(X, precision, ranges=ranges)
        for form in (X, torch.from_numpy(X), list(X), list(torch.from_numpy(X))):
            actual = quantize_embeddings(form, precision, ranges=ranges)
            assert actual.dtype == expected.dtype
            np.testing.assert_array_equal(actual, expected)
    calibrated = quantize_embeddings(X[:5], precision, calibration_embeddings=X)
    np.testing.assert_array_equal(
        calibrated, theirs.quantize_embeddings(X[:5], precision, calibration_embeddings=X)
    )
    assert len(quantize_embeddings(X[:0], precision)) == 0


def test_rows_of_any_length_are_packed_by_themselves():
    """Packing the flattened array would mix rows where dim is not divisible by 8."""
    codes = quantize_embeddings(X[:, :13], "ubinary")
    np.testing.assert_array_equal(codes, np.packbits(X[:, :13] > 0, axis=1))
    np.testing.assert_array_equal(codes[3], quantize_embeddings(X[3, :13], "ubinary"))


def ids_and_scores(found):
    return [[hit["corpus_id"] for hit in hits] for hits in found], [
        [hit["score"] for hit in hits] for hits in found
    ]


QUERIES = X[:9] + 0.02 * np.random.default_rng(1).normal(size=(9, 40)).astype(np.float32)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_search(precision):
    corpus = quantize_embeddings(X, precision, ranges=RANGES)
    ranges = RANGES if "int8" in precision else None
    found, seconds = semantic_search(QUERIES, corpus, precision, top_k=5, ranges=ranges)
    ids, scores = ids_and_scores(found)
    assert seconds > 0
    assert [hits[0] for hits in ids] == list(range(9))
    assert all(hits == sorted(hits, reverse=True) for hits in scores)  # of the order returned
    if precision in ("float32", "int8", "uint8"):
        exact = QUERIES @ X.T
        error = 0.0 if precision == "float32" else 0.03
        np.testing.assert_allclose(scores, np.take_along_axis(exact, np.array(ids), 1),
                                   atol=1e-5 + error)  # fmt: skip
    everything, _ = semantic_search(QUERIES, corpus, precision, top_k=500, ranges=ranges)
    assert all(sorted(hits) == list(range(150)) for hits in ids_and_scores(everything)[0])


def test_binary_and_ubinary_agree():
    """The offset of 128 per byte must not reach the scores."""
    results = [
        semantic_search(QUERIES, quantize_embeddings(X, name), name, top_k=9, rescore=rescore)[0]
        for rescore in (True, False)
        for name in ("binary", "ubinary")
    ]
    assert results[0] == results[1]
    assert results[2] == results[3]
    signs = np.where(X > 0, 1, -1) / 40**0.5
    unit = QUERIES / np.linalg.norm(QUERIES, axis=1, keepdims=True)
    ids, scores = ids_and_scores(results[0])
    np.testing.assert_allclose(
        scores, np.take_along_axis(unit @ signs.T, np.array(ids), 1), atol=1e-5
    )
    ids, scores = ids_and_scores(results[2])
    cosines = (np.where(QUERIES > 0, 1, -1) / 40**0.5) @ signs.T
    np.testing.assert_allclose(scores, np.take_along_axis(cosines, np.array(ids), 1), atol=1e-6)


def test_scales_do_not_reverse_ranks():
    """Raw int8 codes would weigh a narrow dimension like a wide one."""
    corpus = np.array([[1.0, 0.0], [0.0, 0.01]], np.float32)
    ranges = np.array([[0.0, 0.0], [1.0, 0.01]], np.float32)
    codes = quantize_embeddings(corpus, "int8", ranges=ranges)
    found, _ = semantic_search(np.array([[0.1, 0.9]], np.float32), codes, "int8", ranges=ranges)
    assert ids_and_scores(found)[0] == [[0, 1]]


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "precision must be one of", lambda: quantize_embeddings(X, "int4")),
        (TypeError, "embeddings must have dtype", lambda: quantize_embeddings(X > 0, "binary")),
        (TypeError, "embeddings must be a tensor", lambda: quantize_embeddings(3, "binary")),
        (ValueError, "single embedding", lambda: quantize_embeddings(X[:1], "int8")),
        (ValueError, "ranges must be given", lambda: semantic_search(X, X.astype(np.int8), "int8")),
        (ValueError, "top_k must be", lambda: semantic_search(X, X, top_k=0)),
    ],
)
def test_bad_arguments(error, message, call):
    with pytest.raises(error, match=message):
        call()
