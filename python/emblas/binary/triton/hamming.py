"""Exact search by Hamming distance, in Triton.

A program owns a chunk of the codes and four queries (one, if there is but one). Differing bits are
counted word by word; distances never reach memory. Up to 256 neighbours are kept in a sorted list
(``select.py``). More of them, and all within a radius, are found in two passes, since distances are
small integers: the first counts how many codes of each chunk are at each distance. That tells the
distance at which a query's results end, how many of the codes at just that distance are still
among them, and where each chunk's results begin. The second pass writes them there, in the order of
the rows, and torch sorts them.

Bytes: the codes are read once per four queries and pass from the L2 cache, once from memory if the
queries of a chunk run at the same time. Counting bits is the limit for many queries, memory
bandwidth for few. The counts take 4 bytes for each query and each distance that may be found.
"""

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from emblas import _op
from emblas.binary.triton import select
from emblas.binary.triton.select import NOTHING, keep_best, may_return, rows_of, store_best

_BLOCK_CODES, _BLOCK_WORDS, _BLOCK_QUERIES = 256, 8, 4
_COUNTERS = 2**24  # more only if one chunk needs them
_ROW_BITS = tl.constexpr(40)  # of a number; the 23 above hold distances of codes below 2^20 bytes
_NO_DISTANCE = torch.iinfo(torch.int32).max
_LAST = torch.iinfo(torch.int64).max  # above every (distance, row)


@triton.jit
def _count_bits(x):
    """Bits set in 32-bit words; the compiler knows this form and emits one instruction."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101) >> 24


@triton.jit
def _distances(
    queries,
    query_stride,
    query,
    num_queries,
    codes,
    code_stride,
    row,
    given,
    words,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Differing bits of queries and codes, (BLOCK_Q, BLOCK_N); only codes given are read."""
    distance = tl.zeros([BLOCK_Q, BLOCK_N], tl.int32)
    for start in range(0, words, BLOCK_W):
        w = start + tl.arange(0, BLOCK_W)
        code = tl.load(
            codes + row[:, None] * code_stride + w[None, :],
            mask=given[:, None] & (w < words)[None, :],
            other=0,
        )
        wanted = tl.load(
            queries + query[:, None] * query_stride + w[None, :],
            mask=(query < num_queries)[:, None] & (w < words)[None, :],
            other=0,
        )
        differing = wanted[:, None, :] ^ code[None, :, :]
        distance += tl.sum(_count_bits(differing.to(tl.uint32)).to(tl.int32), 2)
    return distance


@triton.jit
def _all_distances(
    queries,
    query_stride: tl.int64,
    codes,
    code_stride: tl.int64,
    out,
    num_queries,
    num_codes: tl.int64,
    words,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    groups = tl.cdiv(num_queries, BLOCK_Q)
    program = tl.program_id(0).to(tl.int64)
    query = program % groups * BLOCK_Q + tl.arange(0, BLOCK_Q)
    row = program // groups * BLOCK_N + tl.arange(0, BLOCK_N)
    distance = _distances(
        queries, query_stride, query, num_queries, codes, code_stride, row, row < num_codes, words,
        BLOCK_Q, BLOCK_N, BLOCK_W,
    )  # fmt: skip
    inside = (query < num_queries)[:, None] & (row < num_codes)[None, :]
    tl.store(out + query[:, None] * num_codes + row[None, :], distance, mask=inside)


@triton.jit
def _scan_tile(
    queries,
    query_stride,
    query,
    codes,
    code_stride,
    bitmaps,
    bitmap_stride,
    ids,
    num_queries,
    num_codes,
    count,
    words,
    first,
    LATER_ONLY: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Rows of a tile, their distances from the queries, and which pairs may be returned."""
    row, there = rows_of(first + tl.arange(0, BLOCK_N), count, ids, num_codes)
    wanted = may_return(query, num_queries, row, there, bitmaps, bitmap_stride)
    if LATER_ONLY:
        wanted = wanted & (row[None, :] > query[:, None])
    given = tl.max(wanted.to(tl.int32), 0) > 0
    distance = tl.zeros([BLOCK_Q, BLOCK_N], tl.int32)
    if tl.max(given.to(tl.int32), 0) > 0:
        distance = _distances(
            queries, query_stride, query, num_queries, codes, code_stride, row, given, words,
            BLOCK_Q, BLOCK_N, BLOCK_W,
        )  # fmt: skip
    return row, distance, wanted


@triton.jit
def _nearest_of_chunk(
    queries,
    query_stride: tl.int64,
    codes,
    code_stride: tl.int64,
    bitmaps,
    bitmap_stride: tl.int64,
    ids,
    num_queries,
    num_codes: tl.int64,
    count: tl.int64,
    words,
    tiles,
    found,
    KEPT: tl.constexpr,
    LATER_ONLY: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Numbers of the KEPT nearest codes of a chunk, negated, the largest first."""
    query = tl.program_id(0).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    chunk = tl.program_id(1).to(tl.int64)
    best = tl.full([BLOCK_Q, KEPT], NOTHING, tl.int64)
    limit = tl.full([BLOCK_Q], NOTHING, tl.int64)
    for tile in range(0, tiles):
        row, distance, wanted = _scan_tile(
            queries, query_stride, query, codes, code_stride, bitmaps, bitmap_stride, ids,
            num_queries, num_codes, count, words, (chunk * tiles + tile) * BLOCK_N,
            LATER_ONLY, BLOCK_Q, BLOCK_N, BLOCK_W,
        )  # fmt: skip
        number = -((distance.to(tl.int64) << _ROW_BITS) | row[None, :])
        best, limit = keep_best(tl.where(wanted, number, NOTHING), best, limit, KEPT)
    store_best(found, query, num_queries, chunk, best, KEPT)


@triton.jit
def _first_tile(query, chunk, tiles, ids, LATER_ONLY: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where a chunk begins: rows before the first query's successor aren't wanted."""
    first = chunk * 0
    if LATER_ONLY and ids is None:
        first = tl.maximum((tl.min(query, 0) + 1) // BLOCK_N - chunk * tiles, 0)
    return first


@triton.jit
def _count_of_chunk(
    queries,
    query_stride: tl.int64,
    codes,
    code_stride: tl.int64,
    bitmaps,
    bitmap_stride: tl.int64,
    ids,
    num_queries,
    num_codes: tl.int64,
    count: tl.int64,
    words,
    tiles,
    counts,
    bins,
    LATER_ONLY: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """How many codes of a chunk are at each distance below ``bins``, (queries, chunks, bins)."""
    query = tl.program_id(0).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    chunk = tl.program_id(1).to(tl.int64)
    first_counter = (query * tl.num_programs(1) + chunk) * bins
    for tile in range(_first_tile(query, chunk, tiles, ids, LATER_ONLY, BLOCK_N), tiles):
        _, distance, wanted = _scan_tile(
            queries, query_stride, query, codes, code_stride, bitmaps, bitmap_stride, ids,
            num_queries, num_codes, count, words, (chunk * tiles + tile) * BLOCK_N,
            LATER_ONLY, BLOCK_Q, BLOCK_N, BLOCK_W,
        )  # fmt: skip
        at = counts + first_counter[:, None] + distance
        tl.atomic_add(at, 1, mask=wanted & (distance < bins), sem="relaxed")


@triton.jit
def _collect_chunk(
    queries,
    query_stride: tl.int64,
    codes,
    code_stride: tl.int64,
    bitmaps,
    bitmap_stride: tl.int64,
    ids,
    num_queries,
    num_codes: tl.int64,
    count: tl.int64,
    words,
    tiles,
    limits,
    ties,
    starts,
    found,
    LATER_ONLY: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Write a chunk's results, in the order of rows: those below the limit, and the first ties."""
    query = tl.program_id(0).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    chunk = tl.program_id(1).to(tl.int64)
    exists = query < num_queries
    limit = tl.load(limits + query, mask=exists, other=0)
    at = query * tl.num_programs(1) + chunk
    ties_left = tl.load(ties + at, mask=exists, other=0)
    free = tl.load(starts + at, mask=exists, other=0)
    for tile in range(_first_tile(query, chunk, tiles, ids, LATER_ONLY, BLOCK_N), tiles):
        row, distance, wanted = _scan_tile(
            queries, query_stride, query, codes, code_stride, bitmaps, bitmap_stride, ids,
            num_queries, num_codes, count, words, (chunk * tiles + tile) * BLOCK_N,
            LATER_ONLY, BLOCK_Q, BLOCK_N, BLOCK_W,
        )  # fmt: skip
        wanted = wanted & (distance <= limit[:, None])
        if tl.max(tl.max(wanted.to(tl.int32), 1), 0) > 0:
            # Two running sums in one: of the tied codes and, in the lower half, of the nearer ones.
            tied = wanted & (distance == limit[:, None])
            ranks = tl.cumsum(wanted.to(tl.int32) + tied.to(tl.int32) * 0xFFFF, 1)
            tie, nearer = ranks >> 16, ranks & 0xFFFF
            place = free[:, None] + nearer + tl.minimum(tie, ties_left[:, None]) - 1
            number = (distance.to(tl.int64) << _ROW_BITS) | row[None, :]
            kept = wanted & ((distance < limit[:, None]) | (tie <= ties_left[:, None]))
            tl.store(found + place, number, mask=kept)
            last = tl.max(ranks, 1)
            free += (last & 0xFFFF) + tl.minimum(last >> 16, ties_left)
            ties_left -= tl.minimum(last >> 16, ties_left)


def _as_words(codes: Tensor) -> Tensor:
    """View codes as 32-bit words; as they are where their width or place in memory forbids it."""
    whole = codes.shape[1] % 4 == codes.stride(0) % 4 == codes.data_ptr() % 4 == 0
    return codes.view(torch.int32) if whole and codes.storage_offset() % 4 == 0 else codes


def _as_same_words(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    words = _as_words(a), _as_words(b)
    return words if words[0].dtype == words[1].dtype else (a, b)


@dataclasses.dataclass(frozen=True)
class _Scan:
    """A walk of all queries through all rows that a filter allows."""

    grid: tuple[int, int]  # groups of queries, chunks of rows
    arguments: tuple[Any, ...]  # the first ones of each kernel
    constants: dict[str, Any]

    @classmethod
    def of(
        cls,
        queries: Tensor,
        codes: Tensor,
        filter: Tensor | None,
        later_only: bool,
        block_queries: int,
        most_chunks: int = 2**16,
    ) -> "_Scan":
        """Cut a search into programs."""
        words, code_words = _as_same_words(queries, codes)
        bitmaps, bitmap_stride, ids, count = select.allowed_rows(filter, codes.shape[0])
        groups = triton.cdiv(queries.shape[0], block_queries)
        tiles = triton.cdiv(count, _BLOCK_CODES)
        chunks = min(select.chunks(groups, tiles), most_chunks)
        arguments = (
            words, words.stride(0), code_words, code_words.stride(0), bitmaps, bitmap_stride, ids,
            queries.shape[0], codes.shape[0], count, code_words.shape[1],
            triton.cdiv(tiles, chunks),
        )  # fmt: skip
        blocks = {"BLOCK_Q": block_queries, "BLOCK_N": _BLOCK_CODES, "BLOCK_W": _BLOCK_WORDS}
        return cls((groups, chunks), arguments, {"LATER_ONLY": later_only, **blocks})


class _Found:
    """How many codes are within a radius of each query, and the second pass that returns them."""

    def __init__(
        self,
        queries: Tensor,
        codes: Tensor,
        radius: int,
        filter: Tensor | None,
        later_only: bool,
    ) -> None:
        num_queries = queries.shape[0]
        bins = min(radius, 8 * codes.shape[1]) + 1
        self.scan = _Scan.of(
            queries, codes, filter, later_only,
            1 if num_queries == 1 else _BLOCK_QUERIES,
            max(1, _COUNTERS // max(1, num_queries * bins)),
        )  # fmt: skip
        shape = (num_queries, self.scan.grid[1], bins)
        self.counts = torch.zeros(shape, dtype=torch.int32, device=codes.device)
        _count_of_chunk[self.scan.grid](
            *self.scan.arguments, self.counts, bins, **self.scan.constants
        )

    def nearest(self, kept: int) -> tuple[Tensor, Tensor]:
        """Return the first ``kept`` of each query by distance and row, filled up."""
        num_queries, chunks, bins = self.counts.shape
        shape = (num_queries, kept)
        found = torch.full(shape, _LAST, dtype=torch.int64, device=self.counts.device)
        if kept == 0:
            return _distances_and_rows(found)
        up_to = self.counts.cumsum(2, dtype=torch.int32)  # each distance
        limits = (up_to.sum(1) < kept).sum(1).clamp_max(bins - 1)
        at = limits[:, None, None].expand(-1, chunks, 1)
        ties = self.counts.gather(2, at)[..., 0]
        below = up_to.gather(2, at)[..., 0] - ties
        ties_left = kept - below.sum(1)[:, None] - (ties.cumsum(1) - ties)
        ties_left = ties_left.clamp_min(0)
        results = below + torch.minimum(ties, ties_left)
        starts = results.cumsum(1) - results
        starts += kept * torch.arange(num_queries, device=starts.device)[:, None]
        self._collect(limits, ties_left, starts, found)
        found = found.sort(1).values
        missing = found == _LAST
        distances, ids = _distances_and_rows(found)
        return distances.masked_fill_(missing, _NO_DISTANCE), ids.masked_fill_(missing, -1)

    def all(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return offsets, distances and rows of all of them; waits for the device."""
        num_queries, _, bins = self.counts.shape
        results = self.counts.sum(2)
        ends = results.flatten().cumsum(0).view_as(results)
        offsets = torch.nn.functional.pad(ends[:, -1], (1, 0))
        total = int(offsets[-1])
        found = torch.empty(total, dtype=torch.int64, device=ends.device)
        limits = torch.full((num_queries,), bins, device=ends.device)
        self._collect(limits, torch.zeros_like(ends), ends - results, found)
        query = torch.arange(num_queries, device=ends.device)
        query = query.repeat_interleave(offsets.diff(), output_size=total)
        # Stable, so that rows keep their order.
        order = (query << 23 | found >> _ROW_BITS.value).sort(stable=True).indices
        return offsets, *_distances_and_rows(found[order])

    def _collect(self, limits: Tensor, ties: Tensor, starts: Tensor, found: Tensor) -> None:
        _collect_chunk[self.scan.grid](
            *self.scan.arguments, limits, ties, starts, found, **self.scan.constants
        )


def _distances_and_rows(numbers: Tensor) -> tuple[Tensor, Tensor]:
    return (numbers >> _ROW_BITS.value).int(), numbers & (2**_ROW_BITS.value - 1)


def _supports(queries: Tensor, codes: Tensor, *others: object) -> bool:
    return codes.shape[0] < 2**40 and codes.shape[1] < 2**20


@_op.kernel(_supports)
def hamming_distance(a: Tensor, b: Tensor) -> Tensor:
    words, code_words = _as_same_words(a, b)
    block_queries = 1 if a.shape[0] == 1 else _BLOCK_QUERIES
    out = a.new_empty(a.shape[0], b.shape[0], dtype=torch.int32)
    programs = triton.cdiv(a.shape[0], block_queries) * triton.cdiv(b.shape[0], _BLOCK_CODES)
    _all_distances[(programs,)](
        words, words.stride(0), code_words, code_words.stride(0), out, a.shape[0], b.shape[0],
        words.shape[1],
        BLOCK_Q=block_queries, BLOCK_N=_BLOCK_CODES, BLOCK_W=_BLOCK_WORDS,
    )  # fmt: skip
    return out


@_op.kernel(_supports)
def hamming_topk(
    queries: Tensor, codes: Tensor, k: int, filter: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if k > select.LISTS[-1]:
        return _Found(queries, codes, 8 * codes.shape[1], filter, False).nearest(k)
    num_queries = queries.shape[0]
    kept = next(size for size in select.LISTS if k <= size)
    # Sorting long lists of several queries at once would take all registers.
    block_queries = 1 if num_queries == 1 or kept > 64 else _BLOCK_QUERIES
    scan = _Scan.of(queries, codes, filter, False, block_queries)
    shape = (num_queries, scan.grid[1] * kept)
    found = torch.empty(shape, dtype=torch.int64, device=codes.device)
    _nearest_of_chunk[scan.grid](*scan.arguments, found, KEPT=kept, **scan.constants)
    best = found.topk(k, dim=1).values  # sorted
    missing = best == NOTHING.value
    distances, ids = _distances_and_rows(-best)
    return distances.masked_fill_(missing, _NO_DISTANCE), ids.masked_fill_(missing, -1)


@_op.kernel(_supports)
def range_search(
    queries: Tensor,
    codes: Tensor,
    radius: int,
    max_results: int,
    filter: Tensor | None,
    later_only: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    found = _Found(queries, codes, radius, filter, later_only)
    return found.counts.sum((1, 2)), *found.nearest(max_results)


@_op.kernel(_supports)
def range_search_csr(
    queries: Tensor, codes: Tensor, radius: int, filter: Tensor | None, later_only: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _Found(queries, codes, radius, filter, later_only).all()
