from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from emblas import evaluation as ev
from scipy import linalg, stats
from sklearn import metrics, neighbors

RNG = np.random.default_rng(0)


def cosine(a, b):
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def test_ranking_measures():
    """sklearn's nDCG and precision of the same scores; gains of several sizes."""
    scores = RNG.normal(size=(20, 30))
    gains = RNG.integers(0, 4, size=(20, 30)) * (RNG.random((20, 30)) < 0.3)
    gains[3] = 0  # nothing to find: left out
    ranked = np.argsort(-scores, 1)
    relevance = [{j: float(g) for j, g in enumerate(row) if g} for row in gains]
    some = gains.any(1)
    for k in (1, 5, 10, 30):
        expected = metrics.ndcg_score(gains[some], scores[some], k=k)
        assert ev.ndcg(ranked, relevance, k) == pytest.approx(expected)
        assert ev.ndcg(torch.from_numpy(ranked), relevance, k) == pytest.approx(expected)
        found = [len(set(row[:k]) & set(known)) / len(known)
                 for row, known in zip(ranked, relevance, strict=True) if known]  # fmt: skip
        assert ev.recall(ranked, relevance, k) == pytest.approx(np.mean(found))
    expected = np.mean([metrics.average_precision_score(g > 0, s)
                        for g, s in zip(gains[some], scores[some], strict=True)])  # fmt: skip
    assert ev.mean_average_precision(ranked, relevance, 30) == pytest.approx(expected)
    # By hand: of three relevant documents two are found, at ranks 1 and 3.
    one = ([[4, 9, 2, -1]], [{4: 1, 2: 1, 7: 1}])
    assert ev.mean_average_precision(*one, k=3) == pytest.approx((1 + 2 / 3) / 3)
    assert ev.mean_average_precision(*one, k=2) == pytest.approx(1 / 3)
    assert ev.recall(*one, k=3) == pytest.approx(2 / 3)
    assert ev.ndcg(*one, k=3) == pytest.approx(1.5 / (1 + 1 / math.log2(3) + 0.5))
    for measure in (ev.ndcg, ev.recall, ev.mean_average_precision):
        assert measure([[1, 2]], [{}]) == 0
        assert measure([], []) == 0
        assert measure([[-1, -1]], [{1: 1}]) == 0


def test_correlations():
    x, y = RNG.integers(0, 6, 50).astype(float), RNG.normal(size=50)
    assert ev.pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic)
    assert ev.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert ev.spearman(x, torch.from_numpy(x) ** 3) == pytest.approx(1)
    assert ev.pearson([1, 1], [1, 2]) == 0
    assert ev.spearman([], []) == 0
    assert ev.pearson([0.1] * 3, [1, 2, 4]) == 0


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e-13, 1e-7, 1e150])
def test_scale_changes_nothing(scale):
    x, y = RNG.normal(size=(30, 4)), RNG.normal(size=(30, 4))
    assert ev.pearson([scale, 2 * scale, 4 * scale], [1, 2, 4]) == pytest.approx(1)
    assert ev.isoscore(x * scale) == pytest.approx(ev.isoscore(x))
    assert ev.alignment(x * scale, y) == pytest.approx(ev.alignment(x, y))
    assert ev.uniformity(x * scale) == pytest.approx(ev.uniformity(x))
    torch.testing.assert_close(ev.csls(x * scale, y), ev.csls(x, y))


def test_knn():
    train, test = RNG.normal(size=(60, 5)), RNG.normal(size=(33, 5))
    a, b = RNG.integers(-1, 3, 60), RNG.integers(-1, 3, 33)
    for k in (1, 3, 8):
        model = neighbors.KNeighborsClassifier(k, metric="cosine").fit(train, a)
        assert ev.knn_score(train, a, test, b, k) == pytest.approx(model.score(test, b))


def test_kmeans():
    a, b = RNG.integers(0, 4, 80), RNG.integers(0, 3, 80)
    assert ev.v_measure(a, b) == pytest.approx(metrics.v_measure_score(a, b))
    assert ev.v_measure([1, 1, 2], [5, 5, 0]) == pytest.approx(1)
    assert ev.v_measure([1, 1], [0, 1]) == pytest.approx(metrics.v_measure_score([1, 1], [0, 1]))
    assert ev.v_measure([], []) == 1
    x = RNG.normal(size=(80, 3)) * 0.1 + np.eye(4, 3)[a] * 5
    assert ev.kmeans_score(x, a) == pytest.approx(1)
    noise = RNG.normal(size=(80, 3))
    assert ev.kmeans_score(noise, a) < 0.2
    assert ev.kmeans_score(noise, a, seed=3) == ev.kmeans_score(noise, a, seed=3)
    assert ev.kmeans_score(np.ones((5, 2)), [0, 1, 2, 3, 4]) == 0


def test_isoscore():
    d = 12
    assert ev.isoscore(np.eye(d) * 3) > 0.8
    assert ev.isoscore(RNG.normal(size=(20000, d))) > 0.99
    line = RNG.normal(size=(100, 1)) * RNG.normal(size=(1, d))
    assert ev.isoscore(line) == pytest.approx(0, abs=1e-9)
    for value in (1, 0.1, 1e-300):
        assert ev.isoscore(np.full((4, d), value)) == 0
    # Exactly k of d directions with equal variance: about (k - 1) / (d - 1).
    for k in (2, 6, 11):
        basis = linalg.hadamard(16)[:, 1 : k + 1].astype(float)  # uncorrelated, mean 0
        x = np.hstack([basis, np.zeros((16, d - k))]) @ stats.ortho_group.rvs(d, random_state=1)
        assert ev.isoscore(x) == pytest.approx((k - 1) / (d - 1))


def test_alignment_and_uniformity():
    x, y = RNG.normal(size=(30, 4)), RNG.normal(size=(30, 4))
    a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))
    for alpha in (1, 2):
        expected = np.mean([np.linalg.norm(p - q) ** alpha for p, q in zip(a, b, strict=True)])
        assert ev.alignment(x, y, alpha) == pytest.approx(expected)
    expected = np.mean([np.exp(-2 * ((p - q) ** 2).sum()) for p, q in itertools.combinations(a, 2)])
    assert ev.uniformity(x) == pytest.approx(np.log(expected))
    assert ev.alignment(x, 3 * x) == pytest.approx(0)
    for t in (1000, 1e6):  # two of length 1 at right angles
        assert ev.uniformity(np.eye(3), t) == pytest.approx(-2 * t)
    assert ev.uniformity(np.zeros((3, 2))) == 0


def test_blocks_change_nothing(monkeypatch):
    x, labels = RNG.normal(size=(50, 3)), RNG.integers(0, 3, 50)

    def measures():
        knn = ev.knn_score(x, labels, x[::-1].copy(), labels, 3)
        return ev.uniformity(x), ev.two_nn(x), knn

    whole = measures()
    monkeypatch.setattr("emblas.evaluation.geometry.BLOCK", 7)
    monkeypatch.setattr("emblas.evaluation.neighbors.BLOCK", 7)
    assert measures() == pytest.approx(whole)


def test_two_nn():
    x = RNG.normal(size=(40, 3))
    logs = []
    for i in range(40):
        r = sorted(np.linalg.norm(x[i] - x[j]) for j in range(40) if j != i)
        logs.append(math.log(r[1] / r[0]))
    assert ev.two_nn(x) == pytest.approx(40 / sum(logs))
    assert ev.two_nn(np.vstack([x, x])) == pytest.approx(40 / sum(logs))
    for dim in (1, 2, 5):  # a flat piece of that dimension in 20 of them, turned
        flat = RNG.random((3000, dim)) @ stats.ortho_group.rvs(20, random_state=2)[:dim]
        assert ev.two_nn(flat) == pytest.approx(dim, rel=0.1)


def test_three_cos_add():
    x = RNG.normal(size=(30, 6))
    a, b, c = RNG.integers(0, 30, (3, 12))
    u = x / np.linalg.norm(x, axis=1, keepdims=True)
    for k in (1, 4):
        answers = ev.three_cos_add(x, a, b, c, k).tolist()
        for i in range(12):
            wanted = u[b[i]] - u[a[i]] + u[c[i]]
            rest = [v for v in range(30) if v not in (a[i], b[i], c[i])]
            assert answers[i] == sorted(rest, key=lambda v: -cosine(x[v], wanted))[:k]


def test_maps():
    x, y = RNG.normal(size=(40, 6)), RNG.normal(size=(40, 6))
    expected, _ = linalg.orthogonal_procrustes(x, y)
    np.testing.assert_allclose(ev.procrustes(x, y), expected, atol=1e-10)
    turn = stats.ortho_group.rvs(6, random_state=3)
    np.testing.assert_allclose(ev.procrustes(x, x @ turn), turn, atol=1e-10)
    z = RNG.normal(size=(40, 4))
    for rows in (40, 3):
        expected = np.linalg.lstsq(x[:rows], z[:rows])[0]
        np.testing.assert_allclose(ev.least_squares_map(x[:rows], z[:rows]), expected, atol=1e-10)
    expected = np.linalg.solve(x.T @ x + 0.5 * np.eye(6), x.T @ z)
    np.testing.assert_allclose(ev.least_squares_map(x, z, ridge=0.5), expected, atol=1e-10)
    assert not ev.least_squares_map(np.zeros((3, 2)), np.ones((3, 2))).any()


def test_csls():
    x, y = RNG.normal(size=(9, 4)), RNG.normal(size=(7, 4))
    cosines = np.array([[cosine(a, b) for b in y] for a in x])
    for k in (1, 3, 100):
        expected = np.array([[2 * cosines[i, j] - np.mean(sorted(cosines[i])[-k:])
                              - np.mean(sorted(cosines[:, j])[-k:]) for j in range(7)]
                             for i in range(9)])  # fmt: skip
        np.testing.assert_allclose(ev.csls(x, y, k), expected, atol=1e-12)


X = np.ones((4, 3))


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "relevance must have 1 queries", lambda: ev.ndcg([[1]], [])),
        (ValueError, "ranked must hold a document once", lambda: ev.recall([[1, 1]], [{1: 1}])),
        (ValueError, "k must be at least 1", lambda: ev.ndcg([[1]], [{1: 1}], 0)),
        (ValueError, "y must have 2 rows", lambda: ev.pearson([1, 2], [1])),
        (ValueError, "x must be finite", lambda: ev.spearman([1, math.nan], [1, 2])),
        (ValueError, "x must have 2 dimensions", lambda: ev.isoscore([1.0, 2.0])),
        (ValueError, "x must have at least 2 rows", lambda: ev.uniformity(X[:1])),
        (ValueError, "x must have at least 2 dimensions", lambda: ev.isoscore(X[:, :1])),
        (ValueError, "x must have at least 3 different rows", lambda: ev.two_nn(X)),
        (ValueError, "train_labels must be 4 integers",
         lambda: ev.knn_score(X, [0.5] * 4, X, [1] * 4)),
        (ValueError, "test must have dimension 3",
         lambda: ev.knn_score(X, [1] * 4, X[:, :2], [1] * 4)),
        (ValueError, "k must be at least 1 and at most 4",
         lambda: ev.knn_score(X, [1] * 4, X, [1] * 4, 5)),
        (IndexError, "c must lie between 0 and 3", lambda: ev.three_cos_add(X, [0], [1], [4])),
        (ValueError, "k must be at least 1 and at most 1",
         lambda: ev.three_cos_add(X, [0], [1], [2], 2)),
        (ValueError, "y must have dimension 3", lambda: ev.procrustes(X, X[:, :2])),
        (ValueError, "ridge must not be negative", lambda: ev.least_squares_map(X, X, -1)),
        (ValueError, "y must have dimension 3", lambda: ev.csls(X, X[:, :2])),
    ],
)  # fmt: skip
def test_bad_arguments(error, message, call):
    with pytest.raises(error, match=message):
        call()
