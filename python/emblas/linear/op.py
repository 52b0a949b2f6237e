"""The linear layer as an operator: tracing and routing."""

from __future__ import annotations

from torch import Tensor

from emblas._op import Op
from emblas.linear import reference


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: int = 0,
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


linear = Op("linear", reference=reference.linear, fake=_fake)
