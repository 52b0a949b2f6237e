"""Losses of pairs and triplets: embeddings against labels, one number per pair."""

from __future__ import annotations

import torch
from torch import Tensor

from emblas import _op
from emblas.losses import checks
from emblas.losses.blocks import by_blocks


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of each pair ``(n,)``, in float32 at least, under autocast too."""
    checks.vectors("a", a)
    checks.vectors("b", b, a, rows=a.shape[0])
    with checks.full_precision(a):
        return (checks.unit(a) * checks.unit(b)).sum(-1)


def _labelled(a: Tensor, b: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    cosines = _cosines(a, b)
    checks.values("labels", labels, a, (a.shape[0],))
    return cosines, labels.to(cosines.dtype)


def cosine_loss(a: Tensor, b: Tensor, labels: Tensor) -> Tensor:
    r"""Mean squared error of cosines: :math:`\frac1n \sum_i (\cos(a_i, b_i) - y_i)^2`.

    Parameters
    ----------
    a, b : Tensor
        Vectors ``(n, dim)`` of both sides of each pair.
    labels : Tensor
        Similarities ``(n,)``, usually from 0 or -1 to 1.

    Returns
    -------
    Tensor
        Scalar, in float32 (float64 for float64); 0 for no pairs.

    Notes
    -----
    Reimers and Gurevych 2019, arXiv 1908.10084 (section 3, regression objective).
    """
    cosines, labels = _labelled(a, b, labels)
    return checks.weighted_mean((cosines - labels).square())


def contrastive_loss(a: Tensor, b: Tensor, labels: Tensor, *, margin: float = 0.5) -> Tensor:
    r"""Pull pairs of label 1 together, push pairs of label 0 at least ``margin`` apart.

    :math:`\frac1{2n} \sum_i y_i D_i^2 + (1 - y_i) \max(0, m - D_i)^2` with the cosine distance
    :math:`D_i = 1 - \cos(a_i, b_i)`.

    Parameters
    ----------
    a, b : Tensor
        Vectors ``(n, dim)``.
    labels : Tensor
        ``(n,)``: 1 for pairs that belong together, 0 for others.
    margin : float, default 0.5
        :math:`m`.

    Returns
    -------
    Tensor
        Scalar; 0 for no pairs.

    Notes
    -----
    Hadsell, Chopra and LeCun 2006 (eq. 4), with cosine distances.
    """
    checks.positive("margin", margin)
    cosines, labels = _labelled(a, b, labels)
    distance = 1 - cosines
    apart = (margin - distance).clamp_min(0)
    losses = labels * distance.square() + (1 - labels) * apart.square()
    return checks.weighted_mean(losses) / 2


def triplet_loss(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    *,
    margin: float = 0.2,
    distance: str = "cosine",
) -> Tensor:
    r"""Mean of :math:`\max(0, D(a, p) - D(a, n) + m)`: positives nearer than negatives.

    Parameters
    ----------
    anchors, positives, negatives : Tensor
        Vectors ``(n, dim)``.
    margin : float, default 0.2
        :math:`m`.
    distance : {"cosine", "euclidean"}, default "cosine"
        ``1 - cos`` or the length of the difference (with slope 0 where it is 0).

    Returns
    -------
    Tensor
        Scalar; 0 for no triplets.

    Notes
    -----
    Schroff et al. 2015, arXiv 1503.03832 (eq. 2, which squares the Euclidean distance); Reimers and
    Gurevych 2019, arXiv 1908.10084 (section 3).
    """
    _op.check_choice("distance", distance, ("cosine", "euclidean"))
    checks.positive("margin", margin)
    checks.vectors("anchors", anchors)
    for name, x in (("positives", positives), ("negatives", negatives)):
        checks.vectors(name, x, anchors, rows=anchors.shape[0])
    dtype = checks.accumulator(anchors)
    with checks.full_precision(anchors):
        if distance == "cosine":
            a, p, n = (checks.unit(x) for x in (anchors, positives, negatives))
            gap = (a * (n - p)).sum(-1)
        else:
            a, p, n = (x.to(dtype) for x in (anchors, positives, negatives))
            gap = (a - p).norm(dim=-1) - (a - n).norm(dim=-1)
        return checks.weighted_mean((gap + margin).clamp_min(0))


def pearson_loss(a: Tensor, b: Tensor, labels: Tensor) -> Tensor:
    r"""One minus the Pearson correlation of cosines and labels.

    Parameters
    ----------
    a, b : Tensor
        Vectors ``(n, dim)``.
    labels : Tensor
        ``(n,)``, on any scale.

    Returns
    -------
    Tensor
        Scalar from 0 to 2; 0 with a zero gradient where cosines or labels are all equal, since
        then there is nothing to learn.

    Notes
    -----
    Zhang et al. 2025, arXiv 2508.11442 (CoDiEmb).
    """
    cosines, labels = _labelled(a, b, labels)
    if not len(cosines):
        return cosines.sum()
    x, y = cosines - cosines.mean(), labels - labels.mean()
    scale = x.square().sum() * y.square().sum()
    # Rounding makes the variance of equal numbers tiny, not zero.
    flat = scale <= (len(x) * torch.finfo(x.dtype).eps) ** 2 * labels.square().sum()
    return torch.where(flat, 0, 1 - (x * y).sum() * torch.where(flat, 1, scale).rsqrt())


def cosent_loss(
    a: Tensor, b: Tensor, labels: Tensor, *, temperature: float = 0.05, weighted: bool = False
) -> Tensor:
    r"""Cosines in the order of their labels, over all pairs of pairs.

    :math:`\log (1 + \sum_{y_i > y_j} w_{ij} e^{(c_j - c_i) / \tau})`, ``c`` the cosines.

    Parameters
    ----------
    a, b : Tensor
        Vectors ``(n, dim)``.
    labels : Tensor
        ``(n,)``; only their order matters, unless ``weighted``.
    temperature : float, default 0.05
        :math:`\tau`.
    weighted : bool, default False
        :math:`w_{ij} = (y_i - y_j)` over its mean, at most 5 (CoDiEmb), in place of 1.

    Returns
    -------
    Tensor
        Scalar; 0 if no two labels differ. Time is ``n x n``, memory linear.

    Notes
    -----
    Huang et al. 2024, CoSENT, IEEE/ACM TASLP 32; Zhang et al. 2025, arXiv 2508.11442.
    """
    checks.positive("temperature", temperature)
    cosines, labels = _labelled(a, b, labels)
    n, mean = len(cosines), None
    if weighted:
        total, pairs = torch.stack(by_blocks(_gaps, n, n, labels)).sum(0)
        mean = torch.where(total == 0, 1, total / pairs.clamp_min(1))
    terms = by_blocks(_misordered, n, n, cosines / temperature, labels, mean)
    return torch.stack([cosines.new_zeros(()), *terms]).logsumexp(0)


def _gaps(begin: int, end: int, labels: Tensor) -> Tensor:
    """Sum of the differences of ordered pairs, and their number."""
    gap = labels[begin:end, None] - labels
    return torch.stack([gap.clamp_min(0).sum(), (gap > 0).sum().to(gap.dtype)])


def _misordered(
    begin: int, end: int, scores: Tensor, labels: Tensor, mean: Tensor | None
) -> Tensor:
    """Log-sum-exp of the differences of scores over ordered pairs."""
    gap = labels[begin:end, None] - labels
    ordered = gap > 0
    terms = scores - scores[begin:end, None]
    if mean is not None:
        terms = terms + torch.where(ordered, (gap / mean).clamp(max=5), 1).log()
    # Finite, so that a block without an ordered pair has a gradient, of 0.
    absent = torch.finfo(terms.dtype).min / 4
    return terms.masked_fill(~ordered, absent).flatten().logsumexp(0)


def rank_kl_loss(a: Tensor, b: Tensor, labels: Tensor, *, temperature: float = 0.05) -> Tensor:
    r"""Divergence of the batch's cosines from the ranks of its labels.

    :math:`\mathrm{KL}(\mathrm{softmax}(r / \tau) \,\|\, \mathrm{softmax}(c / \tau))`, where ``r``
    are the ranks of the labels, from 0 (lowest) to 1, ties sharing their mean rank, as in
    Spearman's correlation.

    Parameters
    ----------
    a, b : Tensor
        Vectors ``(n, dim)``.
    labels : Tensor
        ``(n,)``; only their order matters.
    temperature : float, default 0.05
        :math:`\tau`.

    Returns
    -------
    Tensor
        Scalar; 0 for no pairs.

    Notes
    -----
    Zhang et al. 2025, arXiv 2508.11442 (CoDiEmb). Their code divides by the number of pairs as
    well; this is the divergence itself.
    """
    checks.positive("temperature", temperature)
    cosines, labels = _labelled(a, b, labels)
    n = len(cosines)
    if not n:
        return cosines.sum()
    ordered = labels.detach().sort().values
    below, up_to = (torch.searchsorted(ordered, labels, right=right) for right in (False, True))
    ranks = ((below + up_to - 1) / 2).to(cosines.dtype) / max(n - 1, 1)
    expected = (ranks / temperature).log_softmax(0)
    actual = (cosines / temperature).log_softmax(0)
    return (expected.exp() * (expected - actual)).sum()


def preference_loss(a: Tensor, b: Tensor, labels: Tensor, *, temperature: float = 0.05) -> Tensor:
    r"""Each pair in its turn against all pairs of a lower label, weighted by the difference.

    Mean over the ``k`` that have a lower one of :math:`-\log \frac{e^{w_k c_k/\tau}}{e^{w_k
    c_k/\tau} + \sum_{y_j < y_k} e^{(y_k - y_j) c_j/\tau}}` with
    :math:`w_k = \max_j (y_k - y_j)`.

    Parameters
    ----------
    a, b : Tensor
        Vectors ``(n, dim)``.
    labels : Tensor
        ``(n,)``; their differences weigh.
    temperature : float, default 0.05
        :math:`\tau`.

    Returns
    -------
    Tensor
        Scalar; 0 if no two labels differ. Time is ``n x n``, memory linear.

    Notes
    -----
    Song et al. 2023, arXiv 2306.17492 (PRO), with the weights by label of CoDiEmb, arXiv
    2508.11442.
    """
    checks.positive("temperature", temperature)
    cosines, labels = _labelled(a, b, labels)
    if not len(cosines):
        return cosines.sum()
    n = len(cosines)
    losses, counted = torch.cat(by_blocks(_preferred, n, n, cosines / temperature, labels), 1)
    return checks.weighted_mean(losses, counted)


def _preferred(begin: int, end: int, scores: Tensor, labels: Tensor) -> Tensor:
    """Loss of each pair, and 1 where it has a pair of a lower label."""
    gap = labels[begin:end, None] - labels
    ordered = gap > 0
    terms = torch.where(ordered, gap * scores, -torch.inf)
    own = gap.amax(1).clamp_min(0) * scores[begin:end]
    losses = torch.cat([own[:, None], terms], 1).logsumexp(1) - own
    return torch.stack([losses, ordered.any(1).to(losses.dtype)])
