"""The specification of the linear layer in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.nn import functional

# In the order of csrc/linear/linear.h.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "silu": functional.silu,
}


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: int = 0,
) -> Tensor:
    """``f(x weight^T + bias) + residual``."""
    function = list(ACTIVATIONS.values())[activation]
    out = function(functional.linear(x, weight, bias))
    return out if residual is None else out + residual
