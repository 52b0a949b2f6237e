"""The specification of the bit-code operators in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

NO_DISTANCE = torch.iinfo(torch.int32).max
_WEIGHTS = (128, 64, 32, 16, 8, 4, 2, 1)


def pack_sign(x: Tensor) -> Tensor:
    """Bits of ``x > 0``, (rows, dim) -> (rows, ceil(dim / 8)), the first in the highest place."""
    bits = torch.nn.functional.pad((x > 0).to(torch.uint8), (0, -x.shape[1] % 8))
    weights = torch.tensor(_WEIGHTS, dtype=torch.uint8, device=x.device)
    return (bits.unflatten(1, (-(-x.shape[1] // 8), 8)) * weights).sum(2, dtype=torch.uint8)


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
