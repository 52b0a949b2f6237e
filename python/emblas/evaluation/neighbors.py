"""What labels can be read off the embeddings: by their neighbors, by their clusters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emblas.evaluation import checks

BLOCK = 1024  # rows whose similarities are held at a time


def knn_score(train: Any, train_labels: Any, test: Any, test_labels: Any, k: int = 5) -> float:
    """Accuracy of the majority label among the ``k`` nearest training vectors by cosine.

    Parameters
    ----------
    train, test : array-like
        Vectors ``(n, dim)`` and ``(m, dim)``.
    train_labels, test_labels : array-like
        Integers ``(n,)`` and ``(m,)``.
    k : int, default 5
        Neighbors that vote, at most ``n``; of equally many votes, the smallest label wins.

    Returns
    -------
    float
        From 0 to 1.
    """
    a, b = checks.vectors("train", train), checks.vectors("test", test)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"test must have dimension {a.shape[1]}, as train, got {b.shape[1]}")
    names, index = checks.classes("train_labels", train_labels, len(a))
    expected, which = checks.classes("test_labels", test_labels, len(b))
    checks.count("k", k, len(a))
    a, b = checks.unit(a), checks.unit(b)
    found = []
    for part in b.split(BLOCK):
        votes = index[(part @ a.T).topk(k, 1).indices]
        ballots = torch.nn.functional.one_hot(votes, len(names)).sum(1)
        found.append(names[ballots.argmax(1)])
    return float((torch.cat(found) == expected[which]).double().mean())


def v_measure(labels: Any, clusters: Any) -> float:
    r"""Harmonic mean of homogeneity and completeness of clusters.

    Homogeneity is :math:`1 - H(L | C) / H(L)`, completeness :math:`1 - H(C | L) / H(C)`, each 1
    where its denominator is 0.

    Parameters
    ----------
    labels, clusters : array-like
        Integers ``(n,)``.

    Returns
    -------
    float
        From 0 to 1.

    Notes
    -----
    Rosenberg and Hirschberg 2007.
    """
    n = len(torch.as_tensor(labels))
    (a, i), (b, j) = checks.classes("labels", labels, n), checks.classes("clusters", clusters, n)
    if n == 0:
        return 1.0
    table = torch.zeros(len(a), len(b), dtype=torch.float64)
    table.index_put_((i, j), table.new_ones(n), accumulate=True)
    both, one, other = (_entropy(t / n) for t in (table, table.sum(1), table.sum(0)))
    homogeneity = 1.0 if one == 0 else 1 - (both - other) / one
    completeness = 1.0 if other == 0 else 1 - (both - one) / other
    total = homogeneity + completeness
    return max(0.0, 2 * homogeneity * completeness / total) if total > 0 else 0.0


def _entropy(p: Tensor) -> float:
    return float(-torch.special.xlogy(p, p).sum())


def kmeans_score(x: Any, labels: Any, *, repeats: int = 3, seed: int = 0) -> float:
    """V-measure of k-means clusters, as many as there are labels.

    Parameters
    ----------
    x : array-like
        Vectors ``(n, dim)``.
    labels : array-like
        Integers ``(n,)``.
    repeats : int, default 3
        Starts (k-means++), of which the one with the smallest squared distances is taken.
    seed : int, default 0
        Of the starts.

    Returns
    -------
    float
        From 0 to 1.
    """
    x = checks.vectors("x", x)
    names, _ = checks.classes("labels", labels, len(x))
    checks.count("repeats", repeats)
    generator = torch.Generator().manual_seed(seed)
    runs = [_kmeans(x, len(names), generator) for _ in range(repeats)]
    return v_measure(labels, min(runs, key=lambda run: run[0])[1])


def _kmeans(x: Tensor, k: int, generator: torch.Generator) -> tuple[float, Tensor]:
    """Sum of squared distances to the nearest center, and the index of that center."""
    first = int(torch.randint(len(x), (), generator=generator))
    centers = x[first][None]
    while len(centers) < k:  # k-means++ (Arthur and Vassilvitskii 2007)
        share = torch.cdist(x, centers).amin(1).square()
        if not share.any():  # fewer distinct vectors than labels
            break
        centers = torch.cat([centers, x[torch.multinomial(share, 1, generator=generator)]])
    cluster = torch.full((len(x),), -1)
    for _ in range(300):
        distance, nearest = torch.cdist(x, centers).min(1)
        if torch.equal(nearest, cluster):
            break
        cluster = nearest
        members = torch.zeros(len(centers), dtype=x.dtype).index_add(0, cluster, x.new_ones(len(x)))
        sums = torch.zeros_like(centers).index_add(0, cluster, x)
        centers = torch.where(members[:, None] > 0, sums / members.clamp_min(1)[:, None], centers)
    return float(distance.square().sum()), cluster
