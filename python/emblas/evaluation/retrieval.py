"""Quality of rankings: what was found, and how early."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from emblas.evaluation import checks

Relevance = Sequence[Mapping[int, float]]


def _found(ranked: Any, relevance: Relevance, k: int) -> list[tuple[list[float], list[float]]]:
    """Return gains of the first ``k`` results and of all relevant documents, for each query."""
    rows = torch.as_tensor(ranked).tolist()
    if len(rows) != len(relevance):
        raise ValueError(
            f"relevance must have {len(rows)} queries, as ranked, got {len(relevance)}"
        )
    checks.count("k", k)
    pairs = []
    for i, (row, gains) in enumerate(zip(rows, relevance, strict=True)):
        known = [document for document in row if document >= 0]
        if len(set(known)) != len(known):
            raise ValueError(f"ranked must hold a document once per query, got {row} for query {i}")
        ideal = sorted((gain for gain in gains.values() if gain > 0), reverse=True)
        if ideal:
            pairs.append(([max(gains.get(document, 0), 0) for document in row[:k]], ideal))
    return pairs


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def _discounted(gains: Sequence[float]) -> float:
    return math.fsum(gain / math.log2(rank + 2) for rank, gain in enumerate(gains))


def ndcg(ranked: Any, relevance: Relevance, k: int = 10) -> float:
    r"""Discounted cumulative gain of the first ``k`` results over the best possible one.

    The mean over queries of :math:`\sum_{r \le k} g_r / \log_2(r + 1)`, divided by its largest
    possible value. Gains are linear, as in trec_eval and MTEB.

    Parameters
    ----------
    ranked : array-like
        ``(queries, results)``: ids of documents, best first; negative where there is none.
    relevance : sequence of mappings
        For each query, the gain of every relevant document. Documents not listed have gain 0;
        queries without a relevant document are left out of the mean.
    k : int, default 10
        Results that count.

    Returns
    -------
    float
        From 0 to 1; 0 if no query has a relevant document.

    Raises
    ------
    ValueError
        If the numbers of queries differ, a document appears twice for a query, or ``k`` < 1.

    Notes
    -----
    Jarvelin and Kekalainen 2002.

    Examples
    --------
    >>> ndcg([[7, 3, 5]], [{3: 1.0}])
    0.6309297535714575
    """
    return _mean([_discounted(gains) / _discounted(ideal[:k])
                  for gains, ideal in _found(ranked, relevance, k)])  # fmt: skip


def mean_average_precision(ranked: Any, relevance: Relevance, k: int = 10) -> float:
    r"""Mean over queries of :math:`\frac1R \sum_{r \le k, g_r > 0} \mathrm{precision@}r`.

    ``R`` is the number of all relevant documents of the query, as in trec_eval's ``map_cut``.
    Arguments, result and errors are those of :func:`ndcg`.
    """
    values = []
    for gains, ideal in _found(ranked, relevance, k):
        hits = [rank for rank, gain in enumerate(gains, 1) if gain > 0]
        values.append(math.fsum(i / rank for i, rank in enumerate(hits, 1)) / len(ideal))
    return _mean(values)


def recall(ranked: Any, relevance: Relevance, k: int = 10) -> float:
    """Share of the relevant documents among the first ``k`` results, mean over queries.

    Arguments, result and errors are those of :func:`ndcg`.
    """
    return _mean([sum(gain > 0 for gain in gains) / len(ideal)
                  for gains, ideal in _found(ranked, relevance, k)])  # fmt: skip
