"""A table on disk, a few partitions of which are trained at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from contract import packed
from emblas.tables import CodeSpec, PartitionedEmbedding, bucket_order, random_codes
from emblas.tables import partitioned as module
from tables.experiments import load


def test_bucket_order():
    for count in range(1, 6):
        order = list(bucket_order(count))
        assert sorted(order) == [(i, j) for i in range(count) for j in range(count)]
        seen = set(order[0])
        for pair in order[1:]:
            assert seen & set(pair)
            seen |= set(pair)


def train(table, edges, bounds):
    """Pull the ends of edges together, bucket by bucket."""
    part = [np.searchsorted(bounds, edge.numpy(), "right") - 1 for edge in edges]
    for i, j in bucket_order(len(bounds) - 1):
        if isinstance(table, PartitionedEmbedding):
            table.swap([i, j])
        own = [edge for edge, p in zip(edges, part, strict=True) if (p == (i, j)).all()]
        for edge in own:
            (table(edge).diff(dim=0) - 0.1).square().sum().backward()
            table.step(0.1)


def test_same_as_one_table(tmp_path):
    """Swapping changes nothing: the same bits as with all partitions in memory."""
    edges = list(torch.randint(0, 23, (120, 2)))
    bounds = [p * 23 // 4 for p in range(5)]
    whole = PartitionedEmbedding(tmp_path / "whole", 23, 5, 4, seed=3)
    start = whole.table()
    assert torch.equal(start, 1e-3 * random_codes(torch.arange(23), 5, CodeSpec(seed=3)))
    whole.swap(range(4))
    monkey = whole.swap
    whole.swap = lambda partitions: None  # keep all in memory
    train(whole, edges, bounds)
    whole.swap = monkey
    swapped = PartitionedEmbedding(tmp_path / "swapped", 23, 5, 4, seed=3)
    train(swapped, edges, bounds)
    assert len(swapped.loaded) <= 2
    assert torch.equal(swapped.table(), whole.table())
    assert not torch.equal(swapped.table(), start)
    swapped.flush()
    again = PartitionedEmbedding(tmp_path / "swapped", 23, 5, 4, seed=3)
    assert torch.equal(again.table(), whole.table())


def test_row_wise_adagrad(tmp_path):
    table = PartitionedEmbedding(tmp_path, 6, 2, 2)
    table.swap([0])
    before = table.table()
    for _ in range(2):
        (table(torch.tensor([1, 1])) * torch.tensor([1.0, 3.0])).sum().backward()
        table.step(0.5)
    g = torch.tensor([2.0, 6.0])
    mean = float((g * g).mean())
    expected = before[1] - 0.5 * g / mean**0.5 - 0.5 * g / (2 * mean) ** 0.5
    torch.testing.assert_close(table.table()[1], expected)
    table.swap([1])
    table.swap([0])  # the accumulator has come along
    (table(torch.tensor([1])) * g / 2).sum().backward()
    table.step(0.5)
    total = 2 * mean + mean / 4
    torch.testing.assert_close(table.table()[1], expected - 0.5 * g / 2 / total**0.5)
    assert torch.equal(table.table()[[0, 2, 3]], before[[0, 2, 3]])


def test_lookups(tmp_path):
    table = PartitionedEmbedding(tmp_path, 20, 3, 3, padding_id=2, std=1.0)
    table.swap([0, 2])
    assert table.loaded == (0, 2)
    ids = torch.tensor([[0, 2], [19, 0]])
    expected = table.table()[ids] * (ids != 2)[..., None]
    assert torch.equal(table(ids), expected)
    bags = table(ids.flatten(), packed((3, 0, 1)))
    torch.testing.assert_close(bags[0], expected.flatten(0, 1)[:3].sum(0))
    assert table(ids[:0]).shape == (0, 2, 3)
    with pytest.raises(ValueError, match=r"in memory, \[0, 2\], got 6 of partition 1"):
        table(torch.tensor([0, 6]))


def test_files(tmp_path, monkeypatch):
    table = PartitionedEmbedding(tmp_path, 20, 3, 3)
    with pytest.raises(ValueError, match="holds a table of"):
        PartitionedEmbedding(tmp_path, 20, 3, 4)
    table.swap([1])
    table.flush()
    path = tmp_path / "partition-1.npy"
    before = path.read_bytes()

    def fail(_):
        raise OSError("the disk is full")

    with torch.no_grad():
        table.weights["1"] += 1
    monkeypatch.setattr(module.os, "fsync", fail)
    with pytest.raises(OSError, match="the disk is full"):
        table.swap([0])
    assert path.read_bytes() == before
    assert table.loaded == (1,)  # nothing is lost: it is still in memory
    monkeypatch.undo()
    table.swap([0])
    assert path.read_bytes() != before
    np.save(path, np.zeros((2, 4), np.float32))
    with pytest.raises(ValueError, match="must hold float32 of shape"):
        table.swap([1])
    for message, call in (
        ("num_partitions must be 1 to 20", lambda: PartitionedEmbedding(tmp_path, 20, 3, 0)),
        ("partitions must be 0 to 2", lambda: table.swap([3])),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_link_prediction():
    """The experiment, on a made-up graph of two halves: partitions cost nothing."""
    links = load("link_prediction")
    source, target = torch.randint(0, 100, (2, 3000))
    edges = torch.stack([source, (target // 2) * 2 + source % 2, source % 3], 1)
    for partitions in (1, 2):
        result = links.run(partitions, 0, 3, edges)
        assert result["share_in_memory"] == 1
        assert result["mrr"] > 1.5 * float((1 / torch.arange(1, 1001)).mean())
