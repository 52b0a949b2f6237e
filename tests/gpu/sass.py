"""What a GPU binary says about itself: registers, spills, shared memory, occupancy, instructions.

Read with the tools that the triton wheel brings along, so no CUDA toolkit is needed. The binaries
may come from triton or from nvcc.
"""

from __future__ import annotations

import dataclasses
import math
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Limits of one multiprocessor (CUDA C++ Programming Guide, compute capabilities)."""

    warps: int
    blocks: int
    shared: int  # bytes
    shared_per_block: int


_KIB = 1024
ARCHITECTURES = {
    75: Architecture(32, 16, 64 * _KIB, 64 * _KIB),
    80: Architecture(64, 32, 164 * _KIB, 163 * _KIB),
    86: Architecture(48, 16, 100 * _KIB, 99 * _KIB),
    89: Architecture(48, 24, 100 * _KIB, 99 * _KIB),
    90: Architecture(64, 32, 228 * _KIB, 227 * _KIB),
    100: Architecture(64, 32, 228 * _KIB, 227 * _KIB),
    120: Architecture(48, 24, 100 * _KIB, 99 * _KIB),
}
_REGISTERS = 65536
_RESERVED = 1024  # bytes of shared memory that the system takes of every block, from sm_80 on

_INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE
)
_USAGE = re.compile(r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_THREADS = re.compile(
    r"^\.nv\.info\.(\S+)$(?:(?!^\.nv).)*?EIATTR_(?:MAX_THREADS|REQNTID)\s+Format:\s+\S+\s+"
    r"Value:\s+(0x\w+) (0x\w+) (0x\w+)",
    re.MULTILINE | re.DOTALL,
)
_TENSOR_CORES = ("HMMA", "IMMA", "BMMA", "DMMA", "QMMA", "OMMA", "HGMMA", "IGMMA", "QGMMA", "BGMMA")


@dataclasses.dataclass(frozen=True)
class Binary:
    """What a compiler made of the kernels of an operator, and how they are launched."""

    operator: str
    variant: str  # the call, in words; empty where the names of the kernels tell
    cubin: bytes
    dynamic_shared: int = 0  # bytes


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One function of a binary."""

    name: str
    variant: str  # template arguments
    warps: int  # of a block
    registers: int
    local: int  # bytes of stack and local memory for each thread
    static_shared: int  # bytes, without what the system takes
    instructions: Counter[str]

    def count(self, *prefixes: str) -> int:
        """Count the instructions whose names start so."""
        return sum(n for name, n in self.instructions.items() if name.startswith(prefixes))

    @property
    def spills(self) -> int:
        """Instructions that touch local memory."""
        return self.count("LDL", "STL")

    @property
    def wide_loads(self) -> float | None:
        """Share of the loads from global memory that move 16 bytes or more for each thread."""
        loads = {n: c for n, c in self.instructions.items() if n.startswith(("LDG", "UTMALDG"))}
        wide = (c for n, c in loads.items() if re.search(r"\.(128|256)\b|UTMA", n))
        return sum(wide) / sum(loads.values()) if loads else None

    @property
    def tensor_core_instructions(self) -> int:
        """Instructions that multiply matrices."""
        blackwell = sum(n for name, n in self.instructions.items() if re.match(r"UTC\w*MMA", name))
        return self.count(*_TENSOR_CORES) + blackwell

    def warps_resident(self, architecture: int, dynamic_shared: int = 0) -> int:
        """Warps that a multiprocessor can hold at once."""
        warps = self.warps
        limits = ARCHITECTURES[architecture]
        registers_per_warp = -(-self.registers * 32 // 256) * 256
        by_registers = _REGISTERS // max(registers_per_warp, 256) // 4 * 4 // warps
        reserved = _RESERVED if architecture >= 80 else 0
        shared = -(-(dynamic_shared + self.static_shared + reserved) // 128) * 128
        by_shared = limits.shared // shared if shared else limits.blocks
        return min(limits.blocks, limits.warps // warps, by_registers, by_shared) * warps


def _run(tool: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def _demangled(name: str) -> tuple[str, str]:
    """Return a kernel's name and its template arguments, without namespaces."""
    found = subprocess.run(["c++filt", "-p", name], check=True, capture_output=True, text=True)
    plain = re.sub(r"\w+::", "", found.stdout.strip())
    short, _, arguments = plain.partition("<")
    return short, arguments.removesuffix(">")


def read(cubin: bytes, architecture: int) -> list[Kernel]:
    """Return the kernels of a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        listing = _run("nvdisasm", "-c", file.name)
        sections = _run("cuobjdump", "-elf", file.name)
    threads = {
        name: math.prod(int(size, 16) for size in sizes)
        for name, *sizes in _THREADS.findall(sections)
    }
    bodies = re.split(r"^\.text\.([^\s:]+):", listing, flags=re.MULTILINE)
    code = dict(zip(bodies[1::2], bodies[2::2], strict=True))
    kernels = []
    for name, registers, stack, shared, local in _USAGE.findall(" ".join(usage.split())):
        # From sm_90 on the figure holds what the system takes.
        static = int(shared) - (_RESERVED if architecture >= 90 else 0)
        instructions = Counter(_INSTRUCTION.findall(code[name]))
        short, variant = _demangled(name)
        kernels.append(
            Kernel(
                short,
                variant,
                threads[name] // 32,
                int(registers),
                int(stack) + int(local),
                max(static, 0),
                instructions,
            )
        )
    return kernels
