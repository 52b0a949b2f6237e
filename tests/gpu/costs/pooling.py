"""Segment pooling."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from costs.work import Work

_CHUNK = 128  # rows that one block of sum_chunks adds up


@dataclasses.dataclass(frozen=True)
class Pooling:
    """Mean pooling of sequences of these lengths, none of them empty."""

    lengths: tuple[int, ...]
    dim: int
    dtype: torch.dtype
    weights: bool = False
    normalize: bool = False

    def __str__(self) -> str:
        words = f"{len(self.lengths)} x {self.lengths[0]} tokens, dim {self.dim}, "
        words += str(self.dtype).removeprefix("torch.")
        return words + ", weights" * self.weights + ", normalize" * self.normalize

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
        return sum(-(-length // _CHUNK) for length in self.lengths) * self.dim * 4

    @property
    def per_token(self) -> int:
        return sum(self.lengths) * 4

    @property
    def per_sequence(self) -> int:
        return len(self.lengths) * 4

    @property
    def offsets(self) -> int:
        return (len(self.lengths) + 1) * 4

    @property
    def read_always(self) -> int:
        return self.offsets + self.per_token * self.weights

    def arguments(self) -> tuple[Any, ...]:
        x = torch.rand(sum(self.lengths), self.dim).to(self.dtype)
        offsets = torch.tensor([0, *self.lengths]).cumsum(0).int()
        return x, offsets, torch.rand(len(x)) + 1 if self.weights else None, self.normalize


def _pool_cuda(p: Pooling) -> dict[str, Work]:
    adds = sum(p.lengths) * p.dim * (2 if p.weights else 1)
    return {
        "sum_chunks": Work(p.read_always + p.x, p.partial, adds),
        "finish_means": Work(
            p.read_always + p.partial,
            p.wide + p.out + p.per_sequence * p.normalize,
            p.partial // 4 + 2 * p.wide // 4 * (1 + p.normalize),
        ),
    }


def _pool_triton(p: Pooling) -> dict[str, Work]:
    adds = 2 * sum(p.lengths) * p.dim
    if not p.normalize:
        return {"_mean": Work(p.read_always + p.x, p.out, adds)}
    return {
        "_mean": Work(p.read_always + p.x, p.wide, adds),
        "_normalize": Work(p.wide, p.out + p.per_sequence, 3 * p.wide // 4),
    }


@dataclasses.dataclass(frozen=True)
class PoolingBackward(Pooling):
    """Its gradient with respect to x, and to the weights where there are some."""

    def arguments(self) -> tuple[Any, ...]:
        x, offsets, weights, normalize = super().arguments()
        out, norm = torch.ops.emblas.segment_pool(x, offsets, weights, normalize)
        needs = (normalize, True, self.weights)
        return torch.rand(out.shape).to(x.dtype), x, out, norm, offsets, weights, *needs


def _pool_backward(first: str, second: str, along_mean: bool) -> Callable[..., dict[str, Work]]:
    def works(p: PoolingBackward) -> dict[str, Work]:
        passes = 5 + 4 * p.normalize
        means = Work(
            p.read_always + 2 * p.out + p.per_sequence * p.normalize,
            p.wide + 2 * p.per_sequence,
            p.wide // 4 * passes,
        )
        tokens = Work(
            p.read_always
            + p.wide
            + p.per_sequence * (1 + (along_mean or p.weights))
            + p.x * p.weights,
            p.x + p.per_token * p.weights,
            sum(p.lengths) * p.dim * (3 if p.weights else 1),
        )
        return {first: means, second: tokens}

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


_BF16, _F32 = torch.bfloat16, torch.float32
MODELS: dict[tuple[str, str], Callable[[Any], dict[str, Work]]] = {
    ("segment_pool", "CUDA C++"): _pool_cuda,
    ("segment_pool", "Triton"): _pool_triton,
    ("segment_pool_backward", "CUDA C++"): _pool_backward(
        "mean_gradients", "token_gradients", True
    ),
    ("segment_pool_backward", "Triton"): _pool_backward(
        "_mean_gradient", "_token_gradients", False
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
    ),
    "segment_pool_backward": (
        PoolingBackward((130, 1, 300), 24, _F32),
        PoolingBackward((130, 1, 300), 24, _BF16, weights=True, normalize=True),
    ),
    "segment_max": (Maximum((130, 1, 300), 24, _F32), Maximum((40, 1), 70, _BF16, weights=True)),
    "segment_max_backward": (MaximumBackward((40, 1, 30), 70, _BF16),),
}
LARGE: dict[str, tuple[Any, ...]] = {
    "segment_pool": (Pooling((512,) * 256, 1024, _BF16, normalize=True),),
    "segment_pool_backward": (PoolingBackward((512,) * 256, 1024, _BF16, normalize=True),),
    "segment_max": (Maximum((512,) * 256, 1024, _BF16),),
    "segment_max_backward": (MaximumBackward((512,) * 256, 1024, _BF16),),
}
