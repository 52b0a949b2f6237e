"""Calls of the operators of attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from contract import packed
from emblas.attention import deberta_buckets, reference
from emblas.attention.op import Shaping

from cases.case import HALVES, Case, short


def _attention_arguments(
    lengths_q: tuple[int, ...],
    lengths_k: tuple[int, ...] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    heads: int = 2,
    key_heads: int = 1,
    dim: int = 24,
    value_dim: int | None = None,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    lse: bool = True,
    fused: bool = False,
    options: str = "",
) -> tuple[Any, ...]:
    lengths_k = lengths_q if lengths_k is None else lengths_k
    if fused:  # slices of one projection
        x = torch.randn(sum(lengths_q), 3, heads, dim).to(dtype)
        q, k, v = x.unbind(1)
    else:
        q = torch.randn(sum(lengths_q), heads, dim).to(dtype)
        k = torch.randn(sum(lengths_k), key_heads, dim).to(dtype)
        v = torch.randn(sum(lengths_k), key_heads, value_dim or dim).to(dtype)
    longest = (max((0, *lengths)) for lengths in (lengths_q, lengths_k))
    return (
        q, k, v, packed(lengths_q), packed(lengths_k), *longest, scale, *window, lse,
        *(_shaping(options, lengths_q, lengths_k, q, k.shape[1]) if options else ()),
    )  # fmt: skip


def _shaping(
    names: str,
    lengths_q: tuple[int, ...],
    lengths_k: tuple[int, ...],
    q: torch.Tensor,
    key_heads: int,
) -> Shaping:
    """What shapes scores, by words with commas between."""
    batch, tokens, heads = len(lengths_k), sum(lengths_k), q.shape[1]
    pairs = sum(map(math.prod, zip(lengths_q, lengths_k, strict=True)))
    longest = max(lengths_q), max(lengths_k)

    def positions(slots: int, count: int) -> torch.Tensor:
        """Position vectors, as public functions widen those of the dtype of q."""
        return torch.randn(slots, count, q.shape[2]).to(q.dtype).float()

    lookup, some = deberta_buckets(4, 9).int(), torch.tensor([2, 0, 1, 1, 0]).int()
    made: dict[str, dict[str, Any]] = {
        "softcap": {"softcap": 1.5},
        "slopes": {"alibi_slopes": torch.rand(1, heads)},
        "slopes of sequences": {"alibi_slopes": torch.rand(batch, heads)},
        "distances": {"distance_bias": torch.randn(heads, 11)},
        "one distance": {"distance_bias": torch.randn(heads, 1)},
        "far distances": {"distance_bias": torch.randn(heads, 301)},
        "prefix": {"prefix_len": torch.arange(5, 5 + batch, dtype=torch.int32)},
        "branches": {"branch": (torch.arange(tokens) // max(tokens // 4, 1) - 1).int()},
        "blocks": {"block_ids": torch.randint(-1, 3, (tokens,), dtype=torch.int32)},
        "few blocks": {"block_ids": (torch.arange(tokens) // 30 * 2 // 3 - 1).int()},
        "pairs": {"pair_bias": torch.randn(heads, pairs)},
        "padded pairs": {"pair_bias": torch.randn(batch, heads, longest[0] + 2, longest[1] + 3)},
        "shared pairs": {"pair_bias": torch.randn(1, 1, *longest).expand(batch, heads, *longest)},
        "disentangled": {
            "position_keys": positions(8, key_heads),
            "position_queries": positions(8, heads),
            "position_lookup": lookup,
        },
        "position keys": {"position_keys": positions(4, key_heads), "position_lookup": some},
        "position queries": {"position_queries": positions(4, heads), "position_lookup": some},
        "one slot": {"position_queries": positions(1, heads), "position_lookup": some[1:2]},
        "dropout": {"dropout_p": 0.3, "dropout_seeds": torch.arange(batch) * 7**20 - 5**25},
    }
    made["of keys"] = {"pair_bias": torch.randn(1, 1, 1, longest[1]).expand(1, heads, *longest)}
    return Shaping(**{k: x for name in names.split(", ") for k, x in made[name].items()})


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


def _wide_attention() -> Iterator[tuple[str, Callable[[], Case]]]:
    """Vectors that have no gradient kernel on GPUs."""
    for dtype in (torch.float32, torch.bfloat16):
        wide = {"dtype": dtype, "dim": 512, "value_dim": 500, "heads": 1}
        yield (
            f"dim 512, {short(dtype)}",
            lambda a=wide: Case(_attention_arguments((3, 40), **a), 40),
        )
    other = {"dim": 300, "value_dim": 9, "heads": 1, "window": (9, 0)}
    yield "dim 300", lambda: Case(_attention_arguments((20,), **other), 20)


def _attention_options(beyond: bool | None = None) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Calls with what shapes scores: all, or those whose gradient is one operator's or the other's.

    Pairs, dropout and position vectors take the one for biases beyond those of distance.
    """
    small, many, uneven = (3, 0, 1, 40), (100,), ((9, 40), (4, 50))
    bfloat16, grouped = {"dtype": torch.bfloat16}, {"heads": 2, "key_heads": 2}
    one = {"heads": 1}
    for lengths, words, options in (
        (small, "wide values", {"dim": 24, "value_dim": 40}),
        (small, "narrow values", {"dim": 40, "value_dim": 16, "heads": 4, "key_heads": 2}),
        (small, "softcap", {"scale": 2.0}),
        (small, "slopes", {"window": (-1, 0)}),
        (uneven, "slopes of sequences", grouped),
        (uneven, "prefix", {"window": (-1, 0)}),
        (many, "prefix, branches", {"window": (30, 0), **one}),
        (small, "branches", {"window": (-1, 2)}),
        (uneven, "blocks", {"window": (20, 0)}),
        (many, "few blocks", {"window": (-1, 0), **one}),
        (small, "distances", {}),
        (small, "one distance", {}),
        (many, "distances, branches", {"window": (60, 3), **one}),
        (uneven, "far distances, softcap", {"window": (-1, 0)}),
        (small, "distances, prefix, slopes", {"window": (9, 0), **bfloat16}),
        (uneven, "pairs", grouped),
        (small, "padded pairs", {"window": (5, 9)}),
        (small, "shared pairs, softcap", bfloat16),
        (uneven, "dropout", {"window": (6, 9), **grouped}),
        (many, "dropout, distances, softcap", {"window": (33, 20), **one}),
        (uneven, "dropout, pairs, blocks, distances", {"window": (20, 0), "value_dim": 9}),
        (uneven, "disentangled", {"scale": 0.3}),
        (many, "disentangled, softcap", {"window": (40, 3), **bfloat16, **one, "dim": 40}),
        ((20,), "disentangled, wide", {"dim": 136}),
        ((3, 0, 30), "position keys, distances, branches", {}),
        (((9, 30), (4, 40)), "position queries, dropout", {"window": (9, 20), **grouped}),
        ((3, 0, 1, 17), "one slot, pairs", {}),
    ):
        named = ("pairs", "dropout", "disentangled", "position", "slot")
        if beyond is None or beyond == any(x in words for x in named):
            names = words.removesuffix(", wide")
            chosen = {**options} if "values" in words else {**options, "options": names}
            q, k = lengths if isinstance(lengths[0], tuple) else (lengths, lengths)
            yield (
                f"{words}, {len(q)} sequences",
                lambda a=(q, k), o=chosen: Case(_attention_arguments(*a, **o), max(*a[0], *a[1])),
            )
    if not beyond:
        edges = {"window": (5, 3), "options": "distances"}  # on those of tiles of distances
        yield "distances at edges", lambda: Case(_attention_arguments((30, 37), **edges), 37)
        fewer = ((40,), (10,))
        yield (
            "distances, more queries",
            lambda: Case(_attention_arguments(*fewer, options="distances"), 40),
        )
    if beyond is not False:
        yield "pairs, of keys", lambda: Case(_attention_arguments((20,), options="of keys"), 20)


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


def _gradients(attention: Case, *needs: bool) -> Case:
    """The call of the gradient that belongs to a call of attention.

    Without options there are no needs; with one need it is that of the bias of distances, with
    three also those of the others.
    """
    q, k, v, *offsets, scale, left, right, lse = attention.args[:11]
    shaping = Shaping(*attention.args[11:])
    wide = [x.double() for x in (q, k, v)]
    widened = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in shaping]
    numbers = (*offsets, scale, left, right)
    out, logarithms = reference.varlen_attention(*wide, *numbers, True, *widened)
    grad_out = torch.randn_like(out).to(q.dtype)
    grad_lse = torch.randn_like(logarithms).float() if lse else None
    given = (grad_out, grad_lse, q, k, v, out.to(q.dtype), logarithms.float())
    options = (shaping if len(needs) == 3 else shaping.of_distance()) if needs else ()
    return Case((*given, *numbers, *options, *needs), attention.length)


def _attention_backward() -> Iterator[tuple[str, Callable[[], Case]]]:
    for name, case in (*_attention(), *_attention_halves()):
        yield name, lambda a=case: _gradients(a())
    for name, case in _attention_options(beyond=False):
        yield name, lambda a=case: _gradients(a(), True)
    unneeded = dict(_attention_options())["distances, 4 sequences"]
    yield "unneeded bias", lambda: _gradients(unneeded(), False)


def _attention_biases_backward() -> Iterator[tuple[str, Callable[[], Case]]]:
    for name, case in _attention_options(beyond=True):
        yield name, lambda a=case: _gradients(a(), True, True, True)
    for words in ("shared pairs, softcap, 4 sequences", "disentangled, 2 sequences"):
        unneeded = dict(_attention_options())[words]
        yield f"unneeded biases, {words}", lambda a=unneeded: _gradients(a(), False, False, False)


def _rotary(changed: tuple[int, ...] = ()) -> Iterator[tuple[str, Callable[[], Case]]]:
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
        return Case((x, cos, sin, position_ids, interleaved), 2, changed)

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


def _rows(name: str) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Calls of "row_dots", "row_sums" or "row_outer"."""

    def case(
        lengths: tuple[int, ...],
        rows: tuple[int, ...],
        heads: int = 2,
        key_heads: int = 2,
        dim: int = 24,
        longest: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> Case:
        tokens, longest = sum(lengths), longest or max((0, *lengths))
        x, y = torch.randn(len(rows), heads, dim + 3), torch.randn(tokens, key_heads, dim + 3)
        x, y = (vectors.to(dtype)[:, :, 2 : dim + 2] for vectors in (x, y))
        s, where = (
            torch.randn(len(rows), heads, longest),
            (torch.tensor(rows, dtype=torch.int64), packed(lengths)),
        )
        args = {
            "row_dots": (x, y, *where, longest),
            "row_sums": (s, y, *where),
            "row_outer": (s, x, *where, tokens, key_heads),
        }
        return Case(args[name], max(dim, longest, len(rows)))

    ragged = (3, 0, 1, 40, 0)
    for words, lengths, rows, options in (
        ("ragged", ragged, (3, 2, -1, 43, 2, 0), {}),
        ("grouped heads, longer s", ragged, (4, 0), {"heads": 6, "longest": 50}),
        ("shorter s", (40, 0, 5), (41, 40, 44), {"longest": 5}),
        ("wide", (70,), (0, 69), {"dim": 136, "heads": 1, "key_heads": 1}),
        ("dim 1", (20, 1100), (1119, 0), {"dim": 1, "key_heads": 1}),
        ("bfloat16", ragged, (40, 1), {"dtype": torch.bfloat16, "key_heads": 1}),
        ("no row", ragged, (), {}),
        ("no sequence", (), (-1, -1), {"longest": 2}),
        ("nobody's rows", (4, 3), (-5, -1), {}),
    ):
        yield words, lambda a=lengths, r=rows, o=options: case(a, r, **o)


CASES: dict[str, dict[str, Callable[[], Case]]] = {
    "rotary": dict(_rotary()),
    "rotary_": dict(_rotary(changed=(0,))),
    "rotary_backward": dict(_rotary()),
    **{name: dict(_rows(name)) for name in ("row_dots", "row_sums", "row_outer")},
    "varlen_attention": dict(
        (*_attention(), *_wide_attention(), *_attention_halves(), *_attention_options())
    ),
    "varlen_attention_backward": dict(_attention_backward()),
    "varlen_attention_biases_backward": dict(_attention_biases_backward()),
}
