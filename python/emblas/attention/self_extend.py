"""SelfExtend: rotary attention over texts longer than those of training, without training."""

from __future__ import annotations

import torch
from torch import Tensor

from emblas import _op
from emblas.attention.extra_keys import merge_attention
from emblas.attention.functions import varlen_attention
from emblas.attention.rotary import rotary
from emblas.attention.sequences import positions


def self_extend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    cos: Tensor,
    sin: Tensor,
    *,
    group: int,
    window: int,
    softmax_scale: float | None = None,
    causal: bool = False,
    softcap: float = 0.0,
    interleaved: bool = False,
) -> Tensor:
    """Attend with exact distances nearby and grouped ones beyond.

    Keys less than ``window`` tokens away are at their true distance. Of farther ones only the group
    ``position // group`` counts, and groups go on where the window ends: the distance from query i
    back to key j is ``i // group - j // group + window - window // group``. Looking ahead, query
    and key exchange their roles.

    Parameters
    ----------
    q, k, v : Tensor
        Queries, keys and values as in :func:`varlen_attention`, of the same tokens; queries and
        keys as they are before the rotary embedding.
    cu_seqlens : Tensor
        Offsets ``(batch + 1,)`` of the sequences, int32 or int64.
    max_seqlen : int
        Upper bound of their lengths.
    cos, sin : Tensor
        Rows of the positions 0 to ``max_seqlen - 1``, as in :func:`rotary`. Only their distances
        below ``window + max_seqlen // group`` are used.
    group : int
        Tokens that share a position far away, at least 1.
    window : int
        Distance from which on positions are grouped, at least 1.
    softmax_scale, causal, softcap
        As in :func:`varlen_attention`.
    interleaved : bool, default False
        As in :func:`rotary`.

    Returns
    -------
    Tensor
        ``(tokens, heads, value_dim)``. Gradients flow to ``q``, ``k`` and ``v``.

    Raises
    ------
    TypeError
        If an argument has the wrong type or dtype.
    ValueError
        If an argument is out of range, or shapes, devices or offsets don't fit together.

    Notes
    -----
    Jin et al., 2024 (arXiv 2401.01325), section 3; both directions as in LongEmbed (Zhu et al.,
    2024, arXiv 2404.12096). Exact: the keys within the window, those before and those after it are
    attended to one after the other and merged by :func:`merge_attention`, so memory is linear.
    Sequences shorter than ``window`` are not changed by it.
    """
    if group < 1 or window < 1:
        raise ValueError(f"group and window must be at least 1, got {group} and {window}")
    cu_seqlens = _op.offsets("cu_seqlens", cu_seqlens, q.device)
    position = positions(cu_seqlens, q.shape[0])
    grouped = position // group
    # Tokens below the window aren't used where the shift would carry them past their position.
    shifted = torch.minimum(grouped + window - window // group, position)

    def turn(x: Tensor, at: Tensor) -> Tensor:
        return rotary(x, cos, sin, at, interleaved=interleaved)

    def attend(
        q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, window_size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        return varlen_attention(
            q, k, v, cu_q, cu_k, max_seqlen, max_seqlen, softmax_scale=softmax_scale,
            window_size=window_size, softcap=softcap, return_lse=True,
        )  # fmt: skip

    ahead = 0 if causal else window - 1
    near = attend(turn(q, position), turn(k, position), cu_seqlens, cu_seqlens, (window - 1, ahead))
    # The query at p sees the keys up to p - window: causal attention between the sequence without
    # its first and without its last `window` tokens. The tokens between are sequences without keys,
    # or without queries.
    begin, end = cu_seqlens[:-1], cu_seqlens[1:]
    after_first, before_last = (
        torch.minimum(begin + window, end),
        torch.maximum(end - window, begin),
    )

    def offsets(*bounds: Tensor) -> Tensor:
        return torch.cat([cu_seqlens[:1], torch.stack(bounds, 1).flatten()])

    late, early = offsets(after_first, end, end), offsets(begin, before_last, end)
    out, lse = merge_attention(
        *near, *attend(turn(q, shifted), turn(k, grouped), late, early, (-1, 0))
    )
    if causal:
        return out
    # Likewise the keys from p + window on.
    far = attend(turn(q, grouped), turn(k, shifted), early, late, (0, -1))
    return merge_attention(out, lse, *far)[0]
