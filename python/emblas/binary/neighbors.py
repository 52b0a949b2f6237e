"""What the nearest vectors tell: labels by vote, clusters by k-means. Both rest on the scans."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from emblas import _op
from emblas.binary.dense import METRICS, dense_topk
from emblas.binary.functions import pack_sign, unpack_sign
from emblas.binary.search import _check_at_least, hamming_distance, hamming_topk

_ROWS = 8192  # of the data that a step of k-means looks at together


def knn_vote(
    ids: Tensor,
    labels: Tensor,
    *,
    num_labels: int | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Let the nearest neighbors of each query vote for its labels.

    ``votes[q, l]`` is the share of the neighbors' weight that has label l: the probability of the
    label in the k-nearest-neighbor classifier of Cover and Hart, "Nearest neighbor pattern
    classification", 1967, and one classifier for each label where a row may have several. The
    largest vote is the class, votes above a threshold are the labels.

    Parameters
    ----------
    ids : Tensor
        int64 ``(Q, k)``: rows of ``labels``, as the searches return them; -1 doesn't vote.
    labels : Tensor
        int64 or int32 ``(N,)``, the label of each row, -1 for none; or bool ``(N, L)``, any number
        of labels for each row.
    num_labels : int, optional
        L of int labels; one more than the largest by default.
    weights : Tensor, optional
        Floating-point ``(Q, k)``, at least 0: the vote of each neighbor; all 1 by default. Scores
        are turned into weights by ``(scores / temperature).softmax(1)``, for example.

    Returns
    -------
    Tensor
        float32 ``(Q, L)``, from 0 to 1; zeros where nobody votes. Neighbors without a label lower
        the share of all. Added up in the order of the neighbors.

    Raises
    ------
    TypeError
        If an argument has a wrong type.
    ValueError
        If shapes or devices don't fit together, an id or a label doesn't exist, or a weight is
        negative or not finite.

    Notes
    -----
    The values are checked: on a GPU the call waits for the device.

    Examples
    --------
    >>> knn_vote(torch.tensor([[0, 2, 3]]), torch.tensor([1, 0, 1, 0]))
    tensor([[0.3333, 0.6667]])
    """
    _op.check_tensor("ids", ids, ndim=2, dtypes=(torch.int64,))
    dtypes = (torch.int64, torch.int32, torch.bool)
    _op.check_tensor("labels", labels, dtypes=dtypes, device=ids.device)
    several = labels.dtype == torch.bool
    if labels.dim() != 1 + several:
        raise ValueError(
            f"labels must be int of 1 dimension or bool of 2, got {labels.dtype} of shape "
            f"{tuple(labels.shape)}"
        )
    if several:
        if num_labels is not None:
            raise ValueError("num_labels must be left out where labels are bool")
        num_labels = labels.shape[1]
    elif num_labels is None:
        num_labels = max(int(labels.max()) + 1, 0) if len(labels) else 0
    if not several and bool(((labels < -1) | (labels >= num_labels)).any()):
        raise ValueError(f"labels must lie between -1 and {num_labels - 1}")
    if bool(((ids < -1) | (ids >= len(labels))).any()):
        raise ValueError(f"ids must lie between -1 and {len(labels) - 1}")
    shares = torch.ones(ids.shape, device=ids.device)
    if weights is not None:
        _op.check_tensor("weights", weights, ndim=2, dtypes=_op.FLOATS, device=ids.device)
        if weights.shape != ids.shape:
            raise ValueError(
                f"weights must have the shape of ids, {tuple(ids.shape)}, got "
                f"{tuple(weights.shape)}"
            )
        shares = weights.float()
    shares = shares.masked_fill(ids < 0, 0)
    if not bool((shares.isfinite() & (shares >= 0)).all()):
        raise ValueError("weights must be finite and at least 0")
    votes = torch.zeros(len(ids), num_labels, device=ids.device)
    total = torch.zeros(len(ids), 1, device=ids.device)
    if len(labels) == 0:
        return votes
    for neighbor, share in zip(ids.clamp_min(0).T, shares.T[:, :, None], strict=True):
        total += share
        of_neighbor = labels[neighbor]
        if several:
            votes += share * of_neighbor
        elif num_labels:
            label = of_neighbor.long()[:, None]
            votes.scatter_add_(1, label.clamp_min(0), share.masked_fill(label < 0, 0))
    return votes / total.clamp_min(torch.finfo(torch.float32).tiny)


class Clusters(NamedTuple):
    """What :func:`kmeans` and :func:`binary_kmeans` find."""

    centers: Tensor  # one row each
    assignment: Tensor  # int64, one per row of the data: its nearest center, the first of equals
    counts: Tensor  # int64, one per center: its rows
    cost: float  # sum of the distances to the nearest center
    converged: bool  # the last step moved no row


@dataclass(frozen=True)
class _Space:
    """Where vectors live: what k-means needs to know of it."""

    nearest: Callable[[Tensor, Tensor], Tensor]  # (data, centers): index of each row's center
    distance: Callable[[Tensor, Tensor], Tensor]  # (data, centers), row by row, float64
    to_one: Callable[[Tensor, Tensor], Tensor]  # (data, one center): to draw by
    values: Callable[[Tensor], Tensor]  # (data): what a center adds up, float64
    center: Callable[[Tensor, Tensor], Tensor]  # (sums, counts): float64 sums of such values


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=1)


def _to_one(x: Tensor, center: Tensor) -> Tensor:
    # By differences, not products: near a center nothing cancels, and equal rows are at 0.
    mode = "donot_use_mm_for_euclid_dist"
    return torch.cdist(x, center, compute_mode=mode)[:, 0].double().square()


def _signs(codes: Tensor) -> Tensor:
    return unpack_sign(codes, 8 * codes.shape[1], dtype=torch.float64)


_EUCLIDEAN = _Space(
    lambda x, centers: dense_topk(x, centers, 1, metric="l2")[1][:, 0],
    lambda x, centers: (x.double() - centers).square().sum(1),
    lambda x, center: _to_one(x.float(), center),
    lambda x: x.double(),
    lambda sums, counts: (sums / counts).float(),
)
_SPHERE = _Space(
    lambda x, centers: dense_topk(x, centers, 1, metric="cosine")[1][:, 0],
    # Half the squared distance of unit vectors, which is 1 - cosine.
    lambda x, centers: (_unit(x.double()) - centers).square().sum(1) / 2,
    lambda x, center: _to_one(_unit(x.float()), center),
    lambda x: _unit(x.double()),
    lambda sums, counts: _unit(sums).float(),
)
_BITS = _Space(
    lambda x, centers: hamming_topk(x, centers, 1)[1][:, 0],
    lambda x, centers: (_signs(x) - _signs(centers)).square().sum(1) / 4,
    lambda x, center: hamming_distance(center, x)[0].double(),
    _signs,
    lambda sums, counts: pack_sign(sums),
)


def _distances(space: _Space, x: Tensor, centers: Tensor, assignment: Tensor) -> Tensor:
    pairs = zip(x.split(_ROWS), assignment.split(_ROWS), strict=True)
    return torch.cat([space.distance(part, centers[index]) for part, index in pairs])


def _plus_plus(space: _Space, x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Draw rows as first centers, with probabilities as their distances from those drawn before.

    Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding", 2007.
    """
    n = len(x)
    chosen = [int(torch.randint(n, (), generator=generator))]
    nearest = torch.full((n,), torch.inf, dtype=torch.float64, device=x.device)
    while len(chosen) < k:
        last = space.center(space.values(x[chosen[-1:]]), nearest.new_ones(1, 1))
        found = torch.cat([space.to_one(part, last) for part in x.split(_ROWS)])
        nearest = torch.minimum(nearest, found)
        if not bool(nearest.any()):  # fewer different rows than centers
            nearest = torch.ones_like(nearest)
        total = nearest.cumsum(0)
        draw = torch.rand((), dtype=torch.float64, generator=generator).to(x.device) * total[-1]
        chosen.append(min(int(torch.searchsorted(total, draw, right=True)), n - 1))
    rows = x[torch.tensor(chosen, device=x.device)]
    return space.center(space.values(rows), nearest.new_ones(k, 1))


def _refill(space: _Space, x: Tensor, centers: Tensor, assignment: Tensor, counts: Tensor) -> None:
    """Give each empty cluster the row farthest from its center, of a cluster that has others."""
    empty = (counts == 0).nonzero()[:, 0].tolist()
    if not empty:
        return
    distance = _distances(space, x, centers, assignment)
    farthest = distance.sort(descending=True, stable=True).indices
    for row in farthest[: int((distance > 0).sum())].tolist():
        owner = int(assignment[row])
        if int(counts[owner]) > 1:
            assignment[row] = empty[0]
            counts[owner] -= 1
            counts[empty.pop(0)] += 1
        if not empty:
            return


def _lloyd(space: _Space, x: Tensor, k: int, iterations: int, seed: int) -> Clusters:
    generator = torch.Generator().manual_seed(seed)
    centers = _plus_plus(space, x, k, generator)

    def assign() -> tuple[Tensor, Tensor]:
        assignment = torch.cat([space.nearest(part, centers) for part in x.split(_ROWS)])
        return assignment, torch.bincount(assignment, minlength=k)

    assignment, counts = assign()
    converged = False
    for _ in range(iterations):
        wanted, sizes = assignment.clone(), counts.clone()
        _refill(space, x, centers, wanted, sizes)
        sums: Tensor | None = None
        for part, index in zip(x.split(_ROWS), wanted.split(_ROWS), strict=True):
            values = space.values(part)
            if sums is None:
                sums = values.new_zeros(k, values.shape[1])
            # Adds in the order of the rows, on a GPU too.
            sums.index_put_((index,), values, accumulate=True)
        assert sums is not None
        moved = space.center(sums, sizes[:, None])
        centers = torch.where(sizes[:, None] > 0, moved, centers)
        before = assignment
        assignment, counts = assign()
        if torch.equal(before, assignment):
            converged = True
            break
    cost = float(_distances(space, x, centers, assignment).sum())
    return Clusters(centers, assignment, counts, cost, converged)


def _check_kmeans(rows: int, k: int, iterations: int) -> None:
    if not 1 <= k <= rows:
        raise ValueError(f"k must be between 1 and the {rows} rows of the data, got {k}")
    _check_at_least("iterations", iterations, 0)


def kmeans(
    x: Tensor, k: int, *, metric: str = "l2", iterations: int = 25, seed: int = 0
) -> Clusters:
    """Cluster vectors around k centers, each the mean of the vectors nearest to it.

    Lloyd, "Least squares quantization in PCM", 1982, from starts drawn by k-means++; with "cosine"
    the spherical form of Dhillon and Modha, "Concept decompositions for large sparse text data
    using clustering", 2001. Nearest centers come from :func:`dense_topk`: no matrix of distances
    is written.

    Parameters
    ----------
    x : Tensor
        ``(N, dim)``; floating-point, finite; a memory map serves. Distances are computed in
        float32, means in float64.
    k : int
        Centers, between 1 and N.
    metric : {"l2", "cosine"}, default "l2"
        "cosine" clusters directions: centers have unit length.
    iterations : int, default 25
        Steps at most, fewer if no vector moves any more. 0 leaves the starts.
    seed : int, default 0
        Of the starts. The same arguments give the same result, whatever the number of threads.

    Returns
    -------
    Clusters
        ``centers`` float32 ``(k, dim)``, ``assignment`` int64 ``(N,)``, ``counts`` int64 ``(k,)``,
        ``cost`` the sum of squared distances, halved for "cosine" (1 - cosine of all but zero
        vectors), and ``converged``.

    Raises
    ------
    TypeError
        If ``x`` is no tensor of a floating-point dtype.
    ValueError
        If ``x`` is not 2-D or not finite, or a number is out of range.

    Notes
    -----
    A cluster that loses its last vector continues with the one that is farthest from its center.
    A cluster without vectors is left only where there are fewer different vectors than centers, or
    where the last step took them.
    """
    _op.check_tensor("x", x, ndim=2, dtypes=_op.FLOATS)
    _op.check_choice("metric", metric, METRICS[1:])
    _check_kmeans(len(x), k, iterations)
    if not all(bool(part.isfinite().all()) for part in x.split(_ROWS)):
        raise ValueError("x must be finite, got NaN or infinity")
    return _lloyd(_EUCLIDEAN if metric == "l2" else _SPHERE, x, k, iterations, seed)


def binary_kmeans(codes: Tensor, k: int, *, iterations: int = 25, seed: int = 0) -> Clusters:
    """Cluster bit codes around k center codes, each the majority of the codes nearest to it.

    :func:`kmeans` in Hamming space: the vote of the majority minimizes the sum of distances
    (Grana, Borghesani, Manfredi and Cucchiara, "A fast approach for integrating ORB descriptors in
    the bag of words model", 2013, where it is called k-majority). Nearest centers come from
    :func:`hamming_topk`.

    Parameters
    ----------
    codes : Tensor
        uint8 ``(N, bytes)``.
    k, iterations, seed
        As in :func:`kmeans`.

    Returns
    -------
    Clusters
        ``centers`` uint8 ``(k, bytes)``, where a bit is 0 if as many codes have it as don't;
        ``cost`` is the sum of Hamming distances. The rest as :func:`kmeans`.

    Raises
    ------
    TypeError
        If ``codes`` is no uint8 tensor.
    ValueError
        If ``codes`` is not 2-D or a number is out of range.
    """
    _op.check_tensor("codes", codes, ndim=2, dtypes=(torch.uint8,))
    _check_kmeans(len(codes), k, iterations)
    return _lloyd(_BITS, codes, k, iterations, seed)
