"""What the formulas of every family give."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Work:
    """What one launch of a kernel reads, writes and computes."""

    read: int
    written: int
    flops: int = 0  # additions and multiplications of float32
    tensor_flops: int = 0  # on tensor cores
    binary_flops: int = 0  # the same, of single bits
    popcounts: int = 0  # of 32 bits
    slack: int = 0  # bytes or population counts more that it may take, depending on the data
