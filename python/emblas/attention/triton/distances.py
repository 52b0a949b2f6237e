"""Gradients of biases of distances: sums of the scores' gradients along diagonals.

A program owns some neighbouring distances of one sequence and head. It walks through the queries,
a tile at a time, and makes the gradients of the scores again for the two tiles of keys that hold
these distances of the tile's queries. Row m of a tile is turned by m, so that a distance is a
column; its numbers are added up. A second kernel adds the sums of all sequences, one after the
other. So every sum has one owner and one order: nothing is atomic.

Cost: 8 d flops and two exponentials for each pair of query and key; the sums are a number for each
token and head.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from emblas.attention.triton.scores import add_biases, any_of, cap, kept, sees
from emblas.attention.triton.tiles import LOG2_E, load_vectors, sequence_bounds


@triton.jit
def _grad_distances(
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
    sums,
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
    seeds,
    threshold: tl.int64,
    factor,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    sequence = tl.program_id(0) // heads
    head = (tl.program_id(0) % heads).to(tl.int64)
    q_begin, k_begin, queries, keys = sequence_bounds(
        cu_seqlens_q, cu_seqlens_k, sequence, q_tokens, k_tokens
    )
    nearest = tl.program_id(1) * BLOCK + 1 - keys  # the first of its distances j - p_i
    if nearest >= queries:
        return

    q += q_begin * q_token + head * q_head
    grad_out += q_begin * grad_out_token + head * grad_out_head
    k += k_begin * k_token + head // group * k_head
    v += k_begin * v_token + head // group * v_head
    prefix = None if prefix_len is None else tl.load(prefix_len + sequence)
    if branch is not None:
        branch += k_begin
    if block_ids is not None:
        block_ids += k_begin

    # The queries that have a key at one of these distances, if any pair sees as far.
    ahead = keys - queries
    lowest = tl.maximum(1 - BLOCK - nearest - ahead, 0)
    # The first key is a multiple of four, whose dropout has one run of the generator.
    lowest -= (lowest + ahead + nearest + BLOCK) % 4
    highest = tl.minimum(keys - 1 - nearest - ahead, queries - 1)
    highest = tl.where(nearest + BLOCK - 1 < -left, lowest - 1, highest)
    if prefix_len is None and block_ids is None:
        highest = tl.where(nearest > right, lowest - 1, highest)
    m, n = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(lowest, highest + 1, BLOCK):
        i = start + tl.arange(0, BLOCK)
        position = i + ahead
        i = tl.where(i < 0, queries, i)
        q_tile = load_vectors(q, i, queries, q_token, head_dim, BLOCK_D)
        above = load_vectors(grad_out, i, queries, grad_out_token, value_dim, BLOCK_V)
        row = head * q_tokens + q_begin + i
        # Of what is no query the weights are 0.
        logarithm = tl.load(lse + row, mask=i < queries, other=float("inf")) * LOG2_E
        delta = tl.load(deltas + row, mask=i < queries, other=0.0)
        for half in range(2):
            first = start + ahead + nearest + half * BLOCK
            j = first + tl.arange(0, BLOCK)
            j = tl.where(j < 0, keys, j)
            seen = sees(position[:, None], j[None, :], keys, left, right, prefix, branch, block_ids)
            if (branch is None and block_ids is None) or any_of(seen):
                k_tile = load_vectors(k, j, keys, k_token, head_dim, BLOCK_D)
                v_tile = load_vectors(v, j, keys, v_token, value_dim, BLOCK_V)
                scores = (
                    scale * LOG2_E * tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
                )
                if softcap is not None:
                    scores, _slope = cap(scores, softcap)
                scores = add_biases(
                    scores, i[:, None], position[:, None], j[None, :], sequence, head, queries,
                    keys, slopes, slopes_stride, distance_bias, bias_radius, pair_bias,
                    pair_starts, pair_head, pair_query,
                )  # fmt: skip
                weights = tl.where(seen, tl.exp2(scores - logarithm[:, None]), 0.0)
                grad_weights = tl.dot(above, tl.trans(v_tile), input_precision=PRECISION)
                if seeds is not None:
                    seed = tl.load(seeds + sequence)
                    grad_weights *= kept(seed, head, position, first, threshold, factor, BLOCK)
                grad_scores = weights * (grad_weights - delta[:, None])
                turned = tl.gather(grad_scores, (m + n) % BLOCK, 1)
                total += tl.sum(tl.where((m + n) // BLOCK == half, turned, 0.0), 0)

    x = nearest + tl.arange(0, BLOCK)
    at = head * (q_tokens + k_tokens) + q_begin + k_begin + keys - 1 + x
    tl.store(sums + at, total, mask=x < queries)


@triton.jit
def _add_sequences(
    sums,
    grad,
    cu_seqlens_q,
    cu_seqlens_k,
    q_tokens,
    k_tokens,
    batch,
    bias_radius,
    BLOCK: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    x = tl.program_id(1) * BLOCK + lanes - bias_radius
    total = tl.zeros([BLOCK], tl.float32)
    for sequence in range(batch):
        q_begin, k_begin, queries, keys = sequence_bounds(
            cu_seqlens_q, cu_seqlens_k, sequence, q_tokens, k_tokens
        )
        zero = sums + head * (q_tokens + k_tokens) + q_begin + k_begin + keys - 1
        inner = (tl.abs(x) < bias_radius) & (x > -keys) & (x < queries)
        total += tl.load(zero + x, mask=inner, other=0.0)
        # Distances beyond the radius count at its ends; one that is 0 has them in one place.
        before = tl.where(tl.program_id(1) == 0, keys, 0)
        for start in range(bias_radius, before, BLOCK):
            far = start + lanes
            outer = tl.sum(tl.load(zero - far, mask=far < keys, other=0.0), 0)
            total += tl.where(x == -bias_radius, outer, 0.0)
        after = tl.where(tl.program_id(1) == tl.num_programs(1) - 1, queries, 0)
        for start in range(tl.maximum(bias_radius, 1), after, BLOCK):
            far = start + lanes
            outer = tl.sum(tl.load(zero + far, mask=far < queries, other=0.0), 0)
            total += tl.where(x == bias_radius, outer, 0.0)
    at = head * (2 * bias_radius + 1) + bias_radius + x
    tl.store(grad + at, total, mask=x <= bias_radius)


def _tile(dtype: torch.dtype, dim: int) -> int:
    """Return queries, and keys, of a tile for 8 warps (see docs/gpu_kernels.md)."""
    if dtype == torch.float32:
        return 32 if dim <= 32 else 16
    if dim <= 64:
        return 64
    return 32 if dim <= 128 else 16


def distance_gradients(
    given: tuple[Any, ...],
    sizes: tuple[Any, ...],
    heads: tuple[int, ...],
    how: dict[str, Any],
    distances: int,
) -> Tensor:
    """Return the gradient of the biases, from arguments of :func:`_grad_distances`.

    ``distances`` is no less than the number of those of any sequence.
    """
    cu_seqlens_q, cu_seqlens_k, q_tokens, k_tokens = sizes[:4]
    batch, grad = cu_seqlens_q.shape[0] - 1, torch.empty_like(how["distance_bias"])
    sums = grad.new_empty(heads[0], q_tokens + k_tokens)
    block = _tile(given[0].dtype, max(heads[2:]))
    _grad_distances[(batch * heads[0], triton.cdiv(distances, block))](
        *given, sums, *sizes, *heads, **how, BLOCK=block, num_warps=8, num_stages=1
    )
    block = 256
    _add_sequences[(heads[0], triton.cdiv(grad.shape[1], block))](
        sums, grad, cu_seqlens_q, cu_seqlens_k, q_tokens, k_tokens, batch, how["bias_radius"],
        BLOCK=block, num_warps=4,
    )  # fmt: skip
    return grad
