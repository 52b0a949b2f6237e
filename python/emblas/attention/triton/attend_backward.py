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
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emblas import _op
from emblas.attention.triton.tiles import (
    LOG2_E,
    block,
    load_vectors,
    precision,
    radius,
    sees,
    sequence_bounds,
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
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sequence = tl.program_id(0) // heads
    head = (tl.program_id(0) % heads).to(tl.int64)
    q_begin, k_begin, queries, keys = sequence_bounds(
        cu_seqlens_q, cu_seqlens_k, sequence, q_tokens, k_tokens
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
    above = load_vectors(grad_out, i, queries, grad_out_token, head_dim, BLOCK_D)
    out_tile = load_vectors(out, i, queries, out_token, head_dim, BLOCK_D)

    row = head * q_tokens + q_begin + i
    delta = tl.sum(out_tile.to(tl.float32) * above.to(tl.float32), 1)
    if grad_lse is not None:
        delta -= tl.load(grad_lse + row, mask=i < queries, other=0.0)
    tl.store(deltas + row, delta, mask=i < queries)
    logarithm = tl.load(lse + row, mask=i < queries, other=0.0) * LOG2_E

    position = i + (keys - queries)
    lowest = tl.maximum(first + (keys - queries) - left, 0)
    highest = tl.minimum(first + BLOCK_M - 1 + (keys - queries) + right, keys - 1)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(lowest, highest + 1, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        k_tile = load_vectors(k, j, keys, k_token, head_dim, BLOCK_D)
        v_tile = load_vectors(v, j, keys, v_token, head_dim, BLOCK_D)
        scores = scale * LOG2_E * tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        seen = sees(position[:, None], j[None, :], keys, left, right)
        weights = tl.where(seen, tl.exp2(scores - logarithm[:, None]), 0.0)
        grad_weights = tl.dot(above, tl.trans(v_tile), input_precision=PRECISION)
        grad_scores = weights * (grad_weights - delta[:, None])
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
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sequence = tl.program_id(0) // key_heads
    key_head = (tl.program_id(0) % key_heads).to(tl.int64)
    q_begin, k_begin, queries, keys = sequence_bounds(
        cu_seqlens_q, cu_seqlens_k, sequence, q_tokens, k_tokens
    )
    first = tl.program_id(1) * BLOCK_N
    if first >= keys:
        return

    j = first + tl.arange(0, BLOCK_N)
    k += k_begin * k_token + key_head * k_head
    v += k_begin * v_token + key_head * v_head
    k_tile = load_vectors(k, j, keys, k_token, head_dim, BLOCK_D)
    v_tile = load_vectors(v, j, keys, v_token, head_dim, BLOCK_D)

    lowest = tl.maximum(first - (keys - queries) - right, 0)
    highest = tl.minimum(first + BLOCK_N - 1 - (keys - queries) + left, queries - 1)
    k_total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    v_total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for head in range(key_head * group, (key_head + 1) * group):
        of_head = q + q_begin * q_token + head * q_head
        above_head = grad_out + q_begin * grad_out_token + head * grad_out_head
        for start in range(lowest, highest + 1, BLOCK_M):
            i = start + tl.arange(0, BLOCK_M)
            q_tile = load_vectors(of_head, i, queries, q_token, head_dim, BLOCK_D)
            above = load_vectors(above_head, i, queries, grad_out_token, head_dim, BLOCK_D)
            row = head * q_tokens + q_begin + i
            # Of what is no query the weights are 0.
            logarithm = tl.load(lse + row, mask=i < queries, other=float("inf")) * LOG2_E
            delta = tl.load(deltas + row, mask=i < queries, other=0.0)
            scores = scale * LOG2_E * tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
            position = i + (keys - queries)
            seen = sees(position[None, :], j[:, None], keys, left, right)
            weights = tl.where(seen, tl.exp2(scores - logarithm[None, :]), 0.0)
            v_total = tl.dot(weights.to(above.dtype), above, v_total, input_precision=PRECISION)
            grad_weights = tl.dot(v_tile, tl.trans(above), input_precision=PRECISION)
            grad_scores = weights * (grad_weights - delta[None, :])
            k_total = tl.dot(
                grad_scores.to(q_tile.dtype), q_tile, k_total, input_precision=PRECISION
            )

    d = tl.arange(0, BLOCK_D)
    inside = (j < keys)[:, None] & (d < head_dim)[None, :]
    at = ((k_begin + j)[:, None] * key_heads + key_head) * head_dim + d[None, :]
    tl.store(grad_k + at, (scale * k_total).to(grad_k.dtype.element_ty), mask=inside)
    tl.store(grad_v + at, v_total.to(grad_v.dtype.element_ty), mask=inside)


# Queries and keys of a tile, warps, and stages of the pipeline.
_Tile = tuple[int, int, int, int]


def _tiles(dtype: torch.dtype, head_dim: int) -> tuple[_Tile, _Tile]:
    """Return the tiles of either kernel.

    The largest whose registers don't spill and whose shared memory fits on every architecture
    (docs/gpu_kernels.md).
    """
    if dtype == torch.float32:
        if head_dim <= 32:
            return (32, 16, 4, 1), (16, 32, 4, 1)
        if head_dim <= 64:
            return (32, 32, 4, 1), (32, 32, 4, 1)
        return ((16, 32, 8, 1), (32, 16, 8, 1)) if head_dim <= 128 else ((16, 16, 8, 1),) * 2
    if head_dim <= 32:
        return (64, 64, 4, 2), (64, 64, 4, 2)
    if head_dim <= 64:
        return (128, 64, 8, 2), (64, 128, 8, 2)
    if head_dim <= 128:
        return (64, 32, 8, 2), (32, 64, 8, 2)
    return (32, 32, 8, 2), (32, 32, 8, 1)


def _supports(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    *others: object,
) -> bool:
    return serves(q, k, v) and q.dtype == out.dtype == grad_out.dtype


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, heads, head_dim = q.shape
    key_heads = k.shape[1]
    batch = cu_seqlens_q.shape[0] - 1
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
    deltas = q.new_empty(heads, tokens, dtype=torch.float32)
    for_queries, for_keys = _tiles(q.dtype, head_dim)
    options = (
        cu_seqlens_q, cu_seqlens_k, tokens, k.shape[0], scale, radius(window_left),
        radius(window_right),
    )  # fmt: skip

    block_m, block_n, num_warps, num_stages = for_queries
    _grad_queries[(batch * heads, triton.cdiv(max_seqlen_q, block_m))](
        grad_out, grad_out.stride(0), grad_out.stride(1), grad_lse, q, q.stride(0), q.stride(1),
        k, k.stride(0), k.stride(1), v, v.stride(0), v.stride(1), out, out.stride(0), out.stride(1),
        lse, deltas, grad_q, *options, heads, heads // key_heads, head_dim,
        PRECISION=precision(q.dtype), BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block(head_dim),
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    block_m, block_n, num_warps, num_stages = for_keys
    _grad_keys[(batch * key_heads, triton.cdiv(max_seqlen_k, block_n))](
        grad_out, grad_out.stride(0), grad_out.stride(1), q, q.stride(0), q.stride(1),
        k, k.stride(0), k.stride(1), v, v.stride(0), v.stride(1), lse, deltas, grad_k, grad_v,
        *options, key_heads, heads // key_heads, head_dim,
        PRECISION=precision(q.dtype), BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block(head_dim),
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return grad_q, grad_k, grad_v, q.new_empty(0, 0, dtype=torch.float32)
