"""The specification of the table operators in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

_MURMUR3, _SPLITMIX64 = range(2)
_LOW = 0xFFFFFFFF


def _signed(constant: int) -> int:
    """Return the int64 with the bits of a 64-bit constant: torch multiplies modulo 2^64."""
    constant &= 2**64 - 1
    return constant - 2**64 if constant >= 2**63 else constant


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _murmur3_mix(k: Tensor) -> Tensor:
    k = (k ^ _shift_right(k, 33)) * _signed(0xFF51AFD7ED558CCD)
    k = (k ^ _shift_right(k, 33)) * _signed(0xC4CEB9FE1A85EC53)
    return k ^ _shift_right(k, 33)


def _murmur3(ids: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    k = ids * _signed(0x87C37B91114253D5)
    k = (k << 31) | _shift_right(k, 33)
    h1 = (k * _signed(0x4CF5AD432745937F)) ^ (seed ^ 8)
    h1 = h1 + (seed ^ 8)
    h2 = h1 + (seed ^ 8)
    h1, h2 = _murmur3_mix(h1), _murmur3_mix(h2)
    h1 = h1 + h2
    return h1, h2 + h1


def _splitmix64_mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def hash_keys(ids: Tensor, family: int, seed: int, num_hashes: int, num_embeddings: int) -> Tensor:
    """Row numbers (ids, num_hashes) of int64 ids (ids,); see ``csrc/tables/tables.h``."""
    words: list[Tensor] = []
    start = ids ^ _splitmix64_mix(torch.full_like(ids, seed))
    while len(words) * 2 < num_hashes:
        if family == _MURMUR3:
            words += _murmur3(ids, (seed + len(words) // 2) & _LOW)
        else:
            step = _signed((len(words) + 1) * 0x9E3779B97F4A7C15)
            words.append(_splitmix64_mix(start + step))
    keys = [key for word in words for key in (word & _LOW, _shift_right(word, 32))]
    return torch.stack(keys[:num_hashes], dim=1) % num_embeddings


def bag_of(ids: Tensor, offsets: Tensor | None) -> Tensor:
    """Return the bag of each id."""
    if offsets is None:
        return torch.arange(ids.shape[0], device=ids.device)
    bags = torch.arange(offsets.shape[0] - 1, device=ids.device)
    return torch.repeat_interleave(bags, offsets.diff().long(), output_size=ids.shape[0])


def _accumulator(table: Tensor) -> torch.dtype:
    return torch.float64 if table.dtype == torch.float64 else torch.float32


def hash_bag(
    ids: Tensor,
    table: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    family: int,
    seed: int,
    num_hashes: int,
    padding_id: int | None,
) -> Tensor:
    """Sum of the rows of each bag's ids, (bags, dim); see ``csrc/tables/tables.h``."""
    keys = hash_keys(ids, family, seed, num_hashes, table.shape[0])
    wide = table.to(_accumulator(table))
    summed = wide[keys[:, 0]]
    for j in range(1, num_hashes):
        summed = summed + wide[keys[:, j]]
    if weights is not None:
        summed = weights[:, None] * summed
    if padding_id is not None:
        summed = torch.where((ids == padding_id)[:, None], 0, summed)
    if offsets is not None:
        bags = summed.new_zeros(offsets.shape[0] - 1, table.shape[1])
        summed = bags.index_add(0, bag_of(ids, offsets), summed)
    return summed.to(table.dtype)


def hash_bag_backward(
    grad_out: Tensor,
    ids: Tensor,
    table: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    family: int,
    seed: int,
    num_hashes: int,
    padding_id: int | None,
    need_table: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`hash_bag` with respect to the table and the weights."""
    dtype = _accumulator(table)
    keys = hash_keys(ids, family, seed, num_hashes, table.shape[0])
    grad = grad_out.to(dtype)[bag_of(ids, offsets)]
    if padding_id is not None:
        grad = torch.where((ids == padding_id)[:, None], 0, grad)
    grad_table = grad.new_zeros(table.shape[0] if need_table else 0, table.shape[1])
    grad_weights = grad.new_zeros(ids.shape[0] if need_weights else 0)
    for j in range(num_hashes):
        if need_table:
            weighted = grad if weights is None else weights[:, None] * grad
            grad_table.index_add_(0, keys[:, j], weighted)
        if need_weights:
            grad_weights += (table[keys[:, j]].to(dtype) * grad).sum(1)
    return grad_table.to(table.dtype), grad_weights
