"""Pooling with learned queries and into the vocabulary: public functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emblas import _op
from emblas.pooling import op_attention
from emblas.pooling.functions import pooled_spans, token_segments
from emblas.pooling.op_vocab import lexical_index, vocab_max
from emblas.pooling.op_vocab_sum import ACTIVATIONS, activate, vocab_sum
from emblas.pooling.reference import accumulator

MAX_QUERIES = 256


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
    segments = token_segments(x, cu_seqlens, mask)
    _op.check_tensor("queries", queries, ndim=2, dtypes=_op.FLOATS, device=x.device)
    if queries.shape[1] != x.shape[-1] or queries.shape[0] > MAX_QUERIES:
        raise ValueError(
            f"queries must have the shape (at most {MAX_QUERIES}, {x.shape[-1]}), "
            f"got {tuple(queries.shape)}"
        )
    scale = x.shape[-1] ** -0.5 if scale is None else scale
    queries = queries.to(accumulator(x.dtype)).contiguous()
    return op_attention.attention_pool(segments, queries, scale).to(x.dtype)


class SparseRows(NamedTuple):
    """Sparse vectors of a batch in compressed rows; the fields of ``torch.sparse_csr_tensor``."""

    crow_indices: Tensor
    """``(batch + 1,)``, int64."""
    col_indices: Tensor
    """Ids, rising within a row, int64."""
    values: Tensor


def vocab_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    mode: str = "max",
    activation: str | None = "log1p_relu",
    skip_prefix: int | Tensor | None = None,
    top_n: int | None = None,
) -> Any:
    """Largest logit of every word over the tokens of each sequence, or the sum of its logits.

    Fused with the projection into the vocabulary: SPLADE's pooling (arXiv 2109.10086; its first
    version, 2107.05720, takes the sum). Without activation and first token, the maximum is DupMAE's
    (arXiv 2211.08769). No tensor of tokens times vocabulary is made, forward or backward: logits
    exist one tile of a reused 4 MiB buffer at a time. The gradient of the maximum visits the maxima
    only, that of the sum makes the logits again.

    Parameters
    ----------
    x : Tensor
        Hidden states that the output layer takes, ``(tokens, dim)`` with ``cu_seqlens`` or
        ``(batch, length, dim)`` with ``mask`` (copied unless contiguous).
    weight, bias : Tensor
        Of the output layer, ``(vocabulary, dim)`` and ``(vocabulary,)``; ``weight`` in the dtype of
        ``x``.
    cu_seqlens, mask : Tensor, optional
        As in :func:`segment_pool`; a mask says which tokens there are, not what they weigh.
    mode : {"max", "sum"}, default "max"
        How the logits of a word are combined.
    activation : {"log1p_relu", "log1p_log1p_relu", "relu", None}, default "log1p_relu"
        Applied to the logits; in mode "max" to the maxima, which is the same, since all of these
        grow.
    skip_prefix : int or Tensor, optional
        As in :func:`segment_pool`: 1 leaves the first token out.
    top_n : int, optional
        Keep the ``top_n`` largest values of each sequence only, of equal ones those of the lowest
        ids. All that are kept are stored, zeros too, so that sizes don't depend on the data.

    Returns
    -------
    Tensor or SparseRows
        ``(batch, vocabulary)``, float32 (float64 for float64); zeros for sequences without tokens.
        With ``top_n``, its largest values; gradients flow to those.

    Raises
    ------
    TypeError, ValueError
        As in :func:`segment_pool`, or if ``top_n`` is not between 1 and the vocabulary's size.

    Notes
    -----
    The logits come from torch's matrix product, so the last bits may differ with what else is in
    the batch, as those of any linear layer do.
    """
    _op.check_choice("mode", mode, ("max", "sum"))
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    segments = token_segments(x, cu_seqlens, mask, skip_prefix)
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
    if top_n is not None and not 1 <= top_n <= weight.shape[0]:
        raise ValueError(f"top_n must be between 1 and {weight.shape[0]}, got {top_n}")
    if segments.skip is not None:  # the operators take spans only
        starts, ends = pooled_spans(segments)
        segments = segments._replace(starts=starts.contiguous(), ends=ends.contiguous(), skip=None)
    segments = segments._replace(x=x.reshape(-1, x.shape[-1]).contiguous())
    weight = weight.contiguous()
    if mode == "sum":
        pooled = vocab_sum(segments, weight, bias, activation)
    else:  # fresh from the kernel and needed by nobody else: changed in place where possible
        pooled = activate(vocab_max(segments, weight, bias), ACTIVATIONS.index(activation))
    return pooled if top_n is None else _largest(pooled, top_n)


def _largest(pooled: Tensor, n: int) -> SparseRows:
    """Return the ``n`` largest values of each row; of equal ones those of the lowest columns."""
    # NaN is the largest, as for topk.
    order = pooled.detach().nan_to_num(torch.inf, torch.inf, -torch.inf)
    least = order.topk(n, 1).values[:, -1:]
    above, tied = order > least, order == least
    room = n - above.sum(1, keepdim=True)
    kept = above | (tied & (tied.cumsum(1, dtype=torch.int32) <= room))
    batch = pooled.shape[0]
    columns = torch.nonzero_static(kept, size=batch * n)[:, 1]
    return SparseRows(
        torch.arange(batch + 1, device=pooled.device) * n,
        columns,
        pooled.gather(1, columns.view(batch, n)).flatten(),
    )


def lexical_weights(
    token_ids: Tensor,
    weights: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    ignored_ids: Sequence[int] = (),
) -> SparseRows:
    """Largest weight of each distinct token id in every sequence (BGE-M3, arXiv 2402.03216).

    Parameters
    ----------
    token_ids : Tensor
        ``(tokens,)`` with ``cu_seqlens`` or ``(batch, length)`` with ``mask``; int32 or int64.
    weights : Tensor
        Of the shape of ``token_ids``, floating-point: in BGE-M3 the relu of a linear layer. Tokens
        of weight 0 or less are left out.
    cu_seqlens, mask : Tensor, optional
        As in :func:`segment_pool`.
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
        If dtypes, shapes or offsets don't fit, or (in eager mode on a CPU) a weight is NaN.
    """
    if (cu_seqlens is None) == (mask is None):
        raise ValueError("give either cu_seqlens (packed) or mask (padded), not both or none")
    ndim = 1 if mask is None else 2
    _op.check_tensor("token_ids", token_ids, ndim=ndim, dtypes=(torch.int32, torch.int64))
    device = token_ids.device
    _op.check_tensor("weights", weights, ndim=ndim, dtypes=_op.FLOATS, device=device)
    if weights.shape != token_ids.shape:
        raise ValueError(
            f"weights must have one value per token, {tuple(token_ids.shape)}, "
            f"got {tuple(weights.shape)}"
        )
    if mask is None:
        offsets = _op.offsets("cu_seqlens", cu_seqlens, device)
    else:
        _op.check_tensor("mask", mask, device=device)
        if mask.shape != token_ids.shape:
            raise ValueError(
                f"mask must have the shape of token_ids, {tuple(token_ids.shape)}, "
                f"got {tuple(mask.shape)}"
            )
        batch, length = mask.shape
        offsets = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
        weights = torch.where(mask != 0, weights, 0).flatten()
        token_ids = token_ids.flatten()
    eager_cpu = device.type == "cpu" and not torch.compiler.is_compiling()
    if eager_cpu and weights.isnan().any():
        raise ValueError("weights must not hold NaN")
    crow, columns, tokens = lexical_index(
        token_ids.long().contiguous(),
        weights.detach().float().contiguous(),
        offsets,
        tuple(ignored_ids),
    )
    count = int(crow[-1])
    return SparseRows(crow, columns[:count], weights[tokens[:count]])
