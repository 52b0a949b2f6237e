"""Calls of the operators of binary."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from contract import packed
from emblas import _op
from emblas.binary import reference
from torch import Tensor

from cases.case import HALVES, Case, short, unaligned


def _signs(rows: int, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(rows, dim).to(dtype)
    x[: rows // 2, ::3] = 0
    x[: rows // 2, 1::3] = torch.nan
    return x


def _pack_sign() -> Iterator[tuple[str, Callable[[], Case]]]:
    for dtype in _op.FLOATS:
        yield short(dtype), lambda a=dtype: Case((_signs(33, 131, a),))
    for rows, dim in ((0, 5), (3, 0), (1, 1), (5, 8), (2, 127), (70, 9)):
        yield f"{rows} x {dim}", lambda a=(rows, dim): Case((_signs(*a),))
    yield "strided", lambda: Case((unaligned(_signs(20, 40)),))
    for dtype in _op.FLOATS:
        yield f"threshold, {short(dtype)}", lambda a=dtype: Case(_thresholds(a))


def _thresholds(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values above, below and just at the threshold of their dimension, one of which is NaN."""
    threshold = torch.randn(21).to(dtype)
    x = threshold.repeat(5, 1)
    x[1:3] += torch.tensor([[1.0], [-1.0]]).to(dtype)
    threshold[3] = torch.nan
    return x, threshold.to(torch.float64 if dtype == torch.float64 else torch.float32)


def _unpack_planes() -> Iterator[tuple[str, Callable[[], Case]]]:
    for dtype in _op.FLOATS:
        for planes in (1, 4):
            yield (
                f"{short(dtype)}, {planes} planes",
                lambda a=dtype, b=planes: Case((_codes(33, 17 * b), 131, a)),
            )
    for rows, dim, planes in ((0, 5, 1), (1, 1, 2), (5, 8, 1), (2, 127, 3), (70, 9, 2), (2, 5, 24)):
        yield (
            f"{rows} x {dim}, {planes} planes",
            lambda a=(rows, dim, planes): Case(
                (_codes(a[0], (a[1] + 7) // 8 * a[2]), a[1], torch.float32)
            ),
        )
    yield "aligned", lambda: Case((_codes(9, 10), 40, torch.float32))
    yield "strided", lambda: Case((_codes(9, 13)[:, 3:9], 24, torch.bfloat16))


def _rotate() -> Iterator[tuple[str, Callable[[], Case]]]:
    def rotation(rows: int, dim: int, rounds: int = 3, dtype: torch.dtype = torch.float32) -> Case:
        signs = torch.randint(0, 2, (rounds, dim), dtype=torch.int8) * 2 - 1
        return Case((torch.randn(rows, dim).to(dtype), signs), dim)

    for dtype in _op.FLOATS:
        yield short(dtype), lambda a=dtype: rotation(3, 37, dtype=a)
    shapes = ((3, 16, 1), (3, 32, 2), (2, 9, 4), (2, 1, 2), (2, 3, 1), (0, 5, 2), (2, 700, 2))
    for rows, dim, rounds in shapes:
        yield f"{rows} x {dim}, {rounds} rounds", lambda a=(rows, dim, rounds): rotation(*a)
    yield "no dimension", lambda: rotation(3, 0)
    yield "no round", lambda: rotation(3, 5, 0)

    def strided() -> Case:
        case = rotation(3, 20)
        return Case((unaligned(case.args[0]), case.args[1]), 20)

    yield "strided", strided


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
    yield "longer than any list", lambda: Case((_codes(2, 4, 4), _codes(300, 4, 4), 270))
    for name, filter in _filters(2, 300):
        yield f"filter, {name}", lambda a=filter: Case((_codes(2, 4, 4), _codes(300, 4, 4), 9, a()))


def _filters(queries: int, rows: int) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Filters of all forms that the operators take; rows is no multiple of 8."""
    width = (rows + 7) // 8
    yield "for all", lambda: _codes(1, width)
    yield "for each query", lambda: _codes(queries, width)
    yield "nothing", lambda: torch.zeros(1, width, dtype=torch.uint8)
    yield "last rows", lambda: (torch.arange(width) == width - 1).to(torch.uint8)[None] * 255
    yield "ids", lambda: torch.arange(rows)[torch.rand(rows) < 0.9]
    yield "no ids", lambda: torch.zeros(0, dtype=torch.int64)


def _hamming_distance() -> Iterator[tuple[str, Callable[[], Case]]]:
    for name, queries, rows, width in (
        ("no query", 0, 9, 8),
        ("no code", 3, 0, 8),
        ("no byte", 3, 9, 0),
        ("one code", 1, 1, 1),
        ("one query", 1, 300, 32),
        ("odd width", 9, 300, 13),
        ("wide", 2, 40, 77),
        ("wide, whole words", 4, 40, 68),
        ("wide, whole vectors", 9, 40, 80),
    ):
        yield name, lambda a=(queries, rows, width): Case((_codes(a[0], a[2]), _codes(a[1], a[2])))
    yield "strided", lambda: Case((_codes(9, 8), _codes(300, 24)[:, 3:11]))


def _range_search() -> Iterator[tuple[str, Callable[[], Case]]]:
    for name, queries, rows, width, radius, kept in (
        ("no query", 0, 9, 8, 3, 4),
        ("no code", 3, 0, 8, 3, 4),
        ("no byte", 3, 9, 0, 0, 4),
        ("radius 0", 3, 300, 1, 0, 4),
        ("only counts", 3, 300, 1, 2, 0),
        ("all", 2, 300, 3, 2**40, 301),
        ("cut among ties", 5, 600, 1, 3, 100),
        ("odd width", 1, 300, 13, 50, 300),
        ("nothing", 2, 40, 77, 9, 3),
    ):
        yield (
            name,
            lambda a=(queries, rows, width, radius, kept): Case(
                (_codes(a[0], a[2]), _codes(a[1], a[2]), a[3], a[4], None, False)
            ),
        )
    for name, filter in _filters(2, 300):
        yield (
            f"filter, {name}",
            lambda a=filter: Case((_codes(2, 1), _codes(300, 1), 2, 30, a(), False)),
        )
    yield "later rows only", lambda: Case((*[_codes(30, 1)] * 2, 2, 5, None, True))
    yield (
        "later, bitmaps",
        lambda: Case((_codes(5, 4, 4), _codes(300, 4, 4), 9, 20, _codes(5, 38), True)),
    )
    yield (
        "later ids only",
        lambda: Case((*[_codes(20, 1)] * 2, 2, 9, torch.arange(0, 20, 3), True)),
    )


def _range_search_csr() -> Iterator[tuple[str, Callable[[], Case]]]:
    for name, make in _range_search():
        yield name, lambda make=make: Case((*make().args[:3], *make().args[4:]))


def _whole(rows: int, dim: int, largest: int = 8) -> Tensor:
    """Small whole numbers, whose sums are exact: equal scores tie on every executor."""
    return torch.randint(-largest, largest + 1, (rows, dim)).float()


def _asymmetric_topk() -> Iterator[tuple[str, Callable[[], Case]]]:
    for name, queries, rows, dim, planes, k in (
        ("no query", 0, 9, 8, 1, 3),
        ("no code", 3, 0, 8, 1, 3),
        ("k = 0", 3, 9, 8, 1, 0),
        ("k > rows", 2, 9, 8, 1, 20),
        ("odd dim", 18, 90, 37, 1, 10),
        ("two planes", 3, 90, 37, 2, 10),
        ("four planes", 1, 40, 70, 4, 17),
        ("longer than any list", 2, 130, 9, 1, 70),
    ):
        yield (
            name,
            lambda a=(queries, rows, dim, planes, k): Case(
                (_whole(a[0], a[2]), _codes(a[1], (a[2] + 7) // 8 * a[3]), a[4], None, None)
            ),
        )
    yield "strided", lambda: Case((unaligned(_whole(3, 16)), _codes(70, 9)[:, 3:5], 9, None, None))
    yield (
        "fractions, scale",
        lambda: Case((torch.randn(2, 70), _codes(40, 9), 5, None, torch.rand(40) + 0.1), 70),
    )
    for name, filter in _filters(2, 130):
        yield (
            f"filter, {name}",
            lambda a=filter: Case((_whole(2, 9), _codes(130, 2), 9, a(), torch.full((130,), 0.5))),
        )

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
    for metric, dtype in itertools.product(range(3), (torch.float32, *HALVES, torch.int8)):
        yield (
            f"{('dot', 'cosine', 'l2')[metric]}, {short(dtype)}",
            lambda a=(dtype, metric): Case(
                (torch.randn(2, 37), (torch.randn(40, 37) * 3).to(a[0]), 9, a[1], None), 37
            ),
        )
    for name, queries, rows, dim, k in (
        ("no query", 0, 9, 8, 3),
        ("no document", 3, 0, 8, 3),
        ("no dimension", 3, 9, 0, 3),
        ("k = 0", 3, 9, 8, 0),
        ("k > rows", 18, 9, 8, 20),
        ("ties", 2, 200, 2, 17),
        ("longer than any list", 2, 130, 3, 131),
    ):
        for metric in (0, 2):
            yield (
                f"{name}, metric {metric}",
                lambda a=(queries, rows, dim, k, metric): Case(
                    (_whole(a[0], a[2]), _whole(a[1], a[2], 2), a[3], a[4], None)
                ),
            )
    for dtype, metric in itertools.product((torch.float32, *HALVES, torch.int8), (0, 2)):
        yield (
            f"many rows, {short(dtype)}, metric {metric}",
            lambda a=dtype, m=metric: Case(
                (_whole(5, 70), _whole(300, 70, 5).to(a), 20, m, None), 70
            ),
        )
    yield "zero documents", lambda: Case((_whole(2, 9), torch.zeros(5, 9), 3, 1, None))
    yield "strided", lambda: Case((unaligned(_whole(3, 16)), unaligned(_whole(70, 16)), 9, 0, None))
    for name, filter in _filters(2, 130):
        yield f"filter, {name}", lambda a=filter: Case((_whole(2, 9), _whole(130, 9), 9, 0, a()))


def _gather_scores() -> Iterator[tuple[str, Callable[[], Case]]]:
    for metric, dtype in itertools.product(range(3), (torch.float32, *HALVES, torch.int8)):
        yield (
            f"{('dot', 'cosine', 'l2')[metric]}, {short(dtype)}",
            lambda a=(dtype, metric): Case(
                (
                    torch.randn(3, 137),
                    (torch.randn(40, 137) * 3).to(a[0]),
                    torch.randint(-1, 40, (3, 19)),
                    a[1],
                ),
                137,
            ),
        )
    for name, queries, rows, dim, candidates in (
        ("no query", 0, 9, 8, 3),
        ("no document", 3, 0, 8, 3),
        ("no dimension", 3, 9, 0, 3),
        ("no candidate", 3, 9, 8, 0),
    ):
        yield (
            name,
            lambda a=(queries, rows, dim, candidates): Case(
                (
                    _whole(a[0], a[2]),
                    _whole(a[1], a[2]),
                    torch.randint(-1, max(a[1], 1), (a[0], a[3]))
                    if a[1]
                    else torch.full((a[0], a[3]), -1),
                    2,
                )
            ),
        )
    yield (
        "strided",
        lambda: Case(
            (
                unaligned(_whole(3, 16)),
                unaligned(torch.cat((torch.zeros(1, 16), _whole(70, 16)))),
                torch.arange(60).view(3, 20),
                1,
            )
        ),
    )


def _maxsim_arguments(
    query_lengths: tuple[int, ...],
    lengths: tuple[int, ...],
    dim: int,
    dtype: torch.dtype = torch.float32,
    query_dtype: torch.dtype = torch.float32,
    need_argmax: bool = True,
    strided: bool = False,
) -> tuple[Any, ...]:
    queries, documents = (
        reference.pack_sign(torch.randn(sum(n), dim))
        if t == torch.uint8
        else torch.randn(sum(n), dim).to(t)
        for n, t in ((query_lengths, query_dtype), (lengths, dtype))
    )
    if strided:
        wide = torch.cat((documents[:, :1], documents, documents[:, :2]), 1)
        documents = wide[:, 1:-2]
    return queries, packed(query_lengths), documents, packed(lengths), dim, need_argmax


def _maxsim() -> Iterator[tuple[str, Callable[[], Case]]]:
    query_lengths, lengths = (3, 0, 35), (2, 0, 70, 1)
    bits = torch.uint8
    for name, options in {
        **{short(t): {"dtype": t, "query_dtype": t} for t in (torch.float32, *HALVES)},
        "no argmax": {"need_argmax": False},
        "floats and bits": {"dtype": bits},
        "bits": {"dtype": bits, "query_dtype": bits},
        "strided": {"strided": True},
        "strided bfloat16": {"dtype": HALVES[0], "query_dtype": HALVES[0], "strided": True},
        "strided bits": {"dtype": bits, "query_dtype": bits, "strided": True},
    }.items():
        yield name, lambda a=options: Case(_maxsim_arguments(query_lengths, lengths, 37, **a), 37)
    for name, queries, documents, dim in (
        ("no set", (), (3,), 5),
        ("no document", (3,), (), 5),
        ("empty documents", (3,), (0, 0), 5),
        ("no dimension", (3,), (2,), 0),
    ):
        yield name, lambda a=(queries, documents, dim): Case(_maxsim_arguments(*a))
    for dtype in (torch.float32, *HALVES):
        yield f"ties, {short(dtype)}", lambda a=dtype: Case((*_ties(a), 4, True))


def _ties(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Whole numbers that come again, within a tile and in the next."""
    q, d = _whole(5, 4, 1).to(dtype), _whole(150, 4, 1).to(dtype)
    return q, packed((5,)), d, packed((150,))


def _maxsim_backward() -> Iterator[tuple[str, Callable[[], Case]]]:
    for name, query_lengths, lengths, dim in (
        ("odd", (3, 0, 35), (2, 0, 70, *[1] * 17), 67),
        ("wide", (2,), (3, 1), 130),
        ("one token", (1,), (1,), 3),
        ("few tokens", (5, 2), (3,), 9),
        ("one tile", (16,), (9,), 8),
        ("no set", (), (3,), 5),
        ("no document", (3,), (), 5),
        ("empty documents", (3,), (0, 0), 5),
        ("no dimension", (3,), (2,), 0),
    ):
        yield name, lambda a=(query_lengths, lengths, dim): _maxsim_gradient(*a)


def _maxsim_gradient(*args: Any) -> Case:
    queries, starts, documents, document_starts, *rest = _maxsim_arguments(*args)
    scores, argmax = torch.ops.emblas.maxsim(queries, starts, documents, document_starts, *rest)
    grad = torch.randn(scores.shape)
    return Case((grad, queries, starts, documents, document_starts, argmax), 40)


def _codes_k(queries: int, rows: int, width: int, k: int) -> tuple[Tensor, int]:
    return _codes(rows, width), k


CASES: dict[str, dict[str, Callable[[], Case]]] = {
    "pack_sign": dict(_pack_sign()),
    "unpack_planes": dict(_unpack_planes()),
    "hadamard_rotate": dict(_rotate()),
    "hadamard_unrotate": dict(_rotate()),
    "hamming_distance": dict(_hamming_distance()),
    "hamming_topk": dict(_hamming_topk()),
    "range_search": dict(_range_search()),
    "range_search_csr": dict(_range_search_csr()),
    "asymmetric_topk": dict(_asymmetric_topk()),
    "dense_topk": dict(_dense_topk()),
    "gather_scores": dict(_gather_scores()),
    "maxsim": dict(_maxsim()),
    "maxsim_backward": dict(_maxsim_backward()),
}
