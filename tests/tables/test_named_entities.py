"""The experiment on named entities: its parts, and a smoke run on made-up sentences."""

from __future__ import annotations

import gzip
import json
import random
import sys

import pytest
import torch
from tables.experiments import load


@pytest.fixture(scope="module")
def experiment():
    return load("named_entities")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sentences in which capitalized words are entities of one or two words."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=5)) for _ in range(60)]
    folder = tmp_path_factory.mktemp("data")
    (folder / "ner").mkdir()
    with gzip.open(folder / "ner" / "anem.tsv.gz", "wt") as file:
        file.write("split\tsent_id\ttokens\ttags\n")
        for number in range(240):
            tokens, tags = [], []
            for word in draw.choices(words, k=draw.randint(1, 8)):
                entity = draw.random() < 0.4
                tokens.append(word.title() if entity else word)
                inside = entity and tags and tags[-1] != "O" and draw.random() < 0.5
                tags.append(("I-Part" if inside else "B-Part") if entity else "O")
            split = "train" if number < 200 else "test"
            file.write(f"{split}\t{number}\t{' '.join(tokens)}\t{' '.join(tags)}\n")
    return folder


def test_spans(experiment):
    tags = ["I-A", "I-A", "I-B", "O", "B-A", "B-A", "I-A", "I-B"]
    assert experiment.spans(tags) == {
        (0, 2, "A"), (2, 3, "B"), (4, 5, "A"), (5, 7, "A"), (7, 8, "B")
    }  # fmt: skip
    assert experiment.spans([]) == set()


def test_windows_end_with_their_sentence(experiment):
    model = experiment.Tagger(experiment.MultiHashEmbedding([50] * 4, 96), 3).eval()
    sentences = [torch.randint(0, 99, (length, 4)) for length in (3, 1, 5)]
    alone = torch.cat([model([sentence]) for sentence in sentences])
    torch.testing.assert_close(model(sentences), alone, rtol=1e-4, atol=1e-5)


def test_thinc_gives_the_same(experiment):
    """Values and gradients of both implementations, from the same tables."""
    pytest.importorskip("thinc")
    rows = [40, 7, 30, 11]
    thinc = experiment.ThincTables(rows)
    ours = experiment.MultiHashEmbedding(rows, experiment.DIM, seed=experiment.SEED)
    with torch.no_grad():
        for to, table in zip(ours.tables(), thinc.tables, strict=True):
            to.copy_(table)
    ids = torch.randint(-(2**62), 2**62, (25, 4))
    grad = torch.randn(25, 4 * experiment.DIM)
    results = [module(ids).reshape(25, -1) for module in (ours, thinc)]
    torch.testing.assert_close(*results)
    for result in results:
        result.backward(grad)
    expected = torch.cat([table.grad for table in thinc.tables])
    torch.testing.assert_close(ours.weight.grad, expected, rtol=1e-4, atol=1e-5)


def test_every_method_learns_and_is_reported(experiment, folder, tmp_path, monkeypatch):
    pytest.importorskip("thinc")
    monkeypatch.setattr(experiment, "RESULTS", tmp_path / "named_entities.json")
    monkeypatch.setenv("EMBLAS_DATA", str(folder))
    monkeypatch.setattr(sys, "argv", ["named_entities", "--seeds", "1", "--epochs", "6"])
    experiment.main()
    results = json.loads(experiment.RESULTS.read_text())
    assert [r["method"] for r in results] == list(experiment.METHODS)
    assert results[0]["f1"][0] > 0.5
    monkeypatch.setattr(experiment, "run", None)
    experiment.main()
    assert json.loads(experiment.RESULTS.read_text()) == results
    assert "| hashed, 10% | " in experiment.RESULTS.with_suffix(".md").read_text()
