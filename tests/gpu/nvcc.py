"""Compile the CUDA C++ kernels for GPUs that aren't there.

By the nvcc that pip installed (the table of docs/gpu_kernels.md is its work), else by the one on
the PATH.
"""

from __future__ import annotations

import functools
import hashlib
import re
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


def _included(source: Path) -> set[Path]:
    """Return a source and the files of ours that it includes, directly or not."""
    found, waiting = set[Path](), [source]
    while waiting:
        file = waiting.pop()
        if file not in found and file.exists():
            found.add(file)
            names = re.findall(r'^#include "(.+)"', file.read_text(), re.MULTILINE)
            waiting += [ROOT / "csrc" / name for name in names]
    return found


def compile_cubin(source: Path, architecture: int, *options: str) -> bytes:
    """Compile with the options of the build, once; warnings are errors."""
    compiler = nvcc()
    assert compiler is not None
    command = [
        compiler, "-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", *options,
        "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra",
        f"-arch=sm_{architecture}", "-cubin", str(source),
    ]  # fmt: skip
    facts = options, architecture, compiler, Path(compiler).stat().st_mtime
    key = hashlib.sha256(repr(facts).encode())
    for file in sorted(_included(source)):
        key.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    binary = ROOT / "build" / "cubins" / key.hexdigest()
    if not binary.exists():
        binary.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=binary.parent) as folder:
            new = Path(folder, "cubin")
            command += ["-o", str(new)]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                raise RuntimeError(result.stdout + result.stderr)
            new.replace(binary)
    return binary.read_bytes()


def binaries(architecture: int) -> list[Binary]:
    """Compile the kernels of all families for sm_<architecture>."""
    sources = sorted((ROOT / "csrc").glob("*/*_cuda.cu"))
    return [
        Binary(source.stem.removesuffix("_cuda"), "", compile_cubin(source, architecture))
        for source in sources
    ]
