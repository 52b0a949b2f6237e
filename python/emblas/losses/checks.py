"""Argument checks that the losses share."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from emblas import _op


def accumulator(*tensors: Tensor) -> torch.dtype:
    """Return the dtype in which scores, sums and losses are kept."""
    double = any(x.dtype == torch.float64 for x in tensors)
    return torch.float64 if double else torch.float32


def full_precision(x: Tensor) -> torch.autocast:
    """Return a context in which autocast lowers nothing on the device of ``x``.

    A score of 20 has a spacing of 1/8 in bfloat16: scores and sums stay in float32.
    """
    return torch.autocast(x.device.type, enabled=False)


def _looked_at(value: Tensor) -> bool:
    """Say whether numbers are looked at: see :func:`finite`."""
    if torch.compiler.is_compiling() or value.device.type == "meta":
        return False
    return value.device.type == "cpu" or os.environ.get("EMBLAS_DEBUG") == "1"


def finite(name: str, value: Tensor) -> Tensor:
    """Return ``value`` if it holds neither NaN nor infinity.

    A loss that turns into NaN tells nothing about where the NaN came from, so it is looked for
    where it enters: on the CPU in eager mode always, on a GPU (where looking makes it wait) only
    under ``EMBLAS_DEBUG=1``.
    """
    if not _looked_at(value):
        return value
    with torch.no_grad():
        # The sum is one pass without a temporary; it may overflow where no value is infinite.
        total = value.sum()
        if not torch.isfinite(total) and not (good := torch.isfinite(value)).all():
            at = tuple((~good).nonzero()[0].tolist())
            raise ValueError(f"{name} must be finite, got {value[at].item()} at {list(at)}")
    return value


def vectors(
    name: str, value: object, like: Tensor | None = None, *, ndim: int = 2, rows: int | None = None
) -> Tensor:
    """Return ``value`` if it holds finite vectors: ``like`` another tensor, one per row."""
    device = None if like is None else like.device
    x = _op.check_tensor(name, value, ndim=ndim, dtypes=_op.FLOATS, device=device)
    if like is not None and x.shape[-1] != like.shape[-1]:
        raise ValueError(
            f"{name} must have vectors of dimension {like.shape[-1]}, got shape {tuple(x.shape)}"
        )
    if rows is not None and x.shape[0] != rows:
        raise ValueError(f"{name} must have {rows} rows, got shape {tuple(x.shape)}")
    return finite(name, x)


def values(name: str, value: object, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return ``value`` if it holds finite numbers of this shape on the device of ``like``."""
    x = _op.check_tensor(name, value, device=like.device)
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
    if x.is_complex():
        raise TypeError(f"{name} must hold real numbers, got {x.dtype}")
    return finite(name, x) if x.is_floating_point() else x


def not_negative(name: str, value: object, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return ``value`` if it holds such :func:`values`, none of them negative."""
    x = values(name, value, like, shape)
    if _looked_at(x) and x.numel() and (lowest := x.detach().min()) < 0:
        raise ValueError(f"{name} must not be negative, got {lowest.item()}")
    return x


def positive(name: str, value: float) -> float:
    """Return ``value`` if it is positive."""
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
    return value


def weighted_mean(losses: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of ``losses``, weighted; 0 (with zero gradients) where all weights are 0 or none is."""
    if weights is None:
        return losses.sum() / max(losses.numel(), 1)
    weights = weights.to(losses.dtype)
    total = weights.sum()
    return (losses * weights).sum() / torch.where(total == 0, 1, total)


def reduce(losses: Tensor, reduction: str, weights: Tensor | None = None) -> Tensor:
    """Return the weighted mean, the weighted sum or the weighted ``losses`` themselves."""
    if reduction == "mean":
        return weighted_mean(losses, weights)
    if weights is not None:
        losses = losses * weights.to(losses.dtype)
    return losses.sum() if reduction == "sum" else losses


REDUCTIONS = ("mean", "sum", "none")


def wide(x: Tensor) -> Tensor:
    """Vectors as they are, in the accumulator's dtype."""
    return x.to(accumulator(x))


def unit(x: Tensor) -> Tensor:
    """Vectors of length 1 in the accumulator's dtype; the zero vector stays zero."""
    x = x.to(accumulator(x))
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * inverse(norm)


def inverse(norm: Tensor) -> Tensor:
    """1 / ``norm``, and 0 (with a zero gradient) where there is no direction."""
    empty = norm < 1e-12
    return torch.where(empty, 0, 1 / torch.where(empty, 1, norm))
