"""Packed attention in Triton. The formulas stand in ``csrc/attention/attention.h``.

Online softmax over blocks of keys (Dao et al., 2022, arXiv 2205.14135, algorithm 1): a program owns
a tile of queries of one sequence and head, walks through the keys that any of them may see, and
keeps maximum, sum and weighted values of each query in registers. Exponentials are of base 2, which
is what the hardware has. Nothing of size (queries, keys) is written. Where masks leave no pair of a
tile, it is skipped.

Products run on tensor cores: bfloat16 and float16 as they are, float32 as three TF32 products,
whose error is that of float32. Cost: 4 d flops and one exponential for each pair of query and key;
keys and values are read once per tile of queries, mostly from the L2 cache.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from emblas import _op
from emblas.attention.op import Shaping
from emblas.attention.triton.positions import add_position_scores, has_rows, position_tile
from emblas.attention.triton.scores import (
    add_biases,
    any_of,
    cap,
    kept,
    keys_seen,
    options,
    sees,
    width,
)
from emblas.attention.triton.tiles import (
    LN_2,
    LOG2_E,
    block,
    load_vectors,
    own_sequence,
    precision,
    products_of_parts,
    radius,
    serves,
)


@triton.jit
def _attend(
    q,
    q_token: tl.int64,
    q_head: tl.int64,
    k,
    k_token: tl.int64,
    k_head: tl.int64,
    v,
    v_token: tl.int64,
    v_head: tl.int64,
    out,
    lse,
    cu_seqlens_q,
    cu_seqlens_k,
    q_tokens,
    k_tokens,
    scale,
    left,
    right,
    heads,
    group,
    head_dim,
    value_dim,
    softcap,
    slopes,
    slopes_stride,
    distance_bias,
    bias_radius,
    prefix_len,
    branch,
    block_ids,
    pair_bias,
    pair_starts,
    pair_head: tl.int64,
    pair_query: tl.int64,
    position_keys,
    position_queries,
    position_lookup,
    position_radius,
    seeds,
    threshold: tl.int64,
    factor,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    sequence, head, q_begin, k_begin, queries, keys = own_sequence(
        heads, cu_seqlens_q, cu_seqlens_k, q_tokens, k_tokens
    )
    first = tl.program_id(1) * BLOCK_M
    if first >= queries:
        return

    i = first + tl.arange(0, BLOCK_M)
    q += q_begin * q_token + head * q_head
    q_tile = load_vectors(q, i, queries, q_token, head_dim, BLOCK_D)
    k += k_begin * k_token + head // group * k_head
    v += k_begin * v_token + head // group * v_head

    prefix = None if prefix_len is None else tl.load(prefix_len + sequence)
    if branch is not None:
        branch += k_begin
    if block_ids is not None:
        block_ids += k_begin
    ahead = keys - queries
    position = i + ahead
    lowest, highest = keys_seen(
        first + ahead, first + ahead + BLOCK_M - 1, keys, left, right, prefix, block_ids
    )
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for start in range(lowest, highest + 1, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        seen = sees(position[:, None], j[None, :], keys, left, right, prefix, branch, block_ids)
        if (branch is None and block_ids is None) or any_of(seen):
            k_tile = load_vectors(k, j, keys, k_token, head_dim, BLOCK_D)
            if PART < BLOCK_D:
                products = products_of_parts(
                    q, i, queries, q_token, k, j, keys, k_token, head_dim, PRECISION, BLOCK_M,
                    BLOCK_N, PART,
                )  # fmt: skip
            else:
                products = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
            scores = scale * LOG2_E * products
            if softcap is not None:
                scores, _slope = cap(scores, softcap)
            scores = add_biases(
                scores, i[:, None], position[:, None], j[None, :], sequence, head, queries, keys,
                slopes, slopes_stride, distance_bias, bias_radius, pair_bias, pair_starts,
                pair_head, pair_query,
            )  # fmt: skip
            if position_lookup is not None:
                scores = add_position_scores(
                    scores, scale * LOG2_E, q_tile, position_keys, heads // group, head // group,
                    k_tile, position_queries, heads, head, position_lookup, position_radius,
                    start - first - ahead, head_dim, 1, PRECISION, BLOCK_M, BLOCK_D,
                )  # fmt: skip
            scores = tl.where(seen, scores, float("-inf"))

            highest_score = tl.maximum(maximum, tl.max(scores, 1))
            # Where nothing was seen yet, -inf - -inf would be NaN.
            base = tl.where(highest_score == float("-inf"), 0.0, highest_score)
            weights = tl.exp2(scores - base[:, None])
            shrink = tl.exp2(maximum - base)
            total = total * shrink + tl.sum(weights, 1)
            maximum = highest_score
            if seeds is not None:
                seed = tl.load(seeds + sequence)
                weights *= kept(seed, head, position, start, threshold, factor, BLOCK_N)
            v_tile = load_vectors(v, j, keys, v_token, value_dim, BLOCK_V)
            weighted = tl.dot(
                weights.to(v_tile.dtype),
                v_tile,
                weighted * shrink[:, None],
                input_precision=PRECISION,
            )

    empty = total == 0
    result = weighted / tl.where(empty, 1.0, total)[:, None]
    d = tl.arange(0, BLOCK_V)
    inside = (i < queries)[:, None] & (d < value_dim)[None, :]
    at = ((q_begin + i)[:, None] * heads + head) * value_dim + d[None, :]
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)
    if lse is not None:
        logarithm = tl.log2(tl.where(empty, 1.0, total)) + tl.where(empty, 0.0, maximum)
        logarithm = tl.where(empty, float("-inf"), logarithm * LN_2)
        tl.store(lse + head * q_tokens + q_begin + i, logarithm, mask=i < queries)


def _tile(dtype: torch.dtype, dim: int) -> tuple[int, int, int, int]:
    """Return queries and keys of a tile, warps, and stages of the pipeline.

    The largest whose registers don't spill and whose shared memory fits on every architecture
    (docs/gpu_kernels.md).
    """
    if dtype == torch.float32:
        if dim <= 64:
            return 32, 32, 4, 2
        return (32, 32, 8, 2) if dim <= 128 else (16, 32, 8, 1)
    if dim <= 64:
        return 128, 64, 8, 2
    if dim <= 256:
        return (128, 32, 8, 2) if dim <= 128 else (64, 32, 8, 2)
    return 32, 32, 8, 1


def _part(dtype: torch.dtype, dim: int) -> int:
    """Return how much of a vector is multiplied at once: registers don't hold wide ones."""
    return block(dim) if dtype != torch.float32 else min(block(dim), 128)


def _supports(
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
    *shaping: Any,
) -> bool:
    return serves(q, k, v, 512) and has_rows(Shaping(*shaping))


@_op.kernel(_supports)
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
    tokens, heads, head_dim = q.shape
    value_dim = v.shape[2]
    batch = cu_seqlens_q.shape[0] - 1
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    shaping = Shaping(
        softcap, alibi_slopes, distance_bias, prefix_len, branch, block_ids, position_keys,
        position_queries, position_lookup, pair_bias, dropout_p, dropout_seeds,
    )  # fmt: skip
    out = q.new_empty(tokens, heads, value_dim)
    lse = q.new_empty(heads if return_lse else 0, tokens, dtype=torch.float32)
    tile = _tile if shaping.position_lookup is None else position_tile
    block_m, block_n, num_warps, num_stages = tile(q.dtype, width(head_dim, value_dim, shaping))
    _attend[(batch * heads, triton.cdiv(max_seqlen_q, block_m))](
        q, q.stride(0), q.stride(1), k, k.stride(0), k.stride(1), v, v.stride(0), v.stride(1),
        out, lse if return_lse else None, cu_seqlens_q, cu_seqlens_k, tokens, k.shape[0],
        scale, radius(window_left), radius(window_right), heads, heads // k.shape[1], head_dim,
        value_dim, **options(shaping, q, k, cu_seqlens_q, cu_seqlens_k),
        PRECISION=precision(q.dtype), BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block(head_dim),
        PART=_part(q.dtype, head_dim), BLOCK_V=block(value_dim), num_warps=num_warps,
        num_stages=num_stages,
    )  # fmt: skip
    return out, lse
