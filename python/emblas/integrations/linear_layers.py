"""Linear layers of torch on emblas' kernel, where they compute what no gradient is wanted of.

Matrix libraries know the CPUs of their own makers best: on others, and those of AMD are the only
ones that this was measured on, :func:`emblas.linear.linear` is quicker. It packs the weights anew
in every call, so that nothing is stale when they have changed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from emblas import _op
from emblas._load import _C
from emblas.linear import linear

# With fewer rows, packing the weights takes as long as is gained.
LEAST_ROWS = 256
ISAS = ("avx512", "avx512_vpopcntdq")


def is_quicker() -> bool:
    """Tell whether the kernel is quicker on this CPU than torch's product."""
    return bool(_C.cpu_is_amd()) and _C.isa() in ISAS


def is_plain(layer: nn.Module) -> bool:
    """Tell whether a module is a linear layer of torch, without ways of its own to run."""
    return type(layer) is nn.Linear and "forward" not in vars(layer)


def forward(layer: Any, input: Tensor) -> Tensor:  # as torch calls it
    """Run a linear layer; with a gradient, autocast, few rows or other dtypes as torch does.

    Parameters
    ----------
    layer : torch.nn.Linear
        Whose ``forward`` is replaced by this.
    input : Tensor
        ``(..., in_features)``.

    Returns
    -------
    Tensor
        ``(..., out_features)``.
    """
    if not _serves(layer, input):
        out: Tensor = type(layer).forward(layer, input)
        return out
    rows = linear(input.reshape(-1, input.shape[-1]), layer.weight, layer.bias)
    return rows.view(*input.shape[:-1], rows.shape[-1])


def _serves(layer: Any, x: Tensor) -> bool:
    weight = layer.weight
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() >= LEAST_ROWS * x.shape[-1]
        and x.shape[-1] == weight.shape[1]
        and type(weight) is nn.Parameter
        and not _op.needs_grad(x, weight, layer.bias)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )
