"""Bit codes as other software stores them.

emblas keeps codes as uint8, bit 7 of byte 0 being dimension 0: what ``numpy.packbits`` writes and
what sentence-transformers calls ``ubinary``, so those two need no conversion. Hamming distances
are the same in every format, but asymmetric scores and unpacking are not: convert first.

A bit is ``value > 0`` everywhere except in faiss' LSH index (``value >= 0``), which differs for
exact zeros only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from emblas import _op


def _reverse_bits(codes: Tensor) -> Tensor:
    codes = codes >> 4 & 0x0F | codes << 4
    codes = codes >> 2 & 0x33 | (codes & 0x33) << 2
    return codes >> 1 & 0x55 | (codes & 0x55) << 1


def to_faiss(codes: Tensor) -> Tensor:
    """Return codes in the bit order of faiss and cuVS: bit 0 of byte 0 is dimension 0.

    Parameters
    ----------
    codes : Tensor
        uint8, any shape. faiss' binary indexes need dimensions divisible by 8.

    Raises
    ------
    TypeError
        If ``codes`` is no uint8 tensor.
    """
    return _reverse_bits(_op.check_tensor("codes", codes, dtypes=(torch.uint8,)))


def from_faiss(codes: Tensor) -> Tensor:
    """Return codes whose bit 0 of byte 0 is dimension 0 (faiss, cuVS) in emblas' order.

    Raises
    ------
    TypeError
        If ``codes`` is no uint8 tensor.
    """
    return to_faiss(codes)  # reversing is its own inverse


def to_sentence_transformers(codes: Tensor) -> Tensor:
    """Return codes as sentence-transformers' precision ``binary``: int8, each byte less 128.

    Its ``ubinary`` is emblas' own format.

    Raises
    ------
    TypeError
        If ``codes`` is no uint8 tensor.
    """
    return (_op.check_tensor("codes", codes, dtypes=(torch.uint8,)) ^ 0x80).view(torch.int8)


def from_sentence_transformers(codes: Tensor) -> Tensor:
    """Return codes of sentence-transformers, ``binary`` (int8) or ``ubinary`` (uint8), as uint8.

    Raises
    ------
    TypeError
        If ``codes`` is no int8 or uint8 tensor.
    """
    _op.check_tensor("codes", codes, dtypes=(torch.int8, torch.uint8))
    return codes if codes.dtype == torch.uint8 else codes.view(torch.uint8) ^ 0x80


def to_pgvector(codes: Tensor, dim: int) -> list[str]:
    """Return codes as the text of PostgreSQL's ``bit(dim)``, the type of ``binary_quantize``.

    Parameters
    ----------
    codes : Tensor
        uint8 ``(rows, ceil(dim / 8))``.
    dim : int
        Dimensions; the bits after them are left out.

    Raises
    ------
    TypeError
        If ``codes`` is no uint8 tensor.
    ValueError
        If ``codes`` are not ``ceil(dim / 8)`` bytes wide.
    """
    _op.check_tensor("codes", codes, ndim=2, dtypes=(torch.uint8,))
    width = (dim + 7) // 8
    if codes.shape[1] != width:
        raise ValueError(f"codes must be {width} bytes wide for dim={dim}, got {codes.shape[1]}")
    return ["".join(f"{byte:08b}" for byte in code)[:dim] for code in codes.tolist()]


def from_pgvector(values: Sequence[str]) -> Tensor:
    """Return codes, uint8 ``(rows, ceil(dim / 8))``, from the text of ``bit(dim)`` values.

    Raises
    ------
    ValueError
        If a value has another length than the first, or other characters than 0 and 1.
    """
    dim = len(values[0]) if values else 0
    width = (dim + 7) // 8
    codes = bytearray()
    for value in values:
        if len(value) != dim or value.strip("01"):
            raise ValueError(f"values must be {dim} characters 0 or 1 each, got {value[:80]!r}")
        codes += int(value.ljust(8 * width, "0") or "0", 2).to_bytes(width, "big")
    return torch.tensor(list(codes), dtype=torch.uint8).view(len(values), width)
