"""Ids as the operators take them: 64-bit patterns in int64."""

from __future__ import annotations

import torch
from torch import Tensor

from emblas import _op


def id_pattern(ids: object) -> Tensor:
    """Return ids as a vector of int64: uint64 by bit pattern."""
    tensor = _op.check_tensor("ids", ids, dtypes=(torch.int64, torch.uint64))
    return tensor.view(torch.int64).reshape(-1)


def padding_pattern(padding_id: int | None) -> int | None:
    """Return the int64 with the bits of an id, which may be given as uint64."""
    if padding_id is None:
        return None
    if not -(2**63) <= padding_id < 2**64:
        raise ValueError(f"padding_id must fit 64 bits, got {padding_id}")
    return padding_id - 2**64 if padding_id >= 2**63 else padding_id


def checked_ids(ids: object, num_embeddings: int | None) -> Tensor:
    """Return ids as a vector of int64; ValueError if one is outside a vocabulary of known size.

    Values on a GPU are checked under ``EMBLAS_DEBUG=1`` only, as that waits for it.
    """
    pattern = id_pattern(ids)
    if num_embeddings is None or pattern.numel() == 0:
        return pattern
    if _op._DEBUG or not pattern.is_cuda:
        low, high = (int(x) for x in pattern.aminmax())
        if low < 0 or high >= num_embeddings:
            raise ValueError(f"ids must be 0 to {num_embeddings - 1}, got {low} to {high}")
    return pattern
