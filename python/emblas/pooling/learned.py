"""Pooling with learned queries and into the vocabulary: public functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from emblas import _op
from emblas.pooling import op_attention, op_vocab
from emblas.pooling.functions import padded_segments
from emblas.pooling.op import Segments
from emblas.pooling.reference import accumulator

MAX_QUERIES = 256
ACTIVATIONS = (None, "relu", "log1p_relu", "log1p_log1p_relu")


def _segments(x: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None) -> Segments:
    if (cu_seqlens is None) == (mask is None):
        raise ValueError("give either cu_seqlens (packed x) or mask (padded x), not both or none")
    _op.check_tensor("x", x, ndim=2 if mask is None else 3, dtypes=_op.FLOATS)
    if mask is None:
        return Segments(_op.rows(x), _op.offsets("cu_seqlens", cu_seqlens, x.device))
    starts, ends, weights = padded_segments(x, mask, None)
    return Segments(_op.rows(x), starts, weights, ends)


def attention_pool(
    x: Tensor,
    queries: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Pool every sequence by the attention of a few queries, which all sequences share.

    One streaming pass; keys and values of the tokens are never made. Fold a key projection into the
    queries and apply a value projection to the result, as
    :class:`~emblas.pooling.AttentionPooling` does.

    Parameters
    ----------
    x : Tensor
        ``(tokens, dim)`` with ``cu_seqlens`` or ``(batch, length, dim)`` with ``mask``, as in
        :func:`segment_pool`.
    queries : Tensor
        ``(queries, dim)``, at most 256; floating-point.
    cu_seqlens, mask : Tensor, optional
        As in :func:`segment_pool`.
    scale : float, optional
        Factor of the scores, default ``dim ** -0.5``.

    Returns
    -------
    Tensor
        ``(batch, queries, dim)``, in the dtype of ``x``; zeros for sequences without tokens.
        Gradients flow to ``x`` and ``queries``.

    Raises
    ------
    TypeError, ValueError
        As in :func:`segment_pool`.

    Notes
    -----
    The formulas stand in ``csrc/pooling/attention_pool.h``.
    """
    segments = _segments(x, cu_seqlens, mask)
    _op.check_tensor("queries", queries, ndim=2, dtypes=_op.FLOATS, device=x.device)
    if queries.shape[1] != x.shape[-1] or queries.shape[0] > MAX_QUERIES:
        raise ValueError(
            f"queries must have the shape (at most {MAX_QUERIES}, {x.shape[-1]}), "
            f"got {tuple(queries.shape)}"
        )
    scale = x.shape[-1] ** -0.5 if scale is None else scale
    queries = queries.to(accumulator(x.dtype)).contiguous()
    return op_attention.attention_pool(segments, queries, scale).to(x.dtype)


def vocab_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    activation: str | None = "log1p_relu",
) -> Tensor:
    """Largest logit of every word over the tokens of each sequence, fused with the projection.

    SPLADE's pooling (arXiv 2109.10086) and, without activation, DupMAE's. No tensor of tokens times
    vocabulary is made, forward or backward: logits exist one tile of a reused 4 MiB buffer at a
    time, and the gradient visits the maxima only.

    Parameters
    ----------
    x : Tensor
        Hidden states that the output layer takes, ``(tokens, dim)`` with ``cu_seqlens`` or
        ``(batch, length, dim)`` with ``mask`` (copied unless contiguous).
    weight, bias : Tensor
        Of the output layer, ``(vocabulary, dim)`` and ``(vocabulary,)``; ``weight`` in the dtype of
        ``x``.
    cu_seqlens, mask : Tensor, optional
        As in :func:`segment_pool`.
    activation : {"log1p_relu", "log1p_log1p_relu", "relu", None}, default "log1p_relu"
        Applied to the maxima: the same as before them, since all of these grow.

    Returns
    -------
    Tensor
        ``(batch, vocabulary)``, float32 (float64 for float64); zeros for sequences without tokens.

    Raises
    ------
    TypeError, ValueError
        As in :func:`segment_pool`.

    Notes
    -----
    The logits come from torch's matrix product, so the last bits may differ with what else is in
    the batch, as those of any linear layer do.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    segments = _segments(x, cu_seqlens, mask)
    _op.check_tensor("weight", weight, ndim=2, dtypes=(x.dtype,), device=x.device)
    if weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight must have the shape (vocabulary, {x.shape[-1]}), got {tuple(weight.shape)}"
        )
    if bias is not None:
        _op.check_tensor("bias", bias, ndim=1, dtypes=_op.FLOATS, device=x.device)
        if bias.shape[0] != weight.shape[0]:
            raise ValueError(
                f"bias must have one value per word, {weight.shape[0]}, got {bias.shape[0]}"
            )
        bias = bias.to(accumulator(x.dtype)).contiguous()
    segments = segments._replace(x=x.reshape(-1, x.shape[-1]).contiguous())
    pooled = op_vocab.vocab_max(segments, weight.contiguous(), bias)
    if activation is None:
        return pooled
    # Fresh from the kernel and needed by nobody else: changed in place where autograd allows.
    pooled = pooled.relu() if pooled.requires_grad else pooled.relu_()
    for _ in range(activation.count("log1p")):
        pooled = pooled.log1p() if pooled.requires_grad else pooled.log1p_()
    return pooled


class SparseRows(NamedTuple):
    """Sparse vectors of a batch in compressed rows; the fields of ``torch.sparse_csr_tensor``."""

    crow_indices: Tensor
    """``(batch + 1,)``, int64."""
    col_indices: Tensor
    """Ids, rising within a row, int64."""
    values: Tensor


def lexical_weights(
    token_ids: Tensor,
    weights: Tensor,
    cu_seqlens: Tensor,
    *,
    ignored_ids: Sequence[int] = (),
) -> SparseRows:
    """Largest weight of each distinct token id in every sequence (BGE-M3, arXiv 2402.03216).

    Parameters
    ----------
    token_ids : Tensor
        ``(tokens,)``, int32 or int64.
    weights : Tensor
        ``(tokens,)``, floating-point: in BGE-M3 the relu of a linear layer. Tokens of weight 0 or
        less are left out.
    cu_seqlens : Tensor
        Offsets ``(batch + 1,)``.
    ignored_ids : sequence of int, optional
        Ids that are left out, such as those of CLS, EOS and padding.

    Returns
    -------
    SparseRows
        Gradients flow from its values to the tokens that they came from, the first where several
        share the largest weight. Its size depends on the data: on a GPU this waits for it.

    Raises
    ------
    TypeError, ValueError
        If dtypes, shapes or offsets don't fit.
    """
    _op.check_tensor("token_ids", token_ids, ndim=1, dtypes=(torch.int32, torch.int64))
    device = token_ids.device
    _op.check_tensor("weights", weights, ndim=1, dtypes=_op.FLOATS, device=device)
    if weights.shape != token_ids.shape:
        raise ValueError(
            f"weights must have one value per token, {token_ids.shape[0]}, got {weights.shape[0]}"
        )
    crow, columns, tokens = op_vocab.lexical_index(
        token_ids.long().contiguous(),
        weights.detach().float().contiguous(),
        _op.offsets("cu_seqlens", cu_seqlens, device),
        tuple(ignored_ids),
    )
    count = int(crow[-1])
    return SparseRows(crow, columns[:count], weights[tokens[:count]])
