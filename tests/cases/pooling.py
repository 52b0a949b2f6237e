"""Calls of the operators of pooling."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from contract import packed
from emblas.pooling.reference import MAX, Mode, owners

from cases.case import HALVES, Case, short, unaligned


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
    return (unaligned(x) if strided else x), packed(lengths), weights, normalize


def _pooling() -> Iterator[tuple[str, Callable[[], Case]]]:
    mixed = (0, 5, 1, 0, 130, 64, 0)
    for dtype, weighted, normalize in itertools.product(
        (torch.float32, *HALVES), (False, True), (False, True)
    ):
        name = f"{short(dtype)}{'-weights' * weighted}{'-normalize' * normalize}"
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


def _segments(lengths: tuple[int, ...], dim: int, dtype: torch.dtype, **options: Any) -> list[Any]:
    """x, starts, weights, ends, skip and index of segments in every form that there is."""
    x, starts, weights, _ = _pool(lengths, dim, dtype, options.get("weighted", False))
    ends = skip = index = None
    if options.get("skip"):
        skip = torch.arange(len(lengths), dtype=torch.int32) % 5
    if options.get("spans"):  # they overlap, and leave tokens out
        starts, ends = (starts[:-1] // 2).int(), starts[1:].clone()
    if options.get("index"):
        index = torch.randint(0, len(x), (len(x),), dtype=torch.int32)
    if options.get("planes"):  # padded: segments are parts of each plane
        x = torch.randn(len(lengths), 2 * max(lengths), dim)[:, : max(lengths)].to(dtype)
        starts = torch.arange(len(lengths), dtype=torch.int32) * max(lengths)
        starts, ends = starts, starts + torch.tensor(lengths, dtype=torch.int32)
    return [x, starts, weights, ends, skip, index]


_FORMS: dict[str, dict[str, bool]] = {
    "weights": {"weighted": True},
    "skip": {"skip": True},
    "spans": {"spans": True},
    "spans, weights, skip": {"spans": True, "weighted": True, "skip": True},
    "lists": {"index": True, "weighted": True},
    "padded": {"planes": True},
}


def _forms() -> Iterator[tuple[str, Callable[[], list[Any]]]]:
    mixed = (0, 5, 1, 0, 70, 33, 0)
    for name, options in {
        **{short(dtype): {"dtype": dtype} for dtype in (torch.float32, *HALVES)},
        **_FORMS,
    }.items():
        options = {"dtype": torch.float32, **options}
        yield name, lambda a=options: _segments(mixed, 67, **a)
    for name, lengths, dim in (
        ("no sequence", (), 5),
        ("empty sequences", (0, 0), 5),
        ("no dimension", (3,), 0),
        ("one token", (1,), 64),
    ):
        yield name, lambda a=(lengths, dim): _segments(*a, torch.float32)


def _linear() -> Iterator[tuple[str, Callable[[], Case]]]:
    """Every linear mode on segments of every form."""

    def linear(form: dict[str, Any], mode: Mode, dtype: torch.dtype, *options: bool) -> Case:
        x, starts, weights, *others = _segments((0, 5, 1, 0, 70, 33, 0), 37, dtype, **form)
        if form.get("index"):
            x.nan_to_num_(0.0)  # weights are of positions
        normalize, wide = options
        return Case((x, starts, weights, normalize, int(mode), *others, wide), 400)

    for mode in Mode:
        for name, form in _FORMS.items():
            yield (
                f"{mode.name}, {name}",
                lambda a=(form, mode, torch.float32, False, False): linear(*a),
            )
        for dtype in HALVES:
            options = (dtype, dtype == torch.float16, dtype == torch.bfloat16)
            yield f"{mode.name}, {short(dtype)}", lambda a=({}, mode, *options): linear(*a)
    many = {"spans": True, "weighted": True, "skip": True}
    for name, form in (("spans", many), ("padded", _FORMS["padded"])):
        yield (
            f"normalize, {name}",
            lambda a=(form, Mode.mean, torch.float32, True, False): linear(*a),
        )


def _pooling_backward() -> Iterator[tuple[str, Callable[[], Case]]]:
    def backward(case: Case, need_x: bool = True, need_weights: bool = True) -> Case:
        x, cu_seqlens, weights, normalize, *others = case.args
        x.nan_to_num_(0.0)  # every row is read
        out, norm = torch.ops.emblas.segment_pool(x, cu_seqlens, weights, normalize, *others)
        grad = torch.randn(out.shape).to(out.dtype)
        needs = (normalize, need_x, need_weights)
        length = max(case.length, x.shape[-1])
        return Case((grad, x, out, norm, cu_seqlens, weights, *needs, *others), length)

    for name, make in (*_pooling(), *_linear()):
        yield name, lambda make=make: backward(make())
    for needs in ((True, False), (False, True)):
        yield f"needs {needs}", lambda a=needs: backward(Case(_pool((3, 70), 70)), *a)


def _several() -> Iterator[tuple[str, Callable[[], Case]]]:
    """Several modes on segments of every form."""
    lengths, every = (0, 5, 1, 0, 140, 33, 0), (MAX, *Mode)

    def several(form: dict[str, Any], modes: tuple[int, ...], **options: Any) -> Case:
        dtype, wide = options.get("dtype", torch.float32), options.get("wide", False)
        x, starts, weights, *others = _segments(lengths, options.get("dim", 37), dtype, **form)
        if form.get("index"):
            x.nan_to_num_(0.0)  # weights are of positions
        modes = tuple(map(int, modes))
        return Case((x, starts, weights, modes, *others, wide), 1000)

    for name, form in _FORMS.items():
        yield name, lambda a=form: several(a, every)
    for dtype in HALVES:
        options = {"dtype": dtype, "wide": dtype == torch.bfloat16}
        yield short(dtype), lambda a=options: several({"skip": True}, every, **a)
    yield "aligned", lambda: several({}, (Mode.weighted_mean, MAX), dim=40)
    for modes in ((Mode.last, Mode.cls), (MAX, Mode.sum), (Mode.weighted_mean, Mode.last), (MAX,)):
        names = ", ".join("max" if mode == MAX else Mode(mode).name for mode in modes)
        yield names, lambda a=modes: several({"weighted": True}, a)
    for name, sizes, dim in (
        ("no sequence", (), 5),
        ("empty sequences", (0, 0), 5),
        ("no dimension", (3,), 0),
        ("one token", (1,), 64),
    ):
        x, starts, *_ = _segments(sizes, dim, torch.float32)
        args = (x, starts, None, tuple(map(int, every)), None, None, None, False)
        yield name, lambda a=args: Case(a)
    for dim in (132, 133):  # beyond a block's columns
        yield f"dim {dim}", lambda a=dim: several({}, (Mode.mean, Mode.weighted_mean, MAX), dim=a)


def _several_backward() -> Iterator[tuple[str, Callable[[], Case]]]:
    def backward(case: Case, need_x: bool = True, need_weights: bool = True) -> Case:
        x, starts, weights, modes, *others = case.args
        x.nan_to_num_(0.0)  # every row is read
        out, argmax = torch.ops.emblas.segment_pool_modes(x, starts, weights, modes, *others)
        grad = torch.randn(out.shape).to(out.dtype)
        needs = need_x, need_weights
        return Case((grad, x, out, argmax, starts, weights, modes, *needs, *others), case.length)

    for name, make in _several():
        yield name, lambda make=make: backward(make())
    some = dict(_several())["padded"]
    for needs in ((True, False), (False, True)):
        yield f"needs {needs}", lambda a=needs: backward(some(), *a)


def _max() -> Iterator[tuple[str, Callable[[], Case]]]:
    for name, make in _forms():
        yield name, lambda make=make: Case(tuple(make()))

    def special() -> Case:
        """Equal values, NaN, infinities."""
        x, *others = _segments((5, 70, 3), 40, torch.float32)
        x = torch.randint(-1, 2, x.shape).float()
        x[torch.rand(x.shape) < 0.02] = torch.nan
        x[:5] = -torch.inf
        x[2, :9] = torch.inf
        return Case((x, *others))

    def equal() -> Case:
        """The first of all wins, over many tiles."""
        x, *others = _segments((70, 2), 5, torch.float32)
        return Case((torch.ones_like(x), *others))

    yield "special values", special
    yield "equal values", equal


def _max_backward() -> Iterator[tuple[str, Callable[[], Case]]]:
    for name, make in _max():

        def backward(make: Callable[[], Case] = make) -> Case:
            x, *others = make().args
            out, argmax = torch.ops.emblas.segment_max(x, *others)
            return Case((torch.randn(out.shape).to(x.dtype), argmax, x.shape[:-1].numel()), 9)

        yield name, backward
    shared = torch.tensor([0, 2, 0, -1, 2, 1], dtype=torch.int32)[:, None].repeat(1, 5)
    yield "shared rows", lambda: Case((torch.randn(6, 5), shared, 4), 9)


def _gem() -> Iterator[tuple[str, Callable[[], Case]]]:
    for (name, make), power in zip(_forms(), itertools.cycle((3.0, 2.5, 1.0)), strict=False):

        def gem(make: Callable[[], list[Any]] = make, power: float = power) -> Case:
            x, starts, weights, *others = make()
            if others[-1] is not None:
                x.nan_to_num_(0.0)  # weights are of positions
            epsilon = 0.25  # many values are below
            x[..., 1:2] = epsilon
            return Case((x, starts, weights, torch.tensor([power]), epsilon, *others), 70)

        yield name, gem


def _gem_backward() -> Iterator[tuple[str, Callable[[], Case]]]:
    for name, make in _gem():

        def backward(make: Callable[[], Case] = make) -> Case:
            x, starts, *others = make().args
            x.nan_to_num_(0.0)  # for the weights, every row is read
            out = torch.ops.emblas.segment_gem(x, starts, *others)
            return Case((torch.randn(out.shape), x, out, starts, *others, True), 70 * 67)

        yield name, backward

    def masked() -> Case:  # rows without a weight, the first among them, are not read
        x, starts, *others = dict(_gem())["weights"]().args
        out = torch.ops.emblas.segment_gem(x, starts, *others)
        return Case((torch.randn(out.shape), x, out, starts, *others, False), 70)

    yield "masked", masked


# --- finishing -----------------------------------------------------------------------------------

_KINDS = ("float", "int8", "bits")


def _finish(
    rows: int,
    dim: int,
    dims: tuple[int, ...],
    kind: str = "float",
    dtype: torch.dtype = torch.float32,
    normalize: bool = False,
    noise: float = 0.0,
    seed: int = 5,
) -> Case:
    x = torch.randn(rows, dim)
    x[1:2] = 0  # has no direction
    ranges = None
    if kind == "int8":
        if not normalize:
            x[2:3, ::5] = torch.nan
        low = -torch.rand(sum(dims)) / (6 if normalize else 1)
        ranges = torch.stack([low, -1.3 * low])  # 0 is not between two levels
        ranges[1, ::7] = ranges[0, ::7]
    return Case((x, dims, normalize, noise, seed, _KINDS.index(kind), dtype, ranges), dim)


def _finishing() -> Iterator[tuple[str, Callable[[], Case]]]:
    for kind, normalize in itertools.product(_KINDS, (False, True)):
        for noise in (0.0, 0.7):
            name = f"{kind}{', normalize' * normalize}{', noise' * bool(noise)}"
            options = {"kind": kind, "normalize": normalize, "noise": noise}
            yield name, lambda a=options: _finish(5, 43, (10, 43, 16), **a)
    for dtype in HALVES:
        yield short(dtype), lambda a=dtype: _finish(3, 16, (5, 16), "float", a, True)
    for name, rows, dim, dims in (
        ("no row", 0, 3, (3,)),
        ("one dimension", 2, 1, (1, 1)),
        ("wide", 3, 1100, (1100, 513, 512)),
        ("aligned", 3, 520, (520, 130)),
    ):
        for kind in _KINDS:
            a = (rows, dim, dims, kind)
            yield f"{name}, {kind}", lambda a=a: _finish(*a, normalize=True)
    for seed in (0, -1, 2**62 + 3):
        yield f"seed {seed}", lambda a=seed: _finish(4, 9, (9, 9), noise=2.0, seed=a)


def _finishing_backward() -> Iterator[tuple[str, Callable[[], Case]]]:
    def backward(case: Case) -> Case:
        x, dims, normalize = case.args[:3]
        x[2:3] *= 1e-14  # less than epsilon: divided by a constant
        return Case((torch.randn(len(x), sum(dims)), x, dims, normalize), case.length)

    for rows, dim, dims in (
        (0, 3, (3,)),
        (2, 1, (1, 1)),
        (5, 43, (10, 43, 16)),
        (4, 520, (520,)),
        (4, 1100, (5, 513)),
    ):
        for normalize in (False, True):
            a = (rows, dim, dims, "float", torch.float32, normalize)
            name = f"{rows} rows, {dims} of {dim}{', normalize' * normalize}"
            yield name, lambda a=a: backward(_finish(*a))


# --- attention pooling ---------------------------------------------------------------------------


def _attention() -> Iterator[tuple[str, Callable[[], Case]]]:
    def make(heads: int, segments: list[Any]) -> Case:
        x, starts, weights, ends, _, _ = segments
        queries = torch.randn(heads, x.shape[-1])
        return Case((x, queries, starts, 0.7, weights, ends), 400)

    parts = (0, 128, 5, 130, 0, 300, 1)  # of 128 tokens each
    for name, heads, dim, options in (
        ("one query", 1, 9, {}),
        ("five queries", 5, 9, {}),
        ("weights", 2, 9, {"weighted": True}),
        ("padded", 4, 16, {"planes": True}),
        ("padded, odd", 3, 9, {"planes": True}),
    ):
        options = {"dtype": torch.float32, **options}
        yield name, lambda h=heads, d=dim, o=options: make(h, _segments(parts, d, **o))
    for dtype in HALVES:
        options = {"dtype": dtype}
        yield short(dtype), lambda o=options: make(2, _segments((33, 0, 7), 72, **o))
    for name, lengths, dim, heads in (
        ("no sequence", (), 5, 2),
        ("empty sequences", (0, 0), 5, 2),
        ("no query", (3, 2), 5, 0),
        ("one token", (1,), 64, 1),
        ("wide", (3, 9), 1100, 1),
    ):
        a = (lengths, dim, torch.float32)
        yield name, lambda h=heads, a=a: make(h, _segments(*a))
    gaps = torch.tensor([2, 9, 9, 40]), torch.tensor([5, 9, 20, 41])

    def between() -> Case:
        """Rows that are in no segment."""
        starts, ends = (tensor.int() for tensor in gaps)
        return make(1, [torch.randn(50, 8), starts, None, ends, None, None])

    yield "gaps", between


def _attention_backward() -> Iterator[tuple[str, Callable[[], Case]]]:
    def backward(case: Case) -> Case:
        x, queries, starts, scale, weights, ends = case.args
        out, lse = torch.ops.emblas.attention_pool(x, queries, starts, scale, weights, ends)
        grad = torch.randn(out.shape)
        return Case((grad, x, queries, out, lse, starts, scale, weights, ends), case.length)

    for name, make in _attention():
        yield name, lambda make=make: backward(make())


# --- vocabulary pooling --------------------------------------------------------------------------


def _vocab(
    lengths: tuple[int, ...],
    vocab: int,
    dim: int,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    weighted: bool = False,
    spans: bool = False,
) -> Case:
    """Small integers, so that products are exact and equal ones are many."""
    tokens = sum(lengths)
    x, weight = (torch.randint(-2, 3, (n, dim)).to(dtype) for n in (tokens, vocab))
    starts, ends, weights = packed(lengths), None, None
    if spans:  # with tokens in between that are in none
        starts, ends = (starts[:-1] + 1).clamp(max=tokens), starts[1:].clone()
        starts = torch.minimum(starts, ends)
    if weighted:
        weights = (torch.rand(tokens) < 0.7).float()
        weights[: lengths[0]] = 0
    shift = torch.randint(-3, 4, (vocab,)).float() if bias else None
    return Case((x, weight, shift, starts, weights, ends), dim)


def _vocabularies() -> Iterator[tuple[str, Callable[[], Case]]]:
    mixed = (3, 0, 70, 5, 0)
    for name, options in {
        **{short(dtype): {"dtype": dtype} for dtype in (torch.float32, *HALVES)},
        "bias": {"bias": True},
        "weights": {"weighted": True, "bias": True},
        "spans": {"spans": True, "bias": True},
    }.items():
        yield name, lambda o=options: _vocab(mixed, 67, 37, **o)
    yield "aligned", lambda: _vocab((2, 9), 72, 16)
    for name, lengths, vocab, dim in (
        ("no sequence", (), 5, 3),
        ("empty sequences", (0, 0), 5, 3),
        ("no word", (3,), 0, 3),
        ("one of each", (1,), 1, 1),
        ("wide", (3,), 3, 300),
    ):
        yield name, lambda a=(lengths, vocab, dim): _vocab(*a, bias=True)

    def special() -> Case:
        x, weight, *others = _vocab((5, 70, 3), 9, 4, bias=True).args
        x[[1, 50, 74]] = torch.nan  # two tiles of the second sequence, not its first one
        return Case((x, weight, *others), 4)

    yield "missing values", special


def _vocabularies_backward() -> Iterator[tuple[str, Callable[[], Case]]]:
    def backward(case: Case, needs: tuple[bool, bool] = (True, True)) -> Case:
        x, weight, bias, starts, weights, ends = case.args
        out, argmax = torch.ops.emblas.vocab_max(x, weight, bias, starts, weights, ends)
        grad = torch.randint(-2, 3, out.shape).float()  # sums are exact
        return Case((grad, x.nan_to_num(0), weight, argmax, starts, ends, *needs))

    for name, make in _vocabularies():
        yield name, lambda make=make: backward(make())
    for needs in ((True, False), (False, True)):
        yield f"needs {needs}", lambda a=needs: backward(_vocab((3, 9), 70, 8), a)


def _vocabulary_sums() -> Iterator[tuple[str, Callable[[], Case]]]:
    """Tokens of no sequence hold NaN; some logits are exactly 0."""

    def case(
        lengths: tuple[int, ...], vocab: int, dim: int, activation: int = 2, **options: Any
    ) -> Case:
        x, weight, bias, starts, weights, ends = _vocab(lengths, vocab, dim, **options).args
        x[owners(len(x), starts, weights, ends) < 0] = torch.nan
        return Case(
            (x, weight, bias, starts, activation, weights, ends), dim * max(lengths, default=1)
        )

    mixed = (3, 0, 130, 5, 0)
    dtypes = (torch.float32, *HALVES)
    for activation, dtype in itertools.product(range(4), dtypes):
        a = {"activation": activation, "dtype": dtype, "bias": activation % 2 == 0}
        yield f"activation {activation}, {short(dtype)}", lambda a=a: case(mixed, 67, 37, **a)
    for name, options in {
        "weights": {"weighted": True, "bias": True},
        "spans": {"spans": True, "bias": True},
        "spans, weights": {"spans": True, "weighted": True},
    }.items():
        yield name, lambda o=options: case(mixed, 67, 37, **o)
    yield "aligned", lambda: case((2, 9), 72, 16, bias=True)
    for name, lengths, vocab, dim in (
        ("no sequence", (), 5, 3),
        ("empty sequences", (0, 0), 5, 3),
        ("no word", (3,), 0, 3),
        ("one of each", (1,), 1, 1),
        ("wide", (3,), 3, 300),
        ("tiles of tokens", (4000, 200, 9), 3, 2),  # of 4096 tokens
        ("tiles of words", (2, 1), 2050, 3),  # of 2048 words
    ):
        yield name, lambda a=(lengths, vocab, dim): case(*a, activation=1, bias=True)


def _vocabulary_sums_backward() -> Iterator[tuple[str, Callable[[], Case]]]:
    def backward(case: Case, needs: tuple[bool, ...] = (True, True, True)) -> Case:
        x, weight, _, starts, *_, ends = case.args
        batch = len(starts) - (ends is None)
        grad = torch.randint(-2, 3, (batch, len(weight))).float()
        return Case((grad, *case.args, *needs), max(len(x), len(weight)))

    for name, make in _vocabulary_sums():
        yield name, lambda make=make: backward(make())
    some = dict(_vocabulary_sums())["aligned"]
    for need in range(3):
        needs = tuple(i == need for i in range(3))
        yield f"needs {needs}", lambda a=needs: backward(some(), a)


def _lexical() -> Iterator[tuple[str, Callable[[], Case]]]:
    def make(lengths: tuple[int, ...], words: int, ignored: tuple[int, ...] = ()) -> Case:
        tokens = sum(lengths)
        weights = torch.randint(-1, 5, (tokens,)) / 2  # many of them equal
        weights[1::9] = torch.nan
        ids = torch.randint(0, words, (tokens,)) * 2**40 - 3 * 2**40
        return Case((ids, weights, packed(lengths), [i * 2**40 for i in ignored]))

    yield "mixed", lambda: make((0, 5, 1, 0, 70, 64, 0), 9)
    yield "ignored", lambda: make((30, 100), 12, (-3, 5, 0))
    yield "distinct", lambda: make((40, 3), 10**6)
    yield "one id", lambda: make((65, 3), 1)
    yield "few ids", lambda: make((3,) * 40, 2)
    for name, lengths in (("no sequence", ()), ("empty sequences", (0, 0)), ("one token", (1,))):
        yield name, lambda a=lengths: make(a, 3)


CASES: dict[str, dict[str, Callable[[], Case]]] = {
    "segment_pool": dict((*_pooling(), *_linear())),
    "segment_pool_backward": dict(_pooling_backward()),
    "segment_pool_modes": dict(_several()),
    "segment_pool_modes_backward": dict(_several_backward()),
    "segment_max": dict(_max()),
    "segment_max_backward": dict(_max_backward()),
    "segment_gem": dict(_gem()),
    "segment_gem_backward": dict(_gem_backward()),
    "attention_pool": dict(_attention()),
    "attention_pool_backward": dict(_attention_backward()),
    "vocab_max": dict(_vocabularies()),
    "vocab_max_backward": dict(_vocabularies_backward()),
    "vocab_sum": dict(_vocabulary_sums()),
    "vocab_sum_backward": dict(_vocabulary_sums_backward()),
    "lexical_index": dict(_lexical()),
    "finish": dict(_finishing()),
    "finish_backward": dict(_finishing_backward()),
}
