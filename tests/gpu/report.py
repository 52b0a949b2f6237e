"""What every GPU kernel needs on every architecture, read off its binary.

Run as a script, it writes docs/gpu_kernels.md.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import nvcc
import sass
import triton_kernels

FILE = Path(__file__).parents[2] / "docs" / "gpu_kernels.md"
# Where the binaries of each section come from, and the architectures that they are made for.
SOURCES: dict[str, Callable[[int], list[sass.Binary]]] = {
    "CUDA C++": nvcc.binaries,
    "Triton": triton_kernels.binaries,
}
ARCHITECTURES = {"CUDA C++": nvcc.ARCHITECTURES, "Triton": (80, 90, 100, 120)}

INTRODUCTION = """\
# What the GPU kernels need

Written by `make gpu-table`; not by hand. No GPU was involved: the figures are read off the binaries
that the compilers make for each architecture (`tests/gpu`). Nothing here is a measurement of time.

- **registers** for each thread; **local**: bytes of local memory for each thread, which hold what
  the registers can't (should be 0); **shared**: bytes of shared memory for each block.
- **warps**: how many a multiprocessor can hold at once, limited by registers, shared memory and
  blocks; **occupancy**: their share of the possible.
- **16-byte loads**: share of the load instructions from global memory that move 16 bytes or more
  for each thread, of those in the binary (not of those executed).
- **tensor cores**: instructions for them in the binary.

`tests/gpu/test_compiled.py` holds the kernels to a floor of warps and to no local memory, and lists
the exceptions with their reasons.
"""


@dataclasses.dataclass(frozen=True)
class Row:
    """What one kernel needs on one architecture."""

    section: str
    architecture: int
    operator: str
    kernel: str
    variant: str
    registers: int
    local: int
    shared: int
    warps: int
    wide_loads: float | None
    tensor_cores: int

    def __str__(self) -> str:
        possible = sass.ARCHITECTURES[self.architecture].warps
        wide = "-" if self.wide_loads is None else f"{self.wide_loads:.0%}"
        cells = (
            self.operator, f"`{self.kernel}`", self.variant, self.registers, self.local,
            self.shared, self.warps, f"{self.warps / possible:.0%}", wide, self.tensor_cores or "-",
        )  # fmt: skip
        return f"| {' | '.join(map(str, cells))} |"


def rows(section: str, architecture: int) -> list[Row]:
    """Compile the kernels of a section and read their binaries."""
    found = [
        Row(
            section,
            architecture,
            binary.operator,
            kernel.name,
            ", ".join(filter(None, (binary.variant, kernel.variant))),
            kernel.registers,
            kernel.local,
            kernel.static_shared + binary.dynamic_shared,
            kernel.warps_resident(architecture, binary.dynamic_shared),
            kernel.wide_loads,
            kernel.tensor_core_instructions,
        )
        for binary in SOURCES[section](architecture)
        for kernel in sass.read(binary.cubin, architecture)
    ]
    if section == "CUDA C++":
        return sorted(found, key=lambda row: (row.operator, row.kernel, row.variant))
    return sorted(found, key=lambda row: (row.operator, row.kernel))  # else as called


def all_rows(architectures: Iterable[int]) -> list[Row]:
    """Compile everything, one process for each section and architecture."""
    jobs = [
        (section, a) for section in SOURCES for a in architectures if a in ARCHITECTURES[section]
    ]
    # Not by fork: torch has threads by now.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1), context) as pool:
        return [row for found in pool.map(rows, *zip(*jobs, strict=True)) for row in found]


def table(section: str, architecture: int, found: Iterable[Row]) -> str:
    """Lay out the rows of one section and architecture."""
    lines = [
        f"## {section}, sm_{architecture}",
        "",
        "| operator | kernel | call | registers | local | shared | warps | occupancy "
        "| 16-byte loads | tensor cores |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [str(r) for r in found if (r.section, r.architecture) == (section, architecture)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the file."""
    found = all_rows(nvcc.ARCHITECTURES)
    tables = [table(section, a, found) for section in SOURCES for a in ARCHITECTURES[section]]
    FILE.write_text("\n".join([INTRODUCTION, *tables]))


if __name__ == "__main__":
    main()
