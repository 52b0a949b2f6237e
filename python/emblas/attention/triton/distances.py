"""Gradients by distance: sums of the scores' gradients along diagonals, and of vectors.

A program owns some neighbouring distances of one sequence and head. It walks through the queries,
a tile at a time, and makes the gradients of the scores again for the two tiles of keys that hold
these distances of the tile's queries. Row m of a tile is turned by m, so that a distance is a
column: its numbers are added up for biases of distances, and multiplied with queries and keys for
position vectors. Further kernels add the sums of all sequences, one after the other. So every sum
has one owner and one order: nothing is atomic.

Cost: 8 d flops and two exponentials for each pair of query and key, and 12 d flops more with both
kinds of position vectors. The sums are a number, or a vector, for each token and head.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from emblas.attention.triton.positions import position_tile, position_vectors
from emblas.attention.triton.scores import add_biases, any_of, cap, kept, sees
from emblas.attention.triton.tiles import FAR, LOG2_E, load_vectors, own_sequence, sequence_bounds


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
    key_sums,
    query_sums,
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
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    sequence, head, q_begin, k_begin, queries, keys = own_sequence(
        heads, cu_seqlens_q, cu_seqlens_k, q_tokens, k_tokens
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
    x = nearest + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    key_total = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    query_total = tl.zeros([BLOCK, BLOCK_D], tl.float32)
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
        by_distance = tl.zeros([BLOCK, BLOCK], tl.float32)
        # Only pairs at the program's own distances count: what others get here doesn't matter.
        place = (n - m + BLOCK) % BLOCK
        if position_keys is not None:
            vectors = position_vectors(
                position_keys, position_lookup, position_radius, heads // group, head // group, x,
                head_dim, BLOCK_D,
            )  # fmt: skip
            products = tl.dot(q_tile, tl.trans(vectors), input_precision=PRECISION)
            of_queries = scale * LOG2_E * tl.gather(products, place, 1)
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
                if position_keys is not None:
                    scores += of_queries
                if position_queries is not None:
                    vectors = position_vectors(
                        position_queries, position_lookup, position_radius, heads, head, x,
                        head_dim, BLOCK_D,
                    )  # fmt: skip
                    products = tl.dot(vectors, tl.trans(k_tile), input_precision=PRECISION)
                    scores += scale * LOG2_E * tl.gather(products, place, 0)
                weights = tl.where(seen, tl.exp2(scores - logarithm[:, None]), 0.0)
                grad_weights = tl.dot(above, tl.trans(v_tile), input_precision=PRECISION)
                if seeds is not None:
                    seed = tl.load(seeds + sequence)
                    grad_weights *= kept(seed, head, position, first, threshold, factor, BLOCK)
                grad_scores = weights * (grad_weights - delta[:, None])
                turned = tl.gather(grad_scores, (m + n) % BLOCK, 1)
                turned = tl.where((m + n) // BLOCK == half, turned, 0.0)
                if sums is not None:
                    total += tl.sum(turned, 0)
                if key_sums is not None:
                    by_distance += turned
                if query_sums is not None:
                    source, turned = n - m + half * BLOCK, tl.gather(grad_scores, place, 0)
                    turned = tl.where((source >= 0) & (source < BLOCK), turned, 0.0)
                    query_total = tl.dot(
                        turned.to(k_tile.dtype), k_tile, query_total, input_precision=PRECISION
                    )
        if key_sums is not None:
            turned = tl.trans(by_distance).to(q_tile.dtype)
            key_total = tl.dot(turned, q_tile, key_total, input_precision=PRECISION)

    at = head * (q_tokens + k_tokens) + q_begin + k_begin + keys - 1 + x
    if sums is not None:
        tl.store(sums + at, total, mask=x < queries)
    d = tl.arange(0, BLOCK_D)
    inside = (x < queries)[:, None] & (d < head_dim)[None, :]
    at = at[:, None] * head_dim + d[None, :]
    if key_sums is not None:
        tl.store(key_sums + at, key_total, mask=inside)
    if query_sums is not None:
        tl.store(query_sums + at, query_total, mask=inside)


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


@triton.jit
def _add_vectors(
    sums,
    grad,
    first_distance,
    last_distance,
    lookup,
    radius,
    cu_seqlens_q,
    cu_seqlens_k,
    q_tokens,
    k_tokens,
    batch,
    scale,
    heads,
    group,
    head_dim,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    slot = tl.program_id(0) // heads
    table_head = (tl.program_id(0) % heads).to(tl.int64)
    first, last = tl.load(first_distance + slot), tl.load(last_distance + slot)
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    for head in range(table_head * group, (table_head + 1) * group):
        for sequence in range(batch):
            q_begin, k_begin, queries, keys = sequence_bounds(
                cu_seqlens_q, cu_seqlens_k, sequence, q_tokens, k_tokens
            )
            zero = head * (q_tokens + k_tokens) + q_begin + k_begin + keys - 1
            end = tl.minimum(last + 1, queries)
            for start in range(tl.maximum(first, 1 - keys), end, BLOCK):
                x = start + tl.arange(0, BLOCK)
                inside = tl.minimum(tl.maximum(x, -radius), radius)
                own = (x < end) & (tl.load(lookup + radius + inside) == slot)
                at = (zero + x)[:, None] * head_dim + d[None, :]
                mask = own[:, None] & (d < head_dim)[None, :]
                total += tl.sum(tl.load(sums + at, mask=mask, other=0.0), 0)
    to = grad + tl.program_id(0).to(tl.int64) * head_dim + d
    tl.store(to, scale * total, mask=d < head_dim)


def _tile(dtype: torch.dtype, dim: int) -> int:
    """Return queries, and keys, of a tile for 8 warps (see docs/gpu_kernels.md)."""
    if dtype == torch.float32:
        return 32 if dim <= 32 else 16
    if dim <= 64:
        return 64
    return 32 if dim <= 128 else 16


def _vector_gradients(
    sums: Tensor | None, table: Tensor | None, sizes: tuple[Any, ...], how: dict[str, Any]
) -> Tensor | None:
    """Return the gradient of a table (slots, heads, head_dim) from the sums by distance."""
    if sums is None or table is None:
        return None
    cu_seqlens_q, cu_seqlens_k, q_tokens, k_tokens, scale = sizes[:5]
    grad = sums.new_empty(table.shape)
    slots, heads, head_dim = grad.shape
    lookup, radius = how["position_lookup"], how["position_radius"]
    # Slots lie among these distances, mostly all alone; the first and last have all beyond.
    distance = torch.arange(-radius, radius + 1, dtype=torch.int32, device=lookup.device)
    low, high = distance.clone(), distance.clone()
    low[0], high[-1] = -FAR, FAR
    first, last = (low.new_full((slots,), sign * FAR) for sign in (1, -1))
    first.scatter_reduce_(0, lookup.long(), low, "amin")
    last.scatter_reduce_(0, lookup.long(), high, "amax")
    _add_vectors[(slots * heads,)](
        sums, grad, first, last, lookup, radius, cu_seqlens_q, cu_seqlens_k, q_tokens, k_tokens,
        cu_seqlens_q.shape[0] - 1, scale, heads, sums.shape[0] // heads, head_dim, BLOCK=32,
        BLOCK_D=how["BLOCK_D"], num_warps=4,
    )  # fmt: skip
    return grad


def _bias_gradients(
    sums: Tensor | None, sizes: tuple[Any, ...], how: dict[str, Any]
) -> Tensor | None:
    """Return the gradient of the biases of distances from the sums by distance."""
    if sums is None:
        return None
    cu_seqlens_q, cu_seqlens_k, q_tokens, k_tokens = sizes[:4]
    grad, block = torch.empty_like(how["distance_bias"]), 256
    _add_sequences[(grad.shape[0], triton.cdiv(grad.shape[1], block))](
        sums, grad, cu_seqlens_q, cu_seqlens_k, q_tokens, k_tokens, cu_seqlens_q.shape[0] - 1,
        how["bias_radius"], BLOCK=block, num_warps=4,
    )  # fmt: skip
    return grad


def distance_gradients(
    given: tuple[Any, ...],
    sizes: tuple[Any, ...],
    heads: tuple[int, ...],
    how: dict[str, Any],
    distances: int,
    need_distance_bias: bool,
    need_positions: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of biases of distances, of position keys and of position queries.

    The first arguments are those of :func:`_grad_distances`; ``distances`` is no less than the
    number of those of any sequence. What isn't there, or isn't needed, has no gradient.
    """
    q, rows = given[3], sizes[2] + sizes[3]

    def new(name: str, needed: bool, *dims: int) -> Tensor | None:
        if how[name] is None or not needed:
            return None
        return q.new_empty(heads[0], rows, *dims, dtype=torch.float32)

    sums = new("distance_bias", need_distance_bias)
    key_sums = new("position_keys", need_positions, heads[2])
    query_sums = new("position_queries", need_positions, heads[2])
    if all(x is None for x in (sums, key_sums, query_sums)):
        return None, None, None
    dim = max(heads[2:])
    block = (
        _tile(q.dtype, dim) if how["position_lookup"] is None else position_tile(q.dtype, dim)[0]
    )
    _grad_distances[((sizes[0].shape[0] - 1) * heads[0], triton.cdiv(distances, block))](
        *given, sums, key_sums, query_sums, *sizes, *heads, **how, BLOCK=block, num_warps=8,
        num_stages=1,
    )  # fmt: skip
    return (
        _bias_gradients(sums, sizes, how),
        _vector_gradients(key_sums, how["position_keys"], sizes, how),
        _vector_gradients(query_sums, how["position_queries"], sizes, how),
    )
