"""Exact search by scores, in Triton: of vectors, and of real-valued queries against bit codes.

A program owns a chunk of the documents and 16 queries. It computes a tile of scores on tensor cores
(``dots.py``) and keeps the best in sorted lists (``select.py``). Where more are wanted than a list
holds, candidates are written block by block of documents, and torch.topk merges each block with
the best so far: working memory is bounded, and the answer the same.

Bytes: documents are read once per 16 queries from the L2 cache, once from memory if the queries of
a chunk run at the same time. For few queries memory bandwidth is the limit, for bits their
unpacking; for many queries the tensor cores.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emblas import _op
from emblas._triton import FLOATS
from emblas.binary.triton import select
from emblas.binary.triton.dots import add_dots, load_values
from emblas.binary.triton.select import NOTHING, keep_best, may_return, rows_of, store_best

_BLOCK_QUERIES, _BLOCK_ROWS, _BLOCK_DIM = 16, 64, 32
_LISTS = (16, 64)  # at most _BLOCK_ROWS
_CANDIDATES = 2**24  # in one block
_GATHER_ROWS, _GATHER_DIM = 16, 128
_DOT, _COSINE, _L2 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_LAST_ROW = tl.constexpr(2**32 - 1)


@triton.jit
def _numbers(scores, row):
    """Candidates (queries, rows): descending score, then ascending row."""
    scores = tl.where(scores == scores, scores, float("-inf"))  # NaN comes last
    scores = tl.where(scores == 0, 0.0, scores)  # -0 ties with 0
    bits = scores.to(tl.int32, bitcast=True)
    ascending = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ascending.to(tl.int64) << 32) | (row ^ _LAST_ROW)[None, :]


@triton.jit
def _finish(dots, squares, query_squares, METRIC: tl.constexpr):
    if METRIC == _COSINE:
        return tl.where(squares > 0, dots / tl.sqrt_rn(squares), 0.0)
    elif METRIC == _L2:
        return 2 * dots - squares - query_squares
    else:
        return dots


@triton.jit
def _scores(
    queries,
    query_stride,
    query,
    num_queries,
    documents,
    document_stride,
    row,
    given,
    dim,
    planes,
    METRIC: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    total = tl.zeros([BLOCK_Q, BLOCK_N], tl.float32)
    squares = tl.zeros([BLOCK_N], tl.float32)
    query_squares = tl.zeros([BLOCK_Q], tl.float32)
    weight = tl.full([BLOCK_Q, BLOCK_N], 1.0, tl.float32)
    for plane in range(0, planes):
        dots = tl.zeros([BLOCK_Q, BLOCK_N], tl.float32)
        plane_start = documents + plane * tl.cdiv(dim, 8)
        for first in range(0, dim, BLOCK_D):
            wanted = load_values(
                queries, query_stride, query, query < num_queries, first, dim,
                False, BLOCK_Q, BLOCK_D,
            )  # fmt: skip
            values = load_values(
                plane_start, document_stride, row, given, first, dim, BITS, BLOCK_N, BLOCK_D
            )
            dots = add_dots(dots, wanted, values, tl.float32)
            if METRIC != _DOT:
                squares += tl.sum(values * values, 1)
            if METRIC == _L2:
                query_squares += tl.sum(wanted * wanted, 1)
        total += weight * dots
        weight *= 0.5
    return _finish(total, squares[None, :], query_squares[:, None], METRIC)


@triton.jit
def _highest_of_chunk(
    queries,
    query_stride: tl.int64,
    documents,
    document_stride: tl.int64,
    scale,
    bitmaps,
    bitmap_stride: tl.int64,
    ids,
    num_queries,
    num_documents: tl.int64,
    start: tl.int64,
    count: tl.int64,
    dim,
    planes,
    tiles,
    found,
    METRIC: tl.constexpr,
    BITS: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Find the KEPT best candidates of a chunk, descending; all of them if KEPT is 0."""
    query = tl.program_id(0).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    chunk = tl.program_id(1).to(tl.int64)
    if KEPT > 0:
        best = tl.full([BLOCK_Q, KEPT], NOTHING, tl.int64)
        limit = tl.full([BLOCK_Q], NOTHING, tl.int64)
    for tile in range(0, tiles):
        place = (chunk * tiles + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        row, there = rows_of(start + place, count, ids, num_documents)
        wanted = may_return(query, num_queries, row, there, bitmaps, bitmap_stride)
        given = tl.max(wanted.to(tl.int32), 0) > 0
        scores = tl.zeros([BLOCK_Q, BLOCK_N], tl.float32)
        if tl.max(given.to(tl.int32), 0) > 0:
            scores = _scores(
                queries, query_stride, query, num_queries, documents, document_stride, row, given,
                dim, planes, METRIC, BITS, BLOCK_Q, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            if scale is not None:
                scores *= tl.load(scale + row, mask=given, other=0.0)[None, :]
        number = tl.where(wanted, _numbers(scores, row), NOTHING)
        if KEPT > 0:
            best, limit = keep_best(number, best, limit, KEPT)
        else:
            at = query[:, None] * (tl.num_programs(1) * tiles * BLOCK_N) + place[None, :]
            tl.store(found + at, number, mask=(query < num_queries)[:, None])
    if KEPT > 0:
        store_best(found, query, num_queries, chunk, best, KEPT)


@triton.jit
def _gather_scores(
    queries,
    query_stride: tl.int64,
    documents,
    document_stride: tl.int64,
    ids,
    out,
    candidates: tl.int64,
    num_documents: tl.int64,
    dim,
    METRIC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(candidates, BLOCK_N)
    query = tl.program_id(0).to(tl.int64) // blocks
    place = tl.program_id(0).to(tl.int64) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.load(ids + query * candidates + place, mask=place < candidates, other=-1)
    given = (row >= 0) & (row < num_documents)
    dots = tl.zeros([BLOCK_N], tl.float32)
    squares = tl.zeros([BLOCK_N], tl.float32)
    query_squares = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, dim, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        wanted = tl.load(queries + query * query_stride + d, mask=d < dim, other=0.0)
        values = load_values(
            documents, document_stride, row, given, first, dim, False, BLOCK_N, BLOCK_D
        )
        dots += tl.sum(values * wanted[None, :], 1)
        if METRIC != _DOT:
            squares += tl.sum(values * values, 1)
        query_squares += wanted * wanted
    scores = _finish(dots, squares, tl.sum(query_squares, 0), METRIC)
    scores = tl.where(given, scores, float("-inf"))
    tl.store(out + query * candidates + place, scores, mask=place < candidates)


def _search(
    queries: Tensor,
    documents: Tensor,
    k: int,
    filter: Tensor | None,
    scale: Tensor | None,
    metric: int,
    planes: int,
) -> tuple[Tensor, Tensor]:
    """Scores and rows of the k best documents of each query; bits have one plane or more."""
    num_queries, dim = queries.shape
    bitmaps, bitmap_stride, ids, count = select.allowed_rows(filter, documents.shape[0])
    groups = triton.cdiv(num_queries, _BLOCK_QUERIES)
    kept = next((size for size in _LISTS if k <= size), 0)
    step = count
    if kept == 0:
        step = max(1, _CANDIDATES // max(1, num_queries * _BLOCK_ROWS)) * _BLOCK_ROWS
    shape, device = (num_queries, k), queries.device
    best = torch.full(shape, NOTHING.value, dtype=torch.int64, device=device)
    for start in range(0, count, max(step, 1)):
        tiles = triton.cdiv(min(step, count - start), _BLOCK_ROWS)
        chunks = select.chunks(groups, tiles)
        tiles_per_chunk = triton.cdiv(tiles, chunks)
        width = chunks * (kept or tiles_per_chunk * _BLOCK_ROWS)
        found = torch.empty(num_queries, width, dtype=torch.int64, device=device)
        _highest_of_chunk[(groups, chunks)](
            queries, queries.stride(0), documents, documents.stride(0), scale,
            bitmaps, bitmap_stride, ids, num_queries, documents.shape[0], start, count,
            dim, max(planes, 1), tiles_per_chunk, found,
            METRIC=metric, BITS=planes > 0, KEPT=kept,
            BLOCK_Q=_BLOCK_QUERIES, BLOCK_N=_BLOCK_ROWS, BLOCK_D=_BLOCK_DIM,
        )  # fmt: skip
        best = torch.cat((best, found), 1).topk(k, dim=1).values  # sorted
    missing = best == NOTHING.value
    ascending = (best >> 32).int()
    bits = torch.where(ascending < 0, ascending ^ 0x7FFFFFFF, ascending)
    rows = (best & _LAST_ROW.value) ^ _LAST_ROW.value
    scores = bits.view(torch.float32)
    return scores.masked_fill_(missing, -torch.inf), rows.masked_fill_(missing, -1)


def _asymmetric_topk_supports(queries: Tensor, codes: Tensor, *others: object) -> bool:
    return queries.dtype == torch.float32 and codes.shape[0] < 2**32


@_op.kernel(_asymmetric_topk_supports)
def asymmetric_topk(
    queries: Tensor, codes: Tensor, k: int, filter: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    planes = codes.shape[1] // triton.cdiv(queries.shape[1], 8)
    return _search(queries, codes, k, filter, scale, _DOT.value, planes)


def _dense_supports(queries: Tensor, documents: Tensor, *others: object) -> bool:
    return (
        queries.dtype == torch.float32
        and documents.dtype in (*FLOATS, torch.int8)
        and documents.shape[0] < 2**32
    )


@_op.kernel(_dense_supports)
def dense_topk(
    queries: Tensor, documents: Tensor, k: int, metric: int, filter: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _search(queries, documents, k, filter, None, metric, 0)


@_op.kernel(_dense_supports)
def gather_scores(queries: Tensor, documents: Tensor, ids: Tensor, metric: int) -> Tensor:
    candidates = ids.shape[1]
    out = queries.new_empty(ids.shape)
    _gather_scores[(ids.shape[0] * triton.cdiv(candidates, _GATHER_ROWS),)](
        queries, queries.stride(0), documents, documents.stride(0), ids, out, candidates,
        documents.shape[0], queries.shape[1],
        METRIC=metric, BLOCK_N=_GATHER_ROWS, BLOCK_D=_GATHER_DIM,
    )  # fmt: skip
    return out
