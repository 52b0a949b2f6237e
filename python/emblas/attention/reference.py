"""The specification of packed attention in plain torch."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


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
) -> tuple[Tensor, Tensor]:
    """Attend within each sequence; the formula stands in ``csrc/attention/attention.h``."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    heads = q.shape[1]
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    outs, lses = [], []
    bounds = zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True)
    for (q_begin, k_begin), (q_end, k_end) in pairwise(bounds):
        groups = heads // max(k.shape[1], 1)
        queries = q[q_begin:q_end].to(dtype).transpose(0, 1)
        keys, values = (
            x[k_begin:k_end].to(dtype).transpose(0, 1).repeat_interleave(groups, 0) for x in (k, v)
        )
        scores = scale * queries @ keys.transpose(1, 2)
        position = torch.arange(q_end - q_begin, device=q.device)[:, None]
        position = position + (k_end - k_begin) - (q_end - q_begin)
        distance = torch.arange(k_end - k_begin, device=q.device) - position
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if window_left >= 0:
            hidden |= distance < -window_left
        if window_right >= 0:
            hidden |= distance > window_right
        scores = scores.masked_fill(hidden, -torch.inf)
        lse = scores.logsumexp(2)
        empty = (lse == -torch.inf)[:, :, None]
        weights = torch.where(empty, 0, (scores - lse[:, :, None].masked_fill(empty, 0)).exp())
        outs.append((weights @ values).transpose(0, 1))
        lses.append(lse)
    out = torch.cat(outs).to(q.dtype) if outs else torch.empty_like(q)
    if not return_lse:
        return out, q.new_empty(0, q.shape[0], dtype=dtype)
    return out, torch.cat(lses, 1) if lses else q.new_empty(heads, 0, dtype=dtype)
