"""Calls of the operators of attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from contract import packed

from cases.case import HALVES, Case, short


def _attention_arguments(
    lengths_q: tuple[int, ...],
    lengths_k: tuple[int, ...] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    heads: int = 2,
    key_heads: int = 1,
    dim: int = 24,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    lse: bool = True,
    fused: bool = False,
) -> tuple[Any, ...]:
    lengths_k = lengths_q if lengths_k is None else lengths_k
    if fused:  # slices of one projection
        x = torch.randn(sum(lengths_q), 3, heads, dim).to(dtype)
        q, k, v = x.unbind(1)
    else:
        q = torch.randn(sum(lengths_q), heads, dim).to(dtype)
        k, v = (torch.randn(sum(lengths_k), key_heads, dim).to(dtype) for _ in range(2))
    longest = (max((0, *lengths)) for lengths in (lengths_q, lengths_k))
    return (
        q, k, v, packed(lengths_q), packed(lengths_k), *longest, scale, *window, lse,
    )  # fmt: skip


def _attention() -> Iterator[tuple[str, Callable[[], Case]]]:
    lengths = (3, 0, 1, 40)
    for name, options in {
        "plain": {},
        "no lse": {"lse": False},
        "scale": {"scale": 0.3},
        "causal": {"window": (-1, 0)},
        "window": {"window": (3, 5)},
        "only itself": {"window": (0, 0)},
        "far window": {"window": (2**40, 2**31)},
        "grouped heads": {"heads": 6, "key_heads": 2},
        "fused": {"fused": True},
        "dim 16": {"dim": 16},
        "dim 72": {"dim": 72},
        "dim 256": {"dim": 256, "heads": 1},
    }.items():
        yield name, lambda a=options: Case(_attention_arguments(lengths, **a), 40)
    yield "more tiles", lambda: Case(_attention_arguments((150,), window=(40, 3)), 150)
    many = ((90,), (50,))
    yield "more queries, window", lambda: Case(_attention_arguments(*many, window=(20, 3)), 50)
    for name, q, k in (
        ("more keys", (3, 2, 0, 7), (5, 40, 4, 0)),
        ("more queries", (9, 40), (4, 1)),
        ("no sequence", (), ()),
        ("empty sequences", (0, 0), (0, 0)),
    ):
        yield name, lambda a=(q, k): Case(_attention_arguments(*a, window=(-1, 0)), 40)


def _attention_halves() -> Iterator[tuple[str, Callable[[], Case]]]:
    for dtype in HALVES:
        yield (
            short(dtype),
            lambda a=dtype: Case(_attention_arguments((70, 0, 9), dtype=a, window=(20, 9)), 70),
        )


CASES: dict[str, dict[str, Callable[[], Case]]] = {
    "varlen_attention": {**dict(_attention()), **dict(_attention_halves())},
}
