from __future__ import annotations

import numpy as np
import pytest
import torch
from contract import check_threads, only_kernels
from emblas.binary import (
    binary_kmeans,
    dense_topk,
    hamming_topk,
    kmeans,
    knn_vote,
    neighbors,
    pack_sign,
)
from hypothesis import given
from hypothesis import strategies as st

# --- votes -------------------------------------------------------------------------------------


def counted(ids, labels, weights, num_labels):
    """One vote after the other, float64."""
    votes = np.zeros((len(ids), num_labels))
    for q, row in enumerate(ids.tolist()):
        total = 0.0
        for neighbor, weight in zip(row, weights[q].tolist(), strict=True):
            if neighbor < 0:
                continue
            total += weight
            own = labels[neighbor]
            for label in own.nonzero()[:, 0].tolist() if own.dim() else [int(own)]:
                if label >= 0:
                    votes[q, label] += weight
        votes[q] /= total or 1.0
    return votes


@given(
    queries=st.integers(0, 5),
    k=st.integers(0, 7),
    rows=st.integers(1, 9),
    count=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_votes(queries, k, rows, count, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, rows, (queries, k), generator=generator)
    weights = torch.rand(queries, k, generator=generator).where(ids >= 0, -torch.inf)
    one = torch.randint(-1, count, (rows,), generator=generator)
    several = torch.rand(rows, count, generator=generator) < 0.4
    equal = torch.ones(queries, k)
    for labels, options in ((one, {"num_labels": count}), (several, {})):
        np.testing.assert_allclose(
            knn_vote(ids, labels, weights=weights, **options),
            counted(ids, labels, weights, count),
            rtol=1e-6,
            atol=1e-6,
        )
        np.testing.assert_allclose(
            knn_vote(ids, labels, **options), counted(ids, labels, equal, count), atol=1e-6
        )


def test_votes_of_a_search():
    """Two clouds of bits: the neighbors know the side, and a second label of half of it."""
    x = torch.randn(200, 32)
    x[:, 0] += torch.where(torch.arange(200) < 100, 40.0, -40.0)
    side = torch.arange(200) >= 100
    labels = torch.stack((side, ~side, side & (torch.arange(200) % 2 == 0)), 1)
    for _, ids in (hamming_topk(pack_sign(x), pack_sign(x), 1), dense_topk(x, x, 1)):
        assert torch.equal(knn_vote(ids, labels) > 0.5, labels[ids[:, 0]])
    _, ids = dense_topk(x, x, 20, metric="l2")
    votes = knn_vote(ids, labels)
    assert torch.equal(votes[:, :2] > 0.5, labels[:, :2])
    assert (votes[100:, 2] > 0.1).all()
    assert (votes[:100, 2] == 0).all()
    assert knn_vote(ids, side.long()).shape == (200, 2)  # as many as the largest


def test_nobody_votes():
    nobody = torch.full((2, 3), -1)
    assert knn_vote(nobody, torch.tensor([0, 1])).tolist() == [[0, 0], [0, 0]]
    assert knn_vote(nobody, torch.zeros(0, 4, dtype=torch.bool)).tolist() == [[0] * 4] * 2
    assert knn_vote(nobody, torch.zeros(0).long()).shape == (2, 0)
    assert knn_vote(nobody[:, :0], torch.tensor([-1, -1])).shape == (2, 0)
    zero = knn_vote(torch.tensor([[0, 1]]), torch.tensor([0, 1]), weights=torch.zeros(1, 2))
    assert zero.tolist() == [[0, 0]]


# --- k-means -----------------------------------------------------------------------------------


def lloyd(x, centers, steps, distance, mean):
    """Plain steps in float64 from given centers; no cluster may lose its last row."""
    for _ in range(steps):
        nearest = distance(x, centers).argmin(1)
        centers = np.stack([mean(x[nearest == c]) for c in range(len(centers))])
    return centers, distance(x, centers)


def squared(x, centers):
    return ((x[:, None] - centers) ** 2).sum(2)


def test_lloyd_steps():
    x = torch.randn(700, 9)
    x[:, 0] += torch.arange(700) % 5 * 6
    start = kmeans(x, 5, iterations=0).centers.double().numpy()
    found = kmeans(x, 5, iterations=4)
    centers, distances = lloyd(x.double().numpy(), start, 4, squared, lambda part: part.mean(0))
    np.testing.assert_allclose(found.centers, centers, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found.assignment, distances.argmin(1))
    assert found.cost == pytest.approx(distances.min(1).sum(), rel=1e-6)
    assert found.counts.tolist() == np.bincount(distances.argmin(1), minlength=5).tolist()


def test_spherical_steps():
    def unit(values):
        return values / np.linalg.norm(values, axis=-1, keepdims=True)

    x = torch.randn(600, 8)
    x[:, :3] += 4 * torch.eye(3)[torch.arange(600) % 3]
    start = kmeans(x, 3, metric="cosine", iterations=0).centers.double().numpy()
    found = kmeans(x, 3, metric="cosine", iterations=3)
    centers, distances = lloyd(
        unit(x.double().numpy()), start, 3, lambda a, b: 1 - a @ b.T,
        lambda part: unit(part.sum(0)),
    )  # fmt: skip
    np.testing.assert_allclose(found.centers, centers, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found.assignment, distances.argmin(1))
    assert found.cost == pytest.approx(distances.min(1).sum(), rel=1e-5)
    scaled = kmeans(x * torch.rand(600, 1).exp(), 3, metric="cosine", iterations=3)
    assert torch.equal(scaled.assignment, found.assignment)  # only directions count


def test_binary_steps():
    def hamming(a, b):
        return (a[:, None] != b).sum(2)

    centers = torch.randint(0, 2, (4, 43)).float()
    flips = (torch.rand(500, 43) < 0.2).float()
    bits = (centers[torch.arange(500) % 4] + flips) % 2
    codes = pack_sign(bits)
    start = np.unpackbits(binary_kmeans(codes, 4, iterations=0).centers.numpy(), axis=1)
    found = binary_kmeans(codes, 4, iterations=3)
    expected, distances = lloyd(
        bits.numpy(), start[:, :43], 3, hamming, lambda part: part.mean(0) > 0.5
    )
    np.testing.assert_array_equal(found.centers, np.packbits(expected, axis=1))
    np.testing.assert_array_equal(found.assignment, distances.argmin(1))
    assert found.cost == distances.min(1).sum()
    found = binary_kmeans(codes, 4)
    assert found.converged
    assert len(torch.cdist(centers, torch.from_numpy(np.unpackbits(found.centers.numpy(), axis=1)[
        :, :43]).float(), p=1).argmin(1).unique()) == 4  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_finds_clouds(dtype):
    middle = torch.eye(6) * 50
    x = (middle[torch.arange(300) % 6] + torch.randn(300, 6)).to(dtype)
    found = kmeans(x, 6, seed=3)
    assert found.converged
    assert found.counts.tolist() == [50] * 6
    assert (found.assignment.view(50, 6) == found.assignment[:6]).all()
    assert torch.cdist(found.centers, middle).amin(1).max() < 1


def test_empty_clusters_are_refilled(monkeypatch):
    """All centers start at one spot: every one but the first has no rows."""
    middle = torch.eye(5) * 30
    x = middle[torch.arange(100) % 5] + torch.randn(100, 5)
    monkeypatch.setattr(neighbors, "_plus_plus", lambda space, x, k, g: space.center(
        space.values(x[:1].expand(k, -1)), torch.ones(k, 1)))  # fmt: skip
    for found in (kmeans(x, 5), kmeans(x, 5, metric="cosine")):
        assert (found.counts > 0).all()
        assert found.converged
    codes = pack_sign(torch.randn(40, 64))
    found = binary_kmeans(codes, 40, iterations=1)
    assert (found.counts == 1).all()
    assert found.cost == 0


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_fewer_different_rows_than_centers(metric):
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]]).repeat(5, 1)
    found = kmeans(x, 4, metric=metric)
    assert found.cost < 1e-12
    assert found.centers.isfinite().all()
    assert torch.equal(found.assignment.bincount(minlength=4), found.counts)
    assert found.assignment.view(5, 2).unique(dim=0).shape[0] == 1


def test_extremes():
    x = torch.randn(7, 3)
    every = kmeans(x, 7)
    assert every.assignment.sort().values.tolist() == list(range(7))
    assert every.cost == 0
    one = kmeans(x, 1)
    torch.testing.assert_close(one.centers[0], x.mean(0))
    assert one.counts.tolist() == [7]
    flat = kmeans(torch.zeros(4, 0), 2)
    assert flat.centers.shape == (2, 0)
    with only_kernels("dense_topk"):
        kmeans(x, 2)
    with only_kernels("hamming_topk"):
        binary_kmeans(pack_sign(x), 2)


def test_the_same_every_time(monkeypatch):
    x = torch.randn(1000, 16)
    codes = pack_sign(x)
    check_threads(lambda: kmeans(x, 12)[:3])
    check_threads(lambda: binary_kmeans(codes, 12)[:3])
    assert not torch.equal(kmeans(x, 12).centers, kmeans(x, 12, seed=1).centers)
    together = kmeans(x, 12)
    monkeypatch.setattr(neighbors, "_ROWS", 90)
    assert torch.equal(kmeans(x, 12).centers, together.centers)


def test_better_starts_and_steps():
    """Costs fall with steps, and k-means++ beats rows drawn at random."""
    x = torch.randn(400, 4) + 20 * torch.randn(8, 4)[torch.arange(400) % 8]
    costs = [kmeans(x, 8, iterations=i).cost for i in (0, 1, 2, 25)]
    assert costs == sorted(costs, reverse=True)
    started = np.mean([kmeans(x, 8, iterations=0, seed=s).cost for s in range(8)])
    drawn = np.mean([
        squared(x.double().numpy(), x[torch.randperm(400)[:8]].double().numpy()).min(1).sum()
        for _ in range(8)
    ])  # fmt: skip
    assert started < drawn


IDS, X = torch.tensor([[0, 1]]), torch.zeros(3, 2)
LABELS = torch.tensor([0, 1, 1])


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "ids must have dtype", lambda: knn_vote(X, LABELS)),
        (ValueError, "ids must have 2", lambda: knn_vote(IDS[0], LABELS)),
        (ValueError, "ids must lie between -1 and 2", lambda: knn_vote(IDS + 2, LABELS)),
        (ValueError, "ids must lie between -1 and 2", lambda: knn_vote(IDS - 2, LABELS)),
        (TypeError, "labels must have dtype", lambda: knn_vote(IDS, LABELS.float())),
        (ValueError, "labels must be int of 1", lambda: knn_vote(IDS, LABELS[None])),
        (ValueError, "labels must be int of 1", lambda: knn_vote(IDS, LABELS.bool())),
        (ValueError, "labels must lie", lambda: knn_vote(IDS, LABELS - 2)),
        (ValueError, "labels must lie", lambda: knn_vote(IDS, LABELS, num_labels=1)),
        (ValueError, "left out", lambda: knn_vote(IDS, LABELS.bool()[:, None], num_labels=1)),
        (ValueError, "weights must have the shape", lambda: knn_vote(IDS, LABELS, weights=X)),
        (ValueError, "weights must be finite", lambda: knn_vote(IDS, LABELS, weights=-X[:1] - 1)),
        (ValueError, "weights must be finite", lambda: knn_vote(IDS, LABELS, weights=X[:1] / 0)),
        (TypeError, "x must have dtype", lambda: kmeans(LABELS[None], 1)),
        (ValueError, "x must have 2", lambda: kmeans(X[0], 1)),
        (ValueError, "x must be finite", lambda: kmeans(X / 0, 1)),
        (ValueError, "metric must be one of", lambda: kmeans(X, 1, metric="dot")),
        (ValueError, "k must be between 1 and the 3 rows", lambda: kmeans(X, 4)),
        (ValueError, "k must be between 1 and the 0 rows", lambda: kmeans(X[:0], 1)),
        (ValueError, "iterations must be", lambda: kmeans(X, 1, iterations=-1)),
        (TypeError, "codes must have dtype", lambda: binary_kmeans(X, 1)),
        (ValueError, "k must be between", lambda: binary_kmeans(X.to(torch.uint8), 0)),
    ],
)
def test_bad_arguments(error, message, call):
    with pytest.raises(error, match=message):
        call()
