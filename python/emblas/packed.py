"""Packed batches: ragged sequences laid end to end, without padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def offsets(lengths: Sequence[int] | Tensor) -> Tensor:
    """Offsets ``cu_seqlens`` (batch + 1,), int32, of sequences of these lengths.

    Raises
    ------
    ValueError
        If a length is negative or the total passes 2^31 - 1.
    """
    lengths = torch.as_tensor(lengths, dtype=torch.int64)
    total = int(lengths.sum())
    if len(lengths) and int(lengths.min()) < 0:
        raise ValueError(f"lengths must not be negative, got {int(lengths.min())}")
    if total >= 2**31:
        raise ValueError(f"lengths must sum to less than 2^31 tokens, got {total}")
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)


def pack(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Lay sequences ``(length_b, ...)`` end to end.

    Returns
    -------
    tuple of Tensor
        Tokens ``(sum of lengths, ...)`` and their offsets ``(batch + 1,)``.

    Raises
    ------
    ValueError
        If there is no sequence, whose trailing shape and dtype the result would have.
    """
    if not sequences:
        raise ValueError("sequences must hold at least one tensor, got none")
    return torch.cat(list(sequences)), offsets([len(sequence) for sequence in sequences])


def split(x: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    """Return the sequences of a packed batch, as views of ``x``."""
    return list(x.split(cu_seqlens.diff().tolist()))


def positions(cu_seqlens: Tensor) -> Tensor:
    """Index ``(tokens,)``, int64, of each token within its own sequence."""
    lengths = cu_seqlens.diff().long()
    starts = torch.repeat_interleave(cu_seqlens[:-1].long(), lengths)
    return torch.arange(len(starts), device=cu_seqlens.device) - starts


def token_budget_batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Group sequences into batches of at most ``budget`` tokens.

    Sequences are taken by falling length, so that the batches of the longest come first (a batch
    that is too large for the memory fails at once) and each batch holds sequences of like length. A
    sequence longer than the budget makes a batch of its own.

    Parameters
    ----------
    lengths : sequence of int
        Tokens of each sequence.
    budget : int
        Most tokens in a batch.

    Yields
    ------
    list of int
        Indices into ``lengths``; every index occurs once.

    Raises
    ------
    ValueError
        If ``budget`` is not positive.
    """
    if budget < 1:
        raise ValueError(f"budget must be at least 1 token, got {budget}")
    batch: list[int] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and tokens + lengths[index] > budget:
            yield batch
            batch, tokens = [], 0
        batch.append(index)
        tokens += lengths[index]
    if batch:
        yield batch
