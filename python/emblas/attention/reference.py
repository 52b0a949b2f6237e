"""The specification of packed attention in plain torch."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


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
) -> tuple[Tensor, Tensor]:
    """Attend within each sequence; the formulas stand in ``csrc/attention/attention.h``."""
    dtype = _accumulator(q)
    heads = q.shape[1]
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    outs, lses = [], []
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
        empty = hidden.all(1)[None, :, None]
        lse = torch.where(empty, -torch.inf, scores.masked_fill(empty, 0).logsumexp(2, True))
        weights = torch.where(empty, 0, (scores - lse.masked_fill(empty, 0)).exp())
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
    bias = q.new_zeros(q.shape[1], 1, dtype=_accumulator(q))
    if distance_bias is not None:
        bias = distance_bias
    with torch.enable_grad():
        q, k, v, bias = leaves = [x.detach().requires_grad_() for x in (q, k, v, bias)]
        results = varlen_attention(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale,
            window_left, window_right, True, softcap, alibi_slopes, bias, prefix_len, branch,
            block_ids,
        )  # fmt: skip
        grads = (grad_out, torch.zeros_like(results[1]) if grad_lse is None else grad_lse)
        grad_q, grad_k, grad_v, grad_bias = torch.autograd.grad(
            results, leaves, grads, allow_unused=True, materialize_grads=True
        )
    if distance_bias is None or not need_distance_bias:
        grad_bias = bias.new_empty(0, 0)
    return grad_q, grad_k, grad_v, grad_bias
