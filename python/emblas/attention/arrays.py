"""Packed attention over numpy arrays, without torch at the call."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from emblas._load import _C


def varlen_attention(
    q: npt.NDArray[Any],
    k: npt.NDArray[Any],
    v: npt.NDArray[Any],
    cu_seqlens_q: npt.NDArray[np.int32],
    cu_seqlens_k: npt.NDArray[np.int32],
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> npt.NDArray[Any]:
    """Attend within each sequence; see :func:`emblas.attention.varlen_attention`.

    Same kernel, same bits. Runs on the calling thread with the GIL released.

    Parameters
    ----------
    q, k, v : ndarray
        C-contiguous ``(tokens, heads, head_dim)``, all float32 or all float64.
    cu_seqlens_q, cu_seqlens_k : ndarray
        int32 offsets ``(batch + 1,)``.
    softmax_scale, causal, window_size
        As in the torch function.

    Returns
    -------
    ndarray
        ``(q_tokens, heads, head_dim)``.

    Raises
    ------
    TypeError
        If a dtype or memory layout is another one.
    ValueError
        If shapes or offsets don't fit.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    left, right = window_size
    return _C.varlen_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, scale, left, 0 if causal else right
    )
