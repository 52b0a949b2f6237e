"""One test body, many executors: the implementations of an operator that can run on this machine.

A test file asks for them by a fixture::

    executor = executors.fixture("segment_pool", "segment_pool_backward")

    def test_equals_oracle(executor, ...):
        actual = segment_pool(...)      # the public function, served by one executor after another

Each executor is a context manager over operator names that makes the public functions run on one
implementation, registered in EXECUTORS by name. What an operator has no kernel for is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from emblas import _op
from emblas._load import _C
from simt import emulator


@contextmanager
def _reference(names: tuple[str, ...]) -> Iterator[None]:
    with _op.use_backend("reference"):
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
    with replaced({name: getattr(torch.ops.emblas_simt, f"{name}_cuda").default for name in names}):
        yield


EXECUTORS: dict[str, Callable[[tuple[str, ...]], Any]] = {
    "reference": _reference,
    **{f"cpu:{isa}": partial(_cpu, isa) for isa in _C.compiled_isas()},
    "simt": _simt,
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
