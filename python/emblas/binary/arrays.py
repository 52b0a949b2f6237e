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
        Number of results per query.

    Returns
    -------
    tuple of ndarray
        Distances int32 ``(Q, k)`` and ids int64 ``(Q, k)``.

    Raises
    ------
    TypeError
        If an array is not C-contiguous uint8.
    ValueError
        If widths differ or ``k`` is negative.
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
