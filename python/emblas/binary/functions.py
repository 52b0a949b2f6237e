"""The public functions of bit codes: arguments are checked here, by name."""

from __future__ import annotations

import torch
from torch import Tensor

from emblas import _op
from emblas.binary import op


def pack_sign(x: Tensor) -> Tensor:
    """Pack the signs of vectors into bits.

    Bit = value > 0; zero and NaN give 0. Bit 7 of byte 0 is dimension 0, as in ``numpy.packbits``
    and in sentence-transformers' ``ubinary``; the bits after the last dimension are 0.

    Parameters
    ----------
    x : Tensor
        ``(..., dim)``; float32, float64, bfloat16 or float16.

    Returns
    -------
    Tensor
        uint8 ``(..., ceil(dim / 8))``. No gradient flows through bits; train with
        :func:`sign_ste`.

    Raises
    ------
    TypeError
        If ``x`` is no tensor of a floating-point dtype.
    ValueError
        If ``x`` has no dimension.
    """
    _op.check_tensor("x", x, dtypes=_op.FLOATS)
    if x.dim() == 0:
        raise ValueError("x must have at least 1 dimension, got shape ()")
    rows = x[None] if x.dim() == 1 else x.flatten(0, -2)
    return op.pack_sign(_op.rows(rows)).view(*x.shape[:-1], (x.shape[-1] + 7) // 8)


def unpack_sign(codes: Tensor, dim: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Unpack bits to +1 and -1.

    Parameters
    ----------
    codes : Tensor
        uint8 ``(..., ceil(dim / 8))``, as :func:`pack_sign` makes them.
    dim : int
        Dimensions of the vectors.
    dtype : torch.dtype, default torch.float32
        Type of the result.

    Returns
    -------
    Tensor
        ``(..., dim)``: +1 where the bit is set, -1 elsewhere.

    Raises
    ------
    TypeError
        If ``codes`` is no uint8 tensor.
    ValueError
        If ``codes`` hold another number of bytes than ``dim`` dimensions need.
    """
    _op.check_tensor("codes", codes, dtypes=(torch.uint8,))
    if codes.dim() == 0 or codes.shape[-1] != (dim + 7) // 8:
        raise ValueError(
            f"codes must end in ceil(dim / 8) = {(dim + 7) // 8} bytes for dim={dim}, "
            f"got shape {tuple(codes.shape)}"
        )
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=codes.device)
    bits = (codes[..., None] >> shifts & 1).flatten(-2)[..., :dim]
    return bits.to(dtype) * 2 - 1


def sign_ste(x: Tensor) -> Tensor:
    """Binarize to +1 and -1 with a straight-through gradient.

    Forward: +1 where ``x > 0``, -1 elsewhere, the signs that :func:`pack_sign` packs. Backward: the
    gradient passes unchanged where ``|x| <= 1`` and is 0 outside (the clipped straight-through
    estimator of recurrent binary embeddings, arXiv 2302.08714).

    Parameters
    ----------
    x : Tensor
        Any shape; float32, float64, bfloat16 or float16.

    Returns
    -------
    Tensor
        Shape and dtype of ``x``.

    Raises
    ------
    TypeError
        If ``x`` is no tensor of a floating-point dtype.
    """
    return op.sign_ste(_op.check_tensor("x", x, dtypes=_op.FLOATS))


def hamming_topk(queries: Tensor, codes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the codes at the smallest Hamming distance from each query, exactly.

    Parameters
    ----------
    queries : Tensor
        uint8 ``(Q, bytes)``. Rows may be any stride apart.
    codes : Tensor
        uint8 ``(N, bytes)``, of any width below 2^20 bytes. They are read once for all queries.
    k : int
        Number of results per query, at least 0.

    Returns
    -------
    distances : Tensor
        int32 ``(Q, k)``, ascending.
    ids : Tensor
        int64 ``(Q, k)``: rows of ``codes``, ascending among equal distances, whatever the number of
        threads. Beyond the N-th result, ids are -1 and distances the largest int32.

    Raises
    ------
    TypeError
        If an argument is no uint8 tensor.
    ValueError
        If shapes or devices don't fit together, or ``k`` is negative.

    Examples
    --------
    >>> codes = torch.tensor([[0b1111], [0b0001], [0b0111]], dtype=torch.uint8)
    >>> hamming_topk(codes[:1], codes, k=2)
    (tensor([[0, 1]], dtype=torch.int32), tensor([[0, 2]]))
    """
    _op.check_tensor("queries", queries, ndim=2, dtypes=(torch.uint8,))
    _op.check_tensor("codes", codes, ndim=2, dtypes=(torch.uint8,), device=queries.device)
    if queries.shape[1] != codes.shape[1]:
        raise ValueError(
            f"queries and codes must have the same width, got {queries.shape[1]} and "
            f"{codes.shape[1]} bytes"
        )
    if k < 0:
        raise ValueError(f"k must be at least 0, got {k}")
    return op.hamming_topk(_op.rows(queries), _op.rows(codes), k)
