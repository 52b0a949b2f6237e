"""Calls of the operators of attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from contract import packed
from emblas.attention import reference

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
    """What kernels for tensor cores distinguish too."""
    for dtype in HALVES:
        for name, lengths, options in (
            ("window", (70, 0, 9), {"window": (20, 9)}),
            ("causal", (3, 40), {"window": (-1, 0), "dim": 40}),
            ("grouped heads, wide", (20, 1), {"heads": 4, "key_heads": 2, "dim": 136}),
            ("fused", (5, 30), {"fused": True, "dim": 15}),
        ):
            yield (
                f"{name}, {short(dtype)}",
                lambda a=lengths, d=dtype, o=options: Case(
                    _attention_arguments(a, dtype=d, **o), max(a)
                ),
            )


def _gradients(attention: Case) -> Case:
    """The call of the gradient that belongs to a call of attention."""
    q, k, v, *offsets, scale, left, right, lse = attention.args
    wide = [x.double() for x in (q, k, v)]
    out, logarithms = reference.varlen_attention(*wide, *offsets, scale, left, right, True)
    grad_out = torch.randn_like(out).to(q.dtype)
    grad_lse = torch.randn_like(logarithms).float() if lse else None
    given = (grad_out, grad_lse, q, k, v, out.to(q.dtype), logarithms.float())
    return Case((*given, *offsets, scale, left, right), attention.length)


def _attention_backward() -> Iterator[tuple[str, Callable[[], Case]]]:
    for name, case in (*_attention(), *_attention_halves()):
        yield name, lambda a=case: _gradients(a())


def _rotary() -> Iterator[tuple[str, Callable[[], Case]]]:
    def case(
        tokens: int = 9,
        heads: int = 3,
        dim: int = 24,
        pairs: int = 12,
        *,
        dtype: torch.dtype = torch.float32,
        ids: bool = True,
        interleaved: bool = False,
        fused: bool = False,
    ) -> Case:
        x = torch.randn(tokens, 2 * heads if fused else heads, dim + 3 * fused).to(dtype)
        x = x[:, heads:, 1 : dim + 1] if fused else x
        rows = 40 if ids else tokens
        position_ids = torch.randint(rows, (tokens,)) if ids else None
        cos, sin = torch.randn(rows, pairs), torch.randn(rows, pairs)
        return Case((x, cos, sin, position_ids, interleaved), 2)

    for interleaved in (False, True):
        for name, options in {
            "whole": {},
            "by token": {"ids": False},
            "part": {"dim": 31, "pairs": 5},
            "one pair": {"dim": 2, "pairs": 1},
            "fused": {"fused": True},
            "many tokens": {"tokens": 100, "heads": 2, "dim": 64, "pairs": 32},
            "no token": {"tokens": 0},
            "bfloat16": {"dtype": torch.bfloat16, "dim": 26},
            "float16": {"dtype": torch.float16, "fused": True},
        }.items():
            words = f"{name}, interleaved" if interleaved else name
            yield words, lambda a=options, i=interleaved: case(**a, interleaved=i)


CASES: dict[str, dict[str, Callable[[], Case]]] = {
    "rotary": dict(_rotary()),
    "rotary_backward": dict(_rotary()),
    "varlen_attention": {**dict(_attention()), **dict(_attention_halves())},
    "varlen_attention_backward": dict(_attention_backward()),
}
