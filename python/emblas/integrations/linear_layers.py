"""Linear layers of torch on emblas' kernel, where they compute what no gradient is wanted of.

:func:`emblas.linear.linear` does what follows on a product as long as the sums are at hand: the
activation between the two products of a layer, and the residual connection. It packs the weights
anew in every call, so that nothing is stale when they have changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
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
_ANY_ROWS: ContextVar[bool] = ContextVar("emblas_any_rows", default=False)


def is_wide() -> bool:
    """Tell whether the kernel has vectors of 512 bits, without which it was not measured."""
    return _C.isa() in ("avx512", "avx512_vpopcntdq")


def is_quicker() -> bool:
    """Tell whether products of the kernel are quicker on this CPU than those of torch.

    Matrix libraries know the CPUs of their own makers best; others than those of AMD were not
    measured.
    """
    return bool(_C.cpu_is_amd())


# Activations that go by no setting of theirs.
ACTIVATIONS: dict[type, str] = {
    nn.ReLU: "relu",
    GELUActivation: "gelu",
    GELUTanh: "gelu_tanh",
    nn.SiLU: "silu",
    SiLUActivation: "silu",
}
# Models of transformers whose blocks are known; others name the same parts and do something else.
BLOCKS = {"bert", "camembert", "deberta_v2", "electra", "mpnet", "roberta", "xlm_roberta"}


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
    if type(module).__module__.split(".")[:2] != ["transformers", "models"]:
        return None
    if type(module).__module__.split(".")[2] not in BLOCKS:
        return None
    parts = dict(module.named_children())
    if parts.keys() == {"dense", "intermediate_act_fn"}:
        return _activated
    if everywhere and parts.keys() == {"dense", "dropout", "LayerNorm"}:
        return _added
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
    activation = _activation(block.intermediate_act_fn)
    if activation is None or not _serves(block.dense, hidden_states):
        out: Tensor = type(block).forward(block, hidden_states)
        return out
    return _linear(block.dense, hidden_states, activation)


def _added(block: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
    """``BertSelfOutput``, ``BertOutput`` and their like."""
    if (
        (block.dropout.training and block.dropout.p > 0)
        or not _is_untouched(block.dropout)
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


def _activation(module: nn.Module) -> str | None:
    """Name the kernel's activation that a module is."""
    if not _is_untouched(module):
        return None
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return ACTIVATIONS.get(type(module))


def _is_untouched(module: nn.Module) -> bool:
    """Tell whether nobody else runs a module in his own way, or listens to it."""
    own = vars(module).get("forward")
    return (own is None or getattr(own, "func", None) is forward) and not any(
        versions.private("torch", module, name) for name in ("_forward_hooks", "_forward_pre_hooks")
    )


def _serves(layer: nn.Module, x: Tensor) -> bool:
    if type(layer) is not nn.Linear or torch.compiler.is_compiling():
        return False
    weight = layer.weight
    least = 0 if _ANY_ROWS.get() else LEAST_ROWS if is_quicker() else LEAST_ROWS_BETWEEN
    return (
        _is_untouched(layer)
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() >= least * x.shape[-1]
        and x.shape[-1] == weight.shape[1]
        and type(weight) is nn.Parameter
        and not _op.needs_grad(x, weight, layer.bias)
        and not torch.is_autocast_enabled("cpu")
    )


@contextlib.contextmanager
def any_rows() -> Iterator[None]:
    """Use the kernel for the smallest batches as well, to compare it with what it replaces."""
    token = _ANY_ROWS.set(True)
    try:
        yield
    finally:
        _ANY_ROWS.reset(token)
