"""Embeddings from the routing weights of a mixture of experts (MoEE, arXiv 2410.10814)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from emblas import _op

EPSILON = 1e-8


def zscore(x: Tensor, sample: Tensor | None = None) -> Tensor:
    """Standardize each dimension: subtract its mean, divide by its standard deviation.

    Parameters
    ----------
    x : Tensor
        ``(batch, dim)``, floating-point.
    sample : Tensor, optional
        ``(rows, dim)``, where mean and standard deviation come from: default ``x`` itself, as in
        the paper. With a fixed sample a result doesn't depend on the rest of its batch.

    Returns
    -------
    Tensor
        ``(batch, dim)``, in the dtype of ``x``. The standard deviation is that of a sample (over
        ``rows - 1``), plus 1e-8. A dimension that doesn't vary gives zeros.

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes don't fit.
    """
    _op.check_tensor("x", x, ndim=2, dtypes=_op.FLOATS)
    sample = x if sample is None else sample
    _op.check_tensor("sample", sample, ndim=2, dtypes=_op.FLOATS, device=x.device)
    if sample.shape[1] != x.shape[1] or (sample.shape[0] == 0 and x.shape[0] > 0):
        raise ValueError(
            f"sample must have the shape (at least 1, {x.shape[1]}), got {tuple(sample.shape)}"
        )
    wide = torch.promote_types(x.dtype, torch.float32)
    sample = sample.to(wide)
    centre = sample.mean(0)
    deviation = ((sample - centre).square().sum(0) / max(sample.shape[0] - 1, 1)).sqrt()
    return ((x.to(wide) - centre) / (deviation + EPSILON)).to(x.dtype)


def two_part_similarity(
    queries: tuple[Tensor, Tensor], documents: tuple[Tensor, Tensor], alpha: float = 1.0
) -> Tensor:
    """Cosine of one part plus ``alpha`` times the cosine of the other: MoEE (sum).

    Parameters
    ----------
    queries, documents : tuple of two Tensors
        Hidden state ``(rows, dim)`` and routing weights ``(rows, layers * experts)`` of each text,
        both from :func:`zscore`. Routing weights are the routers' raw logits at the last token,
        layer after layer::

            def last(logits):
                return segment_pool(logits.view(*mask.shape, -1), mask=mask, mode="last")

            with pooled_outputs(routers(model), last) as layers:
                model(input_ids, attention_mask=mask)
            routing = torch.cat(layers, 1)

        with :func:`emblas.pooling.pooled_outputs` and
        :func:`emblas.integrations.transformers.routers`.
    alpha : float, default 1.0
        Weight of the second part.

    Returns
    -------
    Tensor
        ``(queries, documents)``. A part that is zero adds nothing.

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes don't fit.

    Notes
    -----
    MoEE (concat) is ``torch.cat([hidden, routing], 1)`` and any index's cosine. The sum has such a
    form too: both parts at unit length, the second times ``sqrt(alpha)``.
    """
    scores: list[Tensor] = []
    for part in (0, 1):
        q = _op.check_tensor(f"queries[{part}]", queries[part], ndim=2, dtypes=_op.FLOATS)
        d = _op.check_tensor(
            f"documents[{part}]", documents[part], ndim=2, dtypes=(q.dtype,), device=q.device
        )
        if q.shape[1] != d.shape[1]:
            raise ValueError(
                f"documents[{part}] must have the dimension {q.shape[1]}, got {d.shape[1]}"
            )
        scores.append(functional.normalize(q) @ functional.normalize(d).T)
    for name, pair in (("queries", queries), ("documents", documents)):
        if pair[0].shape[0] != pair[1].shape[0]:
            raise ValueError(
                f"{name} must have two parts of the same number of rows, "
                f"got {pair[0].shape[0]} and {pair[1].shape[0]}"
            )
    return scores[0] + alpha * scores[1]
