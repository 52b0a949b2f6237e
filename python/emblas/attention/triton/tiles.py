"""What the kernels of packed attention share: sequences, tiles of vectors."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emblas._triton import FLOATS, segment_bounds

LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
FAR = 2**30  # a window that hides nothing


@triton.jit
def sequence_bounds(cu_seqlens_q, cu_seqlens_k, sequence, q_tokens, k_tokens):
    """First query and first key of a sequence, and how many it has of each."""
    q_begin, q_end = segment_bounds(cu_seqlens_q, sequence, q_tokens)
    k_begin, k_end = segment_bounds(cu_seqlens_k, sequence, k_tokens)
    return q_begin, k_begin, (q_end - q_begin).to(tl.int32), (k_end - k_begin).to(tl.int32)


@triton.jit
def own_sequence(heads, cu_seqlens_q, cu_seqlens_k, q_tokens, k_tokens):
    """Sequence and head of a program; its first query and key, and how many it has of each."""
    sequence = tl.program_id(0) // heads
    head = (tl.program_id(0) % heads).to(tl.int64)
    q_begin, k_begin, queries, keys = sequence_bounds(
        cu_seqlens_q, cu_seqlens_k, sequence, q_tokens, k_tokens
    )
    return sequence, head, q_begin, k_begin, queries, keys


@triton.jit
def load_vectors(vectors, i, count, stride, dim, BLOCK: tl.constexpr):
    """Rows i, so far apart, of which there are ``count``; zeros elsewhere."""
    d = tl.arange(0, BLOCK)
    inside = (i < count)[:, None] & (d < dim)[None, :]
    return tl.load(vectors + i.to(tl.int64)[:, None] * stride + d[None, :], mask=inside, other=0.0)


@triton.jit
def products_of_parts(
    a,
    i,
    rows,
    a_stride,
    b,
    j,
    columns,
    b_stride,
    dim,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PART: tl.constexpr,
):
    """Products of the rows i of a with the rows j of b, which are too wide to be held at once."""
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, dim, PART):
        x = load_vectors(a + start, i, rows, a_stride, dim - start, PART)
        y = load_vectors(b + start, j, columns, b_stride, dim - start, PART)
        total = tl.dot(x, tl.trans(y), total, input_precision=PRECISION)
    return total


def serves(q: Tensor, k: Tensor, v: Tensor, widest: int) -> bool:
    """Tell whether kernels for vectors up to the widest take these queries, keys and values."""
    return (
        q.dtype in FLOATS
        and q.dtype == k.dtype == v.dtype
        and 1 <= q.shape[2] <= widest
        and 1 <= v.shape[2] <= widest
        and k.shape[1] == v.shape[1] > 0
        and max(q.shape[0], k.shape[0]) < FAR
    )


def radius(window: int) -> int:
    """Return the keys that a query sees on one side; all of them for a negative window."""
    return FAR if window < 0 else min(window, FAR)


def block(dim: int) -> int:
    """Return the elements of a tile's vectors."""
    return max(16, triton.next_power_of_2(dim))


def precision(dtype: torch.dtype) -> str:
    """Return how products are made: float32 as three of TF32, whose error is that of float32."""
    return "tf32x3" if dtype == torch.float32 else "ieee"
