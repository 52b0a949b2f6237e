"""Calls of the operators of tables."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from contract import packed
from emblas.tables import Composition, Part
from emblas.tables.compose_op import MODES
from emblas.tables.compose_reference import ADAM
from emblas.tables.composition import COMBINES, tables_of
from emblas.tables.packed_codes import pack_codes
from torch import Tensor

from cases.case import HALVES, Case, short, unaligned


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
        unaligned(table) if strided else table,
        None if lengths is None else packed(lengths),
        torch.randn(count) if weighted else None,
        family, 3, hashes, padding,
    )  # fmt: skip


def _hash_bag() -> Iterator[tuple[str, Callable[[], Case]]]:
    lengths = (0, 1, 7, 0, 20, 12)
    for name, options in {
        **{short(dtype): {"dtype": dtype} for dtype in (torch.float32, *HALVES)},
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

_FEWER_PARTS_LATER = (
    Part(5, 8, "radix", a=5),
    Part(4, 8, a=2, b=3, base=40),
    Part(7, 8, "radix", a=1, base=72, column=8, feature=1),
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
    same_id: bool = False,
) -> Case:
    composition = Composition(parts, combine)
    count = bags * composition.num_features if lengths is None else sum(lengths)
    shape = (count,) if weights == 1 else (count, weights)
    args = (
        torch.full((count,), 5) if same_id else _ids(count),
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
    yield "one id, max", lambda: _composed(mode="max", lengths=(40, 3), same_id=True)
    for dtype in HALVES:
        yield short(dtype), lambda a=dtype: _composed(dtype=a)
        yield f"{short(dtype)}, bags", lambda a=dtype: _composed(dtype=a, lengths=lengths)
    for combine in COMBINES:
        name = f"fewer parts later, {combine}, weights"
        yield name, lambda a=combine: _composed(_FEWER_PARTS_LATER, a, bags=9, weights=1)
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


# Two features that share one table, the elements before and after which are nobody's.
_ONE_TABLE = (
    Part(7, 8, "radix", a=1, base=1),
    Part(7, 8, a=5, b=2, base=1, signed=True),
    Part(5, 8, "radix", a=5, base=1, column=8, feature=1),
)
_WIDE = (Part(9, 300, a=4, b=1), Part(4, 260, "radix", a=1, base=2700, column=300))


def _differentiated(case: Case) -> tuple[Any, ...]:
    """Return the arguments of the forms of the gradient, a gradient in front."""
    out, argmax = torch.ops.emblas.compose_bag(*case.args)
    return torch.randn(out.shape).to(out.dtype), *case.args[:4], argmax, *case.args[4:]


def _compose_bag_backward_rows() -> Iterator[tuple[str, Callable[[], Case]]]:
    lengths = (3, 0, 9, 1)
    for name, options in {
        "one table": {"padding": 3, "bags": 9},
        "one table, bags": {"lengths": lengths, "mode": "mean", "padding": 3},
        "one table, max": {"lengths": lengths, "mode": "max"},
        "one table, weights": {"weights": 1, "lengths": lengths},
        "one row": {"lengths": (130, 3), "same_id": True},
        "four hashes": {"parts": _FOUR_HASHES, "weights": 4, "bags": 6},
        "product": {"parts": _FOUR_HASHES, "combine": "product", "bags": 5},
        "bfloat16": {"parts": _FOUR_HASHES, "dtype": torch.bfloat16, "lengths": (3, 0, 5)},
        "no ids": {"bags": 0},
        "no bags": {"lengths": ()},
        "padding alone": {"bags": 5, "same_id": True, "padding": 5},
    }.items():
        options = {"parts": _ONE_TABLE, **options}
        yield name, lambda a=options: Case(_differentiated(_composed(**a)), 400, counted=True)


def _compose_bag_update() -> Iterator[tuple[str, Callable[[], Case]]]:
    lengths = (3, 0, 9, 1)

    def updated(case: Case, optimizer: int) -> Case:
        args = _differentiated(case)
        table, fields = args[2], args[6]
        rows, accumulator = sum(rows for _, rows in tables_of(fields)), torch.float32
        elements = table.numel()
        first = torch.rand((0, rows, elements, elements)[optimizer], dtype=accumulator)
        second = torch.rand(elements if optimizer == ADAM else 0, dtype=accumulator)
        last_step = torch.randint(0, 7, (rows if optimizer == ADAM else 0,))
        state = (first, second, last_step, torch.tensor([6]))
        # A large epsilon: the sign of a sum near zero is anybody's.
        settings = (0.05, 0.1, 0.9, 0.99, 0.3)
        return Case((*args, *state, optimizer, *settings), 400, (2, *range(10, 14)))

    sgd, row_wise, adagrad, adam = range(4)
    for name, options, kinds in (
        ("two features", {"padding": 3, "bags": 6}, range(4)),
        ("two features, bags", {"lengths": lengths, "mode": "mean"}, (sgd,)),
        ("two features, max", {"lengths": lengths, "mode": "max"}, (adagrad,)),
        ("product", {"combine": "product", "lengths": lengths}, (row_wise, adam)),
        ("one row", {"parts": _ONE_TABLE, "lengths": (130, 3), "same_id": True}, (row_wise, adam)),
        ("wide", {"parts": _WIDE, "bags": 6}, (row_wise, adagrad, adam)),
        ("float16", {"parts": _FOUR_HASHES, "dtype": torch.float16, "bags": 6}, (adam,)),
        ("bfloat16", {"parts": _SHARED, "dtype": torch.bfloat16, "lengths": lengths}, (row_wise,)),
        ("no ids", {"bags": 0}, (adam,)),
        ("no bags", {"lengths": ()}, (sgd,)),
    ):
        for kind in kinds:
            yield f"{name}, {kind}", lambda a=options, n=kind: updated(_composed(**a), n)


def _quantized(
    bits: int = 8,
    dim: int = 37,
    mode: str = "sum",
    *,
    lengths: tuple[int, ...] | None = None,
    count: int = 40,
    dtype: torch.dtype = torch.float32,
    weighted: bool = False,
    zeros: bool = False,
    padding: int | None = None,
    unaligned: bool = False,
    same_id: bool = False,
) -> Case:
    rows = 20
    count = count if lengths is None else sum(lengths)
    codes = torch.randint(0, 2**bits, (rows, dim))
    packed_rows = pack_codes(codes, bits)
    if unaligned:  # every row begins one byte later
        buffer = torch.empty(packed_rows.numel() + 1, dtype=torch.uint8)
        packed_rows = buffer[1:].view(packed_rows.shape).copy_(packed_rows)
    args = (
        torch.full((count,), 5) if same_id else torch.randint(0, rows, (count,)),
        packed_rows,
        ((torch.rand(rows) + 0.5) * 2.0 ** (1 - bits)).to(dtype),
        None if lengths is None else packed(lengths),
        torch.randn(count) if weighted else None,
        bits, dim, MODES.index(mode), padding,
        torch.rand(rows) * 2**bits if zeros else None,
    )  # fmt: skip
    return Case(args, 80)


def _quantized_bag() -> Iterator[tuple[str, Callable[[], Case]]]:
    lengths = (0, 1, 7, 0, 33, 5)
    for bits in (2, 4, 8, 16):
        for dim in (37, 48):
            options = {"bits": bits, "dim": dim, "padding": 3}
            name = f"{bits} bits, {dim}"
            yield name, lambda a=options: _quantized(zeros=True, **a)
            yield (
                f"{name}, bags, weights",
                lambda a=options: _quantized(lengths=lengths, weighted=True, **a),
            )
        yield (
            f"{bits} bits, wide, mean",
            lambda b=bits: _quantized(b, 528, "mean", lengths=(3, 0, 9), padding=2, zeros=True),
        )
        yield (
            f"{bits} bits, wide, max",
            lambda b=bits: _quantized(b, 515, "max", lengths=(3, 0, 9), padding=2),
        )
        yield f"{bits} bits, unaligned", lambda b=bits: _quantized(b, 16, unaligned=True)
    for dtype in HALVES:
        yield short(dtype), lambda a=dtype: _quantized(8, 64, dtype=a)
        yield f"{short(dtype)}, bags", lambda a=dtype: _quantized(4, 21, lengths=lengths, dtype=a)
    for dim in (1, 16, 130):
        yield (
            f"long bags, {dim}",
            lambda a=dim: _quantized(4, a, "max", lengths=(65, 31, 32), zeros=True, padding=5),
        )
        yield f"weights, {dim}", lambda a=dim: _quantized(8, a, count=67, weighted=True)
    for mode in MODES:
        yield (
            f"padding alone, {mode}",
            lambda a=mode: _quantized(8, 5, a, lengths=(2, 3), same_id=True, padding=5),
        )
    yield "no ids", lambda: _quantized(count=0)
    yield "no bags", lambda: _quantized(lengths=())


def _quantized_bag_backward() -> Iterator[tuple[str, Callable[[], Case]]]:
    def backward(case: Case) -> Case:
        ids, table, scale, offsets, _, bits, dim, _, padding, zeros = case.args
        bags = len(ids) if offsets is None else len(offsets) - 1
        grad = torch.randn(bags, dim).to(scale.dtype)
        # Sums of as many products as there are columns, each of the size of a code.
        return Case((grad, ids, table, scale, offsets, bits, dim, padding, zeros), 8 * dim)

    for name, make in _quantized_bag():
        if not name.endswith("max"):
            yield name, lambda make=make: backward(make())


def _random_codes() -> Iterator[tuple[str, Callable[[], Case]]]:
    for kind, sparsity in ((0, 1), (1, 1), (2, 3), (2, 2**31)):
        for dim, dtype in ((1, 0), (8, 1), (67, 0), (12, 2), (7, 3), (520, 0)):
            args = dim, kind, 2**40 + 5, sparsity, dtype
            yield f"{kind}, {sparsity}, {dim}", lambda a=args: Case((_ids(9), _ids(9) & 7, *a))
    yield "one sequence", lambda: Case((_ids(300), torch.tensor([2**32 - 1]), 5, 0, -1, 1, 0))
    # A row may end amid the numbers that a thread makes, at a multiple of 16 bytes.
    yield "whole vectors", lambda: Case((_ids(9), torch.tensor([1]), 6, 1, 3, 1, 1))
    yield "no ids", lambda: Case((_ids(0), torch.tensor([1]), 5, 0, -1, 1, 0))


CASES: dict[str, dict[str, Callable[[], Case]]] = {
    "hash_keys": dict(_hash_keys()),
    "hash_bag": dict(_hash_bag()),
    "hash_bag_backward": dict(_hash_bag_backward()),
    "compose_bag": dict(_compose_bag(backward=False)),
    "compose_bag_backward": dict(_compose_bag_backward()),
    "compose_bag_backward_rows": dict(_compose_bag_backward_rows()),
    "compose_bag_update_": dict(_compose_bag_update()),
    "quantized_bag": dict(_quantized_bag()),
    "quantized_bag_backward": dict(_quantized_bag_backward()),
    "random_codes": dict(_random_codes()),
}
