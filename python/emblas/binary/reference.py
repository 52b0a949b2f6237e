"""The specification of the bit-code operators in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

NO_DISTANCE = torch.iinfo(torch.int32).max
_WEIGHTS = (128, 64, 32, 16, 8, 4, 2, 1)


def pack_sign(x: Tensor, threshold: Tensor | None = None) -> Tensor:
    """Bits of ``x > threshold``, (rows, dim) -> (rows, ceil(dim / 8)), the first bit highest."""
    above = x > 0 if threshold is None else x.to(threshold.dtype) > threshold
    bits = torch.nn.functional.pad(above.to(torch.uint8), (0, -x.shape[1] % 8))
    weights = torch.tensor(_WEIGHTS, dtype=torch.uint8, device=x.device)
    return (bits.unflatten(1, (-(-x.shape[1] // 8), 8)) * weights).sum(2, dtype=torch.uint8)


def _hadamard(x: Tensor) -> Tensor:
    """Multiply rows of a power of two of values by the normalized Hadamard matrix."""
    n, stride = x.shape[1], 1
    while stride < n:
        pairs = x.view(-1, n // (2 * stride), 2, stride)
        x = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), 2)
        x = x.reshape(-1, n)
        stride *= 2
    return x / n**0.5


def _rotate(x: Tensor, signs: Tensor, inverse: bool) -> Tensor:
    rounds, dim = signs.shape
    if dim == 0:
        return x.clone()
    size = 1 << dim.bit_length() - 1
    values = x if x.dtype == torch.float64 else x.float()
    for round in reversed(range(rounds)) if inverse else range(rounds):
        first = dim - size if round % 2 else 0
        if not inverse:
            values = values * signs[round]
        mixed = _hadamard(values[:, first : first + size])
        values = torch.cat((values[:, :first], mixed, values[:, first + size :]), 1)
        if inverse:
            values = values * signs[round]
    return values.to(x.dtype)


def hadamard_rotate(x: Tensor, signs: Tensor) -> Tensor:
    """Flip signs and mix, round by round, (rows, dim) with signs (rounds, dim)."""
    return _rotate(x, signs, inverse=False)


def hadamard_unrotate(x: Tensor, signs: Tensor) -> Tensor:
    """Undo :func:`hadamard_rotate`: its transpose, the rounds backwards."""
    return _rotate(x, signs, inverse=True)


def _distances(queries: Tensor, codes: Tensor) -> Tensor:
    differing = queries[:, None].int() ^ codes[None].int()
    return torch.stack([differing >> bit & 1 for bit in range(8)]).sum((0, 3))


def hamming_topk(queries: Tensor, codes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k rows of ``codes`` nearest to each query, by distance and then by row."""
    rows = codes.shape[0]
    found = min(k, rows)
    shape = (queries.shape[0], k)
    distances = torch.full(shape, NO_DISTANCE, dtype=torch.int32, device=codes.device)
    ids = torch.full(shape, -1, dtype=torch.int64, device=codes.device)
    if found and queries.shape[0]:
        row = torch.arange(rows, device=codes.device)
        keys = _distances(queries, codes).long() * rows + row
        best = keys.sort(1).values[:, :found]
        distances[:, :found] = (best // rows).int()
        ids[:, :found] = best % rows
    return distances, ids
