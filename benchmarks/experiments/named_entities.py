"""Named entities with hashed tables of words, as the tables shrink, beside exact tables and thinc.

Miranda, Kádár, Boyd, Van Landeghem, Søgaard and Honnibal, "Multi hash embeddings in spaCy" (2022),
find that hashed tables do as well as exact ones, and that a tenth of the rows costs little. Task:
the anatomical entities of AnEM. Network: spaCy's, made smaller: NORM, PREFIX, SUFFIX and SHAPE of
each word, 96 dimensions each, one layer that mixes them, three residual layers over windows of
three words (maxout of three pieces, layer norm), and a layer for tags in IOB2. Adam, 1e-3, dropout
0.1, batches of 32 sentences; every tenth sentence of the training set chooses the epoch.

Rows are parts of what the exact tables have: a row for each value in the training set, one for all
others. `thinc` is the same network on thinc's own HashEmbed layers, which spaCy uses.

    EMBLAS_DATA=... python benchmarks/experiments/named_entities.py [--seeds 3] [--epochs 12]

Each finished run is added to named_entities.json beside this file and not repeated; the table
named_entities.md is written from it. Data: Ohta, Pyysalo, Tsujii and Ananiadou, "Open-domain
Anatomical Entity Mention Detection", 2012.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from emblas.tables import MultiHashEmbedding, text_ids
from torch import Tensor, nn

RESULTS = Path(__file__).with_suffix(".json")
ATTRIBUTES = ("norm", "prefix", "suffix", "shape")
DIM = 96
SEED = 16
# name: (implementation, part of the rows of exact tables)
METHODS = {
    "exact": ("exact", 1.0),
    "hashed, 100%": ("emblas", 1.0),
    "thinc, 100%": ("thinc", 1.0),
    "hashed, 50%": ("emblas", 0.5),
    "hashed, 10%": ("emblas", 0.1),
    "thinc, 10%": ("thinc", 0.1),
    "hashed, 1%": ("emblas", 0.01),
}


class Sentences(NamedTuple):
    ids: list[Tensor]  # (words, 4) each
    tags: list[Tensor]  # (words,) each
    texts: list[list[str]]

    def at(self, numbers: Iterable[int]) -> Sentences:
        chosen = list(numbers)
        return Sentences(*([column[i] for i in chosen] for column in self))  # type: ignore[arg-type]


def read(folder: Path) -> tuple[Sentences, Sentences, list[str]]:
    """Training and test set, and the names of the tags."""
    parts = {name: Sentences([], [], []) for name in ("train", "test")}
    names: dict[str, int] = {"O": 0}
    with gzip.open(folder / "ner" / "anem.tsv.gz", "rt", encoding="utf8") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            words, part = row["tokens"].split(" "), parts[row["split"]]
            part.ids.append(torch.stack([text_ids(words, kind)[0] for kind in ATTRIBUTES], 1))
            tags = [names.setdefault(tag, len(names)) for tag in row["tags"].split(" ")]
            part.tags.append(torch.tensor(tags))
            part.texts.append(words)
    return parts["train"], parts["test"], list(names)


class ExactTables(nn.Module):
    """A row for each value that the training set has, and one for all others."""

    def __init__(self, ids: Tensor) -> None:
        super().__init__()
        self.values = [column.unique() for column in ids.T]
        self.rows = [len(values) + 1 for values in self.values]
        self.tables = nn.ModuleList(nn.Embedding(rows, DIM) for rows in self.rows)
        for weight in self.parameters():
            nn.init.uniform_(weight, -0.1, 0.1)

    def forward(self, ids: Tensor) -> Tensor:
        out = []
        for column, values, table in zip(ids.T, self.values, self.tables, strict=True):
            at = torch.searchsorted(values, column.contiguous()).clamp(max=len(values) - 1)
            out.append(table(torch.where(values[at] == column, at, len(values))))
        return torch.cat(out, 1)


class _ThincLookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, layer: Any, ids: Tensor) -> Tensor:
        out, ctx.backprop = layer(ids.numpy().view(np.uint64), is_train=True)
        ctx.layer = layer
        return torch.from_numpy(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.layer.set_grad("E", np.zeros_like(ctx.layer.get_param("E")))
        ctx.backprop(grads[0].numpy())
        return torch.from_numpy(ctx.layer.get_grad("E").copy()), None, None


class ThincTables(nn.Module):
    """Thinc's HashEmbed, one layer for each attribute; it reads the parameters of this module."""

    def __init__(self, rows: list[int]) -> None:
        from thinc.api import HashEmbed

        super().__init__()
        self.layers = [HashEmbed(DIM, n, seed=SEED + i).initialize() for i, n in enumerate(rows)]
        self.tables = nn.ParameterList(torch.empty(n, DIM).uniform_(-0.1, 0.1) for n in rows)

    def forward(self, ids: Tensor) -> Tensor:
        out = []
        for column, layer, weight in zip(ids.T, self.layers, self.tables, strict=True):
            layer.set_param("E", weight.detach().numpy())
            out.append(_ThincLookup.apply(weight, layer, column.contiguous()))
        return torch.cat(out, 1)


class Maxout(nn.Module):
    """The largest of three linear layers, normalized."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(width, 3 * dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x).unflatten(1, (3, -1)).amax(1))


class Tagger(nn.Module):
    def __init__(self, embedding: nn.Module, num_tags: int) -> None:
        super().__init__()
        self.embedding = embedding
        self.mix = Maxout(len(ATTRIBUTES) * DIM, DIM)
        self.layers = nn.ModuleList(Maxout(3 * DIM, DIM) for _ in range(3))
        self.dropout, self.head = nn.Dropout(0.1), nn.Linear(DIM, num_tags)

    def forward(self, sentences: list[Tensor]) -> Tensor:
        """Scores (all words, tags); a window ends with its sentence."""
        x = self.dropout(self.mix(self.embedding(torch.cat(sentences))))
        lengths = torch.tensor([len(sentence) for sentence in sentences])
        last = lengths.cumsum(0) - 1
        before, after = torch.arange(len(x)), torch.arange(len(x)) + 2  # row 0: outside
        before[last - lengths + 1], after[last] = 0, 0
        for layer in self.layers:
            padded = nn.functional.pad(x, (0, 0, 1, 0))
            x = x + self.dropout(layer(torch.cat([padded[before], x, padded[after]], 1)))
        return self.head(x)


def spans(tags: list[str]) -> set[tuple[int, int, str]]:
    """Entities of a sentence: begin, end, kind."""
    found, begin, kind = set(), 0, ""
    for at, tag in enumerate([*tags, "O"]):
        if kind and tag != f"I-{kind}":
            found.add((begin, at, kind))
            kind = ""
        if tag != "O" and not kind:
            begin, kind = at, tag[2:]
    return found


def f1_scores(
    model: Tagger, part: Sentences, names: list[str], seen: set[str]
) -> tuple[float, float, float]:
    """F1 of all entities, of those whose text is in `seen`, and of the others."""
    model.eval()
    with torch.no_grad():
        found = model(part.ids).argmax(1).split([len(tags) for tags in part.tags])
    counts = np.zeros((3, 3), int)  # all, seen, unseen; right, predicted, true
    for words, predicted, tags in zip(part.texts, found, part.tags, strict=True):
        sets = [spans([names[i] for i in x.tolist()]) for x in (predicted, tags)]
        for column, entities in enumerate((sets[0] & sets[1], *sets)):
            for begin, end, _ in entities:
                counts[[0, 1 if " ".join(words[begin:end]) in seen else 2], column] += 1
    right, predicted, true = counts.T
    return tuple((2 * right / np.maximum(predicted + true, 1)).tolist())


def make_embedding(method: str, ids: Tensor) -> tuple[nn.Module, list[int]]:
    """The tables, and the rows of each."""
    implementation, share = METHODS[method]
    exact = ExactTables(ids)
    if implementation == "exact":
        return exact, exact.rows
    rows = [max(1, round(share * count)) for count in exact.rows]
    if implementation == "thinc":
        return ThincTables(rows), rows
    return MultiHashEmbedding(rows, DIM, seed=SEED), rows


def run(
    method: str, seed: int, epochs: int, data: tuple[Sentences, Sentences, list[str]]
) -> dict[str, Any]:
    whole, test, names = data
    torch.manual_seed(seed)
    begin = time.process_time()
    count = len(whole.ids)
    development = whole.at(range(0, count, 10))
    train = whole.at(i for i in range(count) if i % 10)
    seen = {
        " ".join(words[begin:end])
        for words, tags in zip(train.texts, train.tags, strict=True)
        for begin, end, _ in spans([names[i] for i in tags.tolist()])
    }
    embedding, rows = make_embedding(method, torch.cat(train.ids))
    model = Tagger(embedding, len(names))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    best: dict[str, Any] = {"development_f1": -1.0}
    for epoch in range(1, epochs + 1):
        model.train()
        for batch in torch.randperm(len(train.ids)).split(32):
            optimizer.zero_grad()
            scores = model([train.ids[i] for i in batch])
            labels = torch.cat([train.tags[i] for i in batch])
            nn.functional.cross_entropy(scores, labels).backward()
            optimizer.step()
        f1 = f1_scores(model, development, names, seen)[0]
        if f1 > best["development_f1"]:
            scores_of_test = f1_scores(model, test, names, seen)
            best = {"development_f1": f1, "epoch": epoch, "f1": scores_of_test}
    return {
        "method": method, "seed": seed, "epochs": epochs, "rows": rows, **best,
        "cpu_seconds": round(time.process_time() - begin, 1),
    }  # fmt: skip


def write_report(results: list[dict[str, Any]]) -> None:
    lines = [
        "Written by named_entities.py: F1 of entities of the test set, mean and standard deviation",
        "over the seeds; seen entities have a text that is one in the training set too.",
        "",
        "| tables | rows of " + ", ".join(ATTRIBUTES) + " | all | seen | unseen | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        own = [result for result in results if result["method"] == method]
        if own:
            f1 = np.array([result["f1"] for result in own])
            cells = [
                f"{mean:.3f}" + (f" +- {spread:.3f}" if len(own) > 1 else "")
                for mean, spread in zip(f1.mean(0), f1.std(0), strict=True)
            ]
            rows = ", ".join(f"{count:,}" for count in own[0]["rows"])
            lines.append(f"| {method} | {rows} | " + " | ".join(cells) + f" | {len(own)} |")
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=12)
    options = parser.parse_args()
    data = read(Path(os.environ["EMBLAS_DATA"]))
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    done = {(r["method"], r["seed"], r["epochs"]) for r in results}
    for seed in range(options.seeds):
        for method in METHODS:
            if (method, seed, options.epochs) not in done:
                results.append(run(method, seed, options.epochs, data))
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
                write_report(results)
                print(results[-1], flush=True)


if __name__ == "__main__":
    main()
