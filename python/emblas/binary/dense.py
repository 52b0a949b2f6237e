"""Exact search over float and int8 vectors, and rescoring of binary candidates with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from emblas import _op
from emblas.binary import op
from emblas.binary.functions import pack_sign, unpack_sign
from emblas.binary.search import _check_at_least, _filter, hamming_topk

METRICS = ("dot", "cosine", "l2")
_DOCUMENTS = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


def _check_vectors(queries: Tensor, documents: Tensor, metric: str) -> Tensor:
    """Return the queries as the kernels take them: float32, of unit length for a cosine."""
    _op.check_tensor("queries", queries, ndim=2, dtypes=_op.FLOATS)
    _op.check_tensor("documents", documents, ndim=2, dtypes=_DOCUMENTS, device=queries.device)
    _op.check_choice("metric", metric, METRICS)
    if queries.shape[1] != documents.shape[1]:
        raise ValueError(
            f"queries and documents must have the same dimensions, got {queries.shape[1]} and "
            f"{documents.shape[1]}"
        )
    queries = queries.float()
    if metric == "cosine":
        queries = torch.nn.functional.normalize(queries, dim=1)
    return _op.rows(queries)


def dense_topk(
    queries: Tensor, documents: Tensor, k: int, *, metric: str = "dot", filter: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Find the vectors of highest score with each query, exactly.

    Scores are selected while they are computed; no matrix of them is written.

    Parameters
    ----------
    queries : Tensor
        ``(Q, dim)``; floating-point, finite. Computed as float32.
    documents : Tensor
        ``(N, dim)``; float32, bfloat16, float16 or int8, rows any stride apart, such as a memory
        map. Less than 2^32 rows. int8 values are taken as they are; see :class:`Int8Quantizer`.
    k : int
        Number of results per query, at least 1.
    metric : {"dot", "cosine", "l2"}, default "dot"
        "l2" scores minus the squared distance. The cosine with a zero vector is 0.
    filter : Tensor, optional
        As in :func:`emblas.binary.hamming_topk`.

    Returns
    -------
    scores : Tensor
        float32 ``(Q, k)``, descending. A document with NaN comes last, as -inf.
    ids : Tensor
        int64 ``(Q, k)``, ascending among equal scores. Beyond the last row allowed, ids are -1 and
        scores -inf.

    Raises
    ------
    TypeError
        If an argument has a wrong type.
    ValueError
        If shapes or devices don't fit together, ``k`` is below 1, ``metric`` is unknown, an id
        doesn't exist or a query is not finite.
    """
    wanted = _check_vectors(queries, documents, metric)
    _check_at_least("k", k, 1)
    allowed = _filter(filter, queries, documents.shape[0])
    return op.dense_topk(wanted, _op.rows(documents), k, METRICS.index(metric), allowed)


def best_order(scores: Tensor, ids: Tensor) -> Tensor:
    """Return the order of each query's candidates: by score, then by id, those of id -1 last."""
    by_id = torch.where(ids < 0, torch.iinfo(torch.int64).max, ids).sort(1).indices
    return by_id.gather(1, scores.gather(1, by_id).sort(dim=1, descending=True, stable=True)[1])


def best_candidates(scores: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k best candidates of each query by score, then by id; -1 and -inf fill up."""
    order = best_order(scores, ids)[:, :k]
    pad = (0, max(0, k - ids.shape[1]))
    return (
        torch.nn.functional.pad(scores.gather(1, order), pad, value=-torch.inf),
        torch.nn.functional.pad(ids.gather(1, order), pad, value=-1),
    )


def bit_scores(unit: Tensor, codes: Tensor, ids: Tensor) -> Tensor:
    """Cosines of unit queries with the sign vectors of their candidates; -inf for id -1."""
    if codes.shape[0] == 0:
        return torch.full(ids.shape, -torch.inf)
    dim = unit.shape[1]
    signs = unpack_sign(codes[ids.clamp_min(0)], dim)
    scores = (signs @ unit[:, :, None])[..., 0] / dim**0.5
    return scores.masked_fill(ids < 0, -torch.inf)


def rescore(
    queries: Tensor, documents: Tensor, ids: Tensor, k: int, *, metric: str = "dot"
) -> tuple[Tensor, Tensor]:
    """Score candidates with their full vectors and return the best.

    Parameters
    ----------
    queries, documents, metric
        As in :func:`dense_topk`; only the candidates' rows of ``documents`` are read.
    ids : Tensor
        int64 ``(Q, candidates)``: rows of ``documents``, -1 where there is none.
    k : int
        Number of results per query, at least 1.

    Returns
    -------
    scores, ids : Tensor
        As :func:`dense_topk`, among the candidates.

    Raises
    ------
    TypeError, ValueError
        As :func:`dense_topk`; ValueError if ``ids`` has not one row per query.
    """
    wanted = _check_vectors(queries, documents, metric)
    _op.check_tensor("ids", ids, ndim=2, dtypes=(torch.int64,), device=queries.device)
    _check_at_least("k", k, 1)
    if ids.shape[0] != queries.shape[0]:
        raise ValueError(f"ids must have {queries.shape[0]} rows, got {ids.shape[0]}")
    scores = op.gather_scores(wanted, _op.rows(documents), ids.contiguous(), METRICS.index(metric))
    return best_candidates(scores, ids, k)


@dataclass(frozen=True)
class Int8Quantizer:
    """Affine int8 codes per dimension: ``x = start + step * (code + 128)``.

    The scheme of sentence-transformers' precision ``int8``, with values outside of the range
    clipped. Scores with raw codes would weigh dimensions by 1 / step and may reverse ranks:
    :meth:`fold` moves the steps into the query.

    Parameters
    ----------
    start, step : Tensor
        float32 ``(dim,)``; steps above 0.
    """

    start: Tensor
    step: Tensor

    @classmethod
    def fit(cls, x: Tensor) -> Int8Quantizer:
        """Take the range of each dimension from a sample ``(rows, dim)`` without NaN."""
        _op.check_tensor("x", x, ndim=2, dtypes=_op.FLOATS)
        if x.shape[0] == 0:
            raise ValueError("x must have at least one row, got none")
        least, most = x.float().amin(0), x.float().amax(0)
        step = (most - least) / 255
        return cls(least, torch.where(step > 0, step, 1.0))

    def quantize(self, x: Tensor) -> Tensor:
        """Return the int8 codes of ``(rows, dim)``, clipped to the range."""
        codes = ((x.float() - self.start) / self.step).round().clamp(0, 255) - 128
        return codes.to(torch.int8)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Return the values that codes stand for, float32."""
        return self.start + self.step * (codes.float() + 128)

    def fold(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(scaled, constant)`` with ``<q, x> = <scaled, codes> + constant``.

        ``scaled`` is ``(Q, dim)`` and ``constant`` ``(Q, 1)``, the same for all documents.
        """
        queries = queries.float()
        return queries * self.step, queries @ (self.start + 128 * self.step)[:, None]


def rescored_topk(
    queries: Tensor,
    codes: Tensor,
    k: int,
    *,
    documents: Tensor | None = None,
    quantizer: Int8Quantizer | None = None,
    multiplier: int = 4,
    narrow: int | None = None,
    query_offset: Tensor | None = None,
    filter: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Search bits first, then score the candidates better and better.

    Hamming distance finds ``k * multiplier`` candidates, real-valued queries against their bits
    narrow them down to ``k * narrow``, and the documents' own vectors decide. Steps without
    arguments are left out.

    Parameters
    ----------
    queries : Tensor
        ``(Q, dim)``; floating-point, finite.
    codes : Tensor
        uint8 ``(N, ceil(dim / 8))``, signs of the documents.
    k : int
        Number of results per query, at least 1.
    documents : Tensor, optional
        ``(N, dim)``; float32, bfloat16, float16, or int8 codes of ``quantizer``; a memory map
        serves. Without them, the bits' scores decide.
    quantizer : Int8Quantizer, optional
        Needed for int8 documents.
    multiplier : int, default 4
        Candidates per result of the Hamming search, at least 1.
    narrow : int, optional
        Candidates per result that reach ``documents``, at least 1; all of them by default.
    query_offset : Tensor, optional
        ``(dim,)``, added to the queries: what the query encoder has drifted from the document
        encoder, for example the difference of the means of their vectors.
    filter : Tensor, optional
        As in :func:`emblas.binary.hamming_topk`.

    Returns
    -------
    scores : Tensor
        float32 ``(Q, k)``, descending, on the scale of a cosine: of query and document, of query
        and sign vector if there are no documents. int8 documents are taken to have unit length.
    ids : Tensor
        int64 ``(Q, k)``, ascending among equal scores; -1 and -inf fill up.

    Raises
    ------
    TypeError
        If an argument has a wrong type.
    ValueError
        If shapes don't fit together, a number is out of range, ``quantizer`` is missing or an
        argument is given that nothing uses.
    """
    _op.check_tensor("queries", queries, ndim=2, dtypes=_op.FLOATS)
    _check_at_least("k", k, 1)
    _check_at_least("multiplier", multiplier, 1)
    if narrow is not None:
        _check_at_least("narrow", narrow, 1)
    if documents is not None and documents.shape[0] != codes.shape[0]:
        raise ValueError(
            f"documents must have {codes.shape[0]} rows, one for each code, got "
            f"{documents.shape[0]}"
        )
    int8 = documents is not None and documents.dtype == torch.int8
    if int8 != (quantizer is not None):
        raise ValueError("quantizer must be given for int8 documents and for nothing else")
    if narrow is not None and documents is None:
        raise ValueError("narrow must be left out where there are no documents")
    if query_offset is not None:
        _op.check_tensor("query_offset", query_offset, ndim=1, device=queries.device)
        queries = queries + query_offset
    unit = torch.nn.functional.normalize(queries.float(), dim=1)
    _, ids = hamming_topk(pack_sign(queries), codes, k * multiplier, filter=filter)
    if documents is None or narrow is not None:
        scores = bit_scores(unit, codes, ids)
        scores, ids = best_candidates(scores, ids, k if narrow is None else k * narrow)
    if documents is None:
        return scores, ids
    if quantizer is None:
        return rescore(queries, documents, ids, k, metric="cosine")
    scaled, constant = quantizer.fold(unit)
    scores, ids = rescore(scaled, documents, ids, k)
    return scores + constant, ids
