"""Loading the native library: torch first, whose symbols it needs, then the instruction set."""

from __future__ import annotations

import os

import torch  # noqa: F401  (loads libtorch_cpu, which _C binds to)

try:
    from emblas import _C
except ImportError as error:
    raise ImportError(
        "emblas was installed without its native library, or for another Python or platform "
        f"({error}); reinstall it beside torch >= 2.10 with "
        "`pip install --no-build-isolation emblas`"
    ) from error

if isa := os.environ.get("EMBLAS_ISA"):
    try:
        _C.set_isa(isa)
    except ValueError as error:
        raise ImportError(f"EMBLAS_ISA: {error}") from None

__all__ = ["_C"]
