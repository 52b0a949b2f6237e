"""Losses of what an embedding makes a language model say, without logits of tokens x vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from emblas import _op
from emblas.losses import checks, op
from emblas.losses.functions import legal_targets


def token_log_probs(
    x: Tensor,
    vocabulary: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> Tensor:
    r"""Log-probabilities of chosen tokens, of :math:`\mathrm{softmax}_v (x_i w_v / \tau)`.

    Parameters
    ----------
    x : Tensor
        ``(n, dim)``: hidden states in front of an output layer, or embeddings.
    vocabulary : Tensor
        ``(m, dim)``: rows of the output layer. (A bias is one more dimension of it, where every
        ``x`` has a 1.)
    token_ids : Tensor
        int64 ``(n,)`` or ``(n, p)``: different tokens for each row, -1 where there is none.
    temperature : float, default 1
        :math:`\tau`.
    chunk_size : int, optional
        Rows at a time; see :func:`emblas.losses.info_nce`.

    Returns
    -------
    Tensor
        Of the shape of ``token_ids``, in float32 (float64 for float64); 0 where there is no token.

    Raises
    ------
    TypeError, ValueError
        If arguments don't fit together, ids are out of range, or a vector holds NaN or infinity.
    RuntimeError
        In the backward pass of a gradient (``create_graph=True``): there is no second derivative.

    Notes
    -----
    Memory is two blocks of ``chunk_size x m`` and the gradients themselves. What is made of it:

    - a language model's cross-entropy: ``-token_log_probs(...).mean()`` (by
      :func:`emblas.losses.info_nce` with one matrix product less);
    - the likelihood of each text under a decoder that has only its embedding in front of it, the
      sum over its tokens: AutoRegEmbed's information compression (arXiv 2502.11401) is its mean,
      and :func:`likelihood_alignment` compares them;
    - a distribution over some tokens of each text as target (Text2Token; bags of words with
      weights): ``-(weights * token_log_probs(...)).sum(1).mean()``, the Kullback-Leibler
      divergence up to the targets' own entropy, which has no gradient.

    Examples
    --------
    >>> token_log_probs(torch.eye(2), torch.zeros(4, 2), torch.tensor([3, -1]))
    tensor([-1.3863,  0.0000])
    """
    checks.vectors("x", x)
    checks.vectors("vocabulary", vocabulary, x)
    checks.positive("temperature", temperature)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 row, got {chunk_size}")
    _op.check_tensor("token_ids", token_ids)
    targets = legal_targets("token_ids", token_ids, x, "vocabulary", vocabulary.shape[0])
    dtype = checks.accumulator(x, vocabulary)
    scale = torch.full((), 1 / temperature, dtype=dtype, device=x.device)
    known, lse, _ = op.scores(
        op.Problem(
            x, vocabulary, None, scale, targets, None, None, None, None, None, None, None,
            False, False, chunk_size or 0,
        )
    )  # fmt: skip
    valid = targets >= 0
    # A row without tokens must not make NaN of -inf - -inf, not even in its gradient.
    alone = known.masked_fill(~valid, -torch.inf)
    alone = torch.where(valid.any(1, keepdim=True), alone, 0)
    total = torch.logaddexp(alone.logsumexp(1), lse)
    return torch.where(valid, known - total[:, None], 0).reshape(token_ids.shape)


def likelihood_alignment(
    positive: Tensor,
    itself: Tensor,
    negatives: Tensor,
    *,
    reference: tuple[Tensor, Tensor] | None = None,
    beta: float = 0.1,
    temperature: float = 0.1,
) -> Tensor:
    r"""Embeddings of queries that make a decoder say their positives, and not their negatives.

    With :math:`\ell(d | e)` the log-likelihood of text ``d`` behind embedding ``e``, and
    :math:`\ell_0` the same before training,

    .. math:: a_i = \sigma(\beta\, | \ell(d_i^+ | q_i) - \ell(d_i^+ | d_i^+) |), \quad
        r_{ij} = \sigma(\beta\, (\ell(d_i^+ | q_i) - \ell(d_{ij}^- | q_i)
        + \ell_0(d_i^+ | q_i) - \ell_0(d_{ij}^- | q_i)))

    the loss is the mean of :math:`-\log \frac{e^{-a_i / \tau}}{e^{-a_i / \tau} +
    e^{-r_{ij} / \tau}}`: queries mean what their positives mean, and negatives are less likely.

    Parameters
    ----------
    positive : Tensor
        :math:`\ell(d_i^+ | q_i)`, ``(n,)``: sums of :func:`token_log_probs` over each text.
    itself : Tensor
        :math:`\ell(d_i^+ | d_i^+)`, ``(n,)``: of the positive behind its own embedding.
    negatives : Tensor
        :math:`\ell(d_{ij}^- | q_i)`, ``(n, k)``.
    reference : tuple of Tensor, optional
        :math:`\ell_0` of the positives ``(n,)`` and the negatives ``(n, k)``; default 0.
    beta : float, default 0.1
        :math:`\beta`.
    temperature : float, default 0.1
        :math:`\tau`.

    Returns
    -------
    Tensor
        Scalar, in float32 (float64 for float64); 0 for no pairs.

    Raises
    ------
    TypeError, ValueError
        If arguments don't fit together, or hold NaN or infinity.

    Notes
    -----
    Deng et al. 2025, arXiv 2502.11401 (AutoRegEmbed, conditional distribution alignment), with the
    signs and defaults of the authors' code.
    """
    checks.positive("beta", beta)
    checks.positive("temperature", temperature)
    _op.check_tensor("positive", positive, ndim=1, dtypes=_op.FLOATS)
    n = positive.shape[0]
    _op.check_tensor("negatives", negatives, ndim=2, dtypes=_op.FLOATS)
    shape = (n, negatives.shape[1])
    checks.finite("positive", positive)
    checks.values("itself", itself, positive, (n,))
    checks.values("negatives", negatives, positive, shape)
    dtype = checks.accumulator(positive, itself, negatives)
    with checks.full_precision(positive):
        own, fixed, others = (x.to(dtype) for x in (positive, itself, negatives))
        gap = own[:, None] - others
        if reference is not None:
            checks.values("reference[0]", reference[0], positive, (n,))
            checks.values("reference[1]", reference[1], positive, shape)
            first, second = (x.detach().to(dtype) for x in reference)
            gap = gap + first[:, None] - second
        apart = torch.sigmoid(beta * gap)
        near = torch.sigmoid(beta * (own - fixed).abs())[:, None]
        return checks.weighted_mean(torch.nn.functional.softplus((near - apart) / temperature))
