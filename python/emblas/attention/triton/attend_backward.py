"""Gradients of packed attention in Triton. The formulas stand in ``csrc/attention/attention.h``.

Scores are made again, tile by tile, from the log-sum-exp of forward (Dao et al., 2022, arXiv
2205.14135, algorithm 4), by two kernels. In the first a program owns a tile of queries of one head
and walks through the keys that they see, for the gradient of the queries; it also leaves D, one
number for each query. In the second a program owns a tile of keys of one key head and walks through
the queries that see them, head after head of its group, for the gradients of keys and values. So
every sum has one owner and one order, which depends on the sequence alone: nothing is atomic.

Products run on tensor cores as in forward. Cost: 14 d flops for each pair of query and key, 4 d
more than one pass that adds to all three gradients, and two exponentials. Beside the results only D
is written, nothing of size (queries, keys).

Biases of pairs have a gradient of their size, which the first kernel writes on its way; that of
biases of distances is a matter of ``distances.py``.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from emblas import _op
from emblas.attention.op import Shaping
from emblas.attention.triton.distances import distance_gradients
from emblas.attention.triton.positions import (
    add_position_gradients,
    add_position_scores,
    has_rows,
    position_tile,
)
from emblas.attention.triton.scores import (
    add_biases,
    any_of,
    cap,
    kept,
    keys_seen,
    options,
    pair_matrices,
    pairs_at,
    sees,
    width,
)
from emblas.attention.triton.tiles import (
    LOG2_E,
    block,
    load_vectors,
    own_sequence,
    precision,
    radius,
    serves,
)


@triton.jit
def _grad_queries(
    grad_out,
    grad_out_token: tl.int64,
    grad_out_head: tl.int64,
    grad_lse,
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
    out_token: tl.int64,
    out_head: tl.int64,
    lse,
    deltas,
    grad_q,
    grad_pairs,
    grad_pairs_starts,
    grad_pairs_head: tl.int64,
    grad_pairs_query: tl.int64,
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
    out += q_begin * out_token + head * out_head
    grad_out += q_begin * grad_out_token + head * grad_out_head
    k += k_begin * k_token + head // group * k_head
    v += k_begin * v_token + head // group * v_head
    q_tile = load_vectors(q, i, queries, q_token, head_dim, BLOCK_D)
    above = load_vectors(grad_out, i, queries, grad_out_token, value_dim, BLOCK_V)
    out_tile = load_vectors(out, i, queries, out_token, value_dim, BLOCK_V)

    row = head * q_tokens + q_begin + i
    delta = tl.sum(out_tile.to(tl.float32) * above.to(tl.float32), 1)
    if grad_lse is not None:
        delta -= tl.load(grad_lse + row, mask=i < queries, other=0.0)
    tl.store(deltas + row, delta, mask=i < queries)
    logarithm = tl.load(lse + row, mask=i < queries, other=0.0) * LOG2_E

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
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(lowest, highest + 1, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        seen = sees(position[:, None], j[None, :], keys, left, right, prefix, branch, block_ids)
        if (branch is None and block_ids is None) or any_of(seen):
            k_tile = load_vectors(k, j, keys, k_token, head_dim, BLOCK_D)
            v_tile = load_vectors(v, j, keys, v_token, value_dim, BLOCK_V)
            scores = scale * LOG2_E * tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
            if softcap is not None:
                scores, slope = cap(scores, softcap)
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
            weights = tl.where(seen, tl.exp2(scores - logarithm[:, None]), 0.0)
            grad_weights = tl.dot(above, tl.trans(v_tile), input_precision=PRECISION)
            if seeds is not None:
                seed = tl.load(seeds + sequence)
                grad_weights *= kept(seed, head, position, start, threshold, factor, BLOCK_N)
            grad_scores = weights * (grad_weights - delta[:, None])
            if grad_pairs is not None:
                at, there = pairs_at(
                    grad_pairs_starts, sequence, head, i[:, None], j[None, :], queries, keys,
                    grad_pairs_head, grad_pairs_query,
                )  # fmt: skip
                tl.store(grad_pairs + at, grad_scores, mask=there)
            if position_keys is not None:
                total = add_position_gradients(
                    total, grad_scores, position_keys, heads // group, head // group,
                    position_lookup, position_radius, start - first - ahead, head_dim, 1,
                    PRECISION, BLOCK_M, BLOCK_D,
                )  # fmt: skip
            if softcap is not None:
                grad_scores *= slope
            total = tl.dot(grad_scores.to(k_tile.dtype), k_tile, total, input_precision=PRECISION)

    d = tl.arange(0, BLOCK_D)
    inside = (i < queries)[:, None] & (d < head_dim)[None, :]
    at = ((q_begin + i)[:, None] * heads + head) * head_dim + d[None, :]
    tl.store(grad_q + at, (scale * total).to(grad_q.dtype.element_ty), mask=inside)


@triton.jit
def _grad_keys(
    grad_out,
    grad_out_token: tl.int64,
    grad_out_head: tl.int64,
    q,
    q_token: tl.int64,
    q_head: tl.int64,
    k,
    k_token: tl.int64,
    k_head: tl.int64,
    v,
    v_token: tl.int64,
    v_head: tl.int64,
    lse,
    deltas,
    grad_k,
    grad_v,
    cu_seqlens_q,
    cu_seqlens_k,
    q_tokens,
    k_tokens,
    scale,
    left,
    right,
    key_heads,
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
    BLOCK_V: tl.constexpr,
):
    sequence, key_head, q_begin, k_begin, queries, keys = own_sequence(
        key_heads, cu_seqlens_q, cu_seqlens_k, q_tokens, k_tokens
    )
    first = tl.program_id(1) * BLOCK_N
    if first >= keys:
        return

    j = first + tl.arange(0, BLOCK_N)
    k += k_begin * k_token + key_head * k_head
    v += k_begin * v_token + key_head * v_head
    k_tile = load_vectors(k, j, keys, k_token, head_dim, BLOCK_D)
    v_tile = load_vectors(v, j, keys, v_token, value_dim, BLOCK_V)

    prefix = None if prefix_len is None else tl.load(prefix_len + sequence)
    ahead = keys - queries
    lowest = tl.maximum(first - ahead - right, 0)
    highest = tl.minimum(first + BLOCK_N - 1 - ahead + left, queries - 1)
    if prefix is not None:
        lowest = tl.where(first < prefix, 0, lowest)
    if branch is not None:
        branch += k_begin
    if block_ids is not None:
        block_ids += k_begin
        lowest = 0
    k_total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    v_total = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for head in range(key_head * group, (key_head + 1) * group):
        of_head = q + q_begin * q_token + head * q_head
        above_head = grad_out + q_begin * grad_out_token + head * grad_out_head
        for start in range(lowest, highest + 1, BLOCK_M):
            i = start + tl.arange(0, BLOCK_M)
            position = i + ahead
            if (branch is None and block_ids is None) or any_of(
                sees(position[None, :], j[:, None], keys, left, right, prefix, branch, block_ids)
            ):
                q_tile = load_vectors(of_head, i, queries, q_token, head_dim, BLOCK_D)
                above = load_vectors(above_head, i, queries, grad_out_token, value_dim, BLOCK_V)
                row = head * q_tokens + q_begin + i
                # Of what is no query the weights are 0.
                logarithm = tl.load(lse + row, mask=i < queries, other=float("inf")) * LOG2_E
                delta = tl.load(deltas + row, mask=i < queries, other=0.0)
                scores = (
                    scale * LOG2_E * tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
                )
                if softcap is not None:
                    scores, slope = cap(scores, softcap)
                scores = add_biases(
                    scores, i[None, :], position[None, :], j[:, None], sequence, head, queries,
                    keys, slopes, slopes_stride, distance_bias, bias_radius, pair_bias,
                    pair_starts, pair_head, pair_query,
                )  # fmt: skip
                if position_lookup is not None:
                    scores = add_position_scores(
                        scores, scale * LOG2_E, k_tile, position_queries, key_heads * group, head,
                        q_tile, position_keys, key_heads, key_head, position_lookup,
                        position_radius, first - start - ahead, head_dim, -1, PRECISION, BLOCK_N,
                        BLOCK_D,
                    )  # fmt: skip
                seen = sees(  # again: it takes registers to remember
                    position[None, :], j[:, None], keys, left, right, prefix, branch, block_ids
                )
                weights = tl.where(seen, tl.exp2(scores - logarithm[None, :]), 0.0)
                dropped = weights
                if seeds is not None:
                    seed = tl.load(seeds + sequence)
                    keep = kept(seed, head, position, first, threshold, factor, BLOCK_N)
                    dropped = weights * tl.trans(keep)
                v_total = tl.dot(dropped.to(above.dtype), above, v_total, input_precision=PRECISION)
                grad_weights = tl.dot(v_tile, tl.trans(above), input_precision=PRECISION)
                if seeds is not None:
                    grad_weights *= tl.trans(keep)
                grad_scores = weights * (grad_weights - delta[None, :])
                if position_queries is not None:
                    k_total = add_position_gradients(
                        k_total, grad_scores, position_queries, key_heads * group, head,
                        position_lookup, position_radius, first - start - ahead, head_dim, -1,
                        PRECISION, BLOCK_N, BLOCK_D,
                    )  # fmt: skip
                if softcap is not None:
                    grad_scores *= slope
                k_total = tl.dot(
                    grad_scores.to(q_tile.dtype), q_tile, k_total, input_precision=PRECISION
                )

    d = tl.arange(0, BLOCK_D)
    inside = (j < keys)[:, None] & (d < head_dim)[None, :]
    at = ((k_begin + j)[:, None] * key_heads + key_head) * head_dim + d[None, :]
    tl.store(grad_k + at, (scale * k_total).to(grad_k.dtype.element_ty), mask=inside)
    d = tl.arange(0, BLOCK_V)
    inside = (j < keys)[:, None] & (d < value_dim)[None, :]
    at = ((k_begin + j)[:, None] * key_heads + key_head) * value_dim + d[None, :]
    tl.store(grad_v + at, v_total.to(grad_v.dtype.element_ty), mask=inside)


# Queries and keys of a tile, warps, and stages of the pipeline.
_Tile = tuple[int, int, int, int]


def _tiles(dtype: torch.dtype, dim: int, shaping: Shaping) -> tuple[_Tile, _Tile]:
    """Return the tiles of either kernel.

    The largest whose registers don't spill and whose shared memory fits on every architecture
    (docs/gpu_kernels.md).
    """
    if shaping.position_lookup is not None:
        return (position_tile(dtype, dim),) * 2
    if dtype == torch.float32:
        if dim <= 32:
            return (32, 16, 4, 1), (16, 32, 4, 1)
        if dim <= 64:
            return (32, 32, 4, 1), (32, 32, 4, 1)
        return ((16, 32, 8, 1), (32, 16, 8, 1)) if dim <= 128 else ((16, 16, 8, 1),) * 2
    if dim <= 32:
        return (64, 64, 4, 2), (64, 64, 4, 2)
    if dim <= 64:
        return (128, 64, 8, 2), (32, 128, 8, 2)
    if dim <= 128:
        # The second kernel remembers the softcap's derivative, or dropout's factors, of its pairs.
        factors = shaping.softcap > 0 or shaping.dropout_p > 0
        return (64, 32, 8, 2), (32, 32, 4, 2) if factors else (32, 64, 8, 2)
    return (32, 32, 8, 2), (32, 32, 8, 1)


def _gradients(
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
    shaping: Shaping,
    need_distance_bias: bool,
    need_positions: bool = False,
    need_pair_bias: bool = False,
) -> tuple[Tensor, ...]:
    """Return the gradients of q, k, v, of biases of distances, of position vectors, of pairs."""
    tokens, heads, head_dim = q.shape
    key_heads, value_dim = v.shape[1:]
    batch = cu_seqlens_q.shape[0] - 1
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
    deltas = q.new_empty(heads, tokens, dtype=torch.float32)
    for_queries, for_keys = _tiles(q.dtype, width(head_dim, value_dim, shaping), shaping)
    group, offsets = heads // key_heads, (cu_seqlens_q, cu_seqlens_k)
    sizes = *offsets, tokens, k.shape[0], scale, radius(window_left), radius(window_right)
    how = options(shaping, q, k, *offsets) | {
        "PRECISION": precision(q.dtype), "BLOCK_D": block(head_dim), "BLOCK_V": block(value_dim),
    }  # fmt: skip
    vectors = (
        q, q.stride(0), q.stride(1), k, k.stride(0), k.stride(1), v, v.stride(0), v.stride(1),
    )  # fmt: skip
    above = grad_out, grad_out.stride(0), grad_out.stride(1)

    grad_pairs: Tensor | None = None
    matrices: tuple[Tensor | None, int, int] = (None, 0, 0)
    if shaping.pair_bias is not None and need_pair_bias:
        grad_pairs = torch.zeros(shaping.pair_bias.shape, dtype=torch.float32, device=q.device)
        matrices = pair_matrices(grad_pairs, q, k, *offsets)
    block_m, block_n, num_warps, num_stages = for_queries
    _grad_queries[(batch * heads, triton.cdiv(max_seqlen_q, block_m))](
        *above, grad_lse, *vectors, out, out.stride(0), out.stride(1), lse, deltas, grad_q,
        grad_pairs, *matrices, *sizes, heads, group, head_dim, value_dim, **how,
        BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    block_m, block_n, num_warps, num_stages = for_keys
    _grad_keys[(batch * key_heads, triton.cdiv(max_seqlen_k, block_n))](
        *above, *vectors, lse, deltas, grad_k, grad_v, *sizes, key_heads, group, head_dim,
        value_dim, **how, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps,
        num_stages=num_stages,
    )  # fmt: skip
    sums = distance_gradients(
        (*above, *vectors, lse, deltas), sizes, (heads, group, head_dim, value_dim), how,
        max_seqlen_q + max_seqlen_k, need_distance_bias, need_positions,
    )  # fmt: skip
    shapes = (2, 3, 3, 2)
    return (
        grad_q,
        grad_k,
        grad_v,
        *(
            q.new_empty((0,) * dims, dtype=torch.float32) if grad is None else grad
            for grad, dims in zip((*sums, grad_pairs), shapes, strict=True)
        ),
    )


def _supports(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    *others: Any,
) -> bool:
    return serves(q, k, v, 256) and q.dtype == out.dtype == grad_out.dtype


@_op.kernel(_supports)
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
    shaping = Shaping(softcap, alibi_slopes, distance_bias, prefix_len, branch, block_ids)
    grad_q, grad_k, grad_v, grad_distances, *_nothing = _gradients(
        grad_out, grad_lse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, softmax_scale, window_left, window_right, shaping, need_distance_bias,
    )  # fmt: skip
    return grad_q, grad_k, grad_v, grad_distances


def _supports_biases(
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
    *shaping_and_needs: Any,
) -> bool:
    shaping = Shaping(*shaping_and_needs[:-3])
    return _supports(grad_out, grad_lse, q, k, v, out) and has_rows(shaping)


@_op.kernel(_supports_biases)
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
) -> tuple[Tensor, ...]:
    shaping = Shaping(
        softcap, alibi_slopes, distance_bias, prefix_len, branch, block_ids, position_keys,
        position_queries, position_lookup, pair_bias, dropout_p, dropout_seeds,
    )  # fmt: skip
    return _gradients(
        grad_out, grad_lse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, softmax_scale, window_left, window_right, shaping, need_distance_bias,
        need_positions, need_pair_bias,
    )  # fmt: skip
