"""Every way to run an operator in this process, by name. One test body runs them all.

An executor takes the operator's arguments, tensors on the CPU, and returns its results there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from emblas import _op, use_backend
from emblas._load import _C
from torch.utils._pytree import tree_map_only

Executor = Callable[..., Any]


def executors(name: str) -> dict[str, Executor]:
    """Return the executors of ``emblas::<name>``."""
    op = _op.ops()[name]
    if _op.triton_is_interpreted():
        return {"triton-interpreted": _interpreted(op)} if op.kernel("triton") else {}
    found: dict[str, Executor] = {"reference": op.reference}
    for isa in _C.supported_isas():
        found[f"cpu:{isa}"] = _cpu(op, isa)
    if torch.cuda.is_available():
        for backend in ("cuda", "triton"):
            if op.kernel(backend):
                found[backend] = _gpu(op, backend)
    return found


def _cpu(op: _op.Op, isa: str) -> Executor:
    def run(*args: Any) -> Any:
        before = _C.isa()
        _C.set_isa(isa)
        try:
            return op.overload(*args)
        finally:
            _C.set_isa(before)

    return run


def _interpreted(op: _op.Op) -> Executor:
    from triton_check import checked_interpreter

    seeds = itertools.count()

    def run(*args: Any) -> Any:
        with checked_interpreter(next(seeds)), use_backend("triton"):
            return op(*args)

    return run


def _gpu(op: _op.Op, backend: str) -> Executor:
    def run(*args: Any) -> Any:
        with use_backend(backend):
            results = op(*tree_map_only(torch.Tensor, lambda tensor: tensor.cuda(), args))
        return tree_map_only(torch.Tensor, lambda tensor: tensor.cpu(), results)

    return run
