"""What the GPU kernels have to move and compute, as formulas of shapes, and what that bounds.

Bytes are distinct bytes of global memory that a launch reads and writes. The tests hold them, the
products on tensor cores and the population counts to what the SIMT emulator and the checked
interpreter count (test_cost.py beside this file, tests/interpreted/test_cost.py). Other arithmetic
is counted by hand. The formulas of a family stand in costs/<family>.py: MODELS by operator and kind
of kernel, SMALL shapes for the emulators, LARGE ones to give bounds for. Run as a script, this
writes docs/gpu_bounds.md.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from costs import attention, binary, pooling, pooling_heads, pooling_vocab_sum, tables
from costs.work import Work

FILE = Path(__file__).parents[2] / "docs" / "gpu_bounds.md"
_FAMILIES = (pooling, pooling_heads, pooling_vocab_sum, tables, binary, attention)
MODELS = {key: model for family in _FAMILIES for key, model in family.MODELS.items()}
SMALL = {key: shapes for family in _FAMILIES for key, shapes in family.SMALL.items()}
LARGE = {key: shapes for family in _FAMILIES for key, shapes in family.LARGE.items()}


@dataclasses.dataclass(frozen=True)
class Device:
    """Public figures of a GPU."""

    name: str
    bandwidth: float  # bytes a second
    flops: float  # float32, a second
    tensor_flops: float  # of bfloat16, dense, a second
    binary_flops: float  # of single bits, a second; infinite where nothing is published
    popcounts: float  # a second: 16 a clock and multiprocessor (CUDA C++ Programming Guide)


# Data sheets of NVIDIA: A100 80GB SXM, H100 SXM, HGX B200 (one GPU).
DEVICES = (
    Device("A100", 2.039e12, 19.5e12, 312e12, 4992e12, 108 * 1.41e9 * 16),
    Device("H100", 3.35e12, 67e12, 989e12, math.inf, 132 * 1.98e9 * 16),
    Device("B200", 8.0e12, 75e12, 2250e12, math.inf, 148 * 1.965e9 * 16),
)

INTRODUCTION = """\
# What the GPU kernels can't be faster than

Written by `make gpu-table`; not by hand. **These are bounds on paper, not measurements**: what a
kernel has to move and compute (`tests/gpu/costs` has the formulas, which the emulators confirm on
small shapes), divided by the public figures of a GPU. A kernel that reaches its bound would use all
of the bandwidth or all of the arithmetic from its first to its last microsecond, without a launch;
none does. Arithmetic on integers other than population counts (hashing, sorting) is not in it.

Bytes are the distinct bytes that a launch reads and writes. What one kernel of an operator hands to
the next is small and may be found in the second-level cache, so the second may beat its bound.

| GPU | memory | float32 | bfloat16, tensor cores | population counts |
|---|---|---|---|---|
"""


def _limit(work: Work, device: Device) -> tuple[float, str]:
    """Return the least time in seconds, and what sets it."""
    return max(
        ((work.read + work.written) / device.bandwidth, "memory"),
        (work.flops / device.flops, "float32"),
        (work.tensor_flops / device.tensor_flops, "tensor cores"),
        (work.binary_flops / device.binary_flops, "tensor cores"),
        (work.popcounts / device.popcounts, "population counts"),
    )


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def page() -> str:
    """Lay out the bounds of all kernels."""
    lines = [INTRODUCTION.rstrip("\n")]
    lines += [
        f"| {d.name} | {d.bandwidth / 1e12:.3g} TB/s | {d.flops / 1e12:.3g} T/s "
        f"| {d.tensor_flops / 1e12:,.0f} T/s | {d.popcounts / 1e12:.2g} T/s |"
        for d in DEVICES
    ]
    lines += [
        "",
        f"| operator, call | kernel | MB read | MB written | G flop | "
        f"{' | '.join(f'{d.name}, us' for d in DEVICES)} | limit (H100) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (operator, backend), model in MODELS.items():
        for shape in LARGE[operator]:
            for kernel, work in model(shape).items():
                times = [_number(1e6 * _limit(work, device)[0]) for device in DEVICES]
                cells = (
                    f"{operator}: {shape}",
                    f"{backend} `{kernel}`",
                    _number(work.read / 1e6),
                    _number(work.written / 1e6),
                    _number((work.flops + work.tensor_flops + work.binary_flops) / 1e9),
                    *times,
                    _limit(work, DEVICES[1])[1],
                )
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FILE.write_text(page())
