"""What every operator shares: its registration, the choice of a backend, argument checks.

An operator of a family is declared once, in ``<family>/op.py``::

    _pool = Op("segment_pool", reference=reference.segment_pool, fake=_fake, ...)

Its CPU kernel is registered with torch's dispatcher by ``csrc/<family>/<family>_ops.cpp``, its CUDA
C++ kernel as the operator ``emblas::<name>_cuda`` by ``<family>_ops_cuda.cpp``. Its Triton kernel
is the attribute ``<name>`` of ``<family>/triton.py``, a :class:`Kernel`.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from emblas._load import _C, runs_on  # loading registers the operators

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_ERROR_PREFIX = "emblas: "  # of errors in values, which the kernels check (csrc/common/tensor.h)
BACKENDS = ("auto", "cpu", "cuda", "triton", "reference")
_GPU_KERNELS = ("cuda", "triton")  # in order of preference
# Check values on GPU tensors too, for which every call waits for the GPU.
_DEBUG = os.environ.get("EMBLAS_DEBUG", "0") not in ("", "0")

_OPS: dict[str, Op] = {}
_forced = "auto"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An implementation of an operator for GPUs, and the calls that it serves.

    Parameters
    ----------
    run : callable
        Takes the first ``arity`` arguments of the operator. A call fits only if the others, which
        the schema has gained since, have their default values.
    arity : int
        How many these are.
    supports : callable, optional
        Takes the same arguments and decides by shapes, dtypes and options, never by values on the
        device. None supports every call.
    """

    run: Callable[..., Any]
    arity: int
    supports: Callable[..., bool] | None = None


def kernel(supports: Callable[..., bool] | None = None) -> Callable[[Callable[..., Any]], Kernel]:
    """Turn a function of an operator's arguments into its :class:`Kernel`, as a decorator."""
    return lambda run: Kernel(run, len(inspect.signature(run).parameters), supports)


@cache
def has_triton() -> bool:
    """Tell whether triton is installed, without importing it."""
    return importlib.util.find_spec("triton") is not None


def triton_is_interpreted() -> bool:
    """Tell whether Triton kernels run on CPU tensors, which ``TRITON_INTERPRET=1`` asks for."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


class Op:
    """One torch operator ``emblas::<name>``: how it is called, traced and routed.

    Parameters
    ----------
    name : str
        Name of the operator, as in its C++ schema. Its first argument is a tensor.
    reference : callable
        The specification in plain torch, with the operator's arguments and results. It runs on
        any device and dtype, and autograd can differentiate it.
    fake : callable
        Shapes and dtypes of the results, for tracing.
    backward : str, optional
        Name of the operator that computes this one's gradient; None where there is no gradient
        (integer results) or none yet.
    triton : str, optional
        Module of the Triton kernel, imported when first needed; None where there is none.
    cuda_supports : callable, optional
        What the CUDA C++ kernel supports, see :class:`Kernel`.
    check_values : callable, optional
        Takes the operator's arguments and raises ValueError where the CPU kernel would. It runs
        before GPU kernels under ``EMBLAS_DEBUG=1`` only, as it waits for the GPU.
    """

    def __init__(
        self,
        name: str,
        *,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        backward: str | None = None,
        triton: str | None = None,
        cuda_supports: Callable[..., bool] | None = None,
        check_values: Callable[..., None] | None = None,
    ) -> None:
        self.name = name
        self.reference = reference
        self.backward = backward
        self.triton = triton
        self.cuda_supports = cuda_supports
        self.check_values = check_values
        self.overload = getattr(torch.ops.emblas, name).default
        self._warned = False
        torch.library.register_fake(f"emblas::{name}", fake)
        torch.library.impl(f"emblas::{name}", "CUDA", self._on_gpu)
        _OPS[name] = self

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.overload(*args)
        try:
            if _forced != "auto" and not args[0].is_cuda:
                return self._on_cpu(*args)
            return self.overload(*args)
        except RuntimeError as error:
            message = str(error)
            if not message.startswith(_ERROR_PREFIX):
                raise
            # The text may go on with torch's own remarks on the next line.
            message = message.removeprefix(_ERROR_PREFIX).partition("\n")[0]
            raise ValueError(message) from None

    def _on_cpu(self, *args: Any) -> Any:
        """Run the backend that is asked for on tensors that are not on a GPU."""
        if _forced == "cpu":
            return self.overload(*args)
        if _forced == "reference":
            return self.reference(*args)
        if _forced == "triton" and triton_is_interpreted():
            return self._run_kernel("triton", args)
        raise RuntimeError(
            f"backend {_forced!r} can't run emblas::{self.name} on device {args[0].device}"
        )

    def _on_gpu(self, *args: Any) -> Any:
        """Run the operator on CUDA tensors, called by torch's dispatcher."""
        # The dispatcher strips arguments that have their default values.
        args += tuple(a.default_value for a in self.overload._schema.arguments[len(args) :])
        if _DEBUG and self.check_values is not None:
            self.check_values(*args)
        if _forced == "reference":
            return self.reference(*args)
        if _forced != "auto":
            return self._run_kernel(_forced, args)
        for backend in _GPU_KERNELS:
            if self.serves(backend, *args):
                return self._run_kernel(backend, args)
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"no GPU kernel of emblas::{self.name} serves this call (`python -m emblas info` "
                "lists them): its reference in plain torch runs instead (correct, slower)",
                stacklevel=2,
            )
        return self.reference(*args)

    def _run_kernel(self, backend: str, args: Sequence[Any]) -> Any:
        kernel = self.kernel(backend)
        if kernel is None:
            raise RuntimeError(
                f"backend {backend!r} can't run emblas::{self.name} on device {args[0].device}: "
                "it has no such kernel here"
            )
        if not self.serves(backend, *args):
            raise RuntimeError(
                f"backend {backend!r} can't run this call of emblas::{self.name}: its kernel "
                "doesn't support these shapes, dtypes or options"
            )
        return kernel.run(*args[: kernel.arity])

    def kernel(self, backend: str) -> Kernel | None:
        """Return the kernel for GPUs in "cuda" (C++) or "triton"; None where there is none."""
        if backend == "cuda" and hasattr(torch.ops.emblas, f"{self.name}_cuda"):
            overload = getattr(torch.ops.emblas, f"{self.name}_cuda").default
            return Kernel(overload, len(overload._schema.arguments), self.cuda_supports)
        if backend == "triton" and self.triton is not None and has_triton():
            kernel: Kernel = getattr(importlib.import_module(self.triton), self.name)
            return kernel
        return None

    def serves(self, backend: str, *args: Any) -> bool:
        """Tell whether the kernel for GPUs in ``backend`` exists and serves a call."""
        kernel = self.kernel(backend)
        if kernel is None or (backend == "cuda" and not _built_for(args[0].device)):
            return False
        schema = self.overload._schema.arguments
        for value, argument in zip(args[kernel.arity :], schema[kernel.arity :], strict=False):
            if isinstance(value, Tensor) or value != argument.default_value:
                return False
        return kernel.supports is None or kernel.supports(*args[: kernel.arity])

    def backend(self, device: str) -> str | None:
        """Name the backend that a call on ``device`` ("cpu", "cuda") takes; None where none can.

        Calls on "cuda" that this backend doesn't support take the next one.
        """
        if device == "cpu":
            key = torch._C._dispatch_has_kernel_for_dispatch_key(f"emblas::{self.name}", "CPU")
            return "cpu" if key else None
        if device != "cuda":
            return None
        kernels = (backend for backend in _GPU_KERNELS if self.kernel(backend) is not None)
        return next(kernels, "reference")


@cache
def _built_for(device: torch.device) -> bool:
    """Tell whether the CUDA C++ kernels were compiled for a device's architecture."""
    if device.type != "cuda":
        return True  # tests put kernels for other devices in their place
    return runs_on(_C.build_info()["cuda_architectures"], torch.cuda.get_device_capability(device))


def ops() -> dict[str, Op]:
    """Return all operators by name."""
    return dict(_OPS)


def use_reference() -> bool:
    """Tell whether the caller has asked for the reference implementations."""
    return _forced == "reference"


def _why_not(backend: str) -> str | None:
    """Say why a backend for GPUs can't run anything here; None where it can."""
    if backend == "triton":
        if not has_triton():
            return "triton is not installed"
        if triton_is_interpreted():
            return None
    elif not any(op.kernel("cuda") for op in _OPS.values()):
        return "this installation has no CUDA C++ kernels"
    return None if torch.cuda.is_available() else "there is no usable GPU"


def force_backend(name: str) -> str:
    """Set the backend for the whole process and return the one before."""
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name in _GPU_KERNELS and (reason := _why_not(name)):
        raise RuntimeError(f"backend {name!r} can't run: {reason}")
    before, _forced = _forced, name
    return before


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force the backend of every emblas operator inside a ``with`` block.

    Parameters
    ----------
    name : {"auto", "cpu", "cuda", "triton", "reference"}
        "auto" chooses by device and call: on a GPU the CUDA C++ kernel if it was built and
        supports the call, else the Triton kernel, else the reference, with one warning per
        operator. "reference" runs the plain torch specification everywhere. The environment
        variable ``EMBLAS_BACKEND`` sets the same for a whole process.

    Raises
    ------
    ValueError
        If ``name`` is none of these.
    RuntimeError
        If that backend can't run here; operators raise it for calls that it can't serve.

    Notes
    -----
    The choice holds for the process, not for the thread. Code compiled by ``torch.compile`` is
    guarded on it. Operators don't wait for a GPU, so offsets on a GPU are not checked there: the
    environment variable ``EMBLAS_DEBUG=1`` has every call check them first, and wait.
    """
    before = force_backend(name)
    try:
        yield
    finally:
        force_backend(before)


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


def check_offsets(name: str, value: Tensor, total: int, items: str) -> None:
    """Raise what the CPU kernels raise for offsets that are no ``cu_seqlens``; waits for a GPU."""
    if value[0] != 0 or value[-1] != total or (value.diff() < 0).any():
        raise ValueError(f"{name} must start at 0, never decrease and end at the number of {items}")


def rows(tensor: Tensor) -> Tensor:
    """Return ``tensor`` with a contiguous last dimension; other strides are kept."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()
