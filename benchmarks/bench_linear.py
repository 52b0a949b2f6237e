"""Linear layers of encoders, beside torch's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from emblas.linear import linear
from torch import Tensor
from torch.nn import functional

# Columns and depth: the projections and the feed-forward network of MiniLM and of BERT base.
WEIGHTS = [(384, 384), (1536, 384), (384, 1536), (3072, 768), (768, 3072)]


def _gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.gelu(functional.linear(x, weight, bias))


# What follows on the product, and a layer's two ways to say it.
LAYERS: dict[str, dict[str, Callable[..., Tensor]]] = {
    "linear": {"emblas": linear, "torch": functional.linear},
    "linear and GELU": {"emblas": partial(linear, activation="gelu"), "torch": _gelu},
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("who", ["emblas", "torch"])
@pytest.mark.parametrize("rows", [64, 2048])
@pytest.mark.parametrize("weight", WEIGHTS, ids=lambda shape: "x".join(map(str, shape)))
def bench_linear(row: Any, weight: tuple[int, int], rows: int, who: str, layer: str) -> None:
    columns, depth = weight
    row(
        "linear", layer, who, shape=f"{rows} x {depth}, {columns} columns", dtype="float32",
        call=LAYERS[layer][who],
        inputs=[(torch.randn(rows, depth), torch.randn(columns, depth), torch.randn(columns))],
        flops=2 * rows * columns * depth,
    )  # fmt: skip
