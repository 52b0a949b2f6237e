"""Rows of an index that were added together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emblas.binary import storage


@dataclass
class Segment:
    """Rows added together; arrays of a file are checked when they are first asked for."""

    live: Tensor  # bool [rows]
    arrays: dict[str, Tensor] | None = None
    shard: storage.Shard | None = None
    entry: dict[str, Any] | None = None  # of the manifest, once saved
    folder: Path | None = None
    first: int = 0  # row of the arrays that is the first of these

    def tensor(self, name: str, rows: Tensor | None = None) -> Tensor:
        """Return an array, of which at least these rows have been checked."""
        end = self.first + len(self.live)
        if self.arrays is not None:
            return self.arrays[name][self.first : end]
        assert self.shard is not None
        used = slice(self.first, end) if rows is None else (rows.unique() + self.first).numpy()
        return torch.from_numpy(self.shard.array(name, used)[self.first : end])

    def part(self, start: int, stop: int) -> Segment:
        """Return some of the rows, without copying them."""
        return Segment(
            self.live[start:stop].clone(), self.arrays, self.shard, first=self.first + start
        )
