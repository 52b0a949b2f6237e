"""Hashed and quantized tables as numpy arrays, without torch at the call."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from emblas._load import _C
from emblas._op import check_choice
from emblas.tables.compose_op import MODES
from emblas.tables.functions import _check_spec
from emblas.tables.ids import padding_pattern
from emblas.tables.packed_codes import row_bytes
from emblas.tables.quantized_lookup import check_bits
from emblas.tables.spec import TableSpec

Ids = npt.NDArray[np.int64] | npt.NDArray[np.uint64]


def _id_pattern(ids: Ids) -> npt.NDArray[np.int64]:
    """Return ids as a vector of int64 in place: uint64 by bit pattern."""
    if ids.dtype not in (np.int64, np.uint64) or not ids.flags.c_contiguous:
        raise TypeError(f"ids must be a C-contiguous array of int64 or uint64, got {ids.dtype}")
    return ids.view(np.int64).reshape(-1)


def hash_keys(ids: Ids, spec: TableSpec) -> npt.NDArray[np.int64]:
    """Row numbers of ids in a hashed table.

    The numpy door to :func:`emblas.tables.hash_keys`: same kernel, on the calling thread with the
    GIL released.

    Parameters
    ----------
    ids : ndarray
        int64 or uint64 of any shape, C-contiguous.
    spec : TableSpec
        How ids become rows.

    Returns
    -------
    ndarray
        int64 ``(*ids.shape, spec.num_hashes)``.

    Raises
    ------
    TypeError
        If a dtype or memory layout is another one: arrays are never copied silently.
    """
    _check_spec(spec)
    keys = _C.hash_keys(
        _id_pattern(ids), spec.family, spec.seed, spec.num_hashes, spec.num_embeddings
    )
    return keys.reshape(*ids.shape, spec.num_hashes)


def hash_bag(
    ids: Ids,
    table: npt.NDArray[Any],
    spec: TableSpec,
    offsets: npt.NDArray[np.int32] | None = None,
    per_sample_weights: npt.NDArray[Any] | None = None,
    *,
    padding_id: int | None = None,
) -> npt.NDArray[Any]:
    """Hash ids and sum their rows of a table, in one pass.

    The numpy door to :func:`emblas.tables.hash_bag`: same kernel, same bits. It runs on the calling
    thread with the GIL released, so threads of the caller run side by side.

    Parameters
    ----------
    ids : ndarray
        int64 or uint64, C-contiguous: of any shape without ``offsets``, ``(ids,)`` with them.
    table : ndarray
        C-contiguous ``(spec.num_embeddings, dim)``, float32 or float64.
    spec : TableSpec
        How ids become rows.
    offsets : ndarray, optional
        int32 ``(bags + 1,)``.
    per_sample_weights : ndarray, optional
        Of the shape of ``ids`` and the dtype of ``table``.
    padding_id : int, optional
        An id that contributes nothing.

    Returns
    -------
    ndarray
        ``(*ids.shape, dim)``, or ``(bags, dim)`` with ``offsets``, of the dtype of ``table``.

    Raises
    ------
    TypeError
        If a dtype or memory layout is another one: arrays are never copied silently.
    ValueError
        If shapes or offsets don't fit.
    """
    _check_spec(spec)
    if spec.signed:
        raise ValueError("spec must not be signed: the numpy door sums rows as they are")
    if table.shape[:1] != (spec.num_embeddings,):
        raise ValueError(
            f"table must have spec.num_embeddings = {spec.num_embeddings} rows, "
            f"got shape {table.shape}"
        )
    if offsets is not None and ids.ndim != 1:
        raise ValueError(f"ids must have 1 dimensions, got shape {ids.shape}")
    weights = per_sample_weights
    if weights is not None:
        if weights.shape != ids.shape:
            raise ValueError(
                f"per_sample_weights must have the shape of ids, {ids.shape}, got {weights.shape}"
            )
        weights = weights.reshape(-1)
    out = _C.hash_bag(
        _id_pattern(ids), table, offsets, weights, spec.family, spec.seed, spec.num_hashes,
        padding_pattern(padding_id),
    )  # fmt: skip
    return out if offsets is not None else out.reshape(*ids.shape, table.shape[1])


def quantized_bag(
    ids: Ids,
    packed: npt.NDArray[np.uint8],
    scale: npt.NDArray[Any],
    bits: int,
    embedding_dim: int,
    offsets: npt.NDArray[np.int32] | None = None,
    per_sample_weights: npt.NDArray[Any] | None = None,
    *,
    mode: str = "sum",
    padding_id: int | None = None,
    zero_point: npt.NDArray[Any] | None = None,
) -> npt.NDArray[Any]:
    """Look up rows of integers, multiply them by their scales and pool them in bags.

    The numpy door to :func:`emblas.tables.quantized_bag`: same kernel, same bits. It runs on the
    calling thread with the GIL released, so threads of the caller run side by side; ``packed`` may
    be a mapped file.

    Parameters
    ----------
    ids : ndarray
        int64, C-contiguous: of any shape without ``offsets``, ``(ids,)`` with them.
    packed : ndarray
        uint8 ``(rows, ceil(embedding_dim * bits / 8))``, C-contiguous.
    scale : ndarray
        ``(rows,)`` or ``(rows, 1)``, float32 or float64.
    bits : {2, 4, 8, 16}
        Of an integer.
    embedding_dim : int
        Integers of a row.
    offsets : ndarray, optional
        int32 ``(bags + 1,)``.
    per_sample_weights : ndarray, optional
        Of the shape of ``ids`` and the dtype of ``scale``, with mode "sum".
    mode : {"sum", "mean", "max"}, default "sum"
        The others need ``offsets``.
    padding_id : int, optional
        An id that contributes nothing.
    zero_point : ndarray, optional
        ``(rows,)`` or ``(rows, 1)``, of the dtype of ``scale``.

    Returns
    -------
    ndarray
        ``(*ids.shape, embedding_dim)``, or ``(bags, embedding_dim)`` with ``offsets``, of the dtype
        of ``scale``.

    Raises
    ------
    TypeError
        If a dtype or memory layout is another one: arrays are never copied silently.
    ValueError
        If shapes, offsets or values of ids don't fit.
    """
    check_choice("mode", mode, MODES)
    check_bits(bits)
    size = row_bytes(embedding_dim, bits)
    if packed.shape[1:] != (size,):
        raise ValueError(
            f"packed must have {size} bytes a row, for {embedding_dim} integers of {bits} bits, "
            f"got shape {packed.shape}"
        )
    if scale.shape not in ((len(packed),), (len(packed), 1)):
        raise ValueError(f"scale must hold {len(packed)} scales, got shape {scale.shape}")
    if offsets is None and mode != "sum":
        raise ValueError(f"mode {mode!r} needs offsets: without them each id is on its own")
    if offsets is not None and ids.ndim != 1:
        raise ValueError(f"ids must have 1 dimensions, got shape {ids.shape}")
    weights = per_sample_weights
    if weights is not None:
        if mode != "sum":
            raise ValueError(f"per_sample_weights need mode 'sum', got {mode!r}")
        if weights.shape != ids.shape:
            raise ValueError(
                f"per_sample_weights must have the shape of ids, {ids.shape}, got {weights.shape}"
            )
        weights = weights.reshape(-1)
    if zero_point is not None:
        if zero_point.shape not in ((len(packed),), (len(packed), 1)):
            raise ValueError(
                f"zero_point must hold {len(packed)} numbers, got shape {zero_point.shape}"
            )
        zero_point = zero_point.reshape(-1)
    out = _C.quantized_bag(
        _id_pattern(ids), packed, scale.reshape(-1), offsets, weights, bits, embedding_dim,
        MODES.index(mode), padding_pattern(padding_id), zero_point,
    )  # fmt: skip
    return out if offsets is not None else out.reshape(*ids.shape, embedding_dim)
