"""Losses that make a student's embeddings say what a teacher's say."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from emblas import _op
from emblas.losses import checks
from emblas.losses.blocks import by_blocks

METHODS = ("cosine", "euclidean", "similarity", "relative", "anchor")


def distill(
    student: Tensor,
    teacher: Tensor,
    method: str = "cosine",
    *,
    anchors: tuple[Tensor, Tensor] | None = None,
    temperature: float | None = None,
    margin: float = 0.015,
    similarity: str = "cosine",
) -> Tensor:
    r"""Distance between the embeddings of a student and a teacher of the same texts.

    With :math:`S_{ij} = \cos(s_i, s_j)` and :math:`T_{ij} = \cos(t_i, t_j)`:

    - ``cosine``: mean of :math:`1 - \cos(s_i, t_i)`, for equal dimensions;
    - ``euclidean``: mean of :math:`\|s_i - t_i\|^2`, for equal dimensions: lengths count as well,
      so that documents by the teacher can be searched with queries by the student;
    - ``similarity``: mean of :math:`(S_{ij} - T_{ij})^2` over :math:`i \neq j`;
    - ``relative``: mean of :math:`\max(0, S_{ik} - S_{ij} + m)` over :math:`T_{ij} > T_{ik}` with
      different ``i``, ``j``, ``k``: what the teacher finds more alike, the student shall too;
    - ``anchor``: as ``similarity``, but with :math:`S_{ij} = \cos(s_i, a_j)` and
      :math:`T_{ij} = \cos(t_i, b_j)` for ``anchors`` ``(a, b)``: where a text lies among others
      that are fixed.

    With a ``temperature``, ``similarity`` and ``anchor`` compare rows as distributions instead, the
    mean of :math:`\mathrm{KL}(\mathrm{softmax}_j (T_{ij} / \tau) \,\|\, \mathrm{softmax}_j
    (S_{ij} / \tau))`.

    Parameters
    ----------
    student : Tensor
        ``(n, dim)``.
    teacher : Tensor
        ``(n, teacher_dim)``. It receives no gradient.
    method : {"cosine", "euclidean", "similarity", "relative", "anchor"}, default "cosine"
        What is compared.
    anchors : tuple of Tensor, optional
        For ``anchor``: ``(k, dim)`` by the student, which may require grad, and
        ``(k, teacher_dim)`` by the teacher.
    temperature : float, optional
        :math:`\tau`, for ``similarity`` and ``anchor``.
    margin : float, default 0.015
        :math:`m`, for ``relative``.
    similarity : {"cosine", "dot"}, default "cosine"
        What stands in place of :math:`\cos`; not for the methods ``cosine`` and ``euclidean``.

    Returns
    -------
    Tensor
        Scalar, in float32 (float64 for float64); 0 where there is nothing to compare.

    Raises
    ------
    TypeError, ValueError
        If arguments don't fit together, or a vector holds NaN or infinity.

    Notes
    -----
    Similarities are taken by blocks of rows and computed again for the gradient: memory is linear
    in ``n``. The time of ``relative`` is ``n^3``.

    ``cosine``, ``similarity`` and ``relative`` follow Zhang et al. 2024, arXiv 2412.19048 (Jasper,
    eq. 1 to 3), whose third compares any two pairs of a batch, this one pairs with a common text.
    ``euclidean`` is the alignment objective of HARNESS-LM (arXiv 2605.23572) and, of unit vectors,
    of LEAF (arXiv 2509.12539); D2S-VSE (arXiv 2503.14953) uses ``cosine`` or ``euclidean``.
    ``similarity`` with a temperature is the contrastive distillation of KaLM-Embedding-V2.5, arXiv
    2506.20923.

    ``anchor`` with the centroids of the teacher's embeddings and points of the student's space that
    are trained along is how this library reads "consistent geometry around semantic anchors" of
    ECR, arXiv 2601.00543: of the paper its abstract was at hand, and it gives no formula.

    With the rows of both models' vocabularies as ``anchors``, ``similarity="dot"`` and a
    ``temperature``, ``anchor`` is the divergence of their distributions over the next token,
    without logits of ``n x vocabulary``.
    """
    _op.check_choice("method", method, METHODS)
    _op.check_choice("similarity", similarity, ("cosine", "dot"))
    if method in ("cosine", "euclidean") and similarity != "cosine":
        raise ValueError(f"similarity has no meaning for method {method!r}, got {similarity!r}")
    checks.vectors("student", student)
    n = student.shape[0]
    if teacher is student:
        raise ValueError("teacher must be another tensor than student, got the same one")
    checks.vectors("teacher", teacher, ndim=2, rows=n)
    _op.check_tensor("teacher", teacher, device=student.device)
    if (method == "anchor") != (anchors is not None):
        raise ValueError(f"anchors belong to method 'anchor', got {method!r}")
    if temperature is not None:
        checks.positive("temperature", temperature)
        if method not in ("similarity", "anchor"):
            raise ValueError(f"temperature has no meaning for method {method!r}, got {temperature}")
    with checks.full_precision(student):
        as_they_are = method == "euclidean" or similarity == "dot"
        scaled = checks.wide if as_they_are else checks.unit
        s, t = scaled(student), scaled(teacher.detach())
        t = t.to(s.dtype)
        if method in ("cosine", "euclidean"):
            checks.vectors("teacher", teacher, student)
            cosine = method == "cosine"
            return checks.weighted_mean(1 - (s * t).sum(-1) if cosine else (s - t).square().sum(-1))
        if anchors is None:
            own, others = s, t
        else:
            checks.vectors("anchors[0]", anchors[0], student)
            checks.vectors("anchors[1]", anchors[1], teacher, rows=anchors[0].shape[0])
            own, others = (scaled(x).to(s.dtype) for x in (anchors[0], anchors[1].detach()))
        k = own.shape[0]
        same = anchors is None  # leave out what compares a text with itself
        if method == "relative":
            total = torch.stack(by_blocks(_relative, n * n, n, s, t, margin)).sum(0)
            return total[0] / total[1].clamp_min(1)
        parts = by_blocks(_difference, n, k, s, t, own, others, same, temperature)
        pairs = n * (k - 1 if same else k) if temperature is None else n
        return torch.stack(parts).sum() / max(pairs, 1)


def _difference(
    begin: int,
    end: int,
    student: Tensor,
    teacher: Tensor,
    own: Tensor,
    others: Tensor,
    same: bool,
    temperature: float | None,
) -> Tensor:
    s, t = student[begin:end] @ own.t(), teacher[begin:end] @ others.t()
    rows = torch.arange(begin, end, device=s.device)[:, None]
    itself = (rows == torch.arange(own.shape[0], device=s.device)) & same
    if temperature is None:
        return torch.where(itself, 0, s - t).square().sum()
    absent = torch.finfo(s.dtype).min / 4
    actual = (s / temperature).masked_fill(itself, absent).log_softmax(1)
    expected = (t / temperature).masked_fill(itself, absent).log_softmax(1)
    return torch.where(itself, 0, expected.exp() * (expected - actual)).sum()


def _relative(begin: int, end: int, student: Tensor, teacher: Tensor, margin: float) -> Tensor:
    """Sum over the triplets of the pairs ``begin`` to ``end`` (of n x n), and their number."""
    n = student.shape[0]
    pairs = torch.arange(begin, end, device=student.device)
    i, j = pairs // max(n, 1), pairs % max(n, 1)
    texts = slice(begin // max(n, 1), (end - 1) // max(n, 1) + 1)
    s, t = student[texts] @ student.t(), teacher[texts] @ teacher.t()
    row = i - texts.start
    others = i[:, None] != torch.arange(n, device=s.device)
    ordered = (t[row, j][:, None] > t[row]) & others & (i != j)[:, None]
    hinge = (s[row] - s[row, j][:, None] + margin).clamp_min(0)
    return torch.stack([torch.where(ordered, hinge, 0).sum(), ordered.sum().to(s.dtype)])


def self_distill(
    scores: Sequence[Tensor],
    *,
    teacher_weights: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
    temperature: float = 1.0,
) -> Tensor:
    r"""Train several scores of one model by their own weighted sum (M3 self-distillation).

    :math:`\frac1K \sum_k \lambda_k \cdot -\sum_j \mathrm{softmax}(\bar s / \tau)_j \log
    \mathrm{softmax}(s_k / \tau)_j` with the teacher :math:`\bar s = \sum_k w_k s_k`, which receives
    no gradient; mean over queries.

    Parameters
    ----------
    scores : sequence of Tensor
        ``K`` tensors ``(n, m)``: dense, lexical, multi-vector, ... scores of each query's
        candidates.
    teacher_weights : sequence of float, optional
        :math:`w_k`; default 1. (The paper: dense 1, lexical 0.3, multi-vector 1.)
    weights : sequence of float, optional
        :math:`\lambda_k`; default 1. (The paper: 1, 0.1, 1.)
    temperature : float, default 1
        :math:`\tau`.

    Returns
    -------
    Tensor
        Scalar, in float32 (float64 for float64); 0 for no queries.

    Notes
    -----
    Chen et al. 2024, arXiv 2402.03216 (section 3.3). The paper adds this to the InfoNCE losses of
    the scores and of their sum.
    """
    checks.positive("temperature", temperature)
    if not scores:
        raise ValueError("scores must hold at least one tensor, got none")
    for k, x in enumerate(scores):
        _op.check_tensor(f"scores[{k}]", x, ndim=2, dtypes=_op.FLOATS, device=scores[0].device)
        checks.values(f"scores[{k}]", x, scores[0], tuple(scores[0].shape))
    for name, given in (("teacher_weights", teacher_weights), ("weights", weights)):
        if given is not None and len(given) != len(scores):
            raise ValueError(f"{name} must have {len(scores)} values, got {len(given)}")
    ones = [1.0] * len(scores)
    with checks.full_precision(scores[0]):
        s = torch.stack([x.to(checks.accumulator(*scores)) for x in scores]) / temperature
        teacher = torch.tensordot(s.new_tensor(teacher_weights or ones), s.detach(), 1).softmax(-1)
        losses = -(teacher * s.log_softmax(-1)).sum(-1)  # (K, n)
        share = s.new_tensor(weights or ones)[:, None]
        return checks.weighted_mean(losses * share)
