"""Arguments of the measures: anything array-like becomes a CPU tensor in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def numbers(name: str, value: Any, *, ndim: int = 1, rows: int | None = None) -> Tensor:
    """Return ``value`` as float64, if it is finite, of this rank and number of rows."""
    # At once: without a dtype, floats of lists are read as float32.
    x = torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()
    if x.dim() != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {tuple(x.shape)}")
    if rows is not None and x.shape[0] != rows:
        raise ValueError(f"{name} must have {rows} rows, got {x.shape[0]}")
    if not torch.isfinite(x).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return x


def vectors(name: str, value: Any, *, rows: int | None = None, least: int = 1) -> Tensor:
    """Return vectors ``(n, dim)`` in float64, ``n`` at least ``least``."""
    x = numbers(name, value, ndim=2, rows=rows)
    if x.shape[0] < least:
        raise ValueError(f"{name} must have at least {least} rows, got {x.shape[0]}")
    return x


def classes(name: str, value: Any, rows: int) -> tuple[Tensor, Tensor]:
    """Return the distinct labels, and the index ``(rows,)`` of each row's label among them."""
    x = torch.as_tensor(value).cpu()
    if tuple(x.shape) != (rows,) or (rows and x.is_floating_point()):
        raise ValueError(f"{name} must be {rows} integers, got {x.dtype} of shape {tuple(x.shape)}")
    return torch.unique(x, return_inverse=True)


def scaled(x: Tensor, dim: int | None = None) -> Tensor:
    """Largest absolute value 1, of all or along ``dim``, so that squares keep their digits."""
    if not x.numel():
        return x
    largest = x.abs().max() if dim is None else x.abs().amax(dim, keepdim=True)
    return x / torch.where(largest > 0, largest, 1)


def unit(x: Tensor) -> Tensor:
    """Vectors of length 1; the zero vector stays zero."""
    x = scaled(x, -1)  # of which all but the zero vector are at least of length 1
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1)


def count(name: str, value: int, most: int | None = None) -> int:
    """Return ``value`` if it is at least 1 and at most ``most``."""
    if value < 1 or (most is not None and value > most):
        limit = "" if most is None else f" and at most {most}"
        raise ValueError(f"{name} must be at least 1{limit}, got {value}")
    return value
