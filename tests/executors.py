"""One test body, many executors: every way to run an operator in this process, by name.

An executor is a context manager over names of operators, which makes their public functions run on
one implementation. A test file asks for them by a fixture::

    executor = executors.fixture("segment_pool", "segment_pool_backward")

    def test_equals_oracle(executor, ...):
        actual = segment_pool(...)      # served by one executor after another

and test_executors.py calls the operators themselves, see :func:`executors`. Triton reads
TRITON_INTERPRET when it is imported: the interpreted kernels run in a process of their own
(test_interpreted.py), which has no other executor.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from emblas import _op, use_backend
from emblas._load import _C
from simt import emulator
from torch.utils._pytree import tree_map_only


@contextmanager
def _reference(names: tuple[str, ...]) -> Iterator[None]:
    with use_backend("reference"):
        yield


@contextmanager
def _cpu(isa: str, names: tuple[str, ...]) -> Iterator[None]:
    if isa not in _C.supported_isas():
        pytest.skip(f"this CPU can't run {isa}; tests/native emulates it")
    before = _C.isa()
    _C.set_isa(isa)
    try:
        yield
    finally:
        _C.set_isa(before)


@contextmanager
def replaced(overloads: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Let the named operators call these functions in place of their CPU kernels."""
    ops = _op.ops()
    before = {name: ops[name].overload for name in overloads}
    try:
        for name, overload in overloads.items():
            ops[name].overload = overload
        yield
    finally:
        for name, overload in before.items():
            ops[name].overload = overload


@contextmanager
def _simt(names: tuple[str, ...]) -> Iterator[None]:
    """The CUDA C++ kernels and their torch adapters, in the emulator."""
    if reason := emulator.why_not():
        pytest.skip(reason)
    emulator.library()
    with replaced({name: _emulated(_op.ops()[name]) for name in names}):
        yield


def _emulated(op: _op.Op) -> Callable[..., Any]:
    """The emulated kernel of an operator, which may have gained arguments that it doesn't know."""
    overload = getattr(torch.ops.emblas_simt, f"{op.name}_cuda").default
    arity = len(overload._schema.arguments)
    later = op.overload._schema.arguments[arity:]

    def run(*args: Any) -> Any:
        for value, argument in zip(args[arity:], later, strict=False):
            assert not isinstance(value, torch.Tensor), argument.name
            assert value == argument.default_value, argument.name
        return overload(*args[:arity])

    return run


@contextmanager
def _interpreted(names: tuple[str, ...]) -> Iterator[None]:
    """The Triton kernels in the checked interpreter, their programs in another order each test."""
    from triton_check import checked_interpreter

    seed = zlib.crc32(os.environ.get("PYTEST_CURRENT_TEST", "").encode())
    with checked_interpreter(seed), use_backend("triton"):
        yield


@contextmanager
def _gpu(backend: str, names: tuple[str, ...]) -> Iterator[None]:
    """The kernels of one backend on a real GPU: tensors go there and come back."""

    def run(overload: Callable[..., Any], *args: Any) -> Any:
        there = tree_map_only(torch.Tensor, lambda tensor: tensor.cuda(), args)
        with use_backend(backend):
            results = overload(*there)
        for argument, own, other in zip(overload._schema.arguments, args, there, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                own.copy_(other)
        return tree_map_only(torch.Tensor, lambda tensor: tensor.cpu(), results)

    with replaced({name: partial(run, _op.ops()[name].overload) for name in names}):
        yield


def _executors() -> dict[str, Callable[[tuple[str, ...]], Any]]:
    if _op.triton_is_interpreted():
        return {"triton-interpreted": _interpreted}
    found: dict[str, Callable[[tuple[str, ...]], Any]] = {
        "reference": _reference,
        **{f"cpu:{isa}": partial(_cpu, isa) for isa in _C.compiled_isas()},
        "simt": _simt,
    }
    if torch.cuda.is_available():
        found |= {backend: partial(_gpu, backend) for backend in ("cuda", "triton")}
    return found


EXECUTORS = _executors()


def _has_kernel(name: str, executor: str) -> bool:
    if executor == "simt":
        if emulator.why_not():
            return False
        emulator.library()
        return hasattr(torch.ops.emblas_simt, f"{name}_cuda")
    if executor.startswith("cpu:"):
        return executor.removeprefix("cpu:") in _C.supported_isas()
    backend = executor.removesuffix("-interpreted")
    return backend == "reference" or _op.ops()[name].kernel(backend) is not None


def executors(name: str) -> dict[str, Callable[..., Any]]:
    """Return the executors of ``emblas::<name>`` as functions of its arguments, CPU tensors."""

    def run(executor: str, *args: Any) -> Any:
        with EXECUTORS[executor]((name,)):
            return _op.ops()[name](*args)

    return {
        executor: partial(run, executor) for executor in EXECUTORS if _has_kernel(name, executor)
    }


def fixture(*names: str, without: tuple[str, ...] = ()) -> Any:
    """Return a fixture that runs a test on each executor of the operators ``names``.

    ``without`` leaves out executors for which these operators have no kernel.
    """

    @pytest.fixture(params=[name for name in EXECUTORS if name not in without])
    def executor(request: pytest.FixtureRequest) -> Iterator[str]:
        with EXECUTORS[request.param](names):
            yield request.param

    return executor
