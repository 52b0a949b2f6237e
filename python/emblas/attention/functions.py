"""The public functions of attention: arguments are checked here, by name."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from emblas import _op
from emblas.attention import arguments, extra_keys, op


def alibi_slopes(heads: int) -> Tensor:
    """Return the slopes that ALiBi gives to ``heads`` heads.

    Parameters
    ----------
    heads : int
        Number of heads, at least 1.

    Returns
    -------
    Tensor
        float32 ``(heads,)``: ``2 ** (-8 k / n)`` for k from 1 to n, where n is a power of two;
        otherwise those of the power of two below, then every other one of twice that many.

    Notes
    -----
    Press, Smith and Lewis, 2022 (arXiv 2108.12409), section 3 and its public code.

    Examples
    --------
    >>> alibi_slopes(2)
    tensor([0.0625, 0.0039])
    """
    if heads < 1:
        raise ValueError(f"heads must be at least 1, got {heads}")
    power = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-8 * k / power) for k in range(1, power + 1)]
    slopes += [2 ** (-4 * k / power) for k in range(1, 2 * power + 1, 2)]
    return torch.tensor(slopes[:heads])


def t5_buckets(
    num_buckets: int = 32, max_distance: int = 128, *, bidirectional: bool = True
) -> Tensor:
    """Return the lookup of T5's relative position bias, for ``relative_bias``.

    Parameters
    ----------
    num_buckets : int, default 32
        Buckets of the table; even if ``bidirectional``.
    max_distance : int, default 128
        Distance from which on all share the last bucket of their side.
    bidirectional : bool, default True
        Encoders: half of the buckets for keys after the query. Otherwise these share bucket 0.

    Returns
    -------
    Tensor
        int64 ``(2 * max_distance + 1,)``: the bucket of each distance of a key from a query,
        ``-max_distance`` to ``max_distance``.

    Notes
    -----
    Raffel et al., 2020 (arXiv 1910.10683), section 2.1 and its public code: half of the buckets of
    a side are single distances, the others grow with the logarithm, in float32.
    """
    relative = torch.arange(-max_distance, max_distance + 1)
    buckets = num_buckets // 2 if bidirectional else num_buckets
    side = buckets * (relative > 0) if bidirectional else torch.zeros_like(relative)
    distance = relative.abs() if bidirectional else (-relative).clamp_min(0)
    exact = buckets // 2
    ratio = torch.log(distance.clamp_min(1).float() / exact) / math.log(max_distance / exact)
    coarse = (exact + (ratio * (buckets - exact)).long()).clamp_max(buckets - 1)
    return side + torch.where(distance < exact, distance, coarse)


def deberta_buckets(position_buckets: int = 256, max_relative_positions: int = 512) -> Tensor:
    """Return the lookup of DeBERTa's relative positions, for ``disentangled``.

    Parameters
    ----------
    position_buckets : int, default 256
        Half the rows of the tables: so many buckets on either side. Half of them are single
        distances, the others grow with the logarithm. 0 or less: a row for each distance.
    max_relative_positions : int, default 512
        Distance from which on all share the last bucket of their side.

    Returns
    -------
    Tensor
        int64 ``(2 * max_relative_positions + 1,)``: the row of each distance of a key from a
        query, ``-max_relative_positions`` to ``max_relative_positions``.

    Raises
    ------
    ValueError
        If ``max_relative_positions`` is not positive, or there are fewer than 4 buckets.

    Notes
    -----
    He et al., 2021 (arXiv 2006.03654, equation 3) and the public code of version 2, in float32:
    with ``m = position_buckets // 2`` and ``M = max_relative_positions``, a distance x beyond m is
    in bucket ``ceil(ln(x / m) / ln((M - 1) / m) * (m - 1)) + m``.
    """
    if max_relative_positions < 1:
        raise ValueError(f"max_relative_positions must be positive, got {max_relative_positions}")
    if 0 < position_buckets < 4:
        raise ValueError(f"position_buckets must be at least 4, or 0, got {position_buckets}")
    # Rows are counted by the distance of the query from the key.
    distance = -torch.arange(-max_relative_positions, max_relative_positions + 1)
    rows, bucket = max_relative_positions, distance
    if position_buckets > 0:
        rows, middle = position_buckets, position_buckets // 2
        logarithm = torch.log(distance.abs().clamp_min(middle) / middle)
        longest = torch.log(torch.tensor((max_relative_positions - 1) / middle))
        coarse = torch.ceil(logarithm / longest * (middle - 1)) + middle
        coarse = (coarse * distance.sign()).long()
        bucket = torch.where(distance.abs() <= middle, distance, coarse)
    return (bucket + rows).clamp(0, 2 * rows - 1)


@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = ...,
    softmax_scale: float | None = ...,
    causal: bool = ...,
    window_size: tuple[int, int] = ...,
    softcap: float = ...,
    alibi_slopes: Tensor | None = ...,
    deterministic: bool = ...,
    *,
    relative_bias: tuple[Tensor, Tensor] | None = ...,
    disentangled: tuple[Tensor | None, Tensor | None, Tensor] | None = ...,
    attn_bias: Tensor | None = ...,
    dropout_seeds: Tensor | None = ...,
    prefix_len: Tensor | None = ...,
    branch: Tensor | None = ...,
    block_ids: Tensor | None = ...,
    k_prefix: Tensor | None = ...,
    v_prefix: Tensor | None = ...,
    prefix_bias: float | Tensor = ...,
    reroute_last: bool = ...,
    reroute_bias: float | Tensor = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = ...,
    softmax_scale: float | None = ...,
    causal: bool = ...,
    window_size: tuple[int, int] = ...,
    softcap: float = ...,
    alibi_slopes: Tensor | None = ...,
    deterministic: bool = ...,
    *,
    relative_bias: tuple[Tensor, Tensor] | None = ...,
    disentangled: tuple[Tensor | None, Tensor | None, Tensor] | None = ...,
    attn_bias: Tensor | None = ...,
    dropout_seeds: Tensor | None = ...,
    prefix_len: Tensor | None = ...,
    branch: Tensor | None = ...,
    block_ids: Tensor | None = ...,
    k_prefix: Tensor | None = ...,
    v_prefix: Tensor | None = ...,
    prefix_bias: float | Tensor = ...,
    reroute_last: bool = ...,
    reroute_bias: float | Tensor = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = True,
    *,
    relative_bias: tuple[Tensor, Tensor] | None = None,
    disentangled: tuple[Tensor | None, Tensor | None, Tensor] | None = None,
    attn_bias: Tensor | None = None,
    dropout_seeds: Tensor | None = None,
    prefix_len: Tensor | None = None,
    branch: Tensor | None = None,
    block_ids: Tensor | None = None,
    k_prefix: Tensor | None = None,
    v_prefix: Tensor | None = None,
    prefix_bias: float | Tensor = 0.0,
    reroute_last: bool = False,
    reroute_bias: float | Tensor = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend within each sequence of a packed batch, exactly.

    Arguments are named and ordered as those of ``flash_attn_varlen_func``. Gradients flow to
    ``q``, ``k`` and ``v``, and to the biases that say so.

    Parameters
    ----------
    q : Tensor
        Queries ``(q_tokens, heads, head_dim)``, float32, float64, bfloat16 or float16; head_dim
        from 1 to 512. Tokens and heads may be any stride apart: slices of a fused projection and
        transposed views are read in place.
    k, v : Tensor
        Keys ``(k_tokens, key_heads, head_dim)`` and values ``(k_tokens, key_heads, value_dim)``, of
        the dtype of ``q``; value_dim from 1 to 512. ``key_heads`` divides ``heads``: query head h
        reads key head ``h // (heads // key_heads)``.
    cu_seqlens_q, cu_seqlens_k : Tensor
        Offsets ``(batch + 1,)`` of the sequences, int32 or int64. Empty sequences are legal.
    max_seqlen_q, max_seqlen_k : int
        Upper bounds of the sequence lengths. Kernels that plan by them need them to be right.
    dropout_p : float, default 0.0
        Probability, less than 1, with which a query doesn't take the value of a key; the other
        values count ``1 / (1 - dropout_p)`` times.
    softmax_scale : float, optional
        Factor of the scores; default ``head_dim ** -0.5``.
    causal : bool, default False
        Hide the keys after a query. Queries are aligned with the last keys of their sequence.
    window_size : tuple of int, default (-1, -1)
        Keys seen to the left and to the right of a query, its own not counted; -1 sees all.
    softcap : float, default 0.0
        Cap ``c`` of the scores, which become ``c * tanh(score / c)``; 0 leaves them as they are.
    alibi_slopes : Tensor, optional
        ``(heads,)`` or ``(batch, heads)``: adds ``-slope * |distance|`` to the scores, where the
        distance is that of the key from the query's position. No gradient flows to it.
    deterministic : bool, default True
        Accepted for compatibility: results are always deterministic.
    relative_bias : tuple of (Tensor, Tensor), optional
        A table ``(heads, buckets)`` and a lookup ``(2 * radius + 1,)`` of bucket numbers, for the
        distances ``-radius`` to ``radius`` of a key from a query's position; farther ones take the
        lookup's ends. Adds ``table[:, lookup[distance]]`` to the scores, as T5 does (see
        :func:`t5_buckets`). Gradients flow to the table.
    disentangled : tuple of (Tensor or None, Tensor or None, Tensor), optional
        Position keys ``(slots, key_heads, head_dim)``, position queries ``(slots, heads,
        head_dim)`` and a lookup ``(2 * radius + 1,)`` of their rows by distance, as in
        ``relative_bias``. Adds ``softmax_scale * (q_i . position_keys[r] + k_j .
        position_queries[r])`` with ``r = lookup[distance]`` to the scores, as DeBERTa-v2 and v3 do
        (see :func:`deberta_buckets`; their softmax_scale is ``(3 * head_dim) ** -0.5``). Gradients
        flow to both tables.
    attn_bias : Tensor, optional
        A number for each pair, added to the score: padded ``(batch or 1, heads or 1, queries,
        keys)`` with room for the longest sequence, or ragged ``(heads or 1, pairs)``, where the
        matrices (queries, keys) of the sequences follow each other. -inf hides a pair. Gradients
        flow to it. This is the one argument, and gradient, whose size grows with the square of the
        length.
    dropout_seeds : Tensor, optional
        ``(batch,)`` int64: what is dropped in a sequence is a function of its seed, whatever else
        is in the batch. Without it seeds come from torch's generator.
    prefix_len : Tensor, optional
        ``(batch,)`` integers: so many first keys of a sequence are seen by all its queries,
        whatever the right radius or ``causal`` hide.
    branch : Tensor, optional
        ``(k_tokens,)`` integers. A key of branch -1 is shared; the others are seen only by the
        queries of their own branch. A query has the branch of the key at its position.
    block_ids : Tensor, optional
        ``(k_tokens,)`` integers: tokens of the same block, unless negative, see each other whatever
        the right radius or ``causal`` hide.
    k_prefix, v_prefix : Tensor, optional
        Further keys and values, seen by all queries: ``(prefix, key_heads, head_dim)`` and
        ``(prefix, key_heads, value_dim)``, the same for all sequences, or ``(batch, prefix, ...)``.
        They have no position: windows, masks, ``causal`` and biases don't apply to them; the scale,
        the softcap and dropout do. Gradients flow to both.
    prefix_bias : float or Tensor, default 0.0
        Added to the scores of the prefix: a number, or ``(heads,)`` with a gradient.
    reroute_last : bool, default False
        Let all queries of a sequence see its last key and value once more, as a key without a
        position like those of a prefix (KV-Embedding, arXiv 2601.01046).
    reroute_bias : float or Tensor, default 0.0
        Added to the scores of that key, like ``prefix_bias``.
    return_lse : bool, default False
        Also return the log-sum-exp of the scores.

    Returns
    -------
    out : Tensor
        ``(q_tokens, heads, value_dim)``, contiguous, of the dtype of ``q``. A query that sees no
        key gets zeros and has no gradient. The bits of a sequence, and of its gradients, don't
        depend on the rest of the batch nor on the number of threads.
    lse : Tensor
        Only with ``return_lse``: ``(heads, q_tokens)``, float32 (float64 for float64), -inf for a
        query that sees no key. It has a gradient too.

    Raises
    ------
    TypeError
        If an argument has the wrong type or dtype.
    ValueError
        If shapes, devices or offsets don't fit together.

    Notes
    -----
    Online softmax over blocks of keys (Dao et al., 2022, arXiv 2205.14135, algorithm 1), in float32
    (float64 for float64). Backward makes the scores again, block by block, from the log-sum-exp
    (algorithm 4 there): the memory of both is linear in the number of tokens. Dropout draws with
    Philox4x32-10 (Salmon et al., 2011), whose counter is the pair and the head. ``torch.func``
    transforms are not supported.

    A prefix and a re-routed key are attended to by themselves, and merged with the rest by the
    log-sum-exp (:func:`merge_attention`): no key or value of a sequence is copied. With 16-bit
    inputs the parts are rounded before they are merged.
    """
    arguments.vectors(q, k, v)
    offsets_q, offsets_k = arguments.offsets(cu_seqlens_q, cu_seqlens_k, q.device)
    left, right = arguments.window(window_size, causal)
    batch = offsets_q.shape[0] - 1
    shaping = arguments.shaping(
        q, k, batch, max_seqlen_q, max_seqlen_k, softcap, alibi_slopes,
        relative_bias=relative_bias, disentangled=disentangled, attn_bias=attn_bias,
        prefix_len=prefix_len, branch=branch, block_ids=block_ids, dropout_p=dropout_p,
        dropout_seeds=dropout_seeds,
    )  # fmt: skip
    extras = []
    if k_prefix is not None or v_prefix is not None:
        extras.append(extra_keys.prefix(q, k, v, batch, k_prefix, v_prefix, prefix_bias))
    reroute_last = reroute_last and k.shape[0] > 0
    q = _op.rows(q)
    out, lse = op.varlen_attention(
        q,
        _op.rows(k),
        _op.rows(v),
        offsets_q,
        offsets_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        (left, right),
        return_lse or reroute_last or bool(extras),
        shaping,
    )
    if reroute_last:  # by offsets that the operator has checked
        extras.append(extra_keys.last(q, k, v, offsets_q, offsets_k, reroute_bias))
    for extra in extras:
        other = extra.attend(q, offsets_q, max_seqlen_q, softmax_scale, shaping)
        out, lse = extra_keys.merge_attention(out, lse, *other)
    return (out, lse) if return_lse else out
