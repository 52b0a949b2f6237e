"""Segment pooling."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from costs.work import Work
from emblas.pooling.reference import MAX, Mode

_CHUNK = 128  # rows that one block of sum_chunks adds up


@dataclasses.dataclass(frozen=True)
class Pooling:
    """Mean pooling of sequences of these lengths, none of them empty."""

    lengths: tuple[int, ...]
    dim: int
    dtype: torch.dtype
    weights: bool = False
    normalize: bool = False
    mode: Mode = Mode.mean
    spans: bool = False  # given by their starts and ends

    def __str__(self) -> str:
        words = f"{len(self.lengths)} x {self.lengths[0]} tokens, dim {self.dim}, "
        words += str(self.dtype).removeprefix("torch.")
        words += ", weights" * self.weights + ", normalize" * self.normalize
        words += f", {self.mode.name}" * (self.mode != Mode.mean)
        return words + ", spans" * self.spans

    @property
    def x(self) -> int:
        return sum(self.lengths) * self.dim * self.dtype.itemsize

    @property
    def out(self) -> int:
        return len(self.lengths) * self.dim * self.dtype.itemsize

    @property
    def wide(self) -> int:  # as `out`, in accumulators
        return len(self.lengths) * self.dim * 4

    @property
    def partial(self) -> int:
        if self.spans:
            return self.wide
        return sum(-(-length // _CHUNK) for length in self.lengths) * self.dim * 4

    @property
    def per_token(self) -> int:
        return sum(self.lengths) * 4

    @property
    def per_sequence(self) -> int:
        return len(self.lengths) * 4

    @property
    def ranges(self) -> int:
        return 2 * self.per_sequence

    @property
    def fingerprints(self) -> int:
        return 2 * self.per_sequence

    @property
    def order(self) -> int:
        return 4 * self.per_sequence * self.spans

    @property
    def offsets(self) -> int:
        return 2 * self.per_sequence if self.spans else self.per_sequence + 4

    @property
    def read_always(self) -> int:
        return self.offsets + self.per_token * self.weights

    def arguments(self) -> tuple[Any, ...]:
        x = torch.rand(sum(self.lengths), self.dim).to(self.dtype)
        starts, ends = torch.tensor([0, *self.lengths]).cumsum(0).int(), None
        if self.spans:
            starts, ends = starts[:-1].clone(), starts[1:].clone()
        weights = torch.rand(len(x)) + 1 if self.weights else None
        return x, starts, weights, self.normalize, int(self.mode), ends, None, None, False


def _pool_cuda(p: Pooling) -> dict[str, Work]:
    adds = sum(p.lengths) * p.dim * (2 if p.weights else 1)
    return {
        "sum_chunks": Work(p.read_always + p.x, p.partial, adds),
        "finish_pooled": Work(
            p.read_always + p.partial,
            p.out + (p.wide + p.per_sequence) * p.normalize,
            p.partial // 4 + p.wide // 4 * (1 + 3 * p.normalize),
        ),
    }


def _pool_triton(p: Pooling) -> dict[str, Work]:
    adds = 2 * sum(p.lengths) * p.dim
    if not p.normalize:
        return {"_pool": Work(p.read_always + p.x, p.out, adds)}
    return {
        "_pool": Work(p.read_always + p.x, p.wide, adds),
        "_normalize": Work(p.wide, p.out + p.per_sequence, 3 * p.wide // 4),
    }


@dataclasses.dataclass(frozen=True)
class PoolingBackward(Pooling):
    """Its gradient with respect to x, and to the weights where there are some."""

    def arguments(self) -> tuple[Any, ...]:
        x, starts, weights, normalize, *others = super().arguments()
        out, norm = torch.ops.emblas.segment_pool(x, starts, weights, normalize, *others)
        needs = (normalize, True, self.weights)
        return torch.rand(out.shape).to(x.dtype), x, out, norm, starts, weights, *needs, *others


def _contributions(p: PoolingBackward) -> Work:
    return Work(
        p.read_always + 2 * p.out + p.per_sequence * p.normalize,
        p.wide + p.ranges + p.per_sequence,
        p.wide // 4 * (5 + 4 * p.normalize),
    )


def _row_gradients(p: Pooling) -> Work:
    where = p.ranges + p.order + p.per_sequence
    return Work(
        where + p.per_token * p.weights + p.wide, p.x, sum(p.lengths) * p.dim * (1 + p.weights)
    )


def _weight_gradients(p: Pooling) -> Work:
    where = p.ranges + p.order + p.per_sequence
    flops = 3 * sum(p.lengths) * p.dim
    return Work(where + p.per_sequence + p.wide + p.x, p.per_token, flops)


def _pool_backward_cuda(p: PoolingBackward) -> dict[str, Work]:
    contributions = _contributions(p)
    works = {"pool_contributions": contributions}
    if p.spans:
        written = contributions.written + p.fingerprints
        works["pool_contributions"] = dataclasses.replace(contributions, written=written)
        works["rank_spans"] = Work(p.ranges + p.fingerprints, p.order)
    works["write_row_gradients"] = _row_gradients(p)
    if p.weights:
        works["write_weight_gradients"] = _weight_gradients(p)
    return works


def _pool_backward_triton(p: PoolingBackward) -> dict[str, Work]:
    works = {"_segment_gradients": _contributions(p)}
    if p.spans:
        works["_fingerprints"] = Work(p.wide + p.per_sequence, p.fingerprints)
    works["_row_gradients"] = _row_gradients(p)
    if p.weights:
        works["_weight_gradients"] = _weight_gradients(p)
    return works


@dataclasses.dataclass(frozen=True)
class Several(Pooling):
    """Several modes at once."""

    modes: tuple[int, ...] = (Mode.mean, Mode.weighted_mean, Mode.last, MAX)

    def __str__(self) -> str:
        names = ("max" if mode == MAX else Mode(mode).name for mode in self.modes)
        return f"{super().__str__()}, {' and '.join(names)}"

    @property
    def kept(self) -> int:  # of each chunk: sums, sums by position, maxima and where they are
        sums = any(mode < Mode.weighted_mean for mode in self.modes)
        return (sums + (Mode.weighted_mean in self.modes) + 2 * (MAX in self.modes)) * self.partial

    @property
    def rows(self) -> int:  # of the modes that take one
        return ((Mode.cls in self.modes) + (Mode.last in self.modes)) * self.out

    @property
    def outs(self) -> int:
        return len(self.modes) * self.out

    @property
    def wides(self) -> int:
        return len(self.modes) * self.wide

    @property
    def argmax(self) -> int:
        return self.wide * (MAX in self.modes)

    @property
    def mode_ranges(self) -> int:
        return len(self.modes) * self.ranges

    def arguments(self) -> tuple[Any, ...]:
        x, starts, weights, _, _, *others = super().arguments()
        return x, starts, weights, tuple(map(int, self.modes)), *others


def _several_cuda(p: Several) -> dict[str, Work]:
    adds = 4 * sum(p.lengths) * p.dim  # of sums and of sums by position, wanted or not
    return {
        "take_chunks": Work(p.read_always + p.x, p.kept, adds),
        "finish_modes": Work(p.read_always + p.kept + p.rows, p.outs + p.argmax, p.kept // 4),
    }


def _several_triton(p: Several) -> dict[str, Work]:
    adds = 2 * (p.kept // p.partial) * sum(p.lengths) * p.dim
    return {"_pool": Work(p.read_always + p.x, p.outs + p.argmax, adds)}


@dataclasses.dataclass(frozen=True)
class SeveralBackward(Several):
    """Its gradient with respect to x, and to the weights where there are some."""

    def arguments(self) -> tuple[Any, ...]:
        x, *options = super().arguments()
        out, argmax = torch.ops.emblas.segment_pool_modes(x, *options)
        starts, weights, modes, *others = options
        needs = (True, self.weights)
        grad = torch.rand(out.shape).to(x.dtype)
        return grad, x, out, argmax, starts, weights, modes, *needs, *others


def _several_backward(p: SeveralBackward, kernels: tuple[str, ...]) -> dict[str, Work]:
    first, order, rows, weights = kernels
    where = (p.order or p.ranges) + p.mode_ranges + p.per_sequence
    along = len(p.modes) * p.per_sequence
    works = {
        first: Work(
            p.read_always + 2 * p.outs,
            p.wides + p.ranges + p.mode_ranges + along,
            5 * p.wides // 4,
        )
    }
    if p.spans and order == "_fingerprints":
        works[order] = Work(p.wides + p.per_sequence, p.fingerprints)
    elif p.spans:
        written = works[first].written + p.fingerprints
        works[first] = dataclasses.replace(works[first], written=written)
        works[order] = Work(p.ranges + p.fingerprints, p.order)
    flops = 2 * len(p.modes) * sum(p.lengths) * p.dim
    works[rows] = Work(where + p.per_token * p.weights + p.wides + p.argmax, p.x, flops)
    if p.weights:
        share = sum(mode < Mode.cls for mode in p.modes) / len(p.modes)
        read = (p.order or p.ranges) + p.per_sequence + p.x
        read += int(share * (p.mode_ranges + along + p.wides))
        works[weights] = Work(read, p.per_token, 2 * flops)
    return works


@dataclasses.dataclass(frozen=True)
class Maximum(Pooling):
    """Maximum of each column instead."""

    @property
    def argmax(self) -> int:
        return self.wide

    def arguments(self) -> tuple[Any, ...]:
        return *super().arguments()[:3], None, None, None


@dataclasses.dataclass(frozen=True)
class MaximumBackward(Maximum):
    """Its gradient."""

    def arguments(self) -> tuple[Any, ...]:
        x, *others = super().arguments()
        out, argmax = torch.ops.emblas.segment_max(x, *others)
        return torch.rand(out.shape).to(x.dtype), argmax, len(x)


def _max(kernel: str) -> Callable[[Maximum], dict[str, Work]]:
    def works(p: Maximum) -> dict[str, Work]:
        return {kernel: Work(p.read_always + p.x, p.out + p.argmax)}

    return works


def _max_backward(kernel: str) -> Callable[[MaximumBackward], dict[str, Work]]:
    def works(p: MaximumBackward) -> dict[str, Work]:
        return {kernel: Work(p.out + p.argmax, p.out)}  # into zeros

    return works


@dataclasses.dataclass(frozen=True)
class Gem(Pooling):
    """Generalized mean instead; some 30 operations make a power."""

    @property
    def powers(self) -> int:
        return 30 * sum(self.lengths) * self.dim

    def arguments(self) -> tuple[Any, ...]:
        x, starts, weights, _, _, *others, _ = super().arguments()
        return x, starts, weights, torch.tensor([3.0]), 1e-6, *others


@dataclasses.dataclass(frozen=True)
class GemBackward(Gem):
    """Its gradient with respect to x and p, and to the weights where there are some."""

    def arguments(self) -> tuple[Any, ...]:
        x, *others = super().arguments()
        out = torch.ops.emblas.segment_gem(x, *others)
        return torch.rand(out.shape), x, out, *others, self.weights


def _gem_cuda(p: Gem) -> dict[str, Work]:
    return {
        "sum_chunks": Work(p.read_always + p.x + 4, p.partial, p.powers),
        "finish_roots": Work(p.read_always + p.partial + 4, p.wide, 10 * p.wide),
    }


def _gem_triton(p: Gem) -> dict[str, Work]:
    return {"_powers": Work(p.read_always + p.x + 4, p.wide, p.powers)}


def _gem_backward(
    first: str, between: str, rows: str, weights: str
) -> Callable[[GemBackward], dict[str, Work]]:
    def works(p: GemBackward) -> dict[str, Work]:
        parts = Work(
            p.read_always + 2 * p.wide + p.x + 4, p.ranges + p.wide + 2 * p.per_sequence, p.powers
        )
        works = {first: parts}
        if p.spans and between == "_fingerprints":
            works[between] = Work(p.wide + p.per_sequence, p.fingerprints)
        elif p.spans:
            works[first] = dataclasses.replace(parts, written=parts.written + p.fingerprints)
            works[between] = Work(p.ranges + p.fingerprints, p.order)
        of_rows = _row_gradients(p)
        works[rows] = Work(of_rows.read + p.x + 4, of_rows.written, of_rows.flops + p.powers)
        if p.weights:
            of_weights = _weight_gradients(p)
            works[weights] = dataclasses.replace(of_weights, read=of_weights.read + 4)
        return works

    return works


_BF16, _F32 = torch.bfloat16, torch.float32
MODELS: dict[tuple[str, str], Callable[[Any], dict[str, Work]]] = {
    ("segment_pool", "CUDA C++"): _pool_cuda,
    ("segment_pool", "Triton"): _pool_triton,
    ("segment_pool_backward", "CUDA C++"): _pool_backward_cuda,
    ("segment_pool_backward", "Triton"): _pool_backward_triton,
    ("segment_pool_modes", "CUDA C++"): _several_cuda,
    ("segment_pool_modes", "Triton"): _several_triton,
    ("segment_pool_modes_backward", "CUDA C++"): partial(
        _several_backward,
        kernels=(
            "pool_contributions",
            "rank_spans",
            "write_row_gradients",
            "write_weight_gradients",
        ),
    ),
    ("segment_pool_modes_backward", "Triton"): partial(
        _several_backward,
        kernels=("_segment_gradients", "_fingerprints", "_row_gradients", "_weight_gradients"),
    ),
    ("segment_gem", "CUDA C++"): _gem_cuda,
    ("segment_gem", "Triton"): _gem_triton,
    ("segment_gem_backward", "CUDA C++"): _gem_backward(
        "gem_contributions", "rank_spans", "write_row_gradients", "write_weight_gradients"
    ),
    ("segment_gem_backward", "Triton"): _gem_backward(
        "_gem_gradients", "_fingerprints", "_row_gradients", "_weight_gradients"
    ),
    ("segment_max", "CUDA C++"): _max("find_maxima"),
    ("segment_max", "Triton"): _max("_maximum"),
    ("segment_max_backward", "CUDA C++"): _max_backward("scatter_maxima"),
    ("segment_max_backward", "Triton"): _max_backward("_scatter"),
}
SMALL: dict[str, tuple[Any, ...]] = {
    "segment_pool": (
        Pooling((130, 1, 300), 24, _F32),
        Pooling((130, 1, 300), 24, _BF16, weights=True, normalize=True),
        Pooling((130, 1, 300), 24, _F32, mode=Mode.sum, spans=True),
    ),
    "segment_pool_backward": (
        PoolingBackward((130, 1, 300), 24, _F32),
        PoolingBackward((130, 1, 300), 24, _BF16, weights=True, normalize=True),
        PoolingBackward((130, 1, 300), 24, _F32, weights=True, mode=Mode.sum, spans=True),
    ),
    "segment_pool_modes": (
        Several((130, 1, 300), 24, _F32),
        Several((130, 1, 300), 24, _BF16, weights=True, modes=(Mode.sum, MAX), spans=True),
    ),
    "segment_pool_modes_backward": (
        SeveralBackward((130, 1, 300), 24, _F32),
        SeveralBackward((130, 1, 300), 24, _BF16, weights=True, spans=True),
    ),
    "segment_gem": (
        Gem((130, 1, 300), 24, _F32),
        Gem((130, 1, 300), 24, _BF16, weights=True, spans=True),
    ),
    "segment_gem_backward": (
        GemBackward((130, 1, 300), 24, _F32),
        GemBackward((130, 1, 300), 24, _BF16, weights=True, spans=True),
    ),
    "segment_max": (Maximum((130, 1, 300), 24, _F32), Maximum((40, 1), 70, _BF16, weights=True)),
    "segment_max_backward": (MaximumBackward((40, 1, 30), 70, _BF16),),
}
LARGE: dict[str, tuple[Any, ...]] = {
    "segment_pool": (Pooling((512,) * 256, 1024, _BF16, normalize=True),),
    "segment_pool_backward": (PoolingBackward((512,) * 256, 1024, _BF16, normalize=True),),
    "segment_pool_modes": (Several((512,) * 256, 1024, _BF16, modes=(Mode.mean, MAX)),),
    "segment_pool_modes_backward": (
        SeveralBackward((512,) * 256, 1024, _BF16, modes=(Mode.mean, MAX)),
    ),
    "segment_gem": (Gem((512,) * 256, 1024, _BF16),),
    "segment_gem_backward": (GemBackward((512,) * 256, 1024, _BF16),),
    "segment_max": (Maximum((512,) * 256, 1024, _BF16),),
    "segment_max_backward": (MaximumBackward((512,) * 256, 1024, _BF16),),
}
