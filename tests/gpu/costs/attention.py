"""Packed attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from costs.work import Work


@dataclasses.dataclass(frozen=True)
class Attention:
    """Attention of sequences over themselves."""

    lengths: tuple[int, ...]
    heads: int
    head_dim: int
    dtype: torch.dtype

    def __str__(self) -> str:
        words = f"{len(self.lengths)} x {self.lengths[0]} tokens, {self.heads} heads of "
        return words + f"{self.head_dim}, {str(self.dtype).removeprefix('torch.')}"

    @property
    def matrix(self) -> int:
        return sum(self.lengths) * self.heads * self.head_dim * self.dtype.itemsize

    def arguments(self) -> tuple[Any, ...]:
        q, k, v = torch.rand(3, sum(self.lengths), self.heads, self.head_dim).to(self.dtype)
        offsets = torch.tensor([0, *self.lengths]).cumsum(0).int()
        longest = max(self.lengths)
        return q, k, v, offsets, offsets, longest, longest, None, -1, -1, False


def _attend(a: Attention) -> dict[str, Work]:
    pairs = sum(length**2 for length in a.lengths) * a.heads
    read = 3 * a.matrix + 4 * (len(a.lengths) + 1)
    return {"_attend": Work(read, a.matrix, 0, 4 * pairs * a.head_dim)}


_BF16, _F32 = torch.bfloat16, torch.float32
MODELS: dict[tuple[str, str], Callable[[Any], dict[str, Work]]] = {
    ("varlen_attention", "Triton"): _attend,
}
SMALL: dict[str, tuple[Any, ...]] = {
    "varlen_attention": (Attention((128, 256), 2, 64, _BF16), Attention((64, 32), 1, 64, _F32)),
}
LARGE: dict[str, tuple[Any, ...]] = {
    "varlen_attention": (Attention((512,) * 64, 12, 64, _BF16), Attention((8192,), 16, 128, _BF16)),
}
