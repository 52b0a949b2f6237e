"""Linear layers of torch on emblas' kernel, where they compute what no gradient is wanted of.

:func:`emblas.linear.linear` does what follows on a product as long as the sums are at hand: the
activation between the two products of a layer, and the residual connection. It packs the weights
anew in every call, so that nothing is stale when they have changed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from emblas import _op
from emblas._load import _C
from emblas.integrations import versions
from emblas.linear import linear

try:
    from transformers.activations import GELUActivation, GELUTanh, SiLUActivation
except ImportError as error:
    raise versions.import_error(__name__, "transformers", error) from error

# With fewer rows, packing the weights takes as long as is gained.
LEAST_ROWS = 256
# The same where torch's products are the quicker ones: then only what lies between the two products
# of a layer is saved, once it is so much that torch takes new memory for it in every call.
LEAST_ROWS_BETWEEN = 1024


def is_wide() -> bool:
    """Tell whether the kernel has vectors of 512 bits, without which it was not measured."""
    return _C.isa() in ("avx512", "avx512_vpopcntdq")


def is_quicker() -> bool:
    """Tell whether products of the kernel are quicker on this CPU than those of torch.

    Matrix libraries know the CPUs of their own makers best; others than those of AMD were not
    measured.
    """
    return bool(_C.cpu_is_amd())


# Modules that are one of the kernel's activations.
ACTIVATIONS: dict[type, str] = {
    nn.ReLU: "relu",
    nn.GELU: "gelu",
    GELUActivation: "gelu",
    GELUTanh: "gelu_tanh",
    nn.SiLU: "silu",
    SiLUActivation: "silu",
}


def forward_of(module: nn.Module) -> Callable[..., Tensor] | None:
    """Return the function that replaces the ``forward`` of a module, if one is quicker.

    Parameters
    ----------
    module : Module
        A linear layer, or one of the two blocks of BERT and its descendants around them: linear and
        activation, or linear, dropout, residual connection and layer normalization.
    """
    if "forward" in vars(module) or not is_wide():
        return None
    everywhere = is_quicker()
    if type(module) is nn.Linear:
        return forward if everywhere else None
    children = dict(module.named_children())
    if not type(module).__module__.startswith("transformers.models."):
        return None  # which may have these parts and do something else
    if not _is_plain(children.get("dense")):
        return None
    takes = [*inspect.signature(module.forward).parameters]
    if children.keys() == {"dense", "intermediate_act_fn"} and takes == ["hidden_states"]:
        return _activated if type(children["intermediate_act_fn"]) in ACTIVATIONS else None
    if children.keys() == {"dense", "dropout", "LayerNorm"}:
        added = everywhere and takes == ["hidden_states", "input_tensor"]
        return _added if added and type(children["LayerNorm"]) is nn.LayerNorm else None
    return None


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
    return _linear(layer, input)


def _activated(block: Any, hidden_states: Tensor) -> Tensor:
    """``BertIntermediate`` and its like."""
    activation = ACTIVATIONS.get(type(block.intermediate_act_fn))
    if (
        activation is None
        or _has_hooks(block.intermediate_act_fn)
        or not _serves(block.dense, hidden_states)
    ):
        out: Tensor = type(block).forward(block, hidden_states)
        return out
    return _linear(block.dense, hidden_states, activation)


def _added(block: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
    """``BertSelfOutput``, ``BertOutput`` and their like."""
    if (
        (block.dropout.training and block.dropout.p > 0)
        or _has_hooks(block.dropout)
        or not _serves(block.dense, hidden_states)
        or input_tensor.shape != (*hidden_states.shape[:-1], block.dense.out_features)
        or input_tensor.dtype != hidden_states.dtype
        or _op.needs_grad(input_tensor)
    ):
        out: Tensor = type(block).forward(block, hidden_states, input_tensor)
        return out
    out = block.LayerNorm(_linear(block.dense, hidden_states, residual=input_tensor))
    return out


def _linear(
    layer: nn.Linear, x: Tensor, activation: str = "none", residual: Tensor | None = None
) -> Tensor:
    rows = linear(
        x.reshape(-1, x.shape[-1]),
        layer.weight,
        layer.bias,
        activation=activation,
        residual=None if residual is None else residual.reshape(-1, residual.shape[-1]),
    )
    return rows.view(*x.shape[:-1], rows.shape[-1])


def _is_plain(layer: object) -> bool:
    """Tell whether a module is a linear layer of torch that nobody else runs or listens to."""
    return (
        type(layer) is nn.Linear
        and getattr(vars(layer).get("forward"), "func", forward) is forward
        and not _has_hooks(layer)
    )


def _has_hooks(module: nn.Module) -> bool:
    return any(
        versions.private("torch", module, name) for name in ("_forward_hooks", "_forward_pre_hooks")
    )


def _serves(layer: Any, x: Tensor) -> bool:
    weight = layer.weight
    return (
        _is_plain(layer)
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() >= (LEAST_ROWS if is_quicker() else LEAST_ROWS_BETWEEN) * x.shape[-1]
        and x.shape[-1] == weight.shape[1]
        and type(weight) is nn.Parameter
        and not _op.needs_grad(x, weight, layer.bias)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )
