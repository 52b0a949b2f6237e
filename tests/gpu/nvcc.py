"""Compile the CUDA C++ kernels for GPUs that aren't there.

By the nvcc that pip installed (the table of docs/gpu_kernels.md is its work), else by the one on
the PATH.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from sass import Binary

ROOT = Path(__file__).parents[2]
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)


@functools.cache
def nvcc() -> str | None:
    """Return the compiler; None where there is none."""
    installed = Path(sysconfig.get_path("purelib"), "nvidia", "cu13", "bin", "nvcc")
    return str(installed) if installed.exists() else shutil.which("nvcc")


def compile_cubin(source: Path, architecture: int, *options: str) -> bytes:
    """Compile with the options of the build; warnings are errors."""
    compiler = nvcc()
    assert compiler is not None
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "cubin")
        command = [
            compiler, "-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", *options,
            "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra",
            f"-arch=sm_{architecture}", "-cubin", "-o", str(binary), str(source),
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(result.stdout + result.stderr)
        return binary.read_bytes()


def binaries(architecture: int) -> list[Binary]:
    """Compile the kernels of all families for sm_<architecture>."""
    sources = sorted((ROOT / "csrc").glob("*/*_cuda.cu"))
    return [
        Binary(source.stem.removesuffix("_cuda"), "", compile_cubin(source, architecture))
        for source in sources
    ]
