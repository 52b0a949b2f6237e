"""Disentangled scores in the Triton kernels (He et al., 2021, arXiv 2006.03654, section 3.1).

The formulas stand in ``csrc/attention/attention.h``. A square tile of pairs has less than twice as
many distances j - p_i as it has keys. So its queries and its keys are multiplied with the position
vectors of these distances, in two halves, and each pair looks up its two numbers: row r of such a
product is turned by r. Backward turns the gradients of the scores the other way round, so that a
distance is a column, and multiplies those. Nothing is as large as (tokens, slots).

Cost: 8 d flops for each pair forward; backward does it again, and 4 d more for the gradients of q
and of k each. Vectors are read by distance, from the caches: a tile has few slots.
"""

import torch
import triton
import triton.language as tl

from emblas.attention.op import Shaping


@triton.jit
def position_vectors(
    table, lookup, radius, heads, head, distance, head_dim, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Vectors of a head in a table (slots, heads, head_dim), for each distance."""
    slot = tl.load(lookup + radius + tl.minimum(tl.maximum(distance, -radius), radius))
    d = tl.arange(0, BLOCK_D)
    at = (slot.to(tl.int64) * heads + head)[:, None] * head_dim + d[None, :]
    return tl.load(table + at, mask=(d < head_dim)[None, :], other=0.0)


@triton.jit
def add_position_scores(
    scores,
    factor,
    row_tile,
    row_table,
    row_heads,
    row_head,
    column_tile,
    column_table,
    column_heads,
    column_head,
    lookup,
    radius,
    first,
    head_dim,
    SIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Scores of a square tile with ``factor`` times the products with position vectors.

    A row's vector is multiplied with those of ``row_table``, where that is not None; columns alike.
    The first query and the first key are ``first`` apart. SIGN is 1 where keys are columns, and -1
    where they are rows.
    """
    apart = SIGN * (tl.arange(0, BLOCK)[None, :] - tl.arange(0, BLOCK)[:, None])
    place = (apart + BLOCK) % BLOCK
    for start in range(-BLOCK, BLOCK, BLOCK):
        distance = first + start + tl.arange(0, BLOCK)
        own = (apart >= start) & (apart < start + BLOCK)
        if row_table is not None:
            vectors = position_vectors(
                row_table, lookup, radius, row_heads, row_head, distance, head_dim, BLOCK_D
            )
            products = tl.dot(row_tile, tl.trans(vectors), input_precision=PRECISION)
            scores += tl.where(own, factor * tl.gather(products, place, 1), 0.0)
        if column_table is not None:
            vectors = position_vectors(
                column_table, lookup, radius, column_heads, column_head, distance, head_dim, BLOCK_D
            )
            products = tl.dot(vectors, tl.trans(column_tile), input_precision=PRECISION)
            scores += tl.where(own, factor * tl.gather(products, place, 0), 0.0)
    return scores


@triton.jit
def add_position_gradients(
    total,
    grad_scores,
    table,
    heads,
    head,
    lookup,
    radius,
    first,
    head_dim,
    SIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of the rows with what comes from their products with ``table``.

    ``first`` and SIGN are those of :func:`add_position_scores`.
    """
    column = tl.arange(0, BLOCK)[:, None] + SIGN * tl.arange(0, BLOCK)[None, :]
    by_distance = tl.gather(grad_scores, (column + BLOCK) % BLOCK, 1)
    for start in range(-BLOCK, BLOCK, BLOCK):
        distance = first + start + tl.arange(0, BLOCK)
        vectors = position_vectors(table, lookup, radius, heads, head, distance, head_dim, BLOCK_D)
        own = (column + SIGN * start >= 0) & (column + SIGN * start < BLOCK)
        part = tl.where(own, by_distance, 0.0).to(vectors.dtype)
        total = tl.dot(part, vectors, total, input_precision=PRECISION)
    return total


def has_rows(shaping: Shaping) -> bool:
    """Tell whether the position tables have a row that kernels can read."""
    tables = (shaping.position_keys, shaping.position_queries)
    return all(x is None or x.shape[0] > 0 for x in tables)


def position_tile(dtype: torch.dtype, dim: int) -> tuple[int, int, int, int]:
    """Return queries, keys, warps and stages of a square tile with disentangled scores.

    The largest whose registers don't spill on any architecture (docs/gpu_kernels.md), at least for
    the head_dim of 64 that models have.
    """
    if dtype == torch.float32 or dim > 128:
        return 16, 16, 8, 1
    return 32, 32, 4 if dim <= 64 else 8, 1
