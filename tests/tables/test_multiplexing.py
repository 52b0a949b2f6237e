"""The experiment on feature multiplexing: a smoke run on made-up ratings."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from tables.experiments import load


@pytest.fixture(scope="module")
def experiment():
    return load("multiplexing")


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    sizes = [300, 200, 2]
    ids = torch.stack([torch.randint(size, (3000,), generator=generator) for size in sizes], 1)
    taste = [torch.randn(size, generator=generator) for size in sizes]
    labels = (sum(t[ids[:, i]] for i, t in enumerate(taste)) > 0).float()
    return ids, labels, sizes


def test_sizes(experiment, data):
    """Methods are compared at equal bytes, and a full table has a row for each value."""
    sizes = data[2]
    for budget in experiment.BUDGETS:
        rows = {
            method: experiment.make_table(method, budget, sizes).weight.numel() / experiment.DIM
            for method in experiment.METHODS
        }
        assert rows.pop(experiment.FULL) == sum(sizes)
        assert all(abs(count - budget * sum(sizes)) <= 2 for count in rows.values()), rows
    table = experiment.make_table(experiment.FULL, 1.0, sizes)
    torch.nn.init.normal_(table.weight)
    everything = torch.arange(300)[:, None] % torch.tensor(sizes)
    rows = table(everything).reshape(300, 3, -1)
    assert [len(rows[:, i].unique(dim=0)) for i in range(3)] == sizes


def test_every_method_learns_and_is_reported(experiment, data, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "RESULTS", tmp_path / "multiplexing.json")
    monkeypatch.setattr(experiment, "read", lambda: data)
    monkeypatch.setattr(sys, "argv", ["multiplexing", "--seeds", "1", "--epochs", "3"])
    experiment.main()
    results = json.loads(experiment.RESULTS.read_text())
    assert len(results) == 1 + 3 * len(experiment.BUDGETS)
    assert all(r["auc"] > 0.6 for r in results if r["budget"] == 1.0)
    monkeypatch.setattr(experiment, "run", None)
    experiment.main()
    assert json.loads(experiment.RESULTS.read_text()) == results
    report = experiment.RESULTS.with_suffix(".md").read_text()
    assert report.count("\n| 0.") == 2
