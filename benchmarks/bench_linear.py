"""Linear layers of encoders, beside torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emblas.linear import linear

# Columns and depth: the projections and the feed-forward network of MiniLM and of BERT base.
WEIGHTS = [(384, 384), (1536, 384), (384, 1536), (3072, 768), (768, 3072)]


@pytest.mark.parametrize("who", ["emblas", "torch"])
@pytest.mark.parametrize("rows", [64, 2048])
@pytest.mark.parametrize("weight", WEIGHTS, ids=lambda shape: "x".join(map(str, shape)))
def bench_linear(row: Any, weight: tuple[int, int], rows: int, who: str) -> None:
    columns, depth = weight
    row(
        "linear", "linear", who, shape=f"{rows} x {depth}, {columns} columns", dtype="float32",
        call=linear if who == "emblas" else torch.nn.functional.linear,
        inputs=[(torch.randn(rows, depth), torch.randn(columns, depth), torch.randn(columns))],
        flops=2 * rows * columns * depth,
    )  # fmt: skip
