"""Loading the native libraries: torch first, whose symbols they need, then the instruction set."""

from __future__ import annotations

import os
from pathlib import Path

import torch

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


def why_no_cuda_kernels(toolkit: str, torch_cuda: str | None) -> str | None:
    """Say why the CUDA C++ kernels can't be loaded; None if they can.

    Parameters
    ----------
    toolkit : str
        Version of the CUDA toolkit that built them, empty if they were not built.
    torch_cuda : str or None
        ``torch.version.cuda``.
    """
    if not toolkit:
        return "emblas was built without CUDA C++ kernels"
    if torch_cuda is None:
        return "torch is a CPU build"
    if toolkit.partition(".")[0] != torch_cuda.partition(".")[0]:
        return f"the kernels were built with CUDA {toolkit}, torch with CUDA {torch_cuda}"
    return None


def runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    """Tell whether a GPU can run what was compiled for these architectures.

    Machine code runs on its own generation, from its own capability on; PTX on all that is newer.

    Parameters
    ----------
    architectures : str
        In CMake's notation: ``80-real`` is machine code, ``80-virtual`` PTX, ``80`` both.
    capability : tuple of int
        Compute capability of the GPU.
    """
    for architecture in architectures.split():
        number, _, kind = architecture.partition("-")
        built = divmod(int(number), 10)
        if kind != "virtual" and built[0] == capability[0] and built <= capability:
            return True
        if kind != "real" and built <= capability:
            return True
    return False


NO_CUDA_KERNELS = why_no_cuda_kernels(_C.build_info()["cuda"], torch.version.cuda)
if NO_CUDA_KERNELS is None:
    torch.ops.load_library(Path(__file__).with_name("_cuda.so"))  # registers emblas::<op>_cuda

__all__ = ["NO_CUDA_KERNELS", "_C", "runs_on"]
