"""Packed attention in Triton. The formulas stand in ``csrc/attention/attention.h``.

Online softmax over blocks of keys (Dao et al., 2022, arXiv 2205.14135, algorithm 1): a program owns
a tile of queries of one sequence and head, walks through the keys that any of them may see, and
keeps maximum, sum and weighted values of each query in registers. Exponentials are of base 2, which
is what the hardware has. Nothing of size (queries, keys) is written.

Products run on tensor cores: bfloat16 and float16 as they are, float32 as three TF32 products,
whose error is that of float32. Cost: 4 d flops and one exponential for each pair of query and key;
keys and values are read once per tile of queries, mostly from the L2 cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emblas import _op
from emblas.attention.triton.tiles import (
    LN_2,
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
    q_tile = load_vectors(q, i, queries, q_token, head_dim, BLOCK_D)
    k += k_begin * k_token + head // group * k_head
    v += k_begin * v_token + head // group * v_head

    position = i + (keys - queries)
    lowest = tl.maximum(first + (keys - queries) - left, 0)
    highest = tl.minimum(first + BLOCK_M - 1 + (keys - queries) + right, keys - 1)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(lowest, highest + 1, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        k_tile = load_vectors(k, j, keys, k_token, head_dim, BLOCK_D)
        scores = scale * LOG2_E * tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        seen = sees(position[:, None], j[None, :], keys, left, right)
        scores = tl.where(seen, scores, float("-inf"))

        highest_score = tl.maximum(maximum, tl.max(scores, 1))
        # Where nothing was seen yet, -inf - -inf would be NaN.
        base = tl.where(highest_score == float("-inf"), 0.0, highest_score)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(maximum - base)
        total = total * shrink + tl.sum(weights, 1)
        maximum = highest_score
        v_tile = load_vectors(v, j, keys, v_token, head_dim, BLOCK_D)
        weighted = tl.dot(
            weights.to(v_tile.dtype), v_tile, weighted * shrink[:, None], input_precision=PRECISION
        )

    empty = total == 0
    result = weighted / tl.where(empty, 1.0, total)[:, None]
    d = tl.arange(0, BLOCK_D)
    inside = (i < queries)[:, None] & (d < head_dim)[None, :]
    at = ((q_begin + i)[:, None] * heads + head) * head_dim + d[None, :]
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)
    if lse is not None:
        logarithm = tl.log2(tl.where(empty, 1.0, total)) + tl.where(empty, 0.0, maximum)
        logarithm = tl.where(empty, float("-inf"), logarithm * LN_2)
        tl.store(lse + head * q_tokens + q_begin + i, logarithm, mask=i < queries)


def _tile(dtype: torch.dtype, head_dim: int) -> tuple[int, int, int, int]:
    """Return queries and keys of a tile, warps, and stages of the pipeline.

    The largest whose registers don't spill and whose shared memory fits on every architecture
    (docs/gpu_kernels.md).
    """
    if dtype == torch.float32:
        if head_dim <= 64:
            return 32, 32, 4, 2
        return (32, 32, 8, 2) if head_dim <= 128 else (16, 32, 8, 1)
    if head_dim <= 64:
        return 128, 64, 8, 2
    return (128, 32, 8, 2) if head_dim <= 128 else (64, 32, 8, 2)


def _supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *others: object,
) -> bool:
    return serves(q, k, v)


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
) -> tuple[Tensor, Tensor]:
    tokens, heads, head_dim = q.shape
    batch = cu_seqlens_q.shape[0] - 1
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    out = q.new_empty(q.shape)
    lse = q.new_empty(heads if return_lse else 0, tokens, dtype=torch.float32)
    block_m, block_n, num_warps, num_stages = _tile(q.dtype, head_dim)
    _attend[(batch * heads, triton.cdiv(max_seqlen_q, block_m))](
        q, q.stride(0), q.stride(1), k, k.stride(0), k.stride(1), v, v.stride(0), v.stride(1),
        out, lse if return_lse else None, cu_seqlens_q, cu_seqlens_k, tokens, k.shape[0],
        scale, radius(window_left), radius(window_right), heads, heads // k.shape[1], head_dim,
        PRECISION=precision(q.dtype), BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block(head_dim),
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out, lse
