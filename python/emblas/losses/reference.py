"""The specification of the chunked operators in plain torch, with the whole score matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from emblas.losses.checks import accumulator, unit


def info_nce_scores(
    queries: Tensor,
    documents: Tensor,
    negatives: Tensor | None,
    scale: Tensor,
    targets: Tensor,
    query_ids: Tensor | None,
    document_ids: Tensor | None,
    mask: Tensor | None,
    margin: Tensor | None,
    guide_queries: Tensor | None,
    guide_documents: Tensor | None,
    guide_margin: Tensor | None,
    cosine: bool,
    both: bool,
    rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of the positives and log-sum-exp over the negatives; formulas in ``op.py``."""
    dtype = accumulator(queries, documents)
    q, d = (unit(x.to(dtype)) if cosine else x.to(dtype) for x in (queries, documents))
    scores = scale * (q @ d.t())
    valid = targets >= 0
    positives = scores.gather(1, targets.clamp_min(0))
    known = positives.detach().masked_fill(~valid, -torch.inf)
    left_out = torch.zeros_like(scores, dtype=torch.bool)
    if query_ids is not None and document_ids is not None:
        left_out = left_out | (query_ids[:, None] == document_ids)
    if mask is not None:
        left_out = left_out | ~mask
    limit = None
    if margin is not None:
        limit = known.amax(1, keepdim=True) + margin * scale
        limit = torch.where(valid.any(1, keepdim=True), limit, torch.inf)
        left_out = left_out | (scores > limit)
    if guide_queries is not None:
        assert guide_documents is not None
        assert guide_margin is not None
        guide = guide_queries @ guide_documents.t()
        best = guide.gather(1, targets.clamp_min(0)).masked_fill(~valid, -torch.inf)
        best = torch.where(valid.any(1, keepdim=True), best.amax(1, keepdim=True), torch.inf)
        left_out = left_out | (guide > best - guide_margin)
    is_positive = torch.zeros_like(left_out).int()
    is_positive = is_positive.scatter_add(1, targets.clamp_min(0), valid.int()) > 0
    scores = scores.masked_fill(left_out | is_positive, -torch.inf)
    columns = _logsumexp(scores, 0) if both else scores.new_empty(0)
    if negatives is not None:
        own = scale * (
            (unit(negatives.to(dtype)) if cosine else negatives.to(dtype)) * q[:, None]
        ).sum(-1)
        if limit is not None:
            own = own.masked_fill(own > limit, -torch.inf)
        scores = torch.cat([scores, own], 1)
    return positives, _logsumexp(scores, 1), columns


def _logsumexp(scores: Tensor, dim: int) -> Tensor:
    """Log-sum-exp that is -inf with a zero gradient where nothing is left."""
    if not scores.shape[dim]:
        return scores.new_full((scores.shape[1 - dim],), -torch.inf)
    empty = (scores == -torch.inf).all(dim)
    total = scores.masked_fill(empty.unsqueeze(dim), 0).logsumexp(dim)
    return total.masked_fill(empty, -torch.inf)
