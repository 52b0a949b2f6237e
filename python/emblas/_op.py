"""What every operator shares: its registration, the choice of a backend, argument checks.

An operator of a family is declared once, in ``<family>/op.py``::

    _pool = Op("segment_pool", reference=reference.segment_pool, fake=_fake, ...)

Its CPU kernel is registered with torch's dispatcher by ``csrc/<family>/<family>_ops.cpp``.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from emblas import _load  # noqa: F401  (registers the operators)

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_ERROR_PREFIX = "emblas: "  # of errors in values, which the kernels check (csrc/common/tensor.h)
BACKENDS = ("auto", "cpu", "cuda", "triton", "reference")

_OPS: dict[str, Op] = {}
_forced = "auto"


class Op:
    """One torch operator ``emblas::<name>``: how it is called, traced and routed.

    Parameters
    ----------
    name : str
        Name of the operator, as in its C++ schema.
    reference : callable
        The specification in plain torch, with the operator's arguments and results. It runs on
        any device and dtype, and autograd can differentiate it.
    fake : callable
        Shapes and dtypes of the results, for tracing.
    backward : str, optional
        Name of the operator that computes this one's gradient; None where there is no gradient
        (integer results) or none yet.
    """

    def __init__(
        self,
        name: str,
        *,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        backward: str | None = None,
    ) -> None:
        self.name = name
        self.reference = reference
        self.backward = backward
        self.overload = getattr(torch.ops.emblas, name).default
        self._warned = False
        torch.library.register_fake(f"emblas::{name}", fake)
        torch.library.impl(f"emblas::{name}", "CUDA", self._on_gpu)
        _OPS[name] = self

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.overload(*args)
        try:
            return self.overload(*args)
        except RuntimeError as error:
            message = str(error)
            if not message.startswith(_ERROR_PREFIX):
                raise
            # The text may go on with torch's own remarks on the next line.
            message = message.removeprefix(_ERROR_PREFIX).partition("\n")[0]
            raise ValueError(message) from None

    def _on_gpu(self, *args: Any) -> Any:
        if not self._warned and _forced != "reference":
            self._warned = True
            warnings.warn(
                f"emblas::{self.name} has no GPU kernel in this version: its reference in plain "
                "torch runs instead (correct, slower)",
                stacklevel=2,
            )
        return self.reference(*args)

    def backend(self, device: str) -> str | None:
        """Name the backend that a call on ``device`` ("cpu", "cuda") takes; None where none can."""
        if device == "cpu" and torch._C._dispatch_has_kernel_for_dispatch_key(
            f"emblas::{self.name}", "CPU"
        ):
            return "cpu"
        return "reference" if device == "cuda" else None


def ops() -> dict[str, Op]:
    """Return all operators by name."""
    return dict(_OPS)


def use_reference() -> bool:
    """Tell whether the caller has asked for the reference implementations."""
    return _forced == "reference"


def force_backend(name: str) -> str:
    """Set the backend for the whole process and return the one before."""
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name in ("cuda", "triton"):
        raise RuntimeError(f"backend {name!r} can't run: this version has no {name} kernels")
    before, _forced = _forced, name
    return before


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force the backend of every emblas operator inside a ``with`` block.

    Parameters
    ----------
    name : {"auto", "cpu", "cuda", "triton", "reference"}
        "auto" chooses by device. "reference" runs the plain torch specification everywhere. The
        environment variable ``EMBLAS_BACKEND`` sets the same for a whole process.

    Raises
    ------
    ValueError
        If ``name`` is none of these.
    RuntimeError
        If that backend can't run here.

    Notes
    -----
    The choice holds for the process, not for the thread. Code compiled by ``torch.compile`` is
    guarded on it.
    """
    before = force_backend(name)
    try:
        yield
    finally:
        force_backend(before)


if _name := os.environ.get("EMBLAS_BACKEND"):
    force_backend(_name)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Tell whether autograd has to record an operation on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


# --- argument checks: each error names the argument, what it got and what it needs ---------------


def check_tensor(
    name: str,
    value: object,
    *,
    ndim: int | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Return ``value`` if it is a tensor of the given rank, dtype and device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if ndim is not None and value.dim() != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {tuple(value.shape)}")
    if dtypes is not None and value.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(
            f"{name} must have dtype {allowed}, got {str(value.dtype).removeprefix('torch.')}"
        )
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on device {device}, got {value.device}")
    return value


def check_choice(name: str, value: str, choices: Sequence[str]) -> str:
    """Return ``value`` if it is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def offsets(name: str, value: object, device: torch.device) -> Tensor:
    """Return sequence offsets as the contiguous int32 vector that kernels take."""
    tensor = check_tensor(name, value, ndim=1, dtypes=(torch.int32, torch.int64), device=device)
    if tensor.shape[0] == 0:
        raise ValueError(f"{name} must have at least one element (batch + 1), got none")
    if tensor.dtype == torch.int64:  # what int32 can't hold must not wrap to a legal value
        tensor = tensor.clamp(-1, 2**31 - 1)
    return tensor.to(torch.int32).contiguous()


def rows(tensor: Tensor) -> Tensor:
    """Return ``tensor`` with a contiguous last dimension; other strides are kept."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()
