"""Lexical weights in Triton: of each sequence its distinct ids, each with its best token.

A program owns 32 tokens and compares each with every other one of its sequence: is there a better
one of the same id, and how many ids are smaller? That is tokens x length comparisons of numbers
that the first-level cache holds; nothing to sort. Arithmetic is the limit of long sequences, the
launches of short ones.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from emblas import _op

_BLOCK = 32  # its square is compared at once


@triton.jit
def sequences_of(cu_seqlens, sequences, t, tokens):
    """First and last + 1 token of the sequences of tokens, and of all that a program looks at."""
    inside = t < tokens
    sequence = tl.load(sequences + t, mask=inside, other=0)
    begin = tl.load(cu_seqlens + sequence, mask=inside, other=0).to(tl.int64)
    end = tl.load(cu_seqlens + sequence + 1, mask=inside, other=0).to(tl.int64)
    begin = tl.minimum(tl.maximum(begin, 0), tokens)
    end = tl.minimum(tl.maximum(end, begin), tokens)
    first = tl.min(tl.where(inside, begin, tokens), 0)
    return begin, end, first, tl.max(tl.where(inside, end, 0), 0)


@triton.jit
def _choose(
    ids, weights, cu_seqlens, sequences, allowed, chosen, tokens: tl.int64, BLOCK: tl.constexpr
):
    t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    begin, end, first, last = sequences_of(cu_seqlens, sequences, t, tokens)
    id = tl.load(ids + t, mask=t < tokens, other=0)
    weight = tl.load(weights + t, mask=t < tokens, other=0.0)
    beaten = tl.zeros([BLOCK], tl.int32)
    for start in range(first, last, BLOCK):
        s = start + tl.arange(0, BLOCK)
        other_id = tl.load(ids + s, mask=s < last, other=0)[None, :]
        other = tl.load(weights + s, mask=s < last, other=0.0)[None, :]
        later = s[None, :]
        same = (later >= begin[:, None]) & (later < end[:, None]) & (other_id == id[:, None])
        better = (other > weight[:, None]) | ((other == weight[:, None]) & (later < t[:, None]))
        beaten = tl.maximum(beaten, tl.max((same & better).to(tl.int32), 1))
    # A token that no sequence holds has no place among the chosen.
    wanted = (t >= begin) & (t < end) & (tl.load(allowed + t, mask=t < tokens, other=0) != 0)
    best = wanted & (weight > 0) & (beaten == 0)
    tl.store(chosen + t, best.to(tl.int64), mask=t < tokens)


@triton.jit
def _place(
    ids,
    chosen,
    up_to,
    cu_seqlens,
    sequences,
    columns,
    at,
    tokens: tl.int64,
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    begin, end, first, last = sequences_of(cu_seqlens, sequences, t, tokens)
    id = tl.load(ids + t, mask=t < tokens, other=0)
    mine = (tl.load(chosen + t, mask=t < tokens, other=0) != 0) & (t < tokens)
    place = tl.load(up_to + begin - 1, mask=mine & (begin > 0), other=0)
    for start in range(first, last, BLOCK):
        s = start + tl.arange(0, BLOCK)
        other_id = tl.load(ids + s, mask=s < last, other=0)[None, :]
        is_word = (tl.load(chosen + s, mask=s < last, other=0) != 0)[None, :]
        same = (s[None, :] >= begin[:, None]) & (s[None, :] < end[:, None])
        place += tl.sum((same & is_word & (other_id < id[:, None])).to(tl.int64), 1)
    tl.store(columns + place, id, mask=mine)
    tl.store(at + place, t, mask=mine)


@_op.kernel()
def lexical_index(
    token_ids: Tensor, weights: Tensor, cu_seqlens: Tensor, ignored: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    (tokens,), device = token_ids.shape, token_ids.device
    allowed = torch.ones(tokens, dtype=torch.int8, device=device)
    for word in ignored:
        allowed.masked_fill_(token_ids == word, 0)
    token = torch.arange(tokens, device=device, dtype=torch.int32)
    # In range whatever the offsets hold.
    sequences = torch.searchsorted(cu_seqlens, token, right=True) - 1
    sequences = sequences.clamp(0, max(cu_seqlens.shape[0] - 2, 0))
    chosen = torch.empty_like(token_ids)
    programs = triton.cdiv(tokens, _BLOCK)
    _choose[(programs,)](
        token_ids, weights, cu_seqlens, sequences, allowed, chosen, tokens, BLOCK=_BLOCK
    )
    up_to = chosen.cumsum(0)
    before = torch.nn.functional.pad(up_to, (1, 0))
    crow = before[cu_seqlens.clamp(0, tokens).long()]
    columns, at = (torch.full_like(token_ids, -1) for _ in range(2))
    _place[(programs,)](
        token_ids, chosen, up_to, cu_seqlens, sequences, columns, at, tokens, BLOCK=_BLOCK
    )
    return crow, columns, at
