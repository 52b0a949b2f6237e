"""Cosines corrected for hubs, vectors that are near to everything."""

from __future__ import annotations

import torch
from torch import Tensor

from emblas import _op
from emblas.binary.dense import _check_vectors, best_candidates, dense_topk
from emblas.binary.search import _check_at_least

_ROWS = 1 << 14  # of the documents that are copied at a time


def _mean_of_nearest(x: Tensor, others: Tensor, neighbors: int) -> Tensor:
    """Mean cosine ``(rows,)`` of each vector with its nearest of the others; 0 without others."""
    if len(others) == 0:
        return torch.zeros(len(x), device=x.device)
    count = min(neighbors, len(others))
    # As queries, the rows take float32, whatever the documents are stored in.
    return dense_topk(x, others, count, metric="cosine")[0].mean(1)


def csls_topk(
    queries: Tensor,
    documents: Tensor,
    k: int,
    *,
    neighbors: int = 10,
    reference: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Find the documents of highest CSLS score with each query, exactly.

    Cross-domain similarity local scaling (Conneau et al. 2018, arXiv 1710.04087, section 2.3):
    ``2 cos(q, d) - r(q) - r(d)``, where r is the mean cosine with the ``neighbors`` nearest
    vectors of the other set. A document that is near to many queries must be nearer still.

    Parameters
    ----------
    queries, documents
        As in :func:`dense_topk`.
    k : int
        Number of results per query, at least 1.
    neighbors : int, default 10
        Vectors that r is a mean of, at least 1; fewer where a set is smaller.
    reference : Tensor, optional
        ``(M, dim)`` floating-point: what ``r(d)`` is taken from, such as a sample of queries seen
        before. By default the queries of this call, whose scores then depend on each other.

    Returns
    -------
    scores : Tensor
        float32 ``(Q, k)``, descending.
    ids : Tensor
        int64 ``(Q, k)``, ascending among equal scores; -1 and -inf beyond the last document.

    Raises
    ------
    TypeError
        If an argument has a wrong type.
    ValueError
        If shapes or devices don't fit together, a number is out of range, or a query, a document or
        a reference is not finite.

    Notes
    -----
    Three passes: documents against the reference, queries against the documents twice. Documents
    are copied 16,384 rows at a time, with ``-r(d)`` as one dimension more; no matrix of scores is
    written. :func:`emblas.evaluation.csls` gives the matrix, in float64.
    """
    unit = _check_vectors(queries, documents, "cosine")
    _check_at_least("k", k, 1)
    _check_at_least("neighbors", neighbors, 1)
    if reference is None:
        reference = queries
    _op.check_tensor("reference", reference, ndim=2, dtypes=_op.FLOATS, device=queries.device)
    if reference.shape[1] != documents.shape[1]:
        raise ValueError(
            f"reference must have {documents.shape[1]} dimensions, got {reference.shape[1]}"
        )
    for name, vectors in (("documents", documents), ("reference", reference)):
        if not all(bool(part.isfinite().all()) for part in vectors.split(_ROWS)):
            raise ValueError(f"{name} must be finite, got NaN or infinity")
    reference = reference.float()
    own = _mean_of_nearest(unit, documents, neighbors)
    doubled = torch.cat((2 * unit, -torch.ones_like(own)[:, None]), 1)
    scores = [unit.new_empty(len(unit), 0)]
    ids = [torch.empty(len(unit), 0, dtype=torch.int64, device=unit.device)]
    for start, part in zip(range(0, len(documents), _ROWS), documents.split(_ROWS), strict=False):
        rows = torch.nn.functional.normalize(part.float(), dim=1)
        hubness = _mean_of_nearest(rows, reference, neighbors)
        found, local = dense_topk(doubled, torch.cat((rows, hubness[:, None]), 1), k)
        scores.append(found)
        ids.append(torch.where(local < 0, -1, local + start))
    best, best_ids = best_candidates(torch.cat(scores, 1), torch.cat(ids, 1), k)
    return best - own[:, None], best_ids
