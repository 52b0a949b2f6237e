"""Late interaction in Triton: sums over query tokens of the best product with a document token.

A program owns one document and one set of query tokens. It multiplies tiles of tokens on tensor
cores (``dots.py``) and keeps the largest product of each query token in registers; products never
reach memory. Sets of one document run side by side and share its tokens in the L2 cache. Tensor
cores are the limit from about 16 query tokens on.

Backward, without atomics: each pair of tokens that won carries its document's gradient. A program
adds up the document tokens that one query token chose, another the query tokens that chose its
tile of document tokens, both in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emblas import _op
from emblas._triton import segment_bounds
from emblas.binary.triton.dots import add_dots, load_values

_BLOCK_QUERY_TOKENS, _BLOCK_TOKENS, _BLOCK_DIM = 16, 64, 32
_SUM_DOCUMENTS, _SUM_DIM = 16, 128  # gradient of the queries
_GRAD_TOKENS, _GRAD_QUERY_TOKENS, _GRAD_DIM = 32, 16, 64  # gradient of the documents


@triton.jit
def _maxsim(
    queries,
    query_stride: tl.int64,
    query_offsets,
    documents,
    document_stride: tl.int64,
    document_offsets,
    scores,
    argmax,
    num_sets,
    num_documents: tl.int64,
    query_tokens: tl.int64,
    document_tokens: tl.int64,
    dim,
    QUERY_BITS: tl.constexpr,
    BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64) % num_sets
    n = tl.program_id(0).to(tl.int64) // num_sets
    query_begin, query_end = segment_bounds(query_offsets, b, query_tokens)
    begin, end = segment_bounds(document_offsets, n, document_tokens)
    total = tl.zeros([BLOCK_I], tl.float32)
    for query_start in range(query_begin, query_end, BLOCK_I):
        i = query_start + tl.arange(0, BLOCK_I)
        best = tl.full([BLOCK_I], float("-inf"), tl.float32)
        where = tl.full([BLOCK_I], -1, tl.int32)
        for start in range(begin, end, BLOCK_J):
            j = start + tl.arange(0, BLOCK_J)
            dots = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
            for first in range(0, dim, BLOCK_D):
                wanted = load_values(
                    queries, query_stride, i, i < query_end, first, dim,
                    QUERY_BITS, BLOCK_I, BLOCK_D,
                )  # fmt: skip
                values = load_values(
                    documents, document_stride, j, j < end, first, dim, BITS, BLOCK_J, BLOCK_D
                )
                dots = add_dots(dots, wanted, values, DTYPE)
            dots = tl.where((j < end)[None, :], dots, float("-inf"))
            highest, at = tl.max(dots, 1, return_indices=True)
            where = tl.where(highest > best, (start + at).to(tl.int32), where)
            best = tl.maximum(best, highest)
        if argmax is not None:
            tl.store(argmax + i * num_documents + n, where, mask=i < query_end)
        total += tl.where((i < query_end) & (begin < end), best, 0.0)
    tl.store(scores + b * num_documents + n, tl.sum(total, 0))


@triton.jit
def _grad_queries(
    grad,
    documents,
    owners,
    argmax,
    grad_queries,
    num_documents: tl.int64,
    document_tokens: tl.int64,
    dim,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    owner = tl.load(owners + i)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, num_documents, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        j = tl.load(argmax + i * num_documents + n, mask=n < num_documents, other=-1).to(tl.int64)
        won = (j >= 0) & (j < document_tokens)
        weight = tl.load(grad + owner * num_documents + n, mask=won, other=0.0)
        inside = won[:, None] & (d < dim)[None, :]
        tile = tl.load(documents + j[:, None] * dim + d[None, :], mask=inside, other=0.0)
        total += weight[:, None] * tile
    tl.store(grad_queries + i * dim + d, tl.sum(total, 0), mask=d < dim)


@triton.jit
def _grad_documents(
    grad,
    queries,
    owners,
    document_of,
    argmax,
    grad_documents,
    num_documents: tl.int64,
    query_tokens: tl.int64,
    document_tokens: tl.int64,
    dim,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    j = tl.program_id(0).to(tl.int64) * BLOCK_J + tl.arange(0, BLOCK_J)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.load(document_of + j, mask=j < document_tokens, other=0)
    total = tl.zeros([BLOCK_J, BLOCK_D], tl.float32)
    for start in range(0, query_tokens, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        there = i < query_tokens
        owner = tl.load(owners + i, mask=there, other=0)
        inside = (j < document_tokens)[:, None] & there[None, :]
        at = argmax + i[None, :] * num_documents + n[:, None]
        won = tl.load(at, mask=inside, other=-1) == j[:, None]
        at = grad + owner[None, :] * num_documents + n[:, None]
        weight = tl.load(at, mask=won, other=0.0)
        inside = there[:, None] & (d < dim)[None, :]
        tile = tl.load(queries + i[:, None] * dim + d[None, :], mask=inside, other=0.0)
        total = tl.dot(weight, tile, total, input_precision="tf32x3")
    inside = (j < document_tokens)[:, None] & (d < dim)[None, :]
    tl.store(grad_documents + j[:, None] * dim + d[None, :], total, mask=inside)


_DOT_DTYPES = {  # in which the values of queries are multiplied
    torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16,
    torch.uint8: tl.float16,
}  # fmt: skip


def _maxsim_supports(queries: Tensor, *_: object) -> bool:
    return queries.dtype in _DOT_DTYPES


@_op.kernel(_maxsim_supports)
def maxsim(
    queries: Tensor,
    query_offsets: Tensor,
    documents: Tensor,
    document_offsets: Tensor,
    dim: int,
    need_argmax: bool,
) -> tuple[Tensor, Tensor]:
    sets, count = query_offsets.shape[0] - 1, document_offsets.shape[0] - 1
    scores = queries.new_empty(sets, count, dtype=torch.float32)
    tokens = queries.shape[0] if need_argmax else 0
    argmax = queries.new_empty(tokens, count, dtype=torch.int32)
    _maxsim[(sets * count,)](
        queries, queries.stride(0), query_offsets, documents, documents.stride(0),
        document_offsets, scores, argmax if need_argmax else None, sets, count,
        queries.shape[0], documents.shape[0], dim,
        QUERY_BITS=queries.dtype == torch.uint8, BITS=documents.dtype == torch.uint8,
        DTYPE=_DOT_DTYPES[queries.dtype],
        BLOCK_I=_BLOCK_QUERY_TOKENS, BLOCK_J=_BLOCK_TOKENS, BLOCK_D=_BLOCK_DIM, num_stages=2,
    )  # fmt: skip
    return scores, argmax


def _owners(offsets: Tensor, tokens: int) -> Tensor:
    """Return the set that each token belongs to, in range whatever the offsets hold."""
    token = torch.arange(tokens, device=offsets.device, dtype=offsets.dtype)
    owner = torch.searchsorted(offsets, token, right=True) - 1
    return owner.clamp(0, max(offsets.shape[0] - 2, 0))


def _maxsim_backward_supports(grad: Tensor, *_: object) -> bool:
    return grad.dtype == torch.float32


@_op.kernel(_maxsim_backward_supports)
def maxsim_backward(
    grad: Tensor,
    queries: Tensor,
    query_offsets: Tensor,
    documents: Tensor,
    document_offsets: Tensor,
    argmax: Tensor,
) -> tuple[Tensor, Tensor]:
    query_tokens, dim = queries.shape
    tokens, count = documents.shape[0], document_offsets.shape[0] - 1
    owners = _owners(query_offsets, query_tokens)
    grad_queries, grad_documents = torch.empty_like(queries), torch.empty_like(documents)
    _grad_queries[(query_tokens, triton.cdiv(dim, _SUM_DIM))](
        grad, documents, owners, argmax, grad_queries, count, tokens, dim,
        BLOCK_N=_SUM_DOCUMENTS, BLOCK_D=_SUM_DIM,
    )  # fmt: skip
    _grad_documents[(triton.cdiv(tokens, _GRAD_TOKENS), triton.cdiv(dim, _GRAD_DIM))](
        grad, queries, owners, _owners(document_offsets, tokens), argmax, grad_documents,
        count, query_tokens, tokens, dim,
        BLOCK_I=_GRAD_QUERY_TOKENS, BLOCK_J=_GRAD_TOKENS, BLOCK_D=_GRAD_DIM,
    )  # fmt: skip
    return grad_queries, grad_documents
