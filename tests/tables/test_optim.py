"""Optimizers inside the backward pass, against plain dense steps."""

from __future__ import annotations

import copy
import math

import executors
import pytest
import torch
from emblas import use_backend
from emblas.tables import Composition, Part, TableSpec, compose_bag, optim
from torch import nn

executor = executors.fixture("compose_bag", "compose_bag_backward", "compose_bag_update_")
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
QUOTIENT_REMAINDER = (
    Part(5, 6, "radix", a=8, limit=40),
    Part(8, 6, "radix", a=1, limit=40, base=30),
)
CHUNKS = tuple(  # of a memory array of 53 elements: they overlap
    Part(50, 4, "linear", a=634329019, b=5 + 1825252241 * c, p=2038074743, stride=1, column=4 * c)
    for c in range(3)
)


class Table(nn.Module):
    def __init__(self, table, composition):
        super().__init__()
        self.weight = nn.Parameter(table)
        self.composition = composition
        self.fused_optimizer = None


def plain_step(name, w, g, state, used, step, lr):
    """One step of each optimizer on whole tables; rows not in use are put back by the caller."""
    decay = 0.1
    if name == "SGD":
        return w - lr * (g + decay * w)
    if name == "Adagrad":
        g = g + decay * w
        state["s"] = state.get("s", 0) + g**2
        return w - lr * g / (state["s"].sqrt() + 1e-10)
    if name == "RowWiseAdagrad":
        g = g + decay * w
        state["s"] = state.get("s", torch.zeros(len(w), dtype=w.dtype)) + torch.where(
            used, (g**2).mean(1), 0
        )
        return w - lr * g / (state["s"].sqrt() + 1e-8)[:, None]
    # Adam: dense moments of every step, as dense Adam has them.
    state["m"] = 0.9 * state.get("m", 0) + 0.1 * g
    state["v"] = 0.999 * state.get("v", 0) + 0.001 * g**2
    last = state.setdefault("last", torch.zeros(len(w)))
    shrink = (1 - lr * (decay if name == "AdamW" else 0)) ** (step - last)
    last[used] = step
    m, v = state["m"] / (1 - 0.9**step), state["v"] / (1 - 0.999**step)
    return shrink[:, None] * w - lr * m / (v.sqrt() + 1e-8)


@pytest.mark.parametrize("name", ["SGD", "RowWiseAdagrad", "Adagrad", "Adam", "AdamW"])
@pytest.mark.parametrize("rows", [10, 300], ids=["in order", "sorted"])
def test_optimizers(executor, name, rows):
    composition = TableSpec(rows, 2, seed=1).composition(5)
    table = torch.randn(rows, 5, dtype=torch.float64)
    module = Table(table.clone(), composition)
    settings = {} if name == "Adam" else {"weight_decay": 0.1}
    optimizer = getattr(optim, name)(module, lr=0.05, **settings)
    state = {}
    for step in range(1, 6):
        ids = torch.arange(step, step + 6)
        out = compose_bag(ids, module.weight, composition, optimizer=optimizer)
        leaf = table.clone().requires_grad_()
        expected = compose_bag(ids, leaf, composition)
        torch.testing.assert_close(out.detach(), expected.detach())
        grad = torch.randn(6, 5, dtype=torch.float64)
        out.backward(grad)
        expected.backward(grad)
        assert module.weight.grad is None
        used = leaf.grad.any(1)
        after = plain_step(name, table, leaf.grad, state, used, step, 0.05)
        if name == "Adagrad":  # decay must not reach the state of rows that stand still
            before = state.get("before", torch.zeros_like(table))
            state["s"] = state["before"] = torch.where(used[:, None], state["s"], before)
        table = torch.where(used[:, None], after, table)
        torch.testing.assert_close(module.weight.detach(), table)


@pytest.mark.parametrize("name", ["SGD", "RowWiseAdagrad", "Adagrad", "AdamW"])
@pytest.mark.parametrize("combine", ["sum", "product"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_optimizer_reference(name, combine, dtype):
    """Kernel and reference, with several tables, where a product reads what it updates."""
    composition = Composition(QUOTIENT_REMAINDER, combine)
    ids, grad = torch.tensor([1, 9, 1, 33, 39, 8]), torch.randn(6, 6).to(dtype)
    start = torch.randn(composition.size).to(dtype)
    modules = []
    for backend in ("auto", "reference"):
        modules.append(Table(start.clone(), composition))
        optimizer = getattr(optim, name)(modules[-1], lr=0.1)
        with use_backend(backend):
            for shift in (0, 0, 1):
                out = compose_bag(
                    (ids + shift) % 40, modules[-1].weight, composition, optimizer=optimizer
                )
                out.backward(grad)
        modules[-1].state = optimizer.state[modules[-1].weight]
    error = 30 * torch.finfo(dtype).eps
    torch.testing.assert_close(modules[0].weight, modules[1].weight, rtol=error, atol=error)
    for key, value in modules[0].state.items():
        torch.testing.assert_close(value, modules[1].state[key], rtol=error, atol=error)


def test_optimizer_is_a_torch_optimizer():
    composition = TableSpec(30, 2, seed=1).composition(5)
    module = Table(torch.randn(30, 5).bfloat16(), composition)
    optimizer = optim.AdamW(module, lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)

    def train(module):
        out = compose_bag(
            torch.arange(9), module.weight, composition, optimizer=module.fused_optimizer
        )
        out.sum().backward()
        return module.weight.detach().clone()

    train(module)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    assert math.isclose(optimizer.param_groups[0]["lr"], 0.05)
    twin = Table(module.weight.detach().clone(), composition)
    optim.AdamW(twin).load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert twin.fused_optimizer.state[twin.weight]["first"].dtype == torch.float32
    assert torch.equal(train(module), train(twin))
    with pytest.raises(ValueError, match="has a fused optimizer already"):
        optim.SGD(module, lr=1)
    optimizer.detach()
    assert module.fused_optimizer is None
    with pytest.raises(TypeError, match="modules must be tables"):
        optim.SGD(nn.Linear(2, 2), lr=1)
    with pytest.raises(ValueError, match="lr must not be negative"):
        optim.SGD(module, lr=-1)
    with pytest.raises(ValueError, match="betas must be below 1"):
        optim.Adam(module, betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="rows that don't overlap"):
        optim.SGD(Table(torch.zeros(53), Composition(CHUNKS)), lr=1)
    other = Table(torch.zeros(31, 5), TableSpec(31, 2).composition(5))
    with pytest.raises(ValueError, match="must have shape"):
        optim.AdamW(other).load_state_dict(optimizer.state_dict())
