"""The quantization functions of sentence-transformers, over emblas' kernels.

``quantize_embeddings`` takes and returns what ``sentence_transformers.util.quantize_embeddings``
does. ``semantic_search`` does the work of its ``semantic_search_faiss`` and
``semantic_search_usearch`` without an index library: exactly, with every thread, and with scores
that are always those of the order returned.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from emblas import _op
from emblas.binary import (
    Int8Quantizer,
    dense_topk,
    formats,
    hamming_topk,
    pack_sign,
    rescored_topk,
)

PRECISIONS = ("float32", "int8", "uint8", "binary", "ubinary")
Array = npt.NDArray[Any]
Embeddings = Tensor | Array | Sequence[Tensor] | Sequence[Array]


def _as_tensor(name: str, embeddings: Embeddings) -> Tensor:
    if isinstance(embeddings, Tensor):
        return embeddings.detach().cpu()
    if isinstance(embeddings, np.ndarray):
        return torch.from_numpy(embeddings)
    if not isinstance(embeddings, Sequence):
        raise TypeError(
            f"{name} must be a tensor, an array or a list of them, got {type(embeddings).__name__}"
        )
    return torch.stack([_as_tensor(name, one) for one in embeddings])


def _quantizer(
    x: Tensor, ranges: Array | None, calibration_embeddings: Embeddings | None
) -> Int8Quantizer:
    if ranges is None:
        sample = x
        if calibration_embeddings is not None:
            sample = _as_tensor("calibration_embeddings", calibration_embeddings)
        if sample.dim() != 2 or len(sample) < 2:
            raise ValueError(
                "ranges or calibration_embeddings must be given: the range of a dimension can't "
                "be told from a single embedding"
            )
        return Int8Quantizer.fit(sample)
    least, most = torch.from_numpy(np.asarray(ranges, np.float32))
    step = (most - least) / 255
    return Int8Quantizer(least, torch.where(step == 0, 1.0, step))


def quantize_embeddings(
    embeddings: Embeddings,
    precision: str,
    ranges: Array | None = None,
    calibration_embeddings: Embeddings | None = None,
) -> Array:
    """Quantize embeddings; the formats of sentence-transformers.

    Parameters
    ----------
    embeddings : tensor, ndarray or list of them
        ``(..., dim)``; floating-point.
    precision : {"float32", "int8", "uint8", "binary", "ubinary"}
        "binary" and "ubinary" pack the signs of each row by itself, whatever its length; bit =
        value > 0, so NaN gives 0.
    ranges : ndarray, optional
        ``(2, dim)`` least and largest values for "int8" and "uint8"; values outside are clipped.
    calibration_embeddings : tensor, ndarray or list of them, optional
        Sample to take the ranges from; by default the embeddings themselves.

    Returns
    -------
    ndarray
        float32, int8 or uint8 ``(..., dim)``, or int8 and uint8 ``(..., ceil(dim / 8))``.

    Raises
    ------
    TypeError
        If ``embeddings`` are not floating-point.
    ValueError
        If ``precision`` is unknown, or ranges would come from a single embedding.
    """
    _op.check_choice("precision", precision, PRECISIONS)
    x = _op.check_tensor("embeddings", _as_tensor("embeddings", embeddings), dtypes=_op.FLOATS)
    if precision == "float32":
        return x.float().numpy()
    if precision in ("binary", "ubinary"):
        codes = pack_sign(x)
        if precision == "binary":
            codes = formats.to_sentence_transformers(codes)
        return codes.numpy()
    if x.shape[0] == 0:
        return np.zeros(tuple(x.shape), np.dtype(precision))
    quantizer = _quantizer(x, ranges, calibration_embeddings)
    # Rounded down, as there; Int8Quantizer.quantize rounds to nearest.
    levels = ((x.float() - quantizer.start) / quantizer.step).floor().clamp(0, 255)
    return (levels - (128 if precision == "int8" else 0)).numpy().astype(precision)


def _scalar_search(
    queries: Tensor, corpus: Tensor, ranges: Array | None, top_k: int
) -> tuple[Tensor, Tensor]:
    """Inner products with int8 or uint8 codes, on the scale of the float vectors."""
    if ranges is None:
        raise ValueError("ranges must be given for a corpus of int8 or uint8")
    codes = corpus if corpus.dtype == torch.int8 else (corpus ^ 0x80).view(torch.int8)
    quantizer = _quantizer(queries, ranges, None)
    # A code stands for the middle of its step.
    quantizer = Int8Quantizer(quantizer.start + quantizer.step / 2, quantizer.step)
    scaled, constant = quantizer.fold(queries)
    scores, ids = dense_topk(scaled, codes, top_k)
    return scores + constant, ids


def semantic_search(
    query_embeddings: Embeddings,
    corpus_embeddings: Embeddings,
    corpus_precision: str = "float32",
    top_k: int = 10,
    ranges: Array | None = None,
    rescore: bool = True,
    rescore_multiplier: int = 2,
) -> tuple[list[list[dict[str, int | float]]], float]:
    """Find the corpus entries nearest to each query, exactly.

    Parameters
    ----------
    query_embeddings : tensor, ndarray or list of them
        ``(queries, dim)``; floating-point, finite.
    corpus_embeddings : tensor, ndarray or list of them
        ``(rows, ...)`` as :func:`quantize_embeddings` returns them; a memory map serves.
    corpus_precision : {"float32", "int8", "uint8", "binary", "ubinary"}, default "float32"
        What the corpus is.
    top_k : int, default 10
        Results per query, at least 1; fewer if the corpus is smaller.
    ranges : ndarray, optional
        ``(2, dim)``, with which an "int8" or "uint8" corpus was quantized; needed there.
    rescore : bool, default True
        Score binary candidates again, the float query against the bits.
    rescore_multiplier : int, default 2
        Candidates per result that are rescored.

    Returns
    -------
    results : list of list of dict
        Per query ``{"corpus_id", "score"}``, best first. Scores are similarities in every
        precision: inner products for "float32", "int8" and "uint8" (the codes' steps and offsets
        are undone), cosines with the sign vector for rescored bits, and cosines of both sign
        vectors, ``1 - 2 * distance / dim``, without rescoring.
    seconds : float
        Time of the search.

    Raises
    ------
    TypeError
        If an argument has a wrong type.
    ValueError
        If shapes don't fit together, ``ranges`` are missing or a number is out of range.
    """
    _op.check_choice("corpus_precision", corpus_precision, PRECISIONS)
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    queries = _as_tensor("query_embeddings", query_embeddings)
    _op.check_tensor("query_embeddings", queries, ndim=2, dtypes=_op.FLOATS)
    corpus = _as_tensor("corpus_embeddings", corpus_embeddings)
    begin = time.perf_counter()
    if corpus_precision == "float32":
        scores, ids = dense_topk(queries, corpus, top_k)
    elif corpus_precision in ("int8", "uint8"):
        scores, ids = _scalar_search(queries.float(), corpus, ranges, top_k)
    else:
        codes = formats.from_sentence_transformers(corpus)
        if rescore:
            scores, ids = rescored_topk(queries, codes, top_k, multiplier=rescore_multiplier)
        else:
            distances, ids = hamming_topk(pack_sign(queries), codes, top_k)
            scores = 1 - 2 * distances.float() / queries.shape[1]
    seconds = time.perf_counter() - begin
    return [
        [{"corpus_id": row, "score": score} for score, row in zip(*found, strict=True) if row >= 0]
        for found in zip(scores.tolist(), ids.tolist(), strict=True)
    ], seconds
