"""Attention of chosen tokens: their probabilities, and their results without those of others."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from emblas import _op
from emblas.attention import arguments
from emblas.attention.functions import varlen_attention
from emblas.attention.op import Shaping
from emblas.attention.op_rows import row_dots, row_softmax, row_sums
from emblas.attention.sequences import sequence_of


def pooled_tokens(cu_seqlens: Tensor, pooling: str) -> Tensor:
    """Return the token that each sequence is pooled by, for :func:`attend_rows`.

    Parameters
    ----------
    cu_seqlens : Tensor
        Offsets ``(batch + 1,)`` of the sequences, int32 or int64.
    pooling : {"cls", "last"}
        The first or the last token.

    Returns
    -------
    Tensor
        int64 ``(batch,)``; -1, which is nobody's token, for an empty sequence.

    Raises
    ------
    TypeError, ValueError
        If an argument is none of these.
    """
    _op.check_choice("pooling", pooling, ("cls", "last"))
    offsets = _op.offsets("cu_seqlens", cu_seqlens, cu_seqlens.device).long()
    tokens = offsets[:-1] if pooling == "cls" else offsets[1:] - 1
    return torch.where(offsets.diff() > 0, tokens, -1)


class _Chosen(NamedTuple):
    """Chosen tokens, and the sequences that they lie in."""

    tokens: Tensor  # negative: nobody's
    sequences: Tensor
    starts: Tensor
    lengths: Tensor  # 0 for nobody's

    def own(self, x: Tensor) -> Tensor:
        """Return what x, something for each token, holds for the chosen ones."""
        return _or_zero(x)[self.tokens.clamp(0, max(x.shape[0] - 1, 0))]

    def others(self, x: Tensor, length: int) -> Tensor:
        """Return what x holds for the tokens of their sequences, ``(rows, length, ...)``."""
        j = torch.arange(length, device=x.device)
        return _or_zero(x)[torch.where(j < self.lengths[:, None], self.starts[:, None] + j, 0)]


def _or_zero(x: Tensor) -> Tensor:
    return x if x.shape[0] else x.new_zeros(1, *x.shape[1:])


def _choose(tokens: Tensor, cu_seqlens: Tensor) -> _Chosen:
    if cu_seqlens.shape[0] == 1:  # no sequence, and no token
        none = torch.zeros_like(tokens)
        return _Chosen(none - 1, none, none, none)
    present = tokens >= 0
    sequences = sequence_of(tokens.clamp_min(0), cu_seqlens)
    starts = torch.where(present, cu_seqlens[sequences].long(), 0)
    lengths = torch.where(present, cu_seqlens[sequences + 1].long() - starts, 0)
    return _Chosen(tokens, sequences, starts, lengths)


def _tokens(name: str, tokens: Tensor, device: torch.device) -> Tensor:
    _op.check_tensor(name, tokens, ndim=1, dtypes=(torch.int32, torch.int64), device=device)
    return tokens.long().contiguous()


def _shaped(
    scores: Tensor, chosen: _Chosen, shaping: Shaping, window: tuple[int, int], of_keys: bool
) -> Tensor:
    """Cap, bias and hide scaled scores ``(rows, heads, max_seqlen)``.

    Rows are queries and columns their keys; with ``of_keys`` rows are keys and columns queries.
    """
    left, right = window
    position = (chosen.tokens - chosen.starts)[:, None]
    others = torch.arange(scores.shape[2], device=scores.device)
    distance = position - others if of_keys else others - position
    if shaping.softcap != 0:
        scores = shaping.softcap * torch.tanh(scores / shaping.softcap)
    if shaping.alibi_slopes is not None:
        slopes = shaping.alibi_slopes
        slopes = slopes[chosen.sequences] if slopes.shape[0] > 1 else slopes
        scores = scores - slopes[..., None] * distance.abs()[:, None]
    if shaping.distance_bias is not None:
        radius = shaping.distance_bias.shape[1] // 2
        bias = shaping.distance_bias[:, distance.clamp(-radius, radius) + radius]
        scores = scores + bias.transpose(0, 1)

    def of_pairs(ids: Tensor) -> tuple[Tensor, Tensor]:
        """Ids of the queries and of the keys."""
        pair = chosen.own(ids)[:, None], chosen.others(ids, scores.shape[2])
        return (pair[1], pair[0]) if of_keys else pair

    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if right >= 0:
        hidden = distance > right
        if shaping.prefix_len is not None:
            key = position if of_keys else others
            hidden = hidden & (key >= shaping.prefix_len[chosen.sequences][:, None])
        if shaping.block_ids is not None:
            of_query, of_key = of_pairs(shaping.block_ids)
            hidden = hidden & ((of_key < 0) | (of_key != of_query))
    if left >= 0:
        hidden = hidden | (distance < -left)
    if shaping.branch is not None:
        of_query, of_key = of_pairs(shaping.branch)
        hidden = hidden | ((of_key != -1) & (of_key != of_query))
    hidden = hidden | (others >= chosen.lengths[:, None])
    return scores.masked_fill(hidden[:, None], -torch.inf)


def attention_rows(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    rows: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    *,
    relative_bias: tuple[Tensor, Tensor] | None = None,
    prefix_len: Tensor | None = None,
    branch: Tensor | None = None,
    block_ids: Tensor | None = None,
) -> Tensor:
    """Return the attention probabilities of chosen queries.

    Parameters
    ----------
    q : Tensor
        The chosen queries ``(rows, heads, head_dim)``, of the dtype of ``k``: ``q[rows]`` of all.
    k : Tensor
        The keys ``(tokens, key_heads, head_dim)`` of all tokens; ``key_heads`` divides ``heads``.
    cu_seqlens : Tensor
        Offsets ``(batch + 1,)`` of the sequences, int32 or int64.
    max_seqlen : int
        At least the longest sequence.
    rows : Tensor
        The tokens ``(rows,)``, int64 or int32, whose queries these are, in any order, and as often
        as you like. Negative: nobody's.
    softmax_scale, causal, window_size, softcap, alibi_slopes, relative_bias, prefix_len, branch, \
block_ids
        As in :func:`varlen_attention`.

    Returns
    -------
    Tensor
        ``(rows, heads, max_seqlen)``, float32 (float64 for float64): the probability of each key of
        the query's sequence; 0 beyond its end, and everywhere for nobody's query. Gradients flow to
        ``q``, ``k`` and the table of ``relative_bias``.

    Raises
    ------
    TypeError
        If an argument has the wrong type or dtype.
    ValueError
        If shapes, devices or offsets don't fit together.

    Notes
    -----
    Only the result is as long as a sequence: no other row of the matrix of attention is made, and
    keys are read where they lie. The bits of a row don't depend on the others.
    """
    arguments.vectors(q, k, k)
    offsets = _op.offsets("cu_seqlens", cu_seqlens, k.device)
    window = arguments.window(window_size, causal)
    shaping = arguments.shaping(
        q, k, offsets.shape[0] - 1, 0, 0, softcap, alibi_slopes, relative_bias=relative_bias,
        prefix_len=prefix_len, branch=branch, block_ids=block_ids,
    )  # fmt: skip
    rows = _tokens("rows", rows, k.device)
    if q.shape[0] != rows.shape[0]:
        raise ValueError(f"q must have a query per row, {rows.shape[0]}, got {q.shape[0]}")
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    scores = scale * row_dots(q, k, rows, offsets, max_seqlen)
    scores = _shaped(scores, _choose(rows, offsets), shaping, window, of_keys=False)
    return row_softmax(scores, rows, offsets, k.shape[0])


def attend_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    rows: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    *,
    relative_bias: tuple[Tensor, Tensor] | None = None,
    prefix_len: Tensor | None = None,
    branch: Tensor | None = None,
    block_ids: Tensor | None = None,
) -> Tensor:
    """Attend from chosen queries alone: the rows of :func:`varlen_attention` that are wanted.

    The last layer of an encoder that is pooled by its first or last token needs no other queries
    (see :func:`pooled_tokens`), nor what comes after attention for other tokens.

    Parameters
    ----------
    q, k, cu_seqlens, max_seqlen, rows, softmax_scale, causal, window_size, softcap, alibi_slopes, \
relative_bias, prefix_len, branch, block_ids
        As in :func:`attention_rows`.
    v : Tensor
        The values ``(tokens, key_heads, value_dim)`` of all tokens, of the dtype of ``k``.

    Returns
    -------
    Tensor
        ``(rows, heads, value_dim)``, of the dtype of ``v``; zeros for nobody's query. Gradients
        flow to ``q``, ``k``, ``v`` and the table of ``relative_bias``.

    Raises
    ------
    TypeError
        If an argument has the wrong type or dtype.
    ValueError
        If shapes, devices or offsets don't fit together.
    """
    arguments.vectors(q, k, v)
    weights = attention_rows(
        q, k, cu_seqlens, max_seqlen, rows, softmax_scale, causal, window_size, softcap,
        alibi_slopes, relative_bias=relative_bias, prefix_len=prefix_len, branch=branch,
        block_ids=block_ids,
    )  # fmt: skip
    offsets = _op.offsets("cu_seqlens", cu_seqlens, k.device)
    return row_sums(weights, v, _tokens("rows", rows, k.device), offsets)


def attention_columns(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    columns: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    *,
    relative_bias: tuple[Tensor, Tensor] | None = None,
    prefix_len: Tensor | None = None,
    branch: Tensor | None = None,
    block_ids: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Return the attention probabilities of chosen keys, from all queries of their sequences.

    Parameters
    ----------
    q, k : Tensor
        Queries ``(tokens, heads, head_dim)`` and keys ``(tokens, key_heads, head_dim)`` of all
        tokens, as in :func:`varlen_attention`.
    cu_seqlens : Tensor
        Offsets ``(batch + 1,)`` of the sequences, int32 or int64.
    max_seqlen : int
        At least the longest sequence.
    columns : Tensor
        The tokens ``(columns,)``, int64 or int32, whose keys are chosen. Negative: nobody's.
    softmax_scale, causal, window_size, softcap, alibi_slopes, relative_bias, prefix_len, branch, \
block_ids
        As in :func:`varlen_attention`.
    lse : Tensor, optional
        ``(heads, tokens)``, where :func:`varlen_attention` has returned it with the same options;
        its gradient is used. Without it the scores are summed once more.

    Returns
    -------
    Tensor
        ``(columns, heads, max_seqlen)``, float32 (float64 for float64): the probability that each
        query of the key's sequence gives to it; 0 beyond the end, and everywhere for nobody's key.
        Gradients flow to ``q``, ``k`` and the table of ``relative_bias``.

    Raises
    ------
    TypeError
        If an argument has the wrong type or dtype.
    ValueError
        If shapes, devices or offsets don't fit together.

    Notes
    -----
    ``exp(score - lse)``: memory is linear in the number of tokens and in the result.
    """
    arguments.vectors(q, k, k)
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"q must have the tokens of k, {k.shape[0]}, got {q.shape[0]}")
    offsets = _op.offsets("cu_seqlens", cu_seqlens, q.device)
    shaping = arguments.shaping(
        q, k, offsets.shape[0] - 1, 0, 0, softcap, alibi_slopes, relative_bias=relative_bias,
        prefix_len=prefix_len, branch=branch, block_ids=block_ids,
    )  # fmt: skip
    columns = _tokens("columns", columns, q.device)
    if lse is None:
        _, lse = varlen_attention(
            q, k, k[:, :, :1], offsets, offsets, max_seqlen, max_seqlen,
            softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap,
            alibi_slopes=alibi_slopes, relative_bias=relative_bias, prefix_len=prefix_len,
            branch=branch, block_ids=block_ids, return_lse=True,
        )  # fmt: skip
    elif lse.shape != (q.shape[1], q.shape[0]):
        raise ValueError(
            f"lse must have the shape (heads, tokens), {(q.shape[1], q.shape[0])}, got "
            f"{tuple(lse.shape)}"
        )
    chosen = _choose(columns, offsets)
    keys = chosen.own(k).repeat_interleave(q.shape[1] // k.shape[1], 1)
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    scores = scale * row_dots(keys, q, columns, offsets, max_seqlen)
    window = arguments.window(window_size, causal)
    scores = _shaped(scores, chosen, shaping, window, of_keys=True)
    # A query that sees no key has -inf: 0 in its place, as its scores are -inf.
    totals = chosen.others(torch.where(lse == -torch.inf, 0, lse).t(), max_seqlen)
    return (scores - totals.transpose(1, 2)).exp()
