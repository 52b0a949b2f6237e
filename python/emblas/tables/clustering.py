"""k-means, for tables whose rows are chosen by clustering."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 2**22  # distances held at once


def nearest(points: Tensor, centroids: Tensor) -> Tensor:
    """Return the index of each point's nearest centroid, int64 ``(points,)``."""
    offset = centroids.square().sum(1)
    parts = [
        (offset - 2 * (part @ centroids.t())).argmin(1)
        for part in points.split(max(1, _BLOCK // len(centroids)))
    ]
    return torch.cat(parts)


def means(points: Tensor, assignment: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the mean of each cluster's points, zeros for an empty one, and the cluster sizes."""
    sizes = torch.bincount(assignment, minlength=count)
    sums = points.new_zeros(count, points.shape[1]).index_add(0, assignment, points)
    return sums / sizes.clamp(min=1)[:, None], sizes


@torch.no_grad()
def k_means(
    points: Tensor, count: int, *, iterations: int = 20, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Cluster points by Lloyd's algorithm.

    Starts from distinct random points. A cluster that runs empty takes the point that is farthest
    from its own centroid.

    Parameters
    ----------
    points : Tensor
        ``(points, dim)``, at least one.
    count : int
        Clusters. With fewer points than that, each is its own, and centroids of zeros follow.
    iterations : int, default 20
        At most; it stops when no point moves.
    seed : int, default 0
        Of the start.

    Returns
    -------
    centroids : Tensor
        ``(count, dim)``.
    assignment : Tensor
        int64 ``(points,)``: the nearest centroid of each.
    """
    if len(points) <= count:
        padding = points.new_zeros(count - len(points), points.shape[1])
        return torch.cat([points, padding]), torch.arange(len(points), device=points.device)
    generator = torch.Generator().manual_seed(seed)
    centroids = points[torch.randperm(len(points), generator=generator)[:count].to(points.device)]
    assignment = nearest(points, centroids)
    for _ in range(iterations):
        centroids, sizes = means(points, assignment, count)
        empty = (sizes == 0).nonzero()[:, 0]
        if len(empty):
            distance = (points - centroids[assignment]).square().sum(1)
            centroids[empty] = points[distance.topk(len(empty)).indices]
        before, assignment = assignment, nearest(points, centroids)
        if torch.equal(before, assignment):
            break
    return centroids, assignment
