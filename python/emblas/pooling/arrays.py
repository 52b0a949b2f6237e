"""Pooling of numpy arrays, without torch at the call."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from emblas._load import _C


def segment_pool(
    x: npt.NDArray[Any],
    cu_seqlens: npt.NDArray[np.int32],
    *,
    weights: npt.NDArray[Any] | None = None,
    normalize: bool = False,
) -> npt.NDArray[Any]:
    """Mean of the rows of each segment of a packed array.

    The numpy door to :func:`emblas.pooling.segment_pool`: same kernel, same bits. It runs on the
    calling thread with the GIL released, so threads of the caller run side by side.

    Parameters
    ----------
    x : ndarray
        C-contiguous ``(tokens, dim)``, float32 or float64.
    cu_seqlens : ndarray
        int32 offsets ``(batch + 1,)``.
    weights : ndarray, optional
        ``(tokens,)``, of the dtype of ``x``.
    normalize : bool, default False
        Return rows of unit length.

    Returns
    -------
    ndarray
        ``(batch, dim)``, of the dtype of ``x``.

    Raises
    ------
    TypeError
        If a dtype or memory layout is another one: arrays are never copied silently.
    ValueError
        If shapes or offsets don't fit.
    """
    return _C.segment_pool(x, cu_seqlens, weights, normalize)
