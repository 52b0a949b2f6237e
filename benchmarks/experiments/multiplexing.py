"""Feature multiplexing beside separate hashed tables, on ratings of films.

Coleman et al. (2023) claim that one table which all features share loses less than one hashed table
for each feature at the same size, and that the gap grows as the size shrinks. Task: was a film
rated 4 or 5 rather than 1 or 2? Six features of 30 dimensions; a budget is a part of the rows of
all vocabularies together. Separate tables divide it in proportion to their vocabularies; the shared
table gives each feature one row, or six rows of 5 side by side. The network is DCN-V2's: one cross
layer beside a layer of 192; Adam, 1e-3, weight decay 1e-5, batches of 128, values start uniform
within 0.05. Split 80/10/10 at random, anew for each seed; the epoch with the best validation AUC
counts, and training ends five epochs after it.

    python benchmarks/experiments/multiplexing.py [--seeds 3] [--epochs 30]

Each finished run is added to multiplexing.json beside this file and not repeated; the table
multiplexing.md is written from it. Data: see movielens.py.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from emblas.tables import Composition, Part, UnifiedEmbedding, compose_bag
from movielens import read
from quotient_remainder import area_under_curve
from torch import Tensor, nn

RESULTS = Path(__file__).with_suffix(".json")
DIM = 30
BUDGETS = (1.0, 0.5, 0.1)
FULL, SEPARATE = "a row for each value", "separate hashed tables"
MULTIPLEXED = {"multiplexed": 1, "multiplexed, 6 chunks": 6}
METHODS = (FULL, SEPARATE, *MULTIPLEXED)


class SeparateTables(nn.Module):
    """One table for each feature, of hashed ids or with a row for each."""

    def __init__(self, rows: list[int], hashed: bool) -> None:
        super().__init__()
        first = np.cumsum([0, *rows]).tolist()
        self.composition = Composition(tuple(
            Part(count, DIM, "splitmix64" if hashed else "radix", a=feature if hashed else 1,
                 base=first[feature] * DIM, column=feature * DIM, feature=feature)
            for feature, count in enumerate(rows)
        ))  # fmt: skip
        self.weight = nn.Parameter(torch.empty(first[-1] * DIM))

    def forward(self, ids: Tensor) -> Tensor:
        return compose_bag(ids, self.weight, self.composition)


def make_table(method: str, budget: float, sizes: list[int]) -> Any:
    if method in MULTIPLEXED:
        chunks = MULTIPLEXED[method]
        rows = int(budget * sum(sizes)) * chunks
        return UnifiedEmbedding(rows, DIM // chunks, [chunks] * len(sizes))
    if method == FULL:
        return SeparateTables(sizes, hashed=False)
    return SeparateTables([max(1, int(budget * size)) for size in sizes], hashed=True)


class Model(nn.Module):
    def __init__(self, method: str, budget: float, sizes: list[int]) -> None:
        super().__init__()
        width = len(sizes) * DIM
        self.table = make_table(method, budget, sizes)
        nn.init.uniform_(self.table.weight, -0.05, 0.05)
        self.cross, self.deep = nn.Linear(width, width), nn.Linear(width, 192)
        self.head = nn.Linear(width + 192, 1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids).reshape(len(ids), -1)
        crossed = x * self.cross(x) + x
        return self.head(torch.cat([crossed, self.deep(x).relu()], 1))[:, 0]


def run(
    method: str, budget: float, seed: int, epochs: int, data: tuple[Tensor, Tensor, list[int]]
) -> dict[str, Any]:
    ids, labels, sizes = data
    torch.manual_seed(seed)
    begin = time.process_time()
    tenth = len(ids) // 10
    test, validation, train = torch.randperm(len(ids)).tensor_split([tenth, 2 * tenth])
    model = Model(method, budget, sizes)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-5)
    loss_of = nn.functional.binary_cross_entropy_with_logits
    best: dict[str, Any] = {"validation_auc": 0.0, "epoch": 0}
    for epoch in range(1, epochs + 1):
        for batch in train[torch.randperm(len(train))].split(128):
            optimizer.zero_grad()
            loss_of(model(ids[batch]), labels[batch]).backward()
            optimizer.step()
        with torch.no_grad():
            auc = area_under_curve(model(ids[validation]), labels[validation])
            if auc > best["validation_auc"]:
                best = {
                    "validation_auc": auc,
                    "epoch": epoch,
                    "auc": area_under_curve(model(ids[test]), labels[test]),
                }
        if epoch >= best["epoch"] + 5:
            break
    return {
        "method": method, "budget": budget, "seed": seed, "epochs": epochs, **best,
        "bytes": model.table.weight.numel() * 4,
        "cpu_seconds": round(time.process_time() - begin, 1),
    }  # fmt: skip


def write_report(results: list[dict[str, Any]]) -> None:
    def values(method: str, budget: float) -> np.ndarray[Any, Any]:
        own = [r for r in results if (r["method"], r["budget"]) == (method, budget)]
        return np.array([r["auc"] for r in sorted(own, key=lambda r: r["seed"])])

    def cell(numbers: np.ndarray[Any, Any], sign: str = "") -> str:
        if not len(numbers):
            return ""
        spread = f" +- {numbers.std():.4f}" if len(numbers) > 1 else ""
        return f"{numbers.mean():{sign}.4f}{spread}"

    lines = [
        "Written by multiplexing.py: test AUC, mean and standard deviation over the seeds; gain:",
        "over separate hashed tables with the same seed.",
        "",
        f"{FULL.capitalize()}: {cell(values(FULL, 1.0))}.",
        "",
        "| rows, part of all values | " + SEPARATE + " | "
        + " | ".join(f"{name} | gain" for name in MULTIPLEXED) + " |",
        "|---" * (2 + 2 * len(MULTIPLEXED)) + "|",
    ]  # fmt: skip
    for budget in BUDGETS:
        separate = values(SEPARATE, budget)
        cells = [f"{budget:g}", cell(separate)]
        for name in MULTIPLEXED:
            own = values(name, budget)
            cells += [cell(own), cell(own - separate[: len(own)], "+")]
        lines.append("| " + " | ".join(cells) + " |")
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30)
    options = parser.parse_args()
    data = read()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    done = {(r["method"], r["budget"], r["seed"], r["epochs"]) for r in results}
    for seed in range(options.seeds):
        for method in METHODS:
            for budget in BUDGETS if method != FULL else BUDGETS[:1]:
                if (method, budget, seed, options.epochs) in done:
                    continue
                results.append(run(method, budget, seed, options.epochs, data))
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
                write_report(results)
                print(results[-1], flush=True)


if __name__ == "__main__":
    main()
