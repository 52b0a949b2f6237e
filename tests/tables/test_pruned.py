"""Pruned tables, and the sparse form in which they are stored."""

from __future__ import annotations

import math

import pytest
import torch
from contract import packed
from emblas.tables import (
    AutoSrhEmbedding,
    DeepLightEmbedding,
    OptEmbedding,
    PepEmbedding,
    SparseEmbedding,
)
from emblas.tables.pruned import keep_largest
from emblas.tables.sparse import density_bytes, elements_for_budget


@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("dim", [5, 300])
def test_sparse(density, dim):
    table = torch.randn(20, dim) * (torch.rand(20, dim) < density)
    table[7] = 0
    module = SparseEmbedding.from_table(table, padding_id=3)
    assert torch.equal(module.table(), table)
    ids = torch.tensor([[7, 3, 19], [0, 19, 7]])
    expected = table[ids] * (ids != 3)[..., None]
    assert torch.equal(module(ids), expected)
    bags = module(ids.flatten(), packed((2, 0, 4)))
    torch.testing.assert_close(bags[2], expected.flatten(0, 1)[2:].sum(0))
    count = int(table.count_nonzero())
    column = 1 if dim <= 256 else 2
    assert module.num_bytes == count * (4 + column) + 4 * min(21, count)
    assert module.num_bytes == density_bytes(20, dim, count)
    twin = SparseEmbedding(20, dim, count)
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin.table(), table)


def test_sparse_gradient_and_mask():
    table = torch.randn(9, 4, dtype=torch.float64)
    mask = torch.rand(9, 4) < 0.4
    module = SparseEmbedding.from_table(table, mask)
    ids = torch.tensor([0, 3, 3, 8])
    grad = torch.randn(4, 4, dtype=torch.float64)
    (got,) = torch.autograd.grad(module(ids), module.values, grad)
    dense = torch.zeros(9, 4, dtype=torch.float64).index_add(0, ids, grad)
    torch.testing.assert_close(got, dense[mask])
    with pytest.raises(ValueError, match="mask must be bool of shape"):
        SparseEmbedding.from_table(table, mask[:3])
    with pytest.raises(ValueError, match="table must have 2 dim"):
        SparseEmbedding.from_table(table[0])
    count = elements_for_budget(1000, 100, 16)
    assert density_bytes(100, 16, count) <= 1000 < density_bytes(100, 16, count + 1)
    assert elements_for_budget(10**6, 10, 4) == 40
    with pytest.raises(ValueError, match="num_bytes must be at least 9"):
        elements_for_budget(8, 10, 4)


def test_keep_largest():
    table = torch.tensor([[1.0, -3, 3], [0, 2, -3]])
    assert keep_largest(table, 2).tolist() == [[False, True, True], [False, False, False]]
    assert keep_largest(table, 0).sum() == 0
    assert keep_largest(table, 99).all()


@pytest.mark.parametrize("granularity", ["element", "row", "column", "table"])
def test_pep(granularity):
    module = PepEmbedding(8, 5, granularity=granularity, threshold=-3.0, dtype=torch.float64)
    ids = torch.arange(8)
    cut = module.threshold.sigmoid().expand(8, 5)
    expected = torch.where(
        module.weight > cut, module.weight - cut,
        torch.where(module.weight < -cut, module.weight + cut, 0),
    )  # fmt: skip
    torch.testing.assert_close(module(ids), expected)
    grad = torch.randn(8, 5, dtype=torch.float64)
    for mine, theirs in zip(
        torch.autograd.grad(module(ids), module.parameters(), grad),
        torch.autograd.grad(expected, module.parameters(), grad), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(mine, theirs)
    assert torch.equal(module.mask(), expected != 0)
    frozen = module.freeze()
    assert torch.equal(frozen.table(), module.table())
    assert frozen.num_elements == int((expected != 0).sum())
    assert module.freeze(3).num_elements == 3


def test_deep_light():
    module = DeepLightEmbedding(50, 4, 0.9, interval=10, decay=0.5)
    before = module.weight.detach().clone()
    for step in range(1, 41):
        module.advance()
        if step < 10:
            assert torch.equal(module.weight, before)
        elif step % 10 == 0:
            kept = math.ceil(200 * (1 - 0.9 * (1 - 0.5 ** (step / 100))))
            assert torch.equal(module.weight, before * keep_largest(before, kept))
    assert torch.equal(module.freeze().table(), module(torch.arange(50)))
    twin = DeepLightEmbedding(50, 4, 0.9, interval=10, decay=0.5)
    twin.load_state_dict(module.state_dict())
    assert int(twin.steps) == 40


def test_auto_srh():
    module = AutoSrhEmbedding(12, 4, num_groups=5, penalty=0.1)
    with torch.no_grad():
        module.alpha.normal_()
    group = torch.tensor([i * 5 // 12 for i in range(12)])
    torch.testing.assert_close(module(torch.arange(12)), module.weight * module.alpha[group])
    assert group.bincount().tolist() == [3, 2, 3, 2, 2]
    torch.testing.assert_close(module.auxiliary_loss(), 0.1 * module.alpha.abs().sum())
    frozen = module.freeze(10)
    product = (module.weight * module.alpha[group]).detach()
    assert torch.equal(frozen.table(), product * keep_largest(product, 10))


def test_opt_embedding_by_hand():
    module = OptEmbedding([3, 5], 4, alpha=0.1, dtype=torch.float64).eval()
    with torch.no_grad():
        module.weight.normal_()
        module.threshold.copy_(torch.tensor([3.0, 2.0]))
        module.widths.copy_(torch.tensor([2, 3]))
    ids = torch.arange(8)
    out = module(ids)
    grad = torch.randn_like(out)
    dweight, dthreshold = torch.autograd.grad(out, (module.weight, module.threshold), grad)
    for i in range(8):
        block = int(i >= 3)
        width, row = (2, 3)[block], module.weight[i].detach()
        x = float(row.abs().sum()) - (3.0, 2.0)[block]
        inside = (torch.arange(4) < width).double()
        torch.testing.assert_close(out[i], row * inside * float(x > 0))
        slope = 2 - 4 * abs(x) if abs(x) <= 0.4 else 0.4 if abs(x) <= 1 else 0.0
        dx = float((grad[i] * row * inside).sum()) * slope
        torch.testing.assert_close(dweight[i], grad[i] * inside * float(x > 0) + dx * row.sign())
        dthreshold[block] += dx
    torch.testing.assert_close(dthreshold, torch.zeros(2).double())
    loss = 0.1 * (math.exp(-3) + math.exp(-2))
    assert float(module.auxiliary_loss().detach()) == pytest.approx(loss)
    assert torch.equal(module.freeze().table(), out)
    module.train()
    with torch.no_grad():
        module.threshold.fill_(-1)
    lengths = torch.stack([(module(ids) != 0).sum(1) for _ in range(30)])
    assert lengths.unique().tolist() == [1, 2, 3, 4]


def test_evolutionary_search():
    """A loss whose best widths are known."""
    module = OptEmbedding([10] * 3, 8)
    best = torch.tensor([2, 8, 5])
    calls = []

    def loss():
        assert not module.training
        calls.append(module.widths.clone())
        return float((module.widths - best).abs().sum())

    assert module.search(loss, generations=40) == 0
    assert torch.equal(module.widths, best)
    assert module.training
    assert len({tuple(c.tolist()) for c in calls}) == len(calls)


def test_bad_arguments():
    for message, call in (
        ("granularity must be one of", lambda: PepEmbedding(3, 2, granularity="field")),
        ("sparsity must be 0 to 1", lambda: DeepLightEmbedding(3, 2, 1.5)),
        ("interval must be at least 1", lambda: DeepLightEmbedding(3, 2, 0.5, interval=0)),
        ("num_groups must be at least 1", lambda: AutoSrhEmbedding(3, 2, num_groups=0)),
        ("penalty must not be negative", lambda: AutoSrhEmbedding(3, 2, penalty=-1)),
        ("block_sizes must hold", lambda: OptEmbedding([], 2)),
        ("alpha must not be negative", lambda: OptEmbedding([3], 2, alpha=-1)),
        ("mutation must be 0 to 1", lambda: OptEmbedding([3], 2).search(lambda: 0.0, mutation=2)),
        ("holds a table of", lambda: PepEmbedding(3, 2).load_state_dict(
            PepEmbedding(3, 2, granularity="row").state_dict(), strict=False)),
    ):  # fmt: skip
        with pytest.raises((ValueError, RuntimeError), match=message):
            call()
