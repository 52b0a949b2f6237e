"""Calls of the operators of pooling."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from contract import packed
from emblas.pooling.reference import Mode

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
            return Case((x, starts, weights, torch.tensor([power]), epsilon, *others), 70)

        yield name, gem


def _gem_backward() -> Iterator[tuple[str, Callable[[], Case]]]:
    for name, make in _gem():

        def backward(make: Callable[[], Case] = make) -> Case:
            x, starts, *others = make().args
            out = torch.ops.emblas.segment_gem(x, starts, *others)
            return Case((torch.randn(out.shape), x, out, starts, *others), 70 * 67)

        yield name, backward


CASES: dict[str, dict[str, Callable[[], Case]]] = {
    "segment_pool": dict((*_pooling(), *_linear())),
    "segment_pool_backward": dict(_pooling_backward()),
    "segment_max": dict(_max()),
    "segment_max_backward": dict(_max_backward()),
    "segment_gem": dict(_gem()),
    "segment_gem_backward": dict(_gem_backward()),
}
