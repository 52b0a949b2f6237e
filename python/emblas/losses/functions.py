"""Contrastive losses over a batch: InfoNCE in linear memory, and what goes with it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from emblas import _op
from emblas.losses import checks, op

POSITIVES = ("each", "mean", "sum")
SIMILARITIES = ("cosine", "dot")


def info_nce(
    queries: Tensor,
    documents: Tensor,
    *,
    temperature: float | Tensor = 0.05,
    targets: Tensor | None = None,
    negatives: Tensor | None = None,
    positives: str = "each",
    query_ids: Tensor | None = None,
    document_ids: Tensor | None = None,
    mask: Tensor | None = None,
    margin: float | None = None,
    guide: tuple[Tensor, Tensor] | None = None,
    guide_margin: float = 0.0,
    symmetric: bool = False,
    similarity: str = "cosine",
    weights: Tensor | None = None,
    focal: float = 0.0,
    reduction: str = "mean",
    chunk_size: int | None = None,
) -> Tensor:
    r"""Contrastive cross-entropy of queries against documents, without the score matrix.

    With :math:`s_{ij} = \mathrm{sim}(q_i, d_j) / \tau`, positives :math:`P(i)` and the negatives
    :math:`N(i)` (all other documents that are not left out, and the query's own ``negatives``), one
    query's loss is by ``positives``

    - ``each``: :math:`\frac{1}{|P|} \sum_{p \in P} -\log \frac{e^{s_{ip}}}{e^{s_{ip}} +
      \sum_{j \in N} e^{s_{ij}}}`: every positive against the negatives alone (CoDiEmb);
    - ``mean``: :math:`\frac{1}{|P|} \sum_{p \in P} -\log \frac{e^{s_{ip}}}{\sum_{j \in P \cup N}
      e^{s_{ij}}}` (supervised contrastive loss, "out");
    - ``sum``: :math:`-\log \frac{\sum_{p \in P} e^{s_{ip}}}{\sum_{j \in P \cup N} e^{s_{ij}}}`
      (MIL-NCE).

    With a single positive all three are the usual loss. Queries without a positive take no part
    (but stay negatives of the documents in the other direction).

    Parameters
    ----------
    queries : Tensor
        ``(n, dim)``, float32, float64, bfloat16 or float16. Scores and sums are kept in float32
        (float64 for float64), under autocast too.
    documents : Tensor
        ``(m, dim)``, at least one: positives and negatives of all queries. To let queries be
        negatives of each other, append them to the documents and name who is who by the ids.
    temperature : float or Tensor, default 0.05
        :math:`\tau`. A tensor of one element may require grad.
    targets : Tensor, optional
        int64 ``(n,)`` or ``(n, p)``: different rows of ``documents`` that are positives of each
        query, -1 where there is none. Default: document ``i`` is the positive of query ``i``, which
        needs ``m >= n``.
    negatives : Tensor, optional
        ``(n, k, dim)``: hard negatives that only their own query sees. (Those that all queries
        shall see belong at the end of ``documents``.)
    positives : {"each", "mean", "sum"}, default "each"
        How several positives of a query are combined.
    query_ids, document_ids : Tensor, optional
        Integers ``(n,)`` and ``(m,)``. A document with the id of a query is not its negative.
    mask : Tensor, optional
        bool ``(n, m)``: where False, the document is not a negative of the query.
    margin : float, optional
        A negative whose similarity exceeds that of the query's best positive by more than this is
        taken for a false negative and left out (Qwen3-Embedding: 0.1).
    guide : tuple of Tensor, optional
        Vectors ``(n, guide_dim)`` and ``(m, guide_dim)`` of queries and documents by another
        model. Documents that it finds more similar to the query than the query's best positive are
        not negatives (GISTEmbed).
    guide_margin : float, default 0
        How much less similar than that they may be and still be left out.
    symmetric : bool, default False
        Mean of this loss and the same from documents to queries, over the documents that are a
        positive of some query (CLIP). Own ``negatives`` take part in the first only.
    similarity : {"cosine", "dot"}, default "cosine"
        The vector 0 has cosine 0 with everything and receives no gradient.
    weights : Tensor, optional
        Weight of each query ``(n,)``, not negative; from documents to queries, a document has the
        mean weight of its queries.
    focal : float, default 0
        :math:`\gamma` in :math:`(1 - e^{-l})^\gamma\, l`, which takes weight from losses ``l`` that
        are small already (focal loss; KaLM-Embedding-V2 uses such weights).
    reduction : {"mean", "sum", "none"}, default "mean"
        The weighted mean (0 if there is nothing to take it of), the weighted sum, or
        the weighted losses ``(n,)`` of the queries, not with ``symmetric``.
    chunk_size : int, optional
        Queries at a time. The default keeps a block of scores near 8 MiB and above 128 rows.

    Returns
    -------
    Tensor
        Scalar, or ``(n,)`` for "none", in float32 (float64 for float64).

    Raises
    ------
    TypeError
        If an argument has the wrong type or dtype.
    ValueError
        If shapes, devices or settings don't fit together, if targets are out of range, or if a
        vector holds NaN or infinity, or a weight is negative (seen on the CPU in eager mode; on a
        GPU under ``EMBLAS_DEBUG=1``).
    RuntimeError
        In the backward pass of a gradient (``create_graph=True``): there is no second derivative.

    Notes
    -----
    Extra memory is two blocks of ``chunk_size x m`` scores and the gradients themselves. A scalar
    in one direction takes three matrix products, its gradients being computed in the forward pass;
    everything else, and compiled code, takes four. Formulas stand in ``losses/op.py``. Gradients
    of 16-bit vectors are float32 until the loss' own gradient, such as the factor of a GradScaler,
    is multiplied in. They are first order (of second order under ``use_backend("reference")``,
    with the score matrix); ``torch.func`` is not supported.

    With the rows of a vocabulary's output layer as documents, ``similarity="dot"``,
    ``temperature=1`` and ``positives="mean"``, this is the cross-entropy of a bag of words
    (``targets``: the token ids of each text), without logits of ``n x vocabulary``; with weights
    for the words: :func:`emblas.losses.token_log_probs`.

    References
    ----------
    van den Oord et al. 2018, arXiv 1807.03748 (eq. 4); Khosla et al. 2020, arXiv 2004.11362
    (eq. 2); Miech et al. 2020, arXiv 1912.06430; Radford et al. 2021, arXiv 2103.00020;
    Solatorio 2024, arXiv 2402.16829; Zhang et al. 2025, arXiv 2506.05176; Lin et al. 2017,
    arXiv 1708.02002; Zhao et al. 2025, arXiv 2506.20923; Zhang et al. 2025, arXiv 2508.11442.

    Examples
    --------
    >>> x = torch.eye(3)
    >>> info_nce(x, x, temperature=1.0)
    tensor(0.5514)
    """
    _op.check_choice("positives", positives, POSITIVES)
    _op.check_choice("similarity", similarity, SIMILARITIES)
    _op.check_choice("reduction", reduction, checks.REDUCTIONS)
    if symmetric and reduction == "none":
        raise ValueError("reduction must be 'mean' or 'sum' with symmetric=True, got 'none'")
    if not focal >= 0:
        raise ValueError(f"focal must not be negative, got {focal}")
    problem = _problem(
        queries, documents, temperature, targets, negatives, query_ids, document_ids, mask, margin,
        guide, guide_margin, similarity == "cosine", symmetric, chunk_size,
    )  # fmt: skip
    n = queries.shape[0]
    valid = problem.targets >= 0
    share = valid.any(1).to(checks.accumulator(queries, documents))
    if weights is not None:
        share = share * checks.not_negative("weights", weights, queries, (n,)).to(share.dtype)
    if reduction == "mean":
        total = share.sum()
        share = share / torch.where(total == 0, 1, total)
    differentiable = _op.needs_grad(queries, documents, negatives, problem.scale)
    plain = share.requires_grad or _op.use_reference() or torch.compiler.is_compiling()
    if reduction != "none" and not symmetric and differentiable and not plain:
        return op.fused(problem, partial(_block_loss, problem.targets, share, positives, focal))
    known, lse, column_lse = op.scores(problem)
    losses = _focal(_query_losses(known, lse, valid, positives), focal)
    if reduction == "none":
        return share * losses
    loss = (share * losses).sum()
    if symmetric:
        index, _ = op.slots(problem.targets)
        columns, weight = _document_losses(known, column_lse, index, valid, positives, weights)
        if reduction == "mean":
            total = weight.sum()
            weight = weight / torch.where(total == 0, 1, total)
        loss = (loss + (weight * _focal(columns, focal)).sum()) / 2
    return loss


def _problem(
    queries: Tensor,
    documents: Tensor,
    temperature: float | Tensor,
    targets: Tensor | None,
    negatives: Tensor | None,
    query_ids: Tensor | None,
    document_ids: Tensor | None,
    mask: Tensor | None,
    margin: float | None,
    guide: tuple[Tensor, Tensor] | None,
    guide_margin: float,
    cosine: bool,
    symmetric: bool,
    chunk_size: int | None,
) -> op.Problem:
    """Check the arguments of :func:`info_nce` by name."""
    checks.vectors("queries", queries)
    checks.vectors("documents", documents, queries)
    n, m = queries.shape[0], documents.shape[0]
    dtype = checks.accumulator(queries, documents)
    # Settings are tensors, which torch.compile takes as inputs: another value is no other graph.
    number = partial(torch.full, (), dtype=dtype, device=queries.device)
    if negatives is not None:
        checks.vectors("negatives", negatives, queries, ndim=3, rows=n)
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1:
            raise ValueError(
                f"temperature must have one element, got shape {tuple(temperature.shape)}"
            )
        checks.finite("temperature", temperature)
        if temperature.device.type == "cpu" and not torch.compiler.is_compiling():
            checks.positive("temperature", float(temperature.detach()))
        scale = 1 / temperature.reshape(()).to(device=queries.device, dtype=dtype)
    else:
        checks.positive("temperature", temperature)
        scale = number(fill_value=1 / temperature)
    if (query_ids is None) != (document_ids is None):
        raise ValueError("query_ids and document_ids go together, got one without the other")
    if query_ids is not None:
        checks.values("query_ids", query_ids, queries, (n,))
        checks.values("document_ids", document_ids, queries, (m,))
    if mask is not None:
        _op.check_tensor("mask", mask, dtypes=(torch.bool,))
        checks.values("mask", mask, queries, (n, m))
    guides: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    if guide is not None:
        checks.vectors("guide[0]", guide[0], ndim=2, rows=n)
        checks.vectors("guide[1]", guide[1], guide[0], rows=m)
        first, second = (checks.unit(x.detach()).to(dtype) for x in guide)
        guides = (first, second, number(fill_value=guide_margin))
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 query, got {chunk_size}")
    targets = legal_targets("targets", targets, queries, "documents", m)
    return op.Problem(
        queries, documents, negatives, scale, targets,
        query_ids, document_ids, mask, None if margin is None else number(fill_value=margin),
        *guides, cosine, symmetric, chunk_size or 0,
    )  # fmt: skip


def legal_targets(
    name: str, targets: Tensor | None, queries: Tensor, source: str, m: int
) -> Tensor:
    """Return ``targets``, rows of ``source`` which has ``m``, as ``(n, p)`` int64."""
    n = queries.shape[0]
    if targets is None:
        if m < n:
            raise ValueError(f"{source} must have at least {n} rows, one per query, got {m}")
        return torch.arange(n, device=queries.device)[:, None]
    _op.check_tensor(name, targets, dtypes=(torch.int64,), device=queries.device)
    if targets.dim() not in (1, 2) or targets.shape[0] != n or targets.shape[-1] == 0:
        raise ValueError(
            f"{name} must have shape ({n},) or ({n}, positives), got {tuple(targets.shape)}"
        )
    if n and not m:  # even a query without any positive needs a row for its idle slots
        raise ValueError(f"{source} must have at least 1 row, got none")
    known = not torch.compiler.is_compiling() and targets.device.type == "cpu" and n > 0
    if known and (int(targets.min()) < -1 or int(targets.max()) >= m):
        raise ValueError(
            f"{name} must lie between -1 and {m - 1} (rows to choose from), "
            f"got {int(targets.min())} to {int(targets.max())}"
        )
    if known and targets.dim() == 2 and targets.shape[1] > 1:
        ordered = targets.sort(1).values
        if ((ordered.diff(dim=1) == 0) & (ordered[:, 1:] >= 0)).any():
            raise ValueError(f"{name} must name a row once per query, got one twice")
    return targets if targets.dim() == 2 else targets[:, None]


def _block_loss(
    targets: Tensor,
    share: Tensor,
    positives: str,
    focal: float,
    known: Tensor,
    lse: Tensor,
    rows: slice,
) -> Tensor:
    losses = _query_losses(known, lse, targets[rows] >= 0, positives)
    return (share[rows] * _focal(losses, focal)).sum()


def _query_losses(known: Tensor, lse: Tensor, valid: Tensor, positives: str) -> Tensor:
    """Losses (n,) from scores of positives (n, p) and log-sum-exps over negatives (n,)."""
    alone = known.masked_fill(~valid, -torch.inf)
    # A row without positives must not make NaN of -inf - -inf, not even in its gradient.
    alone = torch.where(valid.any(1, keepdim=True), alone, 0)
    together = alone.logsumexp(1)
    if positives == "sum":
        return torch.logaddexp(together, lse) - together
    total = lse[:, None]
    total = torch.logaddexp(known if positives == "each" else together[:, None], total)
    losses = torch.where(valid, total - known, 0)
    return losses.sum(1) / valid.sum(1).clamp_min(1)


def _document_losses(
    known: Tensor,
    lse: Tensor,
    index: Tensor,
    valid: Tensor,
    positives: str,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Losses (m,) from documents to queries, and the weight of each: 0 where it has no query.

    The pairs of a document lie anywhere in ``known``, so its sums are scattered ones.
    """
    pairs = valid.to(known.dtype)
    zeros = torch.zeros_like(lse)
    flat = index.reshape(-1)
    count = zeros.index_add(0, flat, pairs.reshape(-1))
    if positives == "each":
        total = torch.logaddexp(known, lse[index])
    else:
        masked = known.masked_fill(~valid, -torch.inf).reshape(-1)
        most = torch.full_like(lse, -torch.inf).scatter_reduce(0, flat, masked.detach(), "amax")
        most = torch.where(most == -torch.inf, 0, most)
        terms = (masked - most[flat]).exp()
        together = zeros.index_add(0, flat, terms)
        together = most + torch.where(count > 0, together, 1).log()
        all_scores = torch.logaddexp(together, lse)
        if positives == "sum":
            losses = torch.where(count > 0, all_scores - together, 0)
            total = None
        else:
            total = all_scores[index]
    if total is not None:
        losses = zeros.index_add(0, flat, torch.where(valid, total - known, 0).reshape(-1))
        losses = losses / count.clamp_min(1)
    weight = (count > 0).to(known.dtype)
    if weights is not None:
        spread = pairs * weights.to(known.dtype)[:, None]
        weight = zeros.index_add(0, flat, spread.reshape(-1)) / count.clamp_min(1)
    return losses, weight


def _focal(losses: Tensor, gamma: float) -> Tensor:
    if gamma == 0:
        return losses
    tiny = torch.finfo(losses.dtype).tiny  # keeps the slope finite at 0 for gamma < 1
    return (-torch.expm1(-losses)).clamp_min(tiny) ** gamma * losses


def mix_negatives(
    queries: Tensor,
    negatives: Tensor,
    count: int,
    *,
    method: str = "pair",
    temperature: float = 0.05,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Make harder negatives of hard ones by mixing them: unit vectors for ``info_nce``.

    - ``pair``: :math:`\lambda \hat h_a + (1 - \lambda) \hat h_b`, two of the query's own negatives
      drawn with probability proportional to :math:`e^{\cos(q, h)/\tau}` and
      :math:`\lambda \sim U(0, 1)`;
    - ``list``: :math:`\sum_k \lambda_k \hat h_k` over all of them, :math:`\lambda` the softmax of
      :math:`(\cos(q, h_k) + g_k)/\tau` with Gumbel noise ``g`` times ``\tau``, so that every sample
      leans towards other hard negatives.

    Parameters
    ----------
    queries : Tensor
        ``(n, dim)``.
    negatives : Tensor
        ``(n, k, dim)``: at least two of each query for ``pair``, one for ``list``.
    count : int
        Negatives to make for each query.
    method : {"pair", "list"}, default "pair"
        How they are mixed.
    temperature : float, default 0.05
        :math:`\tau`: smaller, and only the hardest are mixed.
    generator : torch.Generator, optional
        Source of randomness, on the device of ``queries``.

    Returns
    -------
    Tensor
        ``(n, count, dim)``, of length 1, in the dtype of ``negatives``. Gradients flow into
        ``negatives``; the weights are constants.

    Notes
    -----
    Kalantidis et al. 2020, arXiv 2010.01028; Zhao et al. 2025, arXiv 2506.20923, mix pairs
    and lists of hard negatives online. The distributions of the weights are this library's choice.
    """
    _op.check_choice("method", method, ("pair", "list"))
    checks.vectors("queries", queries)
    checks.vectors("negatives", negatives, queries, ndim=3, rows=queries.shape[0])
    checks.positive("temperature", temperature)
    n, own, _ = negatives.shape
    least = 2 if method == "pair" else 1
    if own < least:
        raise ValueError(f"negatives must hold at least {least} per query, got {own}")
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    with checks.full_precision(queries):
        hard = checks.unit(negatives)
        with torch.no_grad():
            scores = (hard * checks.unit(queries)[:, None]).sum(-1) / temperature
            noise = torch.empty(n, count, own, dtype=scores.dtype, device=scores.device)
            noise = -noise.exponential_(generator=generator).log()  # Gumbel
            scores = scores[:, None] + noise
            if method == "pair":  # the two largest perturbed scores are two draws without return
                chosen = scores.topk(2, -1).indices
                first = torch.rand(n, count, 1, generator=generator, device=scores.device)
                share = torch.zeros_like(scores).scatter(
                    -1, chosen, torch.cat([first, 1 - first], -1).to(scores.dtype)
                )
            else:
                share = scores.softmax(-1)
        return checks.unit(share @ hard).to(negatives.dtype)


def spread_out(x: Tensor) -> Tensor:
    r"""Mean squared cosine of different vectors: keeps embeddings spread over the sphere.

    .. math:: \frac{1}{n (n - 1)} \sum_{i \neq j} (\hat x_i^T \hat x_j)^2
        = \frac{\| \hat X^T \hat X \|_F^2 - \sum_i \| \hat x_i \|^4}{n (n - 1)}

    The right-hand side needs a ``dim x dim`` matrix and never one of ``n x n``. Random directions
    give ``1 / dim``.

    Parameters
    ----------
    x : Tensor
        Vectors ``(n, dim)``.

    Returns
    -------
    Tensor
        Scalar; 0 for fewer than two vectors.

    Notes
    -----
    Zhang et al. 2017, arXiv 1708.06320 (the second moment); EmbeddingGemma, arXiv 2509.20354,
    adds it for queries and for documents.
    """
    checks.vectors("x", x)
    n = x.shape[0]
    if n < 2:
        return x.to(checks.accumulator(x)).sum() * 0
    with checks.full_precision(x):
        y = checks.unit(x)
        diagonal = y.square().sum(1).square().sum()
        return ((y.t() @ y).square().sum() - diagonal) / (n * (n - 1))
