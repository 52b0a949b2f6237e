"""Integers of few bits, packed."""

from __future__ import annotations

import torch
from torch import Tensor


def row_bytes(count: int, bits: int) -> int:
    """Return the bytes of a row of ``count`` integers of ``bits`` bits."""
    return -(-count * bits // 8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack integers ``(rows, count)`` of 0 to ``2^bits - 1`` as uint8 ``(rows, bytes)``.

    Integer ``i`` of a row is bits ``i * bits`` and on of its bytes, least significant first; the
    last byte ends in zeros. ``bits`` is 1 to 16.
    """
    size = row_bytes(codes.shape[1], bits)
    shifts = torch.arange(bits, device=codes.device)
    stream = (codes.long()[:, :, None] >> shifts & 1).flatten(1)
    stream = torch.nn.functional.pad(stream, (0, 8 * size - stream.shape[1]))
    weights = 2 ** torch.arange(8, device=codes.device)
    return (stream.unflatten(1, (size, 8)) * weights).sum(2).to(torch.uint8)


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undo :func:`pack_codes`: int64 ``(rows, count)``."""
    if bits == 8:
        return packed.long()
    if bits == 16:
        low, high = packed.long().unflatten(1, (count, 2)).unbind(2)
        return low | high << 8
    # Units of bits that no byte's end cuts: whole integers, or single bits.
    unit = bits if 8 % bits == 0 else 1
    shifts = torch.arange(0, 8, unit, dtype=torch.uint8, device=packed.device)
    units = packed[:, :, None] >> shifts & 2**unit - 1
    stream = units.flatten(1)[:, : count * bits // unit].long()
    if unit == bits:
        return stream
    weights = 2 ** torch.arange(bits, device=packed.device)
    return (stream.unflatten(1, (count, bits)) * weights).sum(2)
