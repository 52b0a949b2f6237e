"""Where the tokens of a packed batch are, without waiting for a GPU."""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_of(tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the number of the sequence, int64, that each of some tokens lies in."""
    batch = cu_seqlens.shape[0] - 1
    return torch.searchsorted(cu_seqlens[1:].long(), tokens, right=True).clamp_max(batch - 1)


def positions(cu_seqlens: Tensor, count: int) -> Tensor:
    """Return the position ``(count,)``, int64, of each of ``count`` tokens in its sequence."""
    tokens = torch.arange(count, device=cu_seqlens.device)
    return tokens - cu_seqlens[sequence_of(tokens, cu_seqlens)].long()
