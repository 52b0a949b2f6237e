"""Tables that share rows by frequency, likeness or learned clusters, and mixed widths."""

from __future__ import annotations

import pytest
import torch
from emblas.tables import (
    AdaptiveEmbedding,
    AutoDimEmbedding,
    ClusteredCompositionalEmbedding,
    DeduplicatedEmbedding,
    MixedDimensionEmbedding,
    TableSpec,
    hash_keys,
    popularity_dims,
)


def test_adaptive():
    module = AdaptiveEmbedding(40, 3, 10, 7, seed=2, padding_id=4)
    ids = torch.arange(40)
    shared = 10 + hash_keys(ids, TableSpec(7, 1, "splitmix64", 2))[:, 0]
    table = module.weight[torch.where(ids < 10, ids, shared)]
    assert torch.equal(module(ids), torch.where((ids == 4)[:, None], 0, table))
    assert module.num_parameters == 17 * 3
    grown = module.resize(3)
    assert grown.num_shared == 21
    assert torch.equal(grown.table(), module.table())
    fitted = AdaptiveEmbedding.from_budget(
        1000, num_embeddings=400, embedding_dim=3, num_frequent=40
    )
    assert 1000 - 12 < fitted.num_bytes <= 1000


def test_clustered():
    module = ClusteredCompositionalEmbedding(90, 6, 5, num_chunks=2, seed=3)
    ids = torch.arange(90)
    for _ in range(2):
        chunks = [
            module.weight[0, c][module.index[0, c].long()]
            + module.weight[1, c][module.index[1, c].long()]
            for c in range(2)
        ]
        torch.testing.assert_close(module(ids), torch.cat(chunks, 1))
        module.cluster()
    assert module.num_bytes == 2 * 2 * 5 * 3 * 4 + 2 * 2 * 90 * 4 + 8
    assert int(module.clusterings) == 2
    twin = ClusteredCompositionalEmbedding(90, 6, 5, num_chunks=2, seed=3)
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin.table(), module.table())


def test_clusters_are_found():
    """Few kinds of ids: training after clustering gets nearer than training with random hashes."""
    target = torch.randn(4, 8)[torch.arange(100) % 4]
    module = ClusteredCompositionalEmbedding(100, 8, 8, num_chunks=1)
    before = torch.tensor(0.0)
    for round_ in range(5):
        optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
        for _ in range(40):
            optimizer.zero_grad()
            loss = (module(torch.arange(100)) - target).square().mean()
            loss.backward()
            optimizer.step()
        if round_ == 0:
            before = loss.detach()
        module.cluster()
    assert float(loss.detach()) < 0.8 * float(before)


def test_popularity_dims():
    assert popularity_dims([10, 1000, 10], 16) == [16, 4, 16]
    assert popularity_dims([10, 1000], 16, temperature=0) == [16, 16]
    assert popularity_dims([10, 10**9], 16, temperature=1) == [16, 1]
    assert popularity_dims([10, 45], 16, temperature=0.5, powers_of_two=True) == [16, 8]


def test_mixed_dimension():
    module = MixedDimensionEmbedding([3, 50, 7], 6, [6, 2, 4], padding_id=20)
    first, second, third = module.weights
    table = torch.cat([first, second @ module.projections[0], third @ module.projections[1]])
    torch.testing.assert_close(module.table(), table)
    ids = torch.tensor([[59, 0, 20], [3, 52, 53]])
    expected = torch.where((ids == 20)[..., None], 0, table[ids])
    torch.testing.assert_close(module(ids), expected)
    assert module.num_parameters == 3 * 6 + 50 * 2 + 7 * 4 + 2 * 6 + 4 * 6
    only_last = module(torch.tensor([55, 59]))
    torch.testing.assert_close(only_last, table[[55, 59]])
    for budget in (100_000, 20_000, 5000):
        fitted = MixedDimensionEmbedding.from_budget(budget, [30, 800, 100], 16)
        assert fitted.num_bytes <= budget
    with pytest.raises(ValueError, match="num_bytes must be at least"):
        MixedDimensionEmbedding.from_budget(3000, [30, 800, 100], 16)


def test_auto_dim():
    module = AutoDimEmbedding([3, 40], 4, [1, 4], decay=0.1)
    with torch.no_grad():
        module.logits.copy_(torch.tensor([[0.0, 1], [3, 0]]))
    ids = torch.tensor([0, 2, 3, 9, 42])
    module(ids)  # fills the running statistics
    module.eval()
    shares = module.logits.softmax(1)
    expected = []
    for i in ids.tolist():
        block, own = (0, i) if i < 3 else (1, i - 3)
        total = 0
        for c in range(2):
            k = 2 * block + c
            row, norm = module.weights[k][own] @ module.projections[k], module.norms[k]
            total = (
                total
                + shares[block, c]
                * (row - norm.running_mean)
                / (norm.running_var + norm.eps).sqrt()
            )
        expected.append(total)
    torch.testing.assert_close(module(ids), torch.stack(expected))
    module.train()
    assert module(torch.tensor([1])).isfinite().all()
    module(ids).square().sum().backward()
    assert module.logits.grad.count_nonzero() > 0
    assert module.temperature == 1
    for _ in range(20):
        module.advance()
    assert module.temperature == 0.01
    chosen = module.select()
    assert chosen.dims == (4, 1)
    assert chosen.block_sizes == (3, 40)


def test_deduplicated():
    base = torch.randn(5, 6)
    table = base[torch.arange(30) % 5] + torch.rand(30, 6) * 0.004
    module = DeduplicatedEmbedding.from_table(table)
    assert module.num_blocks == 5
    torch.testing.assert_close(module.table(), base[torch.arange(30) % 5], rtol=0, atol=0.011)
    assert module.num_bytes == 5 * 6 * 4 + 30 * 4
    # Enough of the elements must be close.
    far = table.clone()
    far[5:, :3] += 1
    assert DeduplicatedEmbedding.from_table(far[:10]).num_blocks == 10
    blocks = DeduplicatedEmbedding.from_table(table[:28], 10, padding_id=1)
    assert blocks.num_blocks <= 2
    ids = torch.tensor([0, 1, 27])
    torch.testing.assert_close(
        blocks(ids), table[ids] * torch.tensor([[1.0], [0], [1]]), rtol=0, atol=0.011
    )
    distinct = DeduplicatedEmbedding.from_table(torch.randn(20, 6))
    assert distinct.num_blocks == 20


def test_bad_arguments():
    for message, call in (
        ("num_frequent must be 0 to 5", lambda: AdaptiveEmbedding(5, 2, 6, 3)),
        ("num_shared must be at least 1", lambda: AdaptiveEmbedding(5, 2, 2, 0)),
        ("multiple of num_chunks", lambda: ClusteredCompositionalEmbedding(5, 6, 2)),
        ("num_rows must be at least 1", lambda: ClusteredCompositionalEmbedding(5, 4, 0)),
        ("seed must be 0 to 65535", lambda: ClusteredCompositionalEmbedding(5, 4, 2, seed=-1)),
        ("block_sizes must hold", lambda: MixedDimensionEmbedding([4, 0], 4)),
        ("dims must have a number for", lambda: MixedDimensionEmbedding([4, 2], 4, [4])),
        ("dims must be 1 to 4", lambda: MixedDimensionEmbedding([4, 2], 4, [4, 5])),
        ("temperature must be 0 to 1", lambda: popularity_dims([3], 4, temperature=2)),
        ("candidates must ascend", lambda: AutoDimEmbedding([3], 4, [4, 2])),
        ("candidates must ascend", lambda: AutoDimEmbedding([3], 4, [8])),
        ("table must have 2", lambda: DeduplicatedEmbedding.from_table(torch.ones(3))),
        ("tolerance must be above 0",
         lambda: DeduplicatedEmbedding.from_table(torch.ones(3, 1), tolerance=0)),
        ("block_rows must be at least 1",
         lambda: DeduplicatedEmbedding.from_table(torch.ones(3, 1), 0)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
