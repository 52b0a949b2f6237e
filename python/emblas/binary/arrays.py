"""Bit codes in numpy arrays, without torch at the call."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from emblas._load import _C


def pack_sign(
    x: npt.NDArray[Any], threshold: npt.NDArray[Any] | None = None
) -> npt.NDArray[np.uint8]:
    """Pack the signs of vectors into bits; see :func:`emblas.binary.pack_sign`.

    Runs on the calling thread with the GIL released.

    Parameters
    ----------
    x : ndarray
        C-contiguous ``(rows, dim)``, float32 or float64.
    threshold : ndarray, optional
        ``(dim,)`` of the dtype of ``x``; 0 by default.

    Returns
    -------
    ndarray
        uint8 ``(rows, ceil(dim / 8))``.

    Raises
    ------
    TypeError
        If an array has another dtype or memory layout.
    ValueError
        If ``x`` is not 2-D or ``threshold`` has another length than ``dim``.
    """
    return _C.pack_sign(x, threshold)


def hamming_topk(
    queries: npt.NDArray[np.uint8], codes: npt.NDArray[np.uint8], k: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Find the codes nearest to each query, exactly; see :func:`emblas.binary.hamming_topk`.

    Runs on the calling thread with the GIL released.

    Parameters
    ----------
    queries, codes : ndarray
        C-contiguous uint8 ``(Q, bytes)`` and ``(N, bytes)``.
    k : int
        Number of results per query, at least 1.

    Returns
    -------
    tuple of ndarray
        Distances int32 ``(Q, k)`` and ids int64 ``(Q, k)``.

    Raises
    ------
    TypeError
        If an array is not C-contiguous uint8.
    ValueError
        If widths differ or ``k`` is below 1.
    """
    return _C.hamming_topk(queries, codes, k)


def hamming_distance(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
    """Count the differing bits of all pairs of codes; see :func:`emblas.binary.hamming_distance`.

    Runs on the calling thread with the GIL released.

    Parameters
    ----------
    a, b : ndarray
        C-contiguous uint8 ``(Q, bytes)`` and ``(N, bytes)``.

    Returns
    -------
    ndarray
        int32 ``(Q, N)``.

    Raises
    ------
    TypeError
        If an array is not C-contiguous uint8.
    ValueError
        If widths differ.
    """
    return _C.hamming_distance(a, b)


def range_search_csr(
    queries: npt.NDArray[np.uint8], codes: npt.NDArray[np.uint8], radius: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Find all codes within a Hamming distance; see :func:`emblas.binary.range_search_csr`.

    Runs on the calling thread with the GIL released.

    Parameters
    ----------
    queries, codes : ndarray
        C-contiguous uint8 ``(Q, bytes)`` and ``(N, bytes)``.
    radius : int
        Largest distance that is still found.

    Returns
    -------
    tuple of ndarray
        Offsets int64 ``(Q + 1,)``, distances int32 and ids int64, one entry per code found.

    Raises
    ------
    TypeError
        If an array is not C-contiguous uint8.
    ValueError
        If widths differ or ``radius`` is negative.
    """
    return _C.range_search_csr(queries, codes, radius)


def asymmetric_topk(
    queries: npt.NDArray[np.float32],
    codes: npt.NDArray[np.uint8],
    k: int,
    scale: npt.NDArray[np.float32] | None = None,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Find the codes of highest inner product; see :func:`emblas.binary.asymmetric_topk`.

    Runs on the calling thread with the GIL released.

    Parameters
    ----------
    queries : ndarray
        C-contiguous float32 ``(Q, dim)``, finite.
    codes : ndarray
        C-contiguous uint8 ``(N, bits * ceil(dim / 8))``.
    k : int
        Number of results per query, at least 1.
    scale : ndarray, optional
        float32 ``(N,)``, above 0 and finite: multiplies the scores of each code.

    Returns
    -------
    tuple of ndarray
        Scores float32 ``(Q, k)`` and ids int64 ``(Q, k)``.

    Raises
    ------
    TypeError
        If an array has another dtype or memory layout.
    ValueError
        If shapes don't fit together, ``k`` is below 1 or a number is out of range.
    """
    return _C.asymmetric_topk(queries, codes, k, scale)


def symmetric_topk(
    queries: npt.NDArray[np.uint8],
    codes: npt.NDArray[np.uint8],
    k: int,
    dim: int,
    scale: npt.NDArray[np.float32] | None = None,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Find the multi-bit codes of highest inner product; see :func:`emblas.binary.symmetric_topk`.

    Runs on the calling thread with the GIL released.

    Parameters
    ----------
    queries, codes : ndarray
        C-contiguous uint8 ``(Q, bits * ceil(dim / 8))`` and ``(N, bits * ceil(dim / 8))``.
    k, scale
        As in :func:`asymmetric_topk`.
    dim : int
        Dimensions of the vectors.

    Returns
    -------
    tuple of ndarray
        Scores float32 ``(Q, k)`` and ids int64 ``(Q, k)``.

    Raises
    ------
    TypeError, ValueError
        As :func:`asymmetric_topk`; ValueError if queries and codes differ in width.
    """
    if queries.dtype != np.uint8:
        raise TypeError(f"queries must be an array of uint8, got {queries.dtype}")
    width = (dim + 7) // 8
    if queries.ndim != 2 or queries.shape[1:] != codes.shape[1:] or dim < 1:
        raise ValueError(
            f"queries and codes must have the same width, for dim = {dim}, got shapes "
            f"{queries.shape} and {codes.shape}"
        )
    if queries.shape[1] == 0 or queries.shape[1] % width:
        raise ValueError(
            f"queries must be a multiple of {width} bytes wide for dim = {dim}, got "
            f"{queries.shape[1]}"
        )
    planes = queries.reshape(len(queries), queries.shape[1] // width, width)
    signs = np.unpackbits(planes, axis=2, count=dim).astype(np.float32) * 2 - 1
    weights = np.float32(0.5) ** np.arange(planes.shape[1], dtype=np.float32)
    values = np.einsum("qpd,p->qd", signs, weights)
    return asymmetric_topk(np.ascontiguousarray(values), codes, k, scale)
