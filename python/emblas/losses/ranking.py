"""Losses of ranked lists: the scores of a query's candidates against their relevance."""

from __future__ import annotations

import torch
from torch import Tensor

from emblas import _op
from emblas.losses import checks
from emblas.losses.blocks import by_blocks

METHODS = ("ranknet", "listmle", "listnet")


def listwise_rank(
    scores: Tensor,
    relevance: Tensor,
    method: str = "ranknet",
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    r"""Train scores to order lists of candidates.

    With :math:`s` the scores of one list over ``temperature`` and :math:`y` its relevance:

    - ``ranknet``: mean over the pairs :math:`y_i > y_j` of :math:`\log(1 + e^{s_j - s_i})`;
    - ``listmle``: :math:`-\log` of the probability of the order by falling relevance,
      :math:`\sum_k \left( \log \sum_{l \ge k} e^{s_{\pi(l)}} - s_{\pi(k)} \right)`; ties keep the
      order in which they are given;
    - ``listnet``: cross-entropy :math:`-\sum_k \mathrm{softmax}(y)_k \log \mathrm{softmax}(s)_k`.

    Parameters
    ----------
    scores : Tensor
        ``(n, k)``: ``k`` candidates of each of ``n`` queries.
    relevance : Tensor
        ``(n, k)``, larger is better: labels, a teacher's scores, or negative ranks.
    method : {"ranknet", "listmle", "listnet"}, default "ranknet"
        The loss.
    mask : Tensor, optional
        bool ``(n, k)``: where False, there is no candidate.
    temperature : float, default 1
        Divides the scores.

    Returns
    -------
    Tensor
        Scalar, in float32 (float64 for float64): the mean over the lists that have anything to
        order (a pair of different relevance for ``ranknet``, a candidate for the others), 0 if
        there is none.

    Raises
    ------
    TypeError, ValueError
        If arguments don't fit together, or scores or relevance hold NaN or infinity.

    Notes
    -----
    Burges et al. 2005 (RankNet); Xia et al. 2008 (ListMLE); Cao et al. 2007 (ListNet). E2Rank and
    PE-Rank (arXiv 2406.14848) train embeddings as rerankers so.
    """
    _op.check_choice("method", method, METHODS)
    _op.check_tensor("scores", scores, ndim=2, dtypes=_op.FLOATS)
    checks.finite("scores", scores)
    checks.values("relevance", relevance, scores, tuple(scores.shape))
    checks.positive("temperature", temperature)
    if mask is None:
        mask = torch.ones_like(scores, dtype=torch.bool)
    else:
        _op.check_tensor("mask", mask, dtypes=(torch.bool,))
        checks.values("mask", mask, scores, tuple(scores.shape))
    with checks.full_precision(scores):
        s = scores.to(checks.accumulator(scores)) / temperature
        y = relevance.to(s.dtype)
        losses, counted = _METHODS[method](s, y, mask)
        return checks.weighted_mean(losses, counted)


def _ranknet(s: Tensor, y: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    n, k = s.shape
    parts = by_blocks(_better, n * k, k, s, y, mask)
    losses, count = torch.cat(parts, 1).view(2, n, k).sum(2)
    return losses / count.clamp_min(1), count > 0


def _better(begin: int, end: int, s: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """Losses of candidates ``begin`` to ``end`` (of n k) against worse ones, and their number."""
    lists = torch.arange(begin, end, device=s.device) // max(s.shape[1], 1)
    own, label, there = (x.flatten()[begin:end, None] for x in (s, y, mask))
    worse = (label > y[lists]) & there & mask[lists]
    losses = torch.where(worse, torch.nn.functional.softplus(s[lists] - own), 0).sum(1)
    return torch.stack([losses, worse.sum(1).to(s.dtype)])


def _listmle(s: Tensor, y: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    order = y.masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
    s, mask = s.gather(1, order), mask.gather(1, order)
    # What isn't there comes last, and counts as nothing in the sums: finite, so that the gradient
    # of the cumulative sum has no inf - inf.
    absent = torch.finfo(s.dtype).min / 4
    rest = s.masked_fill(~mask, absent).flip(1).logcumsumexp(1).flip(1)
    return torch.where(mask, rest - s, 0).sum(1), mask.any(1)


def _listnet(s: Tensor, y: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    absent = torch.finfo(s.dtype).min / 4
    expected = y.masked_fill(~mask, absent).softmax(1)
    actual = s.masked_fill(~mask, absent).log_softmax(1)
    return torch.where(mask, -expected * actual, 0).sum(1), mask.any(1)


_METHODS = {"ranknet": _ranknet, "listmle": _listmle, "listnet": _listnet}
