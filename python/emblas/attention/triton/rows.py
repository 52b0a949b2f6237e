"""Chosen rows of attention in Triton. The formulas stand in ``csrc/attention/attention_rows.h``.

A program owns some tokens of one chosen row and key head, for products; one row and head, for sums;
and some tokens of one sequence and key head for the transposed sums, which take the sequence's rows
in the order in which they come. So every sum has one owner and one order: nothing is atomic.

Cost: 2 d flops for each number of s. Bytes: the sequences of the rows once for each row, of which
there are few, and s; for the transposed sums x and s once for each row, and the result. Memory is
the only limit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emblas import _op
from emblas._triton import FLOATS, segment_bounds
from emblas.attention.sequences import sequence_of
from emblas.attention.triton.tiles import load_vectors


@triton.jit
def _tokens_met(token, cu_seqlens, batch, tokens, max_length):
    """First token and length of the sequence of a token; none if that is nobody's."""
    low, high = 0, batch
    while high - low > 1:  # the last sequence that doesn't begin behind the token
        middle = (low + high) // 2
        behind = tl.load(cu_seqlens + middle) > token
        low, high = tl.where(behind, low, middle), tl.where(behind, middle, high)
    begin, end = segment_bounds(cu_seqlens, low, tokens)
    length = tl.where((token >= begin) & (token < end), end - begin, 0)
    return begin, tl.minimum(length, max_length).to(tl.int32)


@triton.jit
def _dot_rows(
    x,
    x_row: tl.int64,
    x_head: tl.int64,
    y,
    y_token: tl.int64,
    y_head: tl.int64,
    s,
    rows,
    cu_seqlens,
    batch,
    tokens,
    max_length,
    key_heads,
    group,
    dim,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = (tl.program_id(0) // key_heads).to(tl.int64)
    key_head = (tl.program_id(0) % key_heads).to(tl.int64)
    begin, length = _tokens_met(tl.load(rows + row), cu_seqlens, batch, tokens, max_length)
    j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    y += begin * y_token + key_head * y_head
    others = load_vectors(y, j, length, y_token, dim, BLOCK_D).to(tl.float32)
    for head in range(key_head * group, (key_head + 1) * group):
        own = tl.load(x + row * x_row + head * x_head + d, mask=d < dim, other=0.0).to(tl.float32)
        to = s + (row * key_heads * group + head) * max_length + j
        tl.store(to, tl.sum(others * own[None, :], 1), mask=j < max_length)


@triton.jit
def _sum_rows(
    s,
    y,
    y_token: tl.int64,
    y_head: tl.int64,
    x,
    rows,
    cu_seqlens,
    batch,
    tokens,
    max_length,
    heads,
    group,
    dim,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    begin, length = _tokens_met(tl.load(rows + row), cu_seqlens, batch, tokens, max_length)
    d = tl.arange(0, BLOCK_D)
    y += begin * y_token + head // group * y_head
    s += (row * heads + head) * max_length
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, length, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        weights = tl.load(s + j, mask=j < length, other=0.0)
        others = load_vectors(y, j, length, y_token, dim, BLOCK_D).to(tl.float32)
        total += tl.sum(weights[:, None] * others, 0)
    to = x + (row * heads + head) * dim + d
    tl.store(to, total.to(x.dtype.element_ty), mask=d < dim)


@triton.jit
def _spread_rows(
    s,
    x,
    x_row: tl.int64,
    x_head: tl.int64,
    y,
    order,
    bounds,
    cu_seqlens,
    tokens,
    max_length,
    key_heads,
    group,
    dim,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sequence = tl.program_id(0) // key_heads
    key_head = (tl.program_id(0) % key_heads).to(tl.int64)
    begin, end = segment_bounds(cu_seqlens, sequence, tokens)
    length = tl.minimum(end - begin, max_length)
    first, last = tl.load(bounds + sequence), tl.load(bounds + sequence + 1)
    j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for index in range(first, last):
        row = tl.load(order + index)
        for head in range(key_head * group, (key_head + 1) * group):
            at = (row * key_heads * group + head) * max_length + j
            weights = tl.load(s + at, mask=j < length, other=0.0)
            own = tl.load(x + row * x_row + head * x_head + d, mask=d < dim, other=0.0)
            total += weights[:, None] * own.to(tl.float32)[None, :]
    to = y + ((begin + j)[:, None] * key_heads + key_head) * dim + d[None, :]
    tl.store(to, total, mask=(j < length)[:, None] & (d < dim)[None, :])


def _tile(dim: int, elements: int = 4096) -> tuple[int, int]:
    """Return tokens and width of a tile for 4 warps (see docs/gpu_kernels.md)."""
    wide = triton.next_power_of_2(dim)
    return min(1024, max(1, elements // wide)), wide


def _serves(vectors: Tensor, heads: int, key_heads: int) -> bool:
    return (
        vectors.dtype in FLOATS
        and 1 <= vectors.shape[2] <= 1024
        and key_heads > 0
        and heads % key_heads == 0
    )


def _supports_dots(x: Tensor, y: Tensor, rows: Tensor, cu_seqlens: Tensor, max_length: int) -> bool:
    return x.dtype == y.dtype and _serves(x, x.shape[1], y.shape[1])


@_op.kernel(_supports_dots)
def row_dots(x: Tensor, y: Tensor, rows: Tensor, cu_seqlens: Tensor, max_length: int) -> Tensor:
    count, heads, dim = x.shape
    tokens, key_heads, _ = y.shape
    batch = cu_seqlens.shape[0] - 1
    s = x.new_empty(count, heads, max_length, dtype=torch.float32)
    if batch == 0:
        return s.zero_()
    block_n, block_d = _tile(dim)
    _dot_rows[(count * key_heads, triton.cdiv(max_length, block_n))](
        x, x.stride(0), x.stride(1), y, y.stride(0), y.stride(1), s, rows, cu_seqlens, batch,
        tokens, max_length, key_heads, heads // key_heads, dim, BLOCK_N=block_n, BLOCK_D=block_d,
        num_warps=4,
    )  # fmt: skip
    return s


def _supports_sums(s: Tensor, y: Tensor, rows: Tensor, cu_seqlens: Tensor) -> bool:
    return s.dtype == torch.float32 and _serves(y, s.shape[1], y.shape[1])


@_op.kernel(_supports_sums)
def row_sums(s: Tensor, y: Tensor, rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    count, heads, max_length = s.shape
    tokens, key_heads, dim = y.shape
    batch = cu_seqlens.shape[0] - 1
    x = y.new_empty(count, heads, dim)
    if batch == 0:
        return x.zero_()
    block_n, block_d = _tile(dim)
    _sum_rows[(count * heads,)](
        s, y, y.stride(0), y.stride(1), x, rows, cu_seqlens, batch, tokens, max_length, heads,
        heads // key_heads, dim, BLOCK_N=block_n, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
    return x


def _supports_outer(
    s: Tensor, x: Tensor, rows: Tensor, cu_seqlens: Tensor, tokens: int, key_heads: int
) -> bool:
    return s.dtype == torch.float32 and _serves(x, x.shape[1], key_heads)


@_op.kernel(_supports_outer)
def row_outer(
    s: Tensor, x: Tensor, rows: Tensor, cu_seqlens: Tensor, tokens: int, key_heads: int
) -> Tensor:
    _, heads, dim = x.shape
    max_length, batch = s.shape[2], cu_seqlens.shape[0] - 1
    y = s.new_zeros(tokens, key_heads, dim)  # of sequences without a row, of whatever length
    if batch == 0:
        return y
    # The rows of each sequence, in their order; nobody's are before the first.
    sequences = torch.where(rows < 0, -1, sequence_of(rows, cu_seqlens))
    ordered, order = sequences.sort(stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(batch + 1, device=rows.device))
    block_n, block_d = _tile(dim, 2048)
    _spread_rows[(batch * key_heads, triton.cdiv(max_length, block_n))](
        s, x, x.stride(0), x.stride(1), y, order, bounds, cu_seqlens, tokens, max_length, key_heads,
        heads // key_heads, dim, BLOCK_N=block_n, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
    return y
