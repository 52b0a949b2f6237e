"""The emulated build of the CUDA C++ kernels, from Python. See README.md beside this file."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import platform
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
ORDERS = ("forward", "reverse", "random")


def why_not() -> str | None:
    """Say what this machine lacks for the emulator."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "the SIMT emulator switches fibers by x86-64 assembly for Linux"
    for tool in ("g++", "cmake", "ninja"):
        if _tool(tool) is None:
            return f"the SIMT emulator is built with {tool}"
    return None


def _tool(name: str) -> str | None:
    # Tools that pip installed stand beside the interpreter, which need not be on the PATH.
    places = (str(Path(sys.executable).parent), sys.prefix + "/bin", os.environ.get("PATH", ""))
    return shutil.which(name, path=os.pathsep.join(places))


def build(folder: Path, csrc: Path = ROOT / "csrc") -> Path:
    """Build the library from the kernels in ``csrc``; incremental, one process at a time.

    Another ``csrc``, say a mutated copy, may draw warnings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        commands = (
            [_tool("cmake"), "-S", ROOT / "tests" / "simt", "-B", folder, "-G", "Ninja",
             f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}", "-DCMAKE_CXX_COMPILER=g++",
             f"-DEMBLAS_CSRC={csrc}",
             f"-DCMAKE_COMPILE_WARNING_AS_ERROR={'ON' if csrc == ROOT / 'csrc' else 'OFF'}",
             f"-DEMBLAS_TORCH={Path(torch.__file__).parent}"],
            [_tool("cmake"), "--build", folder],
        )  # fmt: skip
        for command in commands:
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                raise RuntimeError(f"{result.stdout}\n{result.stderr}")
    return folder / "simt.so"


@functools.cache
def library() -> ctypes.CDLL:
    """Build and load; registers ``torch.ops.emblas_simt.<op>_cuda`` for CPU tensors.

    EMBLAS_SIMT_LIBRARY names a library to take instead, say one built from mutated kernels.
    """
    path = os.environ.get("EMBLAS_SIMT_LIBRARY") or build(ROOT / "build" / "simt")
    torch.ops.load_library(path)
    loaded = ctypes.CDLL(str(path))
    loaded.simt_take_launch.restype = ctypes.c_bool
    loaded.simt_configure.argtypes = [
        ctypes.c_int,
        ctypes.c_uint64,
        ctypes.c_double,
        ctypes.c_bool,
        ctypes.c_bool,
    ]
    return loaded


@contextmanager
def schedule(
    order: str = "forward",
    seed: int = 0,
    preemption: float = 0.0,
    *,
    check_uninitialized: bool = True,
    check_races: bool = True,
) -> Iterator[None]:
    """Run the blocks of a grid and the threads of a block in this order.

    ``random`` shuffles them by ``seed``; with ``preemption`` a thread is also interrupted at an
    access with that probability. Without a check, reads of unwritten memory or races pass: for
    kernels on arguments that break their contract, which must stay in bounds all the same.
    """
    configure = library().simt_configure
    configure(ORDERS.index(order), seed, preemption, check_uninitialized, check_races)
    try:
        yield
    finally:
        configure(0, 0, 0.0, True, True)


def take_launches() -> list[tuple[str, dict[str, int]]]:
    """Kernels launched since the last call (the last 1000), and what each moved and computed.

    In bytes asked for; ``distinct_*`` count a byte of global memory once in a launch: what has to
    move at least. ``popcounts`` are of 32 bits.
    """
    counts = (ctypes.c_uint64 * 8)()
    name = ctypes.create_string_buffer(1024)
    names = ("global_read", "global_write", "shared_read", "shared_write",
             "distinct_read", "distinct_write", "popcounts", "tensor_flops")  # fmt: skip
    launches = []
    while library().simt_take_launch(name, ctypes.c_size_t(len(name)), counts):
        launches.append((name.value.decode(), dict(zip(names, counts, strict=True))))
    return launches


def take_traffic() -> dict[str, int]:
    """Sum :func:`take_launches` over the launches."""
    total: Counter[str] = Counter()
    for _, counts in take_launches():
        total.update(counts)
    return total


def run_case(
    name: str,
    values: np.ndarray,
    results: int,
    *,
    broken: bool = False,
    n: int | None = None,
    block: int = 0,
    dynamic_shared_bytes: int = 0,
    grid_y: int = 1,
) -> np.ndarray:
    """Run a kernel of ``cases.cuh``; RuntimeError with the emulator's message where it faults."""
    values = np.ascontiguousarray(values, np.float32)
    out = np.full(results, np.nan, np.float32)
    message = ctypes.create_string_buffer(4096)
    library().simt_run_case(
        name.encode(), ctypes.c_bool(broken),
        values.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(values.size),
        out.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(out.size),
        ctypes.c_int(values.size if n is None else n), ctypes.c_uint(block),
        ctypes.c_size_t(dynamic_shared_bytes), ctypes.c_uint(grid_y),
        message, ctypes.c_size_t(len(message)),
    )  # fmt: skip
    if message.value:
        raise RuntimeError(message.value.decode())
    return out
