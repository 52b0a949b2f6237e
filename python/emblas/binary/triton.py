"""Bit codes in Triton: packing signs, and exact search. Bits are laid out as ``binary.h`` says.

Search: a program owns a chunk of the codes and four queries (one, if there is but one). It walks
through the chunk in tiles: differing bits are counted word by word, and each (distance, row)
becomes one 63-bit number, distance first. Numbers are all different, so their k smallest are well
defined whatever the order of the work. A program keeps its smallest ones sorted and looks further
into a tile only if some number in it is smaller than the largest kept: after the first tiles that
is rare. The lists of the chunks, k numbers each, are merged by torch.topk.

Bytes: the codes are read once per four queries from the L2 cache, once from memory if the queries
of a chunk run at the same time; distances never reach memory. Counting bits is the limit for many
queries, memory bandwidth for few.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emblas import _op

_BLOCK_ROWS, _BLOCK_BYTES = 32, 16  # pack_sign
_BLOCK_CODES, _BLOCK_WORDS, _BLOCK_QUERIES = 256, 8, 4
_KEPT = (16, 64, 256)  # sizes of the lists; the last is the largest k
_PROGRAMS = 2048
_ROW_BITS = tl.constexpr(40)  # of a number; the 23 above hold distances of codes below 2^20 bytes
_NOTHING = tl.constexpr(-(2**63) + 1)


@triton.jit
def _pack_sign(
    x, row_stride: tl.int64, out, rows, dim, bytes, BLOCK_R: tl.constexpr, BLOCK_B: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.program_id(1) * (BLOCK_B * 8) + tl.arange(0, BLOCK_B * 8)
    inside = (row < rows)[:, None] & (d < dim)[None, :]
    values = tl.load(x + row[:, None] * row_stride + d[None, :], mask=inside, other=0.0)
    bits = (values > 0).to(tl.int32).reshape(BLOCK_R, BLOCK_B, 8)
    packed = tl.sum(bits << (7 - tl.arange(0, 8))[None, None, :], 2)
    byte = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    wanted = (row < rows)[:, None] & (byte < bytes)[None, :]
    tl.store(out + row[:, None] * bytes + byte[None, :], packed.to(tl.uint8), mask=wanted)


@triton.jit
def _count_bits(x):
    """Bits set in 32-bit words; the compiler knows this form and emits one instruction."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101) >> 24


@triton.jit
def _nearest_of_chunk(
    queries,
    query_stride: tl.int64,
    codes,
    code_stride: tl.int64,
    found,
    num_queries,
    num_codes: tl.int64,
    words,
    tiles,
    KEPT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Numbers of the KEPT nearest codes of a chunk, negated, the largest first."""
    query = tl.program_id(0).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    chunk = tl.program_id(1).to(tl.int64)
    lanes = tl.arange(0, BLOCK_W)
    best = tl.full([BLOCK_Q, KEPT], _NOTHING, tl.int64)
    limit = tl.full([BLOCK_Q], _NOTHING, tl.int64)
    for tile in range(0, tiles):
        row = (chunk * tiles + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        distance = tl.zeros([BLOCK_Q, BLOCK_N], tl.int32)
        for start in range(0, words, BLOCK_W):
            w = start + lanes
            code = tl.load(
                codes + row[:, None] * code_stride + w[None, :],
                mask=(row < num_codes)[:, None] & (w < words)[None, :],
                other=0,
            )
            wanted = tl.load(
                queries + query[:, None] * query_stride + w[None, :],
                mask=(query < num_queries)[:, None] & (w < words)[None, :],
                other=0,
            )
            differing = wanted[:, None, :] ^ code[None, :, :]
            distance += tl.sum(_count_bits(differing.to(tl.uint32)).to(tl.int32), 2)
        number = -((distance.to(tl.int64) << _ROW_BITS) | row[None, :])
        number = tl.where((row < num_codes)[None, :], number, _NOTHING)
        if tl.max(tl.max((number > limit[:, None]).to(tl.int32), 1), 0) > 0:
            # Two descending lists, one reversed: the larger of each pair are the largest of all.
            rivals = tl.flip(tl.topk(number, KEPT), 1)
            best = tl.sort(tl.maximum(best, rivals), descending=True)
            limit = tl.min(best, 1)
    at = (query[:, None] * tl.num_programs(1) + chunk) * KEPT + tl.arange(0, KEPT)[None, :]
    tl.store(found + at, best, mask=(query < num_queries)[:, None])


@_op.kernel()
def pack_sign(x: Tensor) -> Tensor:
    rows, dim = x.shape
    width = triton.cdiv(dim, 8)
    out = x.new_empty(rows, width, dtype=torch.uint8)
    _pack_sign[(triton.cdiv(rows, _BLOCK_ROWS), triton.cdiv(width, _BLOCK_BYTES))](
        x, x.stride(0), out, rows, dim, width, BLOCK_R=_BLOCK_ROWS, BLOCK_B=_BLOCK_BYTES
    )
    return out


def _as_words(codes: Tensor) -> Tensor:
    """View codes as 32-bit words; as they are where their width or place in memory forbids it."""
    whole = codes.shape[1] % 4 == codes.stride(0) % 4 == codes.data_ptr() % 4 == 0
    return codes.view(torch.int32) if whole and codes.storage_offset() % 4 == 0 else codes


def _hamming_topk_supports(queries: Tensor, codes: Tensor, k: int) -> bool:
    return 0 <= k <= _KEPT[-1] and codes.shape[0] < 2**40 and codes.shape[1] < 2**20


@_op.kernel(_hamming_topk_supports)
def hamming_topk(queries: Tensor, codes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    num_queries, rows = queries.shape[0], codes.shape[0]
    query_words, code_words = _as_words(queries), _as_words(codes)
    if query_words.dtype != code_words.dtype:
        query_words, code_words = queries, codes
    kept = next(size for size in _KEPT if k <= size)
    # Sorting long lists of several queries at once would take all registers.
    block_queries = 1 if num_queries == 1 or kept > 64 else _BLOCK_QUERIES
    groups = triton.cdiv(num_queries, block_queries)
    tiles = triton.cdiv(rows, _BLOCK_CODES)
    chunks = max(1, min(tiles, _PROGRAMS // max(groups, 1)))
    tiles_per_chunk = triton.cdiv(tiles, chunks)
    found = torch.empty(num_queries, chunks * kept, dtype=torch.int64, device=codes.device)
    _nearest_of_chunk[(groups, chunks)](
        query_words, query_words.stride(0), code_words, code_words.stride(0), found, num_queries,
        rows, code_words.shape[1], tiles_per_chunk,
        KEPT=kept, BLOCK_Q=block_queries, BLOCK_N=_BLOCK_CODES, BLOCK_W=_BLOCK_WORDS,
    )  # fmt: skip
    best = found.topk(k, dim=1).values  # sorted
    missing = best == _NOTHING.value
    distances = (-best >> _ROW_BITS.value).int()
    ids = -best & (2**_ROW_BITS.value - 1)
    largest = torch.iinfo(torch.int32).max
    return distances.masked_fill_(missing, largest), ids.masked_fill_(missing, -1)
