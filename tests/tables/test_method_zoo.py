"""The experiment over all methods: a smoke run of each, on made-up interactions."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from tables.experiments import load


@pytest.fixture(scope="module")
def zoo():
    return load("method_zoo")


@pytest.fixture(scope="module")
def data(zoo):
    """Labels that depend on the ids of two fields; ids of Zipf's frequencies."""
    generator = torch.Generator().manual_seed(0)
    sizes = [300, 500]
    ids = torch.stack([
        (torch.rand(2500, generator=generator) ** 3 * size).long() for size in sizes
    ], 1)  # fmt: skip
    taste = [torch.randn(size, generator=generator) for size in sizes]
    labels = (taste[0][ids[:, 0]] + taste[1][ids[:, 1]] > 0).float()
    return zoo.Data(ids, labels, sizes)


def test_every_method(zoo, data):
    """Each fits its budget and trains."""
    losses = {}
    for name in zoo.METHODS:
        result = zoo.run(name, 2, 0, 1, data)
        assert result is not None, name
        assert result["bytes"] <= result["budget"] or name == "AutoDim", name
        assert 0 < result["log_loss"] < 0.75, name
        losses[name] = result["log_loss"]
    assert len(losses) == 24
    assert zoo.run("DPQ, vq", 1000, 0, 1, data) is None


def test_report(zoo, data, tmp_path, monkeypatch):
    """Runs are kept, and not repeated."""
    monkeypatch.setattr(zoo, "RESULTS", tmp_path / "zoo.json")
    monkeypatch.setattr(zoo, "Data", lambda *_: data)
    monkeypatch.setattr(zoo, "read", lambda folder: ())
    monkeypatch.setattr(zoo, "plot", lambda results: None)
    monkeypatch.setenv("EMBLAS_DATA", str(tmp_path))
    arguments = ["zoo", "--seeds", "1", "--epochs", "1", "--shares", "4", "--methods"]
    monkeypatch.setattr(sys, "argv", [*arguments, "full table", "hashing trick"])
    zoo.main()
    before = json.loads(zoo.RESULTS.read_text())
    assert [r["method"] for r in before] == ["full table", "hashing trick"]
    monkeypatch.setattr(zoo, "run", None)
    zoo.main()
    assert json.loads(zoo.RESULTS.read_text()) == before
    assert "| hashing trick | " in zoo.RESULTS.with_suffix(".md").read_text()
