"""What the searches share: which rows they may return, and how the best of them are kept.

A search walks through the rows in tiles, each program through a chunk of them. A candidate is one
64-bit number, its score above its row, so all candidates of a query are different and their k best
are well defined, whatever the order of the work. A program keeps a sorted list of its best and
looks further into a tile only if something in it beats the last of them: after the first tiles
that is rare. The lists of the chunks are merged by torch.topk.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_PROGRAMS = 2048
LISTS = (16, 64, 256)  # sizes of the sorted lists; the last is the largest k that they serve
NOTHING = tl.constexpr(-(2**63) + 1)  # below every candidate


def chunks(groups: int, tiles: int) -> int:
    """Into how many chunks to cut so many tiles of rows for so many groups of queries."""
    return max(1, min(tiles, _PROGRAMS // max(groups, 1)))


def allowed_rows(filter: Tensor | None, rows: int) -> tuple[Tensor | None, int, Tensor | None, int]:
    """Return bitmaps, their stride, ids, and how many rows there are to visit."""
    if filter is None:
        return None, 0, None, rows
    if filter.dtype == torch.uint8:
        return filter, filter.stride(0) if filter.shape[0] > 1 else 0, None, rows
    return None, 0, filter, filter.shape[0]


@triton.jit
def rows_of(position, count, ids, num_rows):
    """Rows at these positions of a search, and which of them exist."""
    there = position < count
    if ids is None:
        return position, there
    else:
        row = tl.load(ids + position, mask=there, other=-1)
        return row, (row >= 0) & (row < num_rows)


@triton.jit
def may_return(query, num_queries, row, there, bitmaps, bitmap_stride):
    """Which rows each query may return, (queries, rows)."""
    allowed = (query < num_queries)[:, None] & there[None, :]
    if bitmaps is None:
        return allowed
    else:
        at = bitmaps + query[:, None] * bitmap_stride + (row >> 3)[None, :]
        byte = tl.load(at, mask=allowed, other=0).to(tl.int32)
        return allowed & (((byte >> (7 - (row & 7).to(tl.int32))[None, :]) & 1) > 0)


@triton.jit
def keep_best(number, best, limit, KEPT: tl.constexpr):
    """Merge candidates (queries, rows) into the descending lists of the best (queries, KEPT)."""
    if tl.max(tl.max((number > limit[:, None]).to(tl.int32), 1), 0) > 0:
        # Two descending lists, one reversed: the larger of each pair are the largest of all.
        rivals = tl.flip(tl.topk(number, KEPT), 1)
        best = tl.sort(tl.maximum(best, rivals), descending=True)
        limit = tl.min(best, 1)
    return best, limit


@triton.jit
def store_best(found, query, num_queries, chunk, best, KEPT: tl.constexpr):
    """Write the list of one chunk, (queries, chunks, KEPT)."""
    at = (query[:, None] * tl.num_programs(1) + chunk) * KEPT + tl.arange(0, KEPT)[None, :]
    tl.store(found + at, best, mask=(query < num_queries)[:, None])
