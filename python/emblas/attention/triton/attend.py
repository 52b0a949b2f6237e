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
from emblas._triton import FLOATS, segment_bounds

_LOG2_E, _LN_2 = 1.4426950408889634, tl.constexpr(0.6931471805599453)
_FAR = 2**30  # a window that hides nothing


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
    q_begin, q_end = segment_bounds(cu_seqlens_q, sequence, q_tokens)
    k_begin, k_end = segment_bounds(cu_seqlens_k, sequence, k_tokens)
    queries = (q_end - q_begin).to(tl.int32)
    keys = (k_end - k_begin).to(tl.int32)
    first = tl.program_id(1) * BLOCK_M
    if first >= queries:
        return

    i = first + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    q_at = (q_begin + i)[:, None] * q_token + head * q_head + d[None, :]
    q_inside = (i < queries)[:, None] & (d < head_dim)[None, :]
    q_tile = tl.load(q + q_at, mask=q_inside, other=0.0)
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
        at = j.to(tl.int64)
        k_inside = (j < keys)[None, :] & (d < head_dim)[:, None]
        k_tile = tl.load(k + at[None, :] * k_token + d[:, None], mask=k_inside, other=0.0)
        scores = scale * tl.dot(q_tile, k_tile, input_precision=PRECISION)
        seen = (j < keys)[None, :] & (j[None, :] >= position[:, None] - left)
        seen = seen & (j[None, :] <= position[:, None] + right)
        scores = tl.where(seen, scores, float("-inf"))

        highest_score = tl.maximum(maximum, tl.max(scores, 1))
        # Where nothing was seen yet, -inf - -inf would be NaN.
        base = tl.where(highest_score == float("-inf"), 0.0, highest_score)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(maximum - base)
        total = total * shrink + tl.sum(weights, 1)
        maximum = highest_score
        v_inside = (j < keys)[:, None] & (d < head_dim)[None, :]
        v_tile = tl.load(v + at[:, None] * v_token + d[None, :], mask=v_inside, other=0.0)
        weighted = tl.dot(
            weights.to(v_tile.dtype), v_tile, weighted * shrink[:, None], input_precision=PRECISION
        )

    empty = total == 0
    result = weighted / tl.where(empty, 1.0, total)[:, None]
    out_at = ((q_begin + i)[:, None] * heads + head) * head_dim + d[None, :]
    tl.store(out + out_at, result.to(out.dtype.element_ty), mask=q_inside)
    if lse is not None:
        logarithm = tl.log2(tl.where(empty, 1.0, total)) + tl.where(empty, 0.0, maximum)
        logarithm = tl.where(empty, float("-inf"), logarithm * _LN_2)
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
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    *others: object,
) -> bool:
    return (
        q.dtype in FLOATS
        and q.dtype == k.dtype == v.dtype
        and 1 <= q.shape[2] <= 256
        and q.shape[2] == v.shape[2]
        and k.shape[1] == v.shape[1] > 0
        and max(q.shape[0], k.shape[0]) < _FAR
    )


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
    left, right = (_FAR if w < 0 else min(w, _FAR) for w in (window_left, window_right))
    out = q.new_empty(q.shape)
    lse = q.new_empty(heads if return_lse else 0, tokens, dtype=torch.float32)
    block_m, block_n, num_warps, num_stages = _tile(q.dtype, head_dim)
    _attend[(batch * heads, triton.cdiv(max_seqlen_q, block_m))](
        q, q.stride(0), q.stride(1), k, k.stride(0), k.stride(1), v, v.stride(0), v.stride(1),
        out, lse if return_lse else None, cu_seqlens_q, cu_seqlens_k, tokens, k.shape[0],
        scale * _LOG2_E, left, right, heads, heads // k.shape[1], head_dim,
        PRECISION="tf32x3" if q.dtype == torch.float32 else "ieee",
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out, lse
