"""Calls of every operator, over odd and degenerate shapes, for tests/test_executors.py.

``CASES[operator][case]`` makes the arguments; all but few are small, as emulators run them too.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from contract import layouts, packed
from emblas import _op
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class Case:
    args: tuple[Any, ...]
    length: int = 1  # of the longest sum


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _strided(x: Tensor) -> Tensor:
    return layouts(x)["wide rows, unaligned"]


# --- pooling -------------------------------------------------------------------------------------


def _pool(
    lengths: tuple[int, ...],
    dim: int,
    dtype: torch.dtype = torch.float32,
    weighted: bool = False,
    normalize: bool = False,
    strided: bool = False,
) -> tuple[Any, ...]:
    x = torch.randn(sum(lengths), dim).to(dtype)
    weights = torch.rand(sum(lengths)) if weighted else None
    if weighted and lengths:
        weights[::3] = 0
        x[::3] = torch.nan  # rows of weight 0 are not read
        first = packed(lengths)[1]
        weights[:first] = 0  # nothing is left of the first sequence
    return (_strided(x) if strided else x), packed(lengths), weights, normalize


def _pooling() -> Iterator[tuple[str, Callable[[], Case]]]:
    mixed = (0, 5, 1, 0, 130, 64, 0)
    for dtype, weighted, normalize in itertools.product(
        (torch.float32, *HALVES), (False, True), (False, True)
    ):
        name = f"{_short(dtype)}{'-weights' * weighted}{'-normalize' * normalize}"
        yield name, lambda a=(mixed, 67, dtype, weighted, normalize): Case(_pool(*a), 130)
    for name, lengths, dim in (
        ("no sequence", (), 5),
        ("empty sequences", (0, 0), 5),
        ("no dimension", (3,), 0),
        ("one dimension", (3, 1), 1),
        ("one token", (1,), 64),
        ("wide", (2, 3), 1100),
    ):
        yield name, lambda a=(lengths, dim): Case(_pool(*a, normalize=True), 1100)
    yield "strided", lambda: Case(_pool(mixed, 40, strided=True, weighted=True), 130)


def _pooling_backward() -> Iterator[tuple[str, Callable[[], Case]]]:
    def backward(case: Case, need_x: bool = True, need_weights: bool = True) -> Case:
        x, cu_seqlens, weights, normalize = case.args
        x = torch.nan_to_num(x) if x.is_contiguous() else _strided(torch.nan_to_num(x))
        out, norm = torch.ops.emblas.segment_pool(x, cu_seqlens, weights, normalize)
        grad = torch.randn(out.shape).to(x.dtype)
        needs = (normalize, need_x, need_weights)
        return Case((grad, x, out, norm, cu_seqlens, weights, *needs), max(case.length, x.shape[1]))

    for name, make in _pooling():
        yield name, lambda make=make: backward(make())
    for needs in ((True, False), (False, True)):
        yield f"needs {needs}", lambda a=needs: backward(Case(_pool((3, 70), 70)), *a)


# --- tables --------------------------------------------------------------------------------------


def _ids(count: int) -> Tensor:
    ids = torch.randint(-(2**63), 2**63 - 1, (count,))
    ids[: count // 2] %= 7  # some come again
    return ids


def _hash_keys() -> Iterator[tuple[str, Callable[[], Case]]]:
    for family, hashes, rows in itertools.product(
        (0, 1), (1, 4, 7, 16), (1, 2, 1000, 2**31 + 11, 2**32)
    ):
        name = f"family {family}, {hashes} hashes, {rows} rows"
        yield name, lambda a=(family, 2**32 - 1, hashes, rows): Case((_ids(70), *a))
    yield "no ids", lambda: Case((_ids(0), 0, 1, 4, 10))
    yield "every other id", lambda: Case((_ids(600)[::2], 1, 5, 4, 10))


def _bag_arguments(
    count: int,
    rows: int = 20,
    dim: int = 37,
    *,
    dtype: torch.dtype = torch.float32,
    lengths: tuple[int, ...] | None = None,
    weighted: bool = False,
    family: int = 0,
    hashes: int = 4,
    padding: int | None = None,
    strided: bool = False,
) -> tuple[Any, ...]:
    table = torch.randn(rows, dim).to(dtype)
    return (
        _ids(count),
        _strided(table) if strided else table,
        None if lengths is None else packed(lengths),
        torch.randn(count) if weighted else None,
        family, 3, hashes, padding,
    )  # fmt: skip


def _hash_bag() -> Iterator[tuple[str, Callable[[], Case]]]:
    lengths = (0, 1, 7, 0, 20, 12)
    for name, options in {
        **{_short(dtype): {"dtype": dtype} for dtype in (torch.float32, *HALVES)},
        "weights": {"weighted": True},
        "splitmix64": {"family": 1, "hashes": 3},
        "2 hashes": {"hashes": 2},
        "5 hashes": {"hashes": 5},
        "7 hashes": {"hashes": 7},
        "padding": {"padding": 3, "weighted": True},
        "negative padding": {"padding": -(2**63)},
        "strided": {"strided": True},
        "one row": {"rows": 1, "dim": 1},
        "wide": {"dim": 130},
        "no dimension": {"dim": 0},
    }.items():
        yield name, lambda a=options: Case(_bag_arguments(40, **a), 40)
        yield f"bags, {name}", lambda a=options: Case(_bag_arguments(40, lengths=lengths, **a), 80)
    yield "no ids", lambda: Case(_bag_arguments(0))
    yield "empty bags", lambda: Case(_bag_arguments(0, lengths=(0, 0)))
    yield "no bags", lambda: Case(_bag_arguments(0, lengths=()))


def _hash_bag_backward() -> Iterator[tuple[str, Callable[[], Case]]]:
    def backward(case: Case, need_table: bool = True, need_weights: bool = True) -> Case:
        ids, table, offsets, *_ = case.args
        bags = len(ids) if offsets is None else len(offsets) - 1
        grad = torch.randn(bags, table.shape[1]).to(table.dtype)
        return Case((grad, *case.args, need_table, need_weights), 160)

    for name, make in _hash_bag():
        yield name, lambda make=make: backward(make())
    for needs in ((True, False), (False, True)):
        yield f"needs {needs}", lambda a=needs: backward(Case(_bag_arguments(9)), *a)


# --- binary --------------------------------------------------------------------------------------


def _signs(rows: int, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(rows, dim).to(dtype)
    x[: rows // 2, ::3] = 0
    x[: rows // 2, 1::3] = torch.nan
    return x


def _pack_sign() -> Iterator[tuple[str, Callable[[], Case]]]:
    for dtype in _op.FLOATS:
        yield _short(dtype), lambda a=dtype: Case((_signs(33, 131, a),))
    for rows, dim in ((0, 5), (3, 0), (1, 1), (5, 8), (2, 127), (70, 9)):
        yield f"{rows} x {dim}", lambda a=(rows, dim): Case((_signs(*a),))
    yield "strided", lambda: Case((_strided(_signs(20, 40)),))


def _hadamard_rotate() -> Iterator[tuple[str, Callable[[], Case]]]:
    def case(rows: int, dim: int, rounds: int, dtype: torch.dtype, strided: bool = False) -> Case:
        x, signs = torch.randn(rows, dim).to(dtype), torch.randint(0, 2, (rounds, dim)) * 2 - 1
        return Case((_strided(x) if strided else x, signs.to(torch.int8)), dim)

    for dtype in _op.FLOATS:
        yield _short(dtype), lambda a=dtype: case(3, 100, 3, a)
    for rows, dim, rounds in ((0, 5, 3), (3, 0, 3), (3, 1, 3), (2, 64, 0), (2, 64, 1), (2, 700, 2)):
        yield (
            f"{rows} x {dim}, {rounds} rounds",
            lambda a=(rows, dim, rounds): case(*a, torch.float32),
        )
    yield "strided", lambda: case(5, 40, 3, torch.float32, strided=True)


def _codes(rows: int, width: int, values: int = 256) -> Tensor:
    return torch.randint(0, values, (rows, width), dtype=torch.uint8)


def _hamming_topk() -> Iterator[tuple[str, Callable[[], Case]]]:
    for name, queries, rows, width, k in (
        ("no query", 0, 9, 8, 3),
        ("no code", 3, 0, 8, 3),
        ("no byte", 3, 9, 0, 3),
        ("k = 0", 3, 9, 8, 0),
        ("k > rows", 2, 9, 8, 20),
        ("one query", 1, 600, 32, 10),
        ("odd width", 5, 300, 13, 10),
        ("wide", 2, 40, 77, 5),
        ("long list", 2, 300, 8, 200),
    ):
        yield name, lambda a=(queries, rows, width, k): Case((_codes(a[0], a[2]), *_codes_k(*a)))
    yield "ties", lambda: Case((_codes(4, 4, 2), _codes(700, 4, 2), 64))
    yield "strided", lambda: Case((_codes(4, 8), _codes(300, 24)[:, 3:11], 16))
    yield "strided words", lambda: Case((_codes(4, 8), _codes(300, 24)[:, 4:12], 16))


def _hamming_distance() -> Iterator[tuple[str, Callable[[], Case]]]:
    for a, b, width in ((0, 5, 4), (5, 0, 4), (3, 3, 0), (1, 1, 1), (1, 300, 16), (9, 300, 13)):
        yield (
            f"{a} x {b} x {width}",
            lambda c=(a, b, width): Case((_codes(c[0], c[2]), _codes(c[1], c[2]))),
        )
    yield "strided", lambda: Case((_codes(4, 8), _codes(70, 24)[:, 3:11]))


def _range_search() -> Iterator[tuple[str, Callable[[], Case]]]:
    codes = functools.partial(_codes, 300, 4, 4)
    bitmap = functools.partial(_codes, width=38)
    for name, options in {
        "radius 0": (0, 9),
        "some": (5, 9),
        "count": (8, 0),
        "all": (32, 400),
        "later": (6, 20, None, True),
    }.items():
        yield name, lambda a=options: Case((_codes(5, 4, 4), codes(), *a))
    yield "bitmap", lambda: Case((_codes(5, 4, 4), codes(), 9, 20, bitmap(1)))
    yield "bitmaps", lambda: Case((_codes(5, 4, 4), codes(), 9, 20, bitmap(5), True))
    yield "ids", lambda: Case((_codes(5, 4, 4), codes(), 9, 20, torch.arange(0, 300, 7)))
    yield "no code", lambda: Case((_codes(5, 4), _codes(0, 4), 3, 2))
    yield "no query", lambda: Case((_codes(0, 4), _codes(9, 4), 3, 2))


def _asymmetric_topk() -> Iterator[tuple[str, Callable[[], Case]]]:
    def case(queries: int, rows: int, dim: int, k: int, *, planes: int = 1, **options: Any) -> Case:
        # Whole numbers: sums are exact, and ties are ties everywhere.
        wanted = torch.randint(-9, 10, (queries, dim)).float()
        codes = _codes(rows, planes * ((dim + 7) // 8), 4)
        if options.get("ids"):
            filter = torch.arange(0, rows, 7)
        else:
            bitmaps = options.get("bitmaps")
            filter = _codes(bitmaps, (rows + 7) // 8) if bitmaps else None
        scale = 0.5 ** torch.randint(0, 3, (rows,)) if options.get("scale") else None
        return Case((wanted, codes, k, filter, scale), dim)

    for name, options in {
        "one query": {"queries": 1},
        "3 queries": {"queries": 3},
        "no query": {"queries": 0},
        "no code": {"rows": 0},
        "k > rows": {"rows": 9},
        "one dimension": {"dim": 1},
        "2 planes": {"planes": 2},
        "4 planes, odd dim": {"planes": 4, "dim": 77},
        "scale": {"scale": True},
        "bitmap": {"bitmaps": 1},
        "bitmaps": {"bitmaps": 3, "queries": 3, "scale": True},
        "ids": {"ids": True, "scale": True},
    }.items():
        shape = {"queries": 2, "rows": 300, "dim": 40, "k": 20}
        yield name, lambda a={**shape, **options}: case(**a)


def _dense_topk() -> Iterator[tuple[str, Callable[[], Case]]]:
    def whole(rows: int, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
        # Sums of whole numbers are exact, and ties are ties everywhere.
        return torch.randint(-5, 6, (rows, dim)).to(dtype)

    for dtype, metric in itertools.product((torch.float32, *HALVES, torch.int8), (0, 2)):
        yield (
            f"{_short(dtype)}, metric {metric}",
            lambda a=dtype, m=metric: Case((whole(5, 70), whole(300, 70, a), 20, m), 70),
        )
    for queries, rows, dim, k in ((0, 9, 4, 3), (3, 0, 4, 3), (1, 300, 4, 0), (1, 9, 0, 20)):
        yield (
            f"{queries} x {rows} x {dim}, k = {k}",
            lambda a=(queries, rows, dim, k): Case((whole(a[0], a[2]), whole(*a[1:3]), a[3], 0)),
        )
    yield "bitmaps", lambda: Case((whole(5, 9), whole(300, 9), 20, 0, _codes(5, 38)), 9)
    yield "ids", lambda: Case((whole(5, 9), whole(300, 9), 20, 0, torch.arange(0, 300, 7)), 9)


def _gather_scores() -> Iterator[tuple[str, Callable[[], Case]]]:
    def case(
        queries: int, rows: int, dim: int, count: int, dtype: torch.dtype, metric: int
    ) -> Case:
        documents = torch.randint(-5, 6, (rows, dim)).to(dtype)
        ids = torch.randint(-1, rows, (queries, count))
        return Case((torch.randn(queries, dim), documents, ids, metric), 4 * dim + 1)

    for dtype, metric in itertools.product((torch.float32, *HALVES, torch.int8), range(3)):
        yield (
            f"{_short(dtype)}, metric {metric}",
            lambda a=dtype, m=metric: case(3, 20, 77, 9, a, m),
        )
    for shape in ((0, 9, 4, 3), (3, 0, 4, 3), (2, 9, 4, 0), (2, 9, 0, 3)):
        yield (
            " x ".join(map(str, shape)),
            lambda a=shape: case(*a, torch.float32, 0),
        )


def _codes_k(queries: int, rows: int, width: int, k: int) -> tuple[Tensor, int]:
    return _codes(rows, width), k


# --- attention -----------------------------------------------------------------------------------


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
            _short(dtype),
            lambda a=dtype: Case(_attention_arguments((70, 0, 9), dtype=a, window=(20, 9)), 70),
        )


CASES: dict[str, dict[str, Callable[[], Case]]] = {
    "segment_pool": dict(_pooling()),
    "segment_pool_backward": dict(_pooling_backward()),
    "hash_keys": dict(_hash_keys()),
    "hash_bag": dict(_hash_bag()),
    "hash_bag_backward": dict(_hash_bag_backward()),
    "pack_sign": dict(_pack_sign()),
    "hadamard_rotate": dict(_hadamard_rotate()),
    "hadamard_unrotate": dict(_hadamard_rotate()),
    "hamming_topk": dict(_hamming_topk()),
    "hamming_distance": dict(_hamming_distance()),
    "range_search": dict(_range_search()),
    "asymmetric_topk": dict(_asymmetric_topk()),
    "dense_topk": dict(_dense_topk()),
    "gather_scores": dict(_gather_scores()),
    "varlen_attention": {**dict(_attention()), **dict(_attention_halves())},
}
