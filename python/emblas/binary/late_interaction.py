"""Late interaction: queries and documents as sets of token vectors or token codes."""

from __future__ import annotations

import torch
from torch import Tensor

from emblas import _op
from emblas.binary import op
from emblas.binary.search import _check_at_least


def maxsim(
    queries: Tensor,
    documents: Tensor,
    query_offsets: Tensor,
    document_offsets: Tensor,
    *,
    dim: int | None = None,
) -> Tensor:
    """Score sets of tokens: sum over query tokens of the best product with a document token.

    ``scores[b, n] = sum over i in b of max over j in n of <q_i, d_j>`` (ColBERT, arXiv
    2004.12832, equation 3). The products are never written. Bits stand for +1 and -1: with bits on
    both sides the product is ``dim - 2 * Hamming distance``.

    Parameters
    ----------
    queries : Tensor
        ``(query tokens, dim)``; float32, float64, bfloat16 or float16, or uint8 codes of
        :func:`emblas.binary.pack_sign` if the documents are codes, too.
    documents : Tensor
        ``(document tokens, dim)`` in the dtype of the queries, or uint8 codes.
    query_offsets, document_offsets : Tensor
        int32 or int64 ``(B + 1,)`` and ``(N + 1,)``: packed sets, ``0 = offsets[0] <= ...``; empty
        sets score 0.
    dim : int, optional
        Dimensions of the codes; needed if both sides are codes.

    Returns
    -------
    Tensor
        ``(B, N)``, float64 if the documents are, else float32. Differentiable in queries and
        documents where both are floating-point; the gradient goes to the first best token. Float
        queries against bits have none.

    Raises
    ------
    TypeError
        If an argument has a wrong type.
    ValueError
        If shapes or devices don't fit together or offsets are not valid.
    """
    dtypes = (*_op.FLOATS, torch.uint8)
    _op.check_tensor("queries", queries, ndim=2, dtypes=dtypes)
    _op.check_tensor("documents", documents, ndim=2, dtypes=dtypes, device=queries.device)
    starts = _op.offsets("query_offsets", query_offsets, queries.device)
    document_starts = _op.offsets("document_offsets", document_offsets, queries.device)
    bits = documents.dtype == torch.uint8
    if not bits and queries.dtype != documents.dtype:
        raise TypeError(
            f"queries must have the dtype of documents, {documents.dtype}, got {queries.dtype}"
        )
    if queries.dtype != torch.uint8:
        dim = queries.shape[1]
    elif dim is None:
        raise ValueError("dim must be given where queries and documents are codes")
    for name, tensor in (("queries", queries), ("documents", documents)):
        width = (dim + 7) // 8 if tensor.dtype == torch.uint8 else dim
        if tensor.shape[1] != width:
            raise ValueError(
                f"{name} must have {width} columns for {dim} dimensions, got {tensor.shape[1]}"
            )
    return op.maxsim(queries, starts, documents, document_starts, dim)


def maxsim_topk(
    queries: Tensor,
    documents: Tensor,
    query_offsets: Tensor,
    document_offsets: Tensor,
    k: int,
    *,
    dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the documents of highest :func:`maxsim` with each query.

    Parameters
    ----------
    queries, documents, query_offsets, document_offsets, dim
        As in :func:`maxsim`.
    k : int
        Number of results per query, at least 1.

    Returns
    -------
    scores : Tensor
        ``(B, k)``, descending; -inf beyond the last document.
    ids : Tensor
        int64 ``(B, k)``, ascending among equal scores; -1 beyond the last document.

    Raises
    ------
    TypeError, ValueError
        As :func:`maxsim`; ValueError if ``k`` is below 1.
    """
    _check_at_least("k", k, 1)
    scores = maxsim(queries, documents, query_offsets, document_offsets, dim=dim)
    order = scores.sort(dim=1, descending=True, stable=True)
    pad = (0, max(0, k - scores.shape[1]))
    return (
        torch.nn.functional.pad(order.values[:, :k], pad, value=-torch.inf),
        torch.nn.functional.pad(order.indices[:, :k], pad, value=-1),
    )
