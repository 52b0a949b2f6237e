"""Quotient-remainder tables beside the hashing trick, on ratings of books.

Shi et al. (2020) claim that complementary partitions lose much less than hashing at the same size.
Task: was a logged book rated (23 % are)? Four fields (user, book, author, publisher), each embedded
in 16 dimensions, then layers of 64 and 32; the tables of all fields are looked up in one call and
compressed alike. Adam, 1e-3, batches of 1024, the epoch with the best validation loss counts; split
80/10/10 at random, anew for each seed.

    EMBLAS_DATA=... python benchmarks/experiments/quotient_remainder.py [--seeds 3] [--epochs 12]

Each finished run is added to quotient_remainder.json beside this file and not repeated; the table
quotient_remainder.md is written from it. Data: Ziegler, McNee, Konstan and Lausen, "Improving
Recommendation Lists Through Topic Diversification", WWW 2005.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from emblas.tables import Composition, Part, compose_bag
from torch import Tensor, nn

RESULTS = Path(__file__).with_suffix(".json")
DIM = 16
METHODS = {  # name: (method, part of the rows of a full table)
    "full table": ("full", 1),
    "hashing trick, n/4": ("hash", 4),
    "quotient-remainder, n/4": ("quotient-remainder", 4),
}


def read(folder: Path) -> tuple[Tensor, Tensor, list[int]]:
    """Ids (interactions, 4), labels, and the size of each field's vocabulary."""

    def rows(name: str) -> list[list[str]]:
        with gzip.open(folder / "book_crossing" / f"{name}.tsv.gz", "rt") as file:
            reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            return list(reader)[1:]

    authors: dict[str, int] = {}
    publishers: dict[str, int] = {}
    fields = {}
    for item, _, _, author, _, publisher in rows("items"):
        fields[item] = (
            authors.setdefault(author, len(authors)),
            publishers.setdefault(publisher, len(publishers)),
        )
    users: dict[str, int] = {}
    items: dict[str, int] = {}
    ids, labels = [], []
    for user, item, rating in rows("interactions"):
        ids.append(
            (users.setdefault(user, len(users)), items.setdefault(item, len(items)), *fields[item])
        )
        labels.append(float(rating) > 0)
    sizes = [len(users), len(items), len(authors), len(publishers)]
    return torch.tensor(ids), torch.tensor(labels, dtype=torch.float32), sizes


def tables(method: str, share: int, sizes: list[int]) -> tuple[Composition, Tensor]:
    """The tables of all fields as one composition, and their initial values."""
    parts: list[Part] = []
    values: list[Tensor] = []
    for feature, size in enumerate(sizes):
        rows = max(1, size // share)
        radices = [(rows, 1)]
        if method == "quotient-remainder":
            radices = [(-(-size // rows), rows), (rows, 1)]
        for count, divisor in radices:
            base = sum(value.numel() for value in values)
            parts.append(Part(count, DIM, "radix", a=divisor, base=base, column=feature * DIM,
                              feature=feature))  # fmt: skip
            mean = 1.0 if len(radices) == 2 and divisor > 1 else 0.0
            values.append(torch.randn(count * DIM) * 0.1 + mean)
    return Composition(tuple(parts), "product"), torch.cat(values)


class Model(nn.Module):
    def __init__(self, method: str, share: int, sizes: list[int]) -> None:
        super().__init__()
        self.composition, values = tables(method, share, sizes)
        self.table = nn.Parameter(values)
        self.layers = nn.Sequential(
            nn.Linear(len(sizes) * DIM, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(),
            nn.Linear(32, 1),
        )  # fmt: skip

    def forward(self, ids: Tensor) -> Tensor:
        return self.layers(compose_bag(ids, self.table, self.composition))[:, 0]


def area_under_curve(scores: Tensor, labels: Tensor) -> float:
    """Probability that a positive scores above a negative; ties count half."""
    _, where, counts = scores.unique(return_inverse=True, return_counts=True)
    rank = (counts.cumsum(0).double() - (counts - 1) / 2)[where]
    positives = int(labels.sum())
    above = float(rank[labels > 0].sum()) - positives * (positives + 1) / 2
    return above / (positives * (len(labels) - positives))


def run(name: str, seed: int, epochs: int, data: tuple[Tensor, Tensor, list[int]]) -> Any:
    ids, labels, sizes = data
    torch.manual_seed(seed)
    order = torch.randperm(len(ids))
    tenth = len(ids) // 10
    test, validation, train = order[:tenth], order[tenth : 2 * tenth], order[2 * tenth :]
    model = Model(*METHODS[name], sizes)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loss_of = nn.functional.binary_cross_entropy_with_logits
    best: dict[str, Any] = {"validation_loss": math.inf}
    begin = time.process_time()
    for epoch in range(epochs):
        for batch in train[torch.randperm(len(train))].split(1024):
            optimizer.zero_grad()
            loss_of(model(ids[batch]), labels[batch]).backward()
            optimizer.step()
        with torch.no_grad():
            loss = float(loss_of(model(ids[validation]), labels[validation]))
            if loss < best["validation_loss"]:
                scores = model(ids[test])
                best = {
                    "validation_loss": loss,
                    "epoch": epoch + 1,
                    "log_loss": float(loss_of(scores, labels[test])),
                    "auc": area_under_curve(scores, labels[test]),
                }
    return {
        "method": name, "seed": seed, "epochs": epochs, "table_parameters": model.table.numel(),
        **best, "cpu_seconds": round(time.process_time() - begin, 1),
    }  # fmt: skip


def write_table(results: list[dict[str, Any]]) -> None:
    lines = [
        "Written by quotient_remainder.py: test log loss and AUC, mean and standard deviation over",
        "the seeds.",
        "",
        "| method | table parameters | log loss | AUC | seeds |",
        "|---|---|---|---|---|",
    ]
    for name in METHODS:
        own = [result for result in results if result["method"] == name]
        if not own:
            continue
        loss, auc = (np.array([result[key] for result in own]) for key in ("log_loss", "auc"))
        lines.append(
            f"| {name} | {own[0]['table_parameters']:,} | {loss.mean():.4f} +- {loss.std():.4f} "
            f"| {auc.mean():.3f} +- {auc.std():.3f} | {len(own)} |"
        )
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=12)
    options = parser.parse_args()
    data = read(Path(os.environ["EMBLAS_DATA"]))
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    done = {(result["method"], result["seed"], result["epochs"]) for result in results}
    for seed in range(options.seeds):
        for name in METHODS:
            if (name, seed, options.epochs) in done:
                continue
            results.append(run(name, seed, options.epochs, data))
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            write_table(results)
            print(results[-1], flush=True)


if __name__ == "__main__":
    main()
