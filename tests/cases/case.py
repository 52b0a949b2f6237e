"""What the calls of all families have in common."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from contract import layouts
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class Case:
    args: tuple[Any, ...]
    length: int = 1  # of the longest sum
    changed: tuple[int, ...] = ()  # places of arguments that are changed, which are the results
    counted: bool = False  # the last result says how many rows of the others mean something


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def unaligned(x: Tensor) -> Tensor:
    return layouts(x)["wide rows, unaligned"]
