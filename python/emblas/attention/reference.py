"""The specification of packed attention in plain torch."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from emblas._philox import philox4x32
from emblas.attention.sequences import sequence_of


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _disentangled(
    queries: Tensor,
    keys: Tensor,
    distance: Tensor,
    position_keys: Tensor | None,
    position_queries: Tensor | None,
    position_lookup: Tensor,
) -> Tensor:
    """Scores (heads, queries, keys) of one sequence before the scale."""
    radius = position_lookup.shape[0] // 2
    slot = position_lookup.long()[distance.clamp(-radius, radius) + radius]
    scores = queries.new_zeros(queries.shape[0], *distance.shape)
    if position_keys is not None:
        groups = queries.shape[0] // position_keys.shape[1]
        vectors = position_keys.permute(1, 2, 0).repeat_interleave(groups, 0)
        scores = scores + (queries @ vectors).gather(2, slot.expand_as(scores))
    if position_queries is not None:
        by_key = (keys @ position_queries.permute(1, 2, 0)).transpose(1, 2)
        scores = scores + by_key.gather(1, slot.expand_as(scores))
    return scores


def _pair_bias(pair_bias: Tensor, b: int, pairs: int, queries: int, keys: int) -> Tensor:
    """Bias (heads, queries, keys) of sequence b, before which so many pairs lie."""
    if pair_bias.dim() == 4:
        return pair_bias[b, :, :queries, :keys]
    return pair_bias[:, pairs : pairs + queries * keys].unflatten(1, (queries, keys))


def _dropout(
    position: Tensor, keys: int, heads: int, dropout_p: float, seed: int, dtype: torch.dtype
) -> Tensor:
    """Return the factors of the probabilities (heads, queries, keys) of one sequence."""
    head, query, four = torch.broadcast_tensors(
        torch.arange(heads, device=position.device)[:, None, None],
        position[None] & 0xFFFFFFFF,
        torch.arange((keys + 3) // 4, device=position.device)[None, None],
    )
    words = philox4x32([query, four, head, torch.zeros_like(head)], seed % 2**64)
    kept = torch.stack(words, 3).flatten(2)[:, :, :keys] >= int(dropout_p * 2**32)
    return kept.to(dtype) / (1 - dropout_p)


def _hidden(
    position: Tensor,
    keys: int,
    window_left: int,
    window_right: int,
    prefix_len: int | None,
    branch: Tensor | None,
    block_ids: Tensor | None,
) -> Tensor:
    """Pairs (query, key) of one sequence that don't see each other; ``position`` (queries, 1)."""
    key = torch.arange(keys, device=position.device)

    def of_queries(ids: Tensor) -> Tensor:
        """Ids of the keys at the positions of the queries; -1 before the first key."""
        if keys == 0:
            return torch.full_like(position, -1)
        return torch.where(position < 0, -1, ids[position.clamp_min(0)])

    hidden = torch.zeros(position.shape[0], keys, dtype=torch.bool, device=position.device)
    if window_right >= 0:
        hidden |= key > position + window_right
        if prefix_len is not None:
            hidden &= key >= prefix_len
        if block_ids is not None:
            hidden &= (block_ids < 0) | (block_ids != of_queries(block_ids))
    if window_left >= 0:
        hidden |= key < position - window_left
    if branch is not None:
        hidden |= (branch != -1) & (branch != of_queries(branch))
    return hidden


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None,
    window_left: int,
    window_right: int,
    return_lse: bool,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    distance_bias: Tensor | None = None,
    prefix_len: Tensor | None = None,
    branch: Tensor | None = None,
    block_ids: Tensor | None = None,
    position_keys: Tensor | None = None,
    position_queries: Tensor | None = None,
    position_lookup: Tensor | None = None,
    pair_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seeds: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend within each sequence; the formulas stand in ``csrc/attention/attention.h``."""
    dtype = _accumulator(q)
    heads = q.shape[1]
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    outs, lses, pairs = [], [], 0
    bounds = zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True)
    for b, ((q_begin, k_begin), (q_end, k_end)) in enumerate(pairwise(bounds)):
        groups = heads // max(k.shape[1], 1)
        queries = q[q_begin:q_end].to(dtype).transpose(0, 1)
        keys, values = (
            x[k_begin:k_end].to(dtype).transpose(0, 1).repeat_interleave(groups, 0) for x in (k, v)
        )
        scores = scale * queries @ keys.transpose(1, 2)
        if softcap != 0:
            scores = softcap * torch.tanh(scores / softcap)
        position = torch.arange(q_end - q_begin, device=q.device)[:, None]
        position = position + (k_end - k_begin) - (q_end - q_begin)
        distance = torch.arange(k_end - k_begin, device=q.device) - position
        if alibi_slopes is not None:
            slopes = alibi_slopes[b if len(alibi_slopes) > 1 else 0]
            scores = scores - slopes[:, None, None] * distance.abs()
        if distance_bias is not None:
            radius = distance_bias.shape[1] // 2
            scores = scores + distance_bias[:, distance.clamp(-radius, radius) + radius]
        if position_lookup is not None:
            scores = scores + scale * _disentangled(
                queries, keys, distance, position_keys, position_queries, position_lookup
            )
        if pair_bias is not None:
            scores = scores + _pair_bias(pair_bias, b, pairs, *distance.shape)
            pairs += distance.numel()
        hidden = _hidden(
            position,
            k_end - k_begin,
            window_left,
            window_right,
            None if prefix_len is None else int(prefix_len[b]),
            None if branch is None else branch[k_begin:k_end],
            None if block_ids is None else block_ids[k_begin:k_end],
        )
        scores = scores.masked_fill(hidden, -torch.inf)
        empty = (scores == -torch.inf).all(2, keepdim=True)
        lse = torch.where(empty, -torch.inf, scores.masked_fill(empty, 0).logsumexp(2, True))
        weights = torch.where(empty, 0, (scores - lse.masked_fill(empty, 0)).exp())
        if dropout_p > 0 and dropout_seeds is not None:
            seed = int(dropout_seeds[b])
            weights = weights * _dropout(position, keys.shape[1], heads, dropout_p, seed, dtype)
        outs.append((weights @ values).transpose(0, 1))
        lses.append(lse.squeeze(2))
    out = torch.cat(outs).to(q.dtype) if outs else q.new_empty(0, heads, v.shape[2])
    if not return_lse:
        return out, q.new_empty(0, q.shape[0], dtype=dtype)
    return out, torch.cat(lses, 1) if lses else q.new_empty(heads, 0, dtype=dtype)


def varlen_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None,
    window_left: int,
    window_right: int,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    distance_bias: Tensor | None = None,
    prefix_len: Tensor | None = None,
    branch: Tensor | None = None,
    block_ids: Tensor | None = None,
    need_distance_bias: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`varlen_attention`; that of ``distance_bias`` has no rows if unneeded."""
    grads = varlen_attention_biases_backward(
        grad_out, grad_lse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, softmax_scale, window_left, window_right, softcap, alibi_slopes,
        distance_bias, prefix_len, branch, block_ids, None, None, None, None, 0.0, None,
        need_distance_bias, False, False,
    )  # fmt: skip
    return grads[:4]


def varlen_attention_biases_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None,
    window_left: int,
    window_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    distance_bias: Tensor | None,
    prefix_len: Tensor | None,
    branch: Tensor | None,
    block_ids: Tensor | None,
    position_keys: Tensor | None,
    position_queries: Tensor | None,
    position_lookup: Tensor | None,
    pair_bias: Tensor | None,
    dropout_p: float,
    dropout_seeds: Tensor | None,
    need_distance_bias: bool,
    need_positions: bool,
    need_pair_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of all inputs of :func:`varlen_attention`; without elements where unneeded."""
    dtype = _accumulator(q)
    biases = {
        "distance_bias": (distance_bias, need_distance_bias, 2),
        "position_keys": (position_keys, need_positions, 3),
        "position_queries": (position_queries, need_positions, 3),
        "pair_bias": (pair_bias, need_pair_bias, 2),
    }
    with torch.enable_grad():
        q, k, v = leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        given = {
            name: None if bias is None else bias.detach().requires_grad_(need)
            for name, (bias, need, _) in biases.items()
        }
        wanted = [name for name, x in given.items() if x is not None and x.requires_grad]
        results = varlen_attention(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale,
            window_left, window_right, True, softcap, alibi_slopes, prefix_len=prefix_len,
            branch=branch, block_ids=block_ids, position_lookup=position_lookup,
            dropout_p=dropout_p, dropout_seeds=dropout_seeds, **given,
        )  # fmt: skip
        leaves += [x for x in given.values() if x is not None and x.requires_grad]
        if not any(result.requires_grad for result in results):  # no sequence
            grads = [torch.zeros_like(leaf) for leaf in leaves]
        else:
            above = (grad_out, torch.zeros_like(results[1]) if grad_lse is None else grad_lse)
            grads = list(
                torch.autograd.grad(
                    results, leaves, above, allow_unused=True, materialize_grads=True
                )
            )
    by_name = dict(zip(wanted, grads[3:], strict=True))

    def of(name: str) -> Tensor:
        return by_name.get(name, q.new_empty((0,) * biases[name][2], dtype=dtype))

    return (
        *(grads[0], grads[1], grads[2], of("distance_bias")),
        *(of("position_keys"), of("position_queries"), of("pair_bias")),
    )


def rotary(
    x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool
) -> Tensor:
    """Turn pairs of elements; the formula stands in ``csrc/attention/rotary.h``."""
    if position_ids is not None:
        cos, sin = cos[position_ids], sin[position_ids]
    cos, sin = cos[:, None], sin[:, None]
    pairs = cos.shape[2]
    turned = x[..., : 2 * pairs].to(cos.dtype)
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], 3).flatten(2)
    else:
        a, b = turned[..., :pairs], turned[..., pairs:]
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], 2)
    return torch.cat([turned.to(x.dtype), x[..., 2 * pairs :]], 2)


def rotary_backward(
    grad_out: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool
) -> Tensor:
    """Turn back: the gradient of :func:`rotary`."""
    return rotary(grad_out, cos, -sin, position_ids, interleaved)


def rotary_(
    x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool
) -> None:
    """Turn pairs of elements in place."""
    x.copy_(rotary(x, cos, sin, position_ids, interleaved))


def _ranges(rows: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """First token and length of each chosen token's sequence; none for negative ones."""
    if cu_seqlens.shape[0] == 1:
        return torch.zeros_like(rows), torch.zeros_like(rows)
    sequences = sequence_of(rows.clamp_min(0), cu_seqlens)
    starts = cu_seqlens[sequences].long()
    lengths = cu_seqlens[sequences + 1].long() - starts
    return torch.where(rows < 0, 0, starts), torch.where(rows < 0, 0, lengths)


def _met(
    y: Tensor, rows: Tensor, cu_seqlens: Tensor, max_length: int, heads: int
) -> tuple[Tensor, Tensor]:
    """Vectors (rows, heads, max_length, dim) of the tokens that each row meets; which are there."""
    starts, lengths = _ranges(rows, cu_seqlens)
    j = torch.arange(max_length, device=y.device)
    inside = j < lengths[:, None]
    if y.shape[0] == 0:
        y = y.new_zeros(1, *y.shape[1:])
    met = y[torch.where(inside, starts[:, None] + j, 0)].to(_accumulator(y))
    met = torch.where(inside[..., None, None], met, 0).transpose(1, 2)
    return met.repeat_interleave(heads // max(y.shape[1], 1), 1), inside


def row_dots(x: Tensor, y: Tensor, rows: Tensor, cu_seqlens: Tensor, max_length: int) -> Tensor:
    """Products of chosen rows; the formulas stand in ``csrc/attention/attention_rows.h``."""
    others, inside = _met(y, rows, cu_seqlens, max_length, x.shape[1])
    dots = (others @ x.to(others.dtype)[..., None])[..., 0]
    return torch.where(inside[:, None], dots, 0)


def row_sums(s: Tensor, y: Tensor, rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Weighted sums of the tokens that chosen rows meet."""
    others, inside = _met(y, rows, cu_seqlens, s.shape[2], s.shape[1])
    s = torch.where(inside[:, None], s, 0)
    return (s[:, :, None] @ others)[:, :, 0].to(y.dtype)


def row_outer(
    s: Tensor, x: Tensor, rows: Tensor, cu_seqlens: Tensor, tokens: int, key_heads: int
) -> Tensor:
    """Sum, for each token, of the chosen rows that meet it."""
    starts, lengths = _ranges(rows, cu_seqlens)
    j = torch.arange(s.shape[2], device=s.device)
    inside = j < lengths[:, None]
    token = torch.where(inside, starts[:, None] + j, tokens)  # the last is nobody's
    products = torch.where(inside[:, None], s, 0)[..., None] * x.to(s.dtype)[:, :, None]
    by_head = products.unflatten(1, (key_heads, -1)).sum(2) if key_heads else products
    out = s.new_zeros(tokens + 1, key_heads, x.shape[2])
    return out.index_add(0, token.flatten(), by_head.transpose(1, 2).flatten(0, 1))[:tokens]
