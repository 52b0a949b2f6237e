"""Optimizers that update a table inside the backward pass, one row in use at a time.

No gradient of the table's size exists: each row's gradient is added up in the first-level cache, on
a GPU in registers where its row allows, and applied there. The rows that a batch doesn't use are
not read, so memory and time follow the batch, not the table::

    embedding = HashEmbedding(5000, 96)
    optimizer = optim.RowWiseAdagrad(embedding, lr=0.02)
    ...
    loss.backward()  # the table has moved now; optimizer.step() does nothing

They are ``torch.optim.Optimizer`` objects: learning-rate schedulers, parameter groups and state
dicts work as usual. Every lookup that autograd differentiates takes its own step: a table that one
loss looks up twice takes two.

Rows that are not in use stand still. What that means for moments and weight decay is documented
with each optimizer. ``weight_decay`` is added to the gradient (L2), except in :class:`AdamW`, which
shrinks the row.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from emblas.tables.composition import Composition

_SGD, _ROW_WISE_ADAGRAD, _ADAGRAD, _ADAM = range(4)  # in the order of csrc/tables/compose.h


class ComposedModule(Protocol):
    """A module whose one table is looked up through a composition."""

    weight: nn.Parameter
    fused_optimizer: FusedOptimizer | None

    @property
    def composition(self) -> Composition:
        """Which rows of ``weight`` belong to an id."""


class FusedOptimizer(torch.optim.Optimizer):
    """Base of the fused optimizers; takes one or several table modules and attaches to them.

    Parameters
    ----------
    modules : module or iterable of modules
        Tables of :mod:`emblas.tables` that are looked up by hashes or partitions.
    defaults : dict
        Settings of the optimizer.

    Raises
    ------
    TypeError
        If a module has no composed table.
    ValueError
        If a module has a fused optimizer already, rows that overlap, or a setting is out of range.
    """

    kind: int

    def __init__(
        self, modules: ComposedModule | Iterable[ComposedModule], defaults: dict[str, Any]
    ) -> None:
        for name, value in defaults.items():
            for number in value if isinstance(value, tuple) else (value,):
                if not number >= 0:
                    raise ValueError(f"{name} must not be negative, got {value}")
        self._modules = list(modules) if isinstance(modules, Iterable) else [modules]
        for module in self._modules:
            composition = getattr(module, "composition", None)
            if not isinstance(composition, Composition):
                name = type(module).__name__
                raise TypeError(f"modules must be tables that are looked up by rows, got {name}")
            if module.fused_optimizer is not None:
                raise ValueError(f"{type(module).__name__} has a fused optimizer already")
            if any(part.row_stride < part.width for part in composition.parts):
                raise ValueError("a fused optimizer needs rows that don't overlap")
        super().__init__([module.weight for module in self._modules], defaults)
        for module in self._modules:
            self.state[module.weight] = self._new_state(module.weight, module.composition)
            module.fused_optimizer = self

    def _new_state(self, table: Tensor, composition: Composition) -> dict[str, Tensor]:
        dtype = torch.float64 if table.dtype == torch.float64 else torch.float32
        rows, elements = composition.num_rows, table.numel()
        first = {_SGD: 0, _ROW_WISE_ADAGRAD: rows, _ADAGRAD: elements, _ADAM: elements}[self.kind]
        is_adam = self.kind == _ADAM

        def zeros(size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=table.device)

        return {
            "first": zeros(first, dtype),
            "second": zeros(elements if is_adam else 0, dtype),
            "last_step": zeros(rows if is_adam else 0, torch.int64),
            "steps": zeros(1, torch.int64),
        }

    def arguments(self, table: Tensor) -> tuple[Any, ...]:
        """Return the state and settings of one table, as the operator takes them."""
        state = self.state[table]
        group = next(g for g in self.param_groups if any(p is table for p in g["params"]))
        beta1, beta2 = group.get("betas", (0.0, 0.0))
        return (
            state["first"], state["second"], state["last_step"], state["steps"], self.kind,
            float(group["lr"]), group.get("eps", 0.0), beta1, beta2, group["weight_decay"],
        )  # fmt: skip

    def detach(self) -> None:
        """Give the modules back to ordinary gradients."""
        for module in self._modules:
            module.fused_optimizer = None

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do nothing: the backward pass has taken the step."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load settings and state; the state keeps its own dtypes beside a 16-bit table."""
        super().load_state_dict(state_dict)
        for number, module in enumerate(self._modules):
            saved = state_dict["state"][number]
            for name, value in self._new_state(module.weight, module.composition).items():
                if saved[name].shape != value.shape:
                    raise ValueError(
                        f"state {name!r} must have shape {tuple(value.shape)}, "
                        f"got {tuple(saved[name].shape)}"
                    )
                self.state[module.weight][name] = value.copy_(saved[name])


class SGD(FusedOptimizer):
    """Stochastic gradient descent: ``w -= lr (g + weight_decay w)``.

    Parameters
    ----------
    modules : module or iterable of modules
    lr : float
    weight_decay : float, default 0
        Acts on a row only in the steps that use it.
    """

    kind = _SGD

    def __init__(
        self,
        modules: ComposedModule | Iterable[ComposedModule],
        lr: float,
        *,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(modules, {"lr": lr, "weight_decay": weight_decay})


class RowWiseAdagrad(FusedOptimizer):
    """Adagrad with one accumulator per row: ``s += mean(g^2)``, ``w -= lr g / (sqrt(s) + eps)``.

    The update of FBGEMM's ``EXACT_ROWWISE_ADAGRAD``. State: 4 bytes per row.

    Parameters
    ----------
    modules : module or iterable of modules
    lr : float, default 0.01
    eps : float, default 1e-8
    weight_decay : float, default 0
        Acts on a row only in the steps that use it.
    """

    kind = _ROW_WISE_ADAGRAD

    def __init__(
        self,
        modules: ComposedModule | Iterable[ComposedModule],
        lr: float = 0.01,
        *,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(modules, {"lr": lr, "eps": eps, "weight_decay": weight_decay})


class Adagrad(FusedOptimizer):
    """Adagrad: ``s += g^2``, ``w -= lr g / (sqrt(s) + eps)``, element by element.

    Rows without gradient don't move in dense Adagrad either, so with ``weight_decay=0`` the two are
    the same optimizer.

    Parameters
    ----------
    modules : module or iterable of modules
    lr : float, default 0.01
    eps : float, default 1e-10
    weight_decay : float, default 0
        Acts on a row only in the steps that use it.
    """

    kind = _ADAGRAD

    def __init__(
        self,
        modules: ComposedModule | Iterable[ComposedModule],
        lr: float = 0.01,
        *,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(modules, {"lr": lr, "eps": eps, "weight_decay": weight_decay})


class AdamW(FusedOptimizer):
    """Adam with decoupled weight decay, caught up lazily.

    For a row that was last in use ``n`` steps ago, moments are decayed by ``beta^n`` and the row is
    shrunk by ``(1 - lr weight_decay)^n`` before the step: both are then what dense AdamW has (for a
    constant learning rate). Left out is what dense AdamW does to a row between its uses: it goes on
    moving along its old momentum. The bias correction counts all steps. ``torch.optim.SparseAdam``
    differs: it decays moments only in the steps that use a row.

    Parameters
    ----------
    modules : module or iterable of modules
    lr : float, default 1e-3
    betas : (float, float), default (0.9, 0.999)
    eps : float, default 1e-8
    weight_decay : float, default 0.01
    """

    kind = _ADAM

    def __init__(
        self,
        modules: ComposedModule | Iterable[ComposedModule],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        if not all(beta < 1 for beta in betas):
            raise ValueError(f"betas must be below 1, got {betas}")
        super().__init__(
            modules, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        )


class Adam(AdamW):
    """:class:`AdamW` without weight decay.

    Parameters
    ----------
    modules : module or iterable of modules
    lr : float, default 1e-3
    betas : (float, float), default (0.9, 0.999)
    eps : float, default 1e-8
    """

    def __init__(
        self,
        modules: ComposedModule | Iterable[ComposedModule],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(modules, lr, betas=betas, eps=eps, weight_decay=0.0)
