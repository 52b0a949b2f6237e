"""What shapes scores in the Triton kernels beside q . k: masks, softcap, biases; and dropout.

The formulas stand in ``csrc/attention/attention.h``. What a call doesn't use is None, which the
compiler knows: it costs nothing. Queries i and keys j of a tile come as a column and a row, or the
other way round, and the results have the shape that they make together.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from emblas.attention.op import Shaping
from emblas.attention.triton.tiles import LOG2_E


@triton.jit
def keys_seen(first, last, keys, left, right, prefix, block_ids):
    """First and last key that may be seen from the positions first to last.

    The first is a multiple of four, whose dropout has one run of the generator.
    """
    lowest = tl.maximum(first - left, 0) // 4 * 4
    highest = tl.minimum(last + right, keys - 1)
    if prefix is not None:
        highest = tl.maximum(highest + 1, tl.minimum(prefix, keys)) - 1
    if block_ids is not None:
        highest = keys - 1
    return lowest, highest


@triton.jit
def _id_of(ids, j, keys):
    """Ids of the keys j; -1 where there is no such key."""
    return tl.load(ids + j, mask=(j >= 0) & (j < keys), other=-1)


@triton.jit
def sees(position, j, keys, left, right, prefix, branch, block_ids):
    """Which queries, by their positions, see which of the keys j."""
    seen = j <= position + right
    if prefix is not None:
        seen = seen | (j < prefix)
    if block_ids is not None:
        block = _id_of(block_ids, j, keys)
        seen = seen | ((block >= 0) & (block == _id_of(block_ids, position, keys)))
    seen = (j < keys) & (j >= position - left) & seen
    if branch is not None:
        own = _id_of(branch, j, keys)
        seen = seen & ((own == -1) | (own == _id_of(branch, position, keys)))
    return seen


@triton.jit
def any_of(seen):
    """Tell whether a tile has a pair that is seen."""
    return tl.max(tl.max(seen.to(tl.int32), 1), 0) > 0


@triton.jit
def _tanh(x):
    """By its series near 0, where the difference of exponentials would cancel."""
    e = tl.exp2(tl.abs(x) * (-2 * LOG2_E))
    far = (1 - e) / (1 + e)
    square = x * x
    series = square * (62 / 2835) - 17 / 315
    series = series * square + 2 / 15
    series = x + x * square * (series * square - 1 / 3)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -far, far))


@triton.jit
def cap(scores, softcap):
    """Scores of base 2 within the softcap, and the derivative of that."""
    limit = softcap * LOG2_E
    t = _tanh(scores / limit)
    return limit * t, 1 - t * t


@triton.jit
def pairs_at(starts, sequence, head, i, j, queries, keys, head_stride, query_stride):
    """Where matrices of pairs have the pairs (i, j), and which of them they have."""
    start = tl.load(starts + sequence)
    stride = tl.where(query_stride < 0, keys, query_stride)
    at = start + head * head_stride + i.to(tl.int64) * stride + j
    return at, (start >= 0) & (i < queries) & (j < keys)


@triton.jit
def add_biases(
    scores,
    i,
    position,
    j,
    sequence,
    head,
    queries,
    keys,
    slopes,
    slopes_stride,
    distance_bias,
    bias_radius,
    pair_bias,
    pair_starts,
    pair_head,
    pair_query,
):
    """Scores of base 2 with the biases of the pairs (i, j)."""
    if slopes is not None:
        slope = tl.load(slopes + sequence * slopes_stride + head)
        scores -= slope * LOG2_E * tl.abs(j - position)
    if distance_bias is not None:
        distance = tl.minimum(tl.maximum(j - position, -bias_radius), bias_radius)
        zero = distance_bias + head * (2 * bias_radius + 1) + bias_radius
        scores += tl.load(zero + distance) * LOG2_E
    if pair_bias is not None:
        at, there = pairs_at(
            pair_starts, sequence, head, i, j, queries, keys, pair_head, pair_query
        )
        scores += tl.load(pair_bias + at, mask=there, other=0.0) * LOG2_E
    return scores


@triton.jit
def kept(seed, head, position, start, threshold, factor, BLOCK_N: tl.constexpr):
    """Factors of the probabilities [queries][keys] under dropout, for the keys from start on.

    One run of the generator serves four keys, so start is a multiple of four.
    """
    four = start // 4 + tl.arange(0, BLOCK_N // 4)
    zero = tl.zeros([position.shape[0], BLOCK_N // 4], tl.int32)
    a, b, c, d = tl.philox(
        seed,
        (zero + position[:, None]).to(tl.uint32),
        (zero + four[None, :]).to(tl.uint32),
        (zero + head).to(tl.uint32),
        zero.to(tl.uint32),
    )
    words = tl.join(tl.join(a, c), tl.join(b, d))  # of the last axis first: a, b, c, d
    words = tl.reshape(words, [position.shape[0], BLOCK_N])
    return tl.where(words < threshold.to(tl.uint32), 0.0, factor)


def _lengths(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Return the lengths of the sequences, as kernels see them whatever the offsets hold."""
    bounds = cu_seqlens.long().clamp(0, tokens)
    return bounds.diff().clamp_min(0)


def pair_matrices(
    pairs: Tensor, q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> tuple[Tensor, int, int]:
    """Return where the matrix of each sequence starts, and the strides of heads and queries.

    A sequence for which there is no room has none, -1. A stride of -1 is the number of its keys.
    """
    queries, keys = _lengths(cu_seqlens_q, q.shape[0]), _lengths(cu_seqlens_k, k.shape[0])
    if pairs.dim() == 4:
        starts = torch.arange(len(queries), device=pairs.device) * pairs.stride(0)
        held = (queries <= pairs.shape[2]) & (keys <= pairs.shape[3])
        return torch.where(held, starts, -1), pairs.stride(1), pairs.stride(2)
    ends = (queries * keys).cumsum(0)
    starts = torch.where(ends <= pairs.shape[1], ends - queries * keys, -1)
    return starts, pairs.stride(0), -1


def _positions(shaping: Shaping, dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments of disentangled scores: tables (slots, heads, head_dim) and lookup."""
    lookup = shaping.position_lookup
    tables = (shaping.position_keys, shaping.position_queries)
    keys, queries = (None if x is None else x.to(dtype).contiguous() for x in tables)
    if lookup is not None:  # whatever it holds, kernels read rows of the tables
        slots = [x.shape[0] for x in (keys, queries) if x is not None]
        lookup = lookup.clamp(0, min(slots) - 1) if slots else None
    return {
        "position_keys": keys,
        "position_queries": queries,
        "position_lookup": lookup,
        "position_radius": 0 if lookup is None else lookup.shape[0] // 2,
    }


def options(
    shaping: Shaping, q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> dict[str, Any]:
    """Return the arguments by which kernels shape scores, by their names."""
    slopes, bias, pairs = shaping.alibi_slopes, shaping.distance_bias, shaping.pair_bias
    starts, pair_head, pair_query = (
        (None, 0, 0) if pairs is None else pair_matrices(pairs, q, k, cu_seqlens_q, cu_seqlens_k)
    )
    return {
        "softcap": shaping.softcap or None,
        "slopes": slopes,
        "slopes_stride": q.shape[1] if slopes is not None and slopes.shape[0] > 1 else 0,
        "distance_bias": bias,
        "bias_radius": 0 if bias is None else bias.shape[1] // 2,
        "prefix_len": shaping.prefix_len,
        "branch": shaping.branch,
        "block_ids": shaping.block_ids,
        "pair_bias": pairs,
        "pair_starts": starts,
        "pair_head": pair_head,
        "pair_query": pair_query,
        **_positions(shaping, q.dtype),
        "seeds": shaping.dropout_seeds if shaping.dropout_p > 0 else None,
        "threshold": int(shaping.dropout_p * 2**32),
        "factor": 1 / (1 - shaping.dropout_p),
    }


def width(head_dim: int, value_dim: int, shaping: Shaping) -> int:
    """Return the width of vectors by which tiles are chosen.

    Most of what shapes scores takes registers as twice the width does.
    """
    dim = max(head_dim, value_dim)
    tensors = (
        shaping.distance_bias, shaping.branch, shaping.block_ids, shaping.pair_bias,
        shaping.dropout_seeds,
    )  # fmt: skip
    return dim if all(x is None for x in tensors) else 2 * dim
