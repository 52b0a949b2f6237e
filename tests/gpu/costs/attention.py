"""Packed attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from costs.work import Work
from emblas.attention.op import Shaping


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

    @property
    def per_query(self) -> int:
        return 4 * sum(self.lengths) * self.heads

    @property
    def pairs(self) -> int:
        return sum(length**2 for length in self.lengths) * self.heads


class AttentionBackward(Attention):
    """Its gradients."""

    def arguments(self) -> tuple[Any, ...]:
        q, k, v, *others, _ = super().arguments()
        grad_out, out, lse = q.clone(), q.clone(), torch.zeros(self.heads, q.shape[0])
        return grad_out, None, q, k, v, out, lse, *others


_RADIUS = 16


class AttentionBiasesBackward(AttentionBackward):
    """With biases of distances and of pairs, and gradients of both."""

    def __str__(self) -> str:
        return f"{super().__str__()}, biases"

    def arguments(self) -> tuple[Any, ...]:
        pairs = torch.rand(self.heads, self.pairs // self.heads)
        distances = torch.rand(self.heads, 2 * _RADIUS + 1)
        return *super().arguments(), *Shaping(0.0, None, distances, pair_bias=pairs), *[True] * 3

    @property
    def distances(self) -> int:
        return sum(2 * length - 1 for length in self.lengths) * self.heads


class DisentangledBackward(AttentionBackward):
    """With disentangled scores, and gradients of both kinds of position vectors."""

    slots = 2 * _RADIUS + 1

    def __str__(self) -> str:
        return f"{super().__str__()}, disentangled"

    def arguments(self) -> tuple[Any, ...]:
        tables = torch.rand(2, self.slots, self.heads, self.head_dim)
        lookup = torch.arange(self.slots, dtype=torch.int32)
        shaping = Shaping(
            position_keys=tables[0], position_queries=tables[1], position_lookup=lookup
        )
        return *super().arguments(), *shaping, *[True] * 3

    @property
    def table(self) -> int:
        return self.slots * self.heads * self.head_dim

    @property
    def sums(self) -> int:
        return sum(2 * length - 1 for length in self.lengths) * self.heads * self.head_dim


@dataclasses.dataclass(frozen=True)
class Rotary:
    """All elements of the heads of some tokens turned, each token at a position of its own."""

    tokens: int
    heads: int
    head_dim: int
    dtype: torch.dtype

    def __str__(self) -> str:
        words = f"{self.tokens} tokens, {self.heads} heads of {self.head_dim}, "
        return words + str(self.dtype).removeprefix("torch.")

    def arguments(self) -> tuple[Any, ...]:
        x = torch.rand(self.tokens, self.heads, self.head_dim).to(self.dtype)
        tables = torch.rand(2, self.tokens, self.head_dim // 2)
        return x, *tables, torch.arange(self.tokens), False


class Dots(Attention):
    """Products of the first token of each sequence with all of its tokens."""

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def chosen(self) -> int:
        """Bytes of the vectors of these tokens."""
        return self.batch * self.heads * self.head_dim * self.dtype.itemsize

    def parts(self) -> tuple[torch.Tensor, ...]:
        """s, x, y, rows and offsets."""
        y = torch.rand(sum(self.lengths), self.heads, self.head_dim).to(self.dtype)
        offsets = torch.tensor([0, *self.lengths]).cumsum(0)
        s = torch.rand(self.batch, self.heads, max(self.lengths))
        return s, y[: self.batch].clone(), y, offsets[:-1].clone(), offsets.int()

    def arguments(self) -> tuple[Any, ...]:
        _, *others = self.parts()
        return *others, max(self.lengths)


class Sums(Dots):
    """Sums of all tokens of each sequence, by the weights of a row."""

    def arguments(self) -> tuple[Any, ...]:
        s, _, *others = self.parts()
        return s, *others


class Outer(Dots):
    """Each token the vector of its sequence's row, by a weight."""

    def arguments(self) -> tuple[Any, ...]:
        s, x, _, *others = self.parts()
        return s, x, *others, sum(self.lengths), self.heads


def _dots(a: Dots) -> dict[str, Work]:
    read = a.chosen + a.matrix + 8 * a.batch + 4 * (a.batch + 1)
    written = 4 * a.batch * a.heads * max(a.lengths)
    return {"_dot_rows": Work(read, written, a.per_query // 2 * a.head_dim)}


def _sums(a: Sums) -> dict[str, Work]:
    read = a.per_query + a.matrix + 8 * a.batch + 4 * (a.batch + 1)
    return {"_sum_rows": Work(read, a.chosen, a.per_query // 2 * a.head_dim)}


def _outer(a: Outer) -> dict[str, Work]:
    """Rows come in the order of their sequences, and each sequence knows where its own begin."""
    read = a.per_query + a.chosen + 8 * a.batch + 12 * (a.batch + 1)
    flops = a.per_query // 2 * a.head_dim
    return {"_spread_rows": Work(read, a.per_query * a.head_dim, flops)}


def _rotary(kernel: str, r: Rotary) -> dict[str, Work]:
    elements = r.tokens * r.heads * r.head_dim
    size, tables = elements * r.dtype.itemsize, r.tokens * (4 * r.head_dim + 8)
    return {kernel: Work(size + tables, size, 3 * elements)}


def _attend(kernel: str, a: Attention) -> dict[str, Work]:
    read = 3 * a.matrix + 4 * (len(a.lengths) + 1)
    return {kernel: Work(read, a.matrix, 0, 4 * a.pairs * a.head_dim)}


def _attend_backward(kernels: tuple[str, str], a: AttentionBackward) -> dict[str, Work]:
    offsets, flops = 4 * (len(a.lengths) + 1), 2 * a.pairs * a.head_dim
    for_queries = 5 * a.matrix + a.per_query + offsets
    for_keys = 4 * a.matrix + 2 * a.per_query + offsets
    return {
        kernels[0]: Work(for_queries, a.matrix + a.per_query, 0, 3 * flops),
        kernels[1]: Work(for_keys, 2 * a.matrix, 0, 4 * flops),
    }


def _attend_biases_backward(a: AttentionBiasesBackward) -> dict[str, Work]:
    """Tiles of distances hang over the ends of the queries."""
    plain = _attend_backward(("_grad_queries", "_grad_keys"), a)
    bins = a.heads * (2 * _RADIUS + 1)
    biases = 4 * (a.pairs + bins) + 8 * len(a.lengths)
    offsets, flops = 4 * (len(a.lengths) + 1), 2 * a.pairs * a.head_dim
    for_queries, for_keys = plain["_grad_queries"], plain["_grad_keys"]
    read = for_queries.read + biases + 8 * len(a.lengths)
    written = for_queries.written + 4 * a.pairs
    return {
        "_grad_queries": Work(read, written, 0, 3 * flops),
        "_grad_keys": Work(for_keys.read + biases, for_keys.written, 0, 4 * flops),
        "_grad_distances": Work(for_keys.read + biases, 4 * a.distances, 0, 4 * flops, slack=1),
        "_add_sequences": Work(4 * a.distances + offsets, 4 * bins),
    }


def _disentangled_backward(a: DisentangledBackward) -> dict[str, Work]:
    """Tables are read as vectors of the dtype, and their gradients in float32."""
    plain = _attend_backward(("_grad_queries", "_grad_keys"), a)
    offsets, flops, lookup = 4 * (len(a.lengths) + 1), 2 * a.pairs * a.head_dim, 4 * a.slots
    tables = 2 * a.table * a.dtype.itemsize + lookup
    for_queries, for_keys = plain["_grad_queries"], plain["_grad_keys"]
    add_vectors = Work(4 * a.sums + offsets + lookup + 8 * a.slots, 4 * a.table)
    return {
        "_grad_queries": Work(for_queries.read + tables, for_queries.written, 0, 9 * flops),
        "_grad_keys": Work(for_keys.read + tables, for_keys.written, 0, 10 * flops),
        "_grad_distances": Work(for_keys.read + tables, 8 * a.sums, 0, 10 * flops, slack=1),
        "_add_vectors (keys)": add_vectors,
        "_add_vectors (queries)": add_vectors,
    }


def _attend_shaped_backward(
    a: AttentionBiasesBackward | DisentangledBackward,
) -> dict[str, Work]:
    if isinstance(a, DisentangledBackward):
        return _disentangled_backward(a)
    return _attend_biases_backward(a)


_BF16, _F32 = torch.bfloat16, torch.float32
MODELS: dict[tuple[str, str], Callable[[Any], dict[str, Work]]] = {
    ("rotary", "CUDA C++"): partial(_rotary, "turn_pairs"),
    ("rotary", "Triton"): partial(_rotary, "_turn"),
    ("rotary_", "CUDA C++"): partial(_rotary, "turn_pairs"),
    ("rotary_", "Triton"): partial(_rotary, "_turn"),
    ("rotary_backward", "CUDA C++"): partial(_rotary, "turn_pairs"),
    ("rotary_backward", "Triton"): partial(_rotary, "_turn"),
    ("row_dots", "Triton"): _dots,
    ("row_sums", "Triton"): _sums,
    ("row_outer", "Triton"): _outer,
    ("varlen_attention", "CUDA C++"): partial(_attend, "attend_tile"),
    ("varlen_attention", "Triton"): partial(_attend, "_attend"),
    ("varlen_attention_backward", "CUDA C++"): partial(
        _attend_backward, ("grad_queries_tile", "grad_keys_tile")
    ),
    ("varlen_attention_backward", "Triton"): partial(
        _attend_backward, ("_grad_queries", "_grad_keys")
    ),
    ("varlen_attention_biases_backward", "Triton"): _attend_shaped_backward,
}
_SMALL_ROTARY = (Rotary(20, 3, 64, _F32), Rotary(7, 2, 24, _BF16))
_LARGE_ROTARY = (Rotary(32768, 24, 64, _BF16),)
SMALL: dict[str, tuple[Any, ...]] = {
    "rotary": _SMALL_ROTARY,
    "rotary_": _SMALL_ROTARY,
    "rotary_backward": _SMALL_ROTARY,
    "row_dots": (Dots((9, 130), 2, 24, _BF16),),
    "row_sums": (Sums((9, 130), 2, 24, _BF16),),
    "row_outer": (Outer((9, 130), 2, 24, _BF16),),
    "varlen_attention": (Attention((128, 256), 2, 64, _BF16), Attention((64, 32), 1, 64, _F32)),
    "varlen_attention_backward": (
        AttentionBackward((128, 256), 2, 64, _BF16),
        AttentionBackward((64, 32), 1, 32, _F32),
    ),
    "varlen_attention_biases_backward": (
        AttentionBiasesBackward((128,), 2, 64, _BF16),
        DisentangledBackward((64,), 2, 64, _BF16),
    ),
}
LARGE: dict[str, tuple[Any, ...]] = {
    "rotary": _LARGE_ROTARY,
    "rotary_": _LARGE_ROTARY,
    "rotary_backward": _LARGE_ROTARY,
    "row_dots": (Dots((512,) * 64, 12, 64, _BF16),),
    "row_sums": (Sums((512,) * 64, 12, 64, _BF16),),
    "row_outer": (Outer((512,) * 64, 12, 64, _BF16),),
    "varlen_attention": (Attention((512,) * 64, 12, 64, _BF16), Attention((8192,), 16, 128, _BF16)),
    "varlen_attention_backward": (
        AttentionBackward((512,) * 64, 12, 64, _BF16),
        AttentionBackward((8192,), 16, 128, _BF16),
    ),
    "varlen_attention_biases_backward": (
        AttentionBiasesBackward((512,) * 64, 12, 64, _BF16),
        DisentangledBackward((512,) * 64, 12, 64, _BF16),
    ),
}
