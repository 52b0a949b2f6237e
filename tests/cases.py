"""Calls of every operator, over odd and degenerate shapes, for tests/test_executors.py.

``CASES[operator][case]`` makes the arguments; all but few are small, as emulators run them too.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from contract import layouts, packed
from emblas import _op
from emblas.binary import reference
from emblas.tables import Composition, Part
from emblas.tables.compose_op import MODES
from emblas.tables.composition import COMBINES
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
    long = (127, 0, 128, 1, 129, 200)
    yield "long bags", lambda: Case(_bag_arguments(585, 3, 8, lengths=long, hashes=2), 1200)
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


# Two features: a signed slot of two hashes and a slot of one digit; a slot of three unlike keys.
_TWO_FEATURES = (
    Part(11, 16, a=1, b=0, signed=True),
    Part(11, 16, a=1, b=6, signed=True),
    Part(30, 7, "radix", a=3, base=176, column=16),
    Part(20, 5, "linear", a=77, b=2**62 + 3, p=2**61 - 1, base=386, column=23, feature=1),
    Part(9, 5, "splitmix64", a=5, b=1, base=486, column=23, feature=1),
    Part(9, 5, "splitmix64", a=5, b=7, base=486, column=23, feature=1),
)
# Overlapping chunks of one array, keys by the largest moduli and by one that sums often reach.
_CHUNKS = tuple(
    Part(50, 4, "linear", a=2**63 - 2, b=c, p=p, stride=1, column=4 * c)
    for c, p in enumerate((2**63 - 1, 2**63 - 2, 7))
)
_FOUR_HASHES = tuple(Part(6, 130, "splitmix64", a=9, b=b) for b in range(4))
_SHARED = (  # by two features of unlike size; an element before and after it is nobody's
    Part(7, 8, "radix", a=1, base=1),
    Part(5, 8, "radix", a=5, base=1, column=8, feature=1),
    Part(4, 8, a=2, b=3, base=57, column=8, feature=1),
)


def _composed(
    parts: tuple[Part, ...] = _TWO_FEATURES,
    combine: str = "sum",
    mode: str = "sum",
    *,
    lengths: tuple[int, ...] | None = None,
    bags: int = 17,
    dtype: torch.dtype = torch.float32,
    weights: int = 0,  # per id
    padding: int | None = None,
) -> Case:
    composition = Composition(parts, combine)
    count = bags * composition.num_features if lengths is None else sum(lengths)
    shape = (count,) if weights == 1 else (count, weights)
    args = (
        _ids(count),
        torch.randn(composition.size + 1).to(dtype),
        None if lengths is None else packed(lengths),
        torch.randn(shape) if weights else None,
        composition.fields, COMBINES.index(combine), MODES.index(mode), padding,
    )  # fmt: skip
    return Case(args, 80)


def _compose_bag(backward: bool) -> Iterator[tuple[str, Callable[[], Case]]]:
    lengths = (3, 0, 17, 9, 1, 8, 0, 7)
    for combine, padding in itertools.product(COMBINES, (None, 3)):
        options = {"combine": combine, "padding": padding}
        name = combine + ", padding" * bool(padding)
        yield name, lambda a=options: _composed(**a)
        for mode in MODES:
            yield (
                f"{name}, bags, {mode}",
                lambda a=options, m=mode: _composed(mode=m, lengths=lengths, **a),
            )
        for bags in (None, lengths):
            yield (
                f"{name}, {'bags, ' * bool(bags)}weights",
                lambda a=options, b=bags: _composed(weights=1, lengths=b, **a),
            )
    hashes = {"parts": _FOUR_HASHES, "padding": 2}
    for combine, bags in itertools.product(("sum", "mean"), (None, (3, 0, 17))):
        name = f"four hashes, {combine}{', bags' * bool(bags)}, weights per part"
        yield name, lambda a=combine, b=bags: _composed(combine=a, lengths=b, weights=4, **hashes)
    yield "four hashes, product", lambda: _composed(combine="product", bags=5, **hashes)
    slots = (*_FOUR_HASHES[:2], Part(9, 6, "radix", a=1, base=780, column=130))
    yield "two slots, weights per part", lambda: _composed(slots, bags=9, weights=3)
    yield "long first bag, max", lambda: _composed(mode="max", lengths=(60, 2))
    for dtype in HALVES:
        yield _short(dtype), lambda a=dtype: _composed(dtype=a)
        yield f"{_short(dtype)}, bags", lambda a=dtype: _composed(dtype=a, lengths=lengths)
    for combine in COMBINES:
        yield f"shared, {combine}", lambda a=combine: _composed(_SHARED, a, lengths=(3, 2, 9, 0))
    yield "no ids", lambda: _composed(bags=0)
    yield "no bags", lambda: _composed(lengths=())
    yield "empty bags", lambda: _composed(lengths=(0,) * 4, mode="max")
    if not backward:
        yield "overlapping rows", lambda: _composed(_CHUNKS, bags=70)


def _compose_bag_backward() -> Iterator[tuple[str, Callable[[], Case]]]:
    def differentiated(case: Case, need_table: bool = True, need_weights: bool = True) -> Case:
        out, argmax = torch.ops.emblas.compose_bag(*case.args)
        grad = torch.randn(out.shape).to(out.dtype)
        wanted = (need_table, need_weights and case.args[3] is not None)
        return Case((grad, *case.args[:4], argmax, *case.args[4:], *wanted), 200)

    for name, make in _compose_bag(backward=True):
        yield name, lambda make=make: differentiated(make())
    for needs in ((True, False), (False, True), (False, False)):
        yield f"needs {needs}", lambda a=needs: differentiated(_composed(weights=1), *a)


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
    for dtype in _op.FLOATS:
        yield f"threshold, {_short(dtype)}", lambda a=dtype: Case(_thresholds(a))


def _thresholds(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values above, below and just at the threshold of their dimension, one of which is NaN."""
    threshold = torch.randn(21).to(dtype)
    x = threshold.repeat(5, 1)
    x[1:3] += torch.tensor([[1.0], [-1.0]]).to(dtype)
    threshold[3] = torch.nan
    return x, threshold.to(torch.float64 if dtype == torch.float64 else torch.float32)


def _rotate() -> Iterator[tuple[str, Callable[[], Case]]]:
    def rotation(rows: int, dim: int, rounds: int = 3, dtype: torch.dtype = torch.float32) -> Case:
        signs = torch.randint(0, 2, (rounds, dim), dtype=torch.int8) * 2 - 1
        return Case((torch.randn(rows, dim).to(dtype), signs), dim)

    for dtype in _op.FLOATS:
        yield _short(dtype), lambda a=dtype: rotation(3, 37, dtype=a)
    shapes = ((3, 16, 1), (3, 32, 2), (2, 9, 4), (2, 1, 2), (2, 3, 1), (0, 5, 2), (2, 700, 2))
    for rows, dim, rounds in shapes:
        yield f"{rows} x {dim}, {rounds} rounds", lambda a=(rows, dim, rounds): rotation(*a)
    yield "no dimension", lambda: rotation(3, 0)
    yield "no round", lambda: rotation(3, 5, 0)

    def strided() -> Case:
        case = rotation(3, 20)
        return Case((_strided(case.args[0]), case.args[1]), 20)

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
    yield "strided", lambda: Case((_strided(_whole(3, 16)), _codes(70, 9)[:, 3:5], 9, None, None))
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
            f"{('dot', 'cosine', 'l2')[metric]}, {_short(dtype)}",
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
            f"many rows, {_short(dtype)}, metric {metric}",
            lambda a=dtype, m=metric: Case(
                (_whole(5, 70), _whole(300, 70, 5).to(a), 20, m, None), 70
            ),
        )
    yield "zero documents", lambda: Case((_whole(2, 9), torch.zeros(5, 9), 3, 1, None))
    yield "strided", lambda: Case((_strided(_whole(3, 16)), _strided(_whole(70, 16)), 9, 0, None))
    for name, filter in _filters(2, 130):
        yield f"filter, {name}", lambda a=filter: Case((_whole(2, 9), _whole(130, 9), 9, 0, a()))


def _gather_scores() -> Iterator[tuple[str, Callable[[], Case]]]:
    for metric, dtype in itertools.product(range(3), (torch.float32, *HALVES, torch.int8)):
        yield (
            f"{('dot', 'cosine', 'l2')[metric]}, {_short(dtype)}",
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
                _strided(_whole(3, 16)),
                _strided(torch.cat((torch.zeros(1, 16), _whole(70, 16)))),
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
        **{_short(dtype): {"dtype": dtype} for dtype in (torch.float32, *HALVES)},
        "no argmax": {"need_argmax": False},
        "floats and bits": {"dtype": bits},
        "bits": {"dtype": bits, "query_dtype": bits},
        "strided": {"strided": True},
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
    yield "ties", lambda: Case((*_ties(), 4, True))


def _ties() -> tuple[Tensor, ...]:
    """Whole numbers that come again, within a tile and in the next."""
    return _whole(5, 4, 1), packed((5,)), _whole(150, 4, 1), packed((150,))


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
            _short(dtype),
            lambda a=dtype: Case(_attention_arguments((70, 0, 9), dtype=a, window=(20, 9)), 70),
        )


CASES: dict[str, dict[str, Callable[[], Case]]] = {
    "segment_pool": dict(_pooling()),
    "segment_pool_backward": dict(_pooling_backward()),
    "hash_keys": dict(_hash_keys()),
    "hash_bag": dict(_hash_bag()),
    "hash_bag_backward": dict(_hash_bag_backward()),
    "compose_bag": dict(_compose_bag(backward=False)),
    "compose_bag_backward": dict(_compose_bag_backward()),
    "pack_sign": dict(_pack_sign()),
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
    "varlen_attention": {**dict(_attention()), **dict(_attention_halves())},
}
