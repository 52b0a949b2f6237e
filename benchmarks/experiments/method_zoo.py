"""All table methods at equal bytes, on ratings of books: test log loss and AUC against the budget.

Task and network are those of quotient_remainder.py: was a logged book rated? Four fields (user,
book, author, publisher), 16 dimensions each, layers of 64 and 32, Adam with 1e-3, batches of 1024,
the epoch with the best validation loss counts. Here all fields share one vocabulary, numbered by
falling frequency, so that each method is one module; a budget is a part of the bytes of the full
table, and counts all that the method stores to serve: indices, codes, scales and masks too. Blocks
of ids (mixed dimension, AutoDim, OptEmbed) are ranges of frequency. Methods that prune search for
half of the epochs and then train what they keep from the first values, as their papers do.

    EMBLAS_DATA=... python benchmarks/experiments/method_zoo.py [--seeds 3] [--epochs 12]
        [--shares 4 16 64] [--methods NAME ...]

Each finished run is added to method_zoo.json beside this file and not repeated; method_zoo.md and
method_zoo.svg are written from it. A method that can't be made as small as a budget is left out.
Data: Ziegler, McNee, Konstan and Lausen, "Improving Recommendation Lists Through Topic
Diversification", WWW 2005.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from emblas import tables as t
from emblas.tables.base import TableModule
from emblas.tables.sparse import elements_for_budget
from quotient_remainder import area_under_curve, read
from torch import Tensor, nn

RESULTS = Path(__file__).with_suffix(".json")
DIM = 16


def blocks(rows: int) -> list[int]:
    """Ranges of frequency: each holds four times as many ids as the one before."""
    sizes = [rows]
    while sizes[0] > 256:
        sizes[:1] = [sizes[0] // 4, sizes[0] - sizes[0] // 4]
    return sizes


def cube(rows: int) -> tuple[int, int, int]:
    side = math.ceil(rows ** (1 / 3))
    return side, side, side


def full(rows: int) -> TableModule:
    return t.QuotientRemainderEmbedding(rows, DIM, 1, combine="sum")


def pruning_sparsity(rows: int, budget: int) -> float:
    return 1 - elements_for_budget(budget, rows, DIM) / (rows * DIM)


def auto_dim(rows: int, budget: int) -> TableModule:
    """Candidates around the width at which all blocks alike fill the budget."""
    middle = max(1, budget // (4 * rows))
    dims = sorted({max(1, middle // 2), middle, min(DIM, 2 * middle)})
    return t.AutoDimEmbedding(blocks(rows), DIM, dims)


def product_quantized(cls: Any, rows: int, budget: int, **options: Any) -> TableModule:
    """Up to 256 centroids for as many parts as fit."""
    for parts in (8, 4, 2):
        for centroids in (256, 64, 16):
            if cls._frozen_bytes(rows, DIM, parts, centroids) <= budget:
                module: TableModule = cls(rows, DIM, parts, centroids, **options)
                return module
    raise ValueError("num_bytes is too small for codes")


# name: the module to train, from the number of ids and the bytes it may need to serve
METHODS: dict[str, Callable[[int, int], TableModule]] = {
    "hashing trick": lambda n, b: t.HashEmbedding.from_budget(b, embedding_dim=DIM, num_hashes=1),
    "multiple hashes (4, sum)": lambda n, b: t.HashEmbedding.from_budget(b, embedding_dim=DIM),
    "hash embeddings": lambda n, b: t.WeightedHashEmbedding.from_budget(
        b, embedding_dim=DIM, num_importances=b // 32
    ),
    "unified (4 chunks)": lambda n, b: t.UnifiedEmbedding.from_budget(
        b, chunk_dim=DIM // 4, chunks=[4]
    ),
    "quotient-remainder, product": lambda n, b: t.QuotientRemainderEmbedding.from_budget(b, n, DIM),
    "quotient-remainder, concat": lambda n, b: t.QuotientRemainderEmbedding.from_budget(
        b, n, DIM, combine="concat"
    ),
    "ROBE": lambda n, b: t.RobeEmbedding.from_budget(b, DIM, 4),
    "tensor train": lambda n, b: t.TensorTrainEmbedding.from_budget(b, cube(n), (2, 4, 2)),
    "DHE": lambda n, b: t.DeepHashEmbedding.from_budget(
        b, embedding_dim=DIM, code_dim=128, num_layers=2
    ),
    "MEmCom": lambda n, b: t.MemComEmbedding.from_budget(b, num_embeddings=n, embedding_dim=DIM),
    "CCE": lambda n, b: t.ClusteredCompositionalEmbedding.from_budget(
        b, num_embeddings=n, embedding_dim=DIM, num_chunks=1
    ),
    "AdaptEmb": lambda n, b: t.AdaptiveEmbedding.from_budget(
        b, num_embeddings=n, embedding_dim=DIM, num_frequent=b // (8 * DIM)
    ),
    "Dedup": lambda n, b: full(n),
    "DPQ, vq": lambda n, b: product_quantized(t.ProductQuantizedEmbedding, n, b),
    "DPQ, sx": lambda n, b: product_quantized(t.ProductQuantizedEmbedding, n, b, kind="sx"),
    "MGQE": lambda n, b: product_quantized(t.MultiGranularQuantizedEmbedding, n, b),
    "ALPT": lambda n, b: t.QuantizedEmbedding.from_budget(b, n, DIM),
    "LSQ": lambda n, b: t.LearnedStepEmbedding(
        n, DIM, t.QuantizedEmbedding.from_budget(b, n, DIM, device="meta").bits
    ),
    "mixed dimension": lambda n, b: t.MixedDimensionEmbedding.from_budget(b, blocks(n), DIM),
    "AutoDim": auto_dim,
    "OptEmbed": lambda n, b: t.OptEmbedding(blocks(n), DIM),
    "PEP": lambda n, b: t.PepEmbedding(n, DIM),
    "DeepLight": lambda n, b: t.DeepLightEmbedding(n, DIM, pruning_sparsity(n, b), decay=0.9),
    "AutoSrh": lambda n, b: t.AutoSrhEmbedding(n, DIM),
}
FULL = "full table"


class Model(nn.Module):
    table: TableModule

    def __init__(self, table: TableModule, fields: int) -> None:
        super().__init__()
        self.table = table
        self.layers = nn.Sequential(
            nn.Linear(fields * DIM, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1)
        )

    def forward(self, ids: Tensor) -> Tensor:
        return self.layers(self.table(ids).flatten(1))[:, 0]


class Data:
    """Ids by falling frequency, one vocabulary for all fields; split 80/10/10 by the seed."""

    def __init__(self, ids: Tensor, labels: Tensor, sizes: list[int]) -> None:
        whole = ids + torch.tensor([0, *np.cumsum(sizes)[:-1]])
        counts = torch.bincount(whole.flatten(), minlength=sum(sizes))
        rank = torch.empty_like(counts)
        rank[counts.argsort(descending=True, stable=True)] = torch.arange(len(counts))
        self.ids, self.labels, self.rows = rank[whole], labels, len(counts)

    def split(self) -> tuple[Tensor, Tensor, Tensor]:
        test, validation, train = torch.randperm(len(self.ids)).tensor_split(
            [len(self.ids) // 10, len(self.ids) // 5]
        )
        return test, validation, train


def loss_of(model: Model, data: Data, part: Tensor) -> Tensor:
    scores = model(data.ids[part])
    return nn.functional.binary_cross_entropy_with_logits(scores, data.labels[part])


def train_epoch(model: Model, optimizer: Any, data: Data, train: Tensor) -> None:
    """One pass; `optimizer` is Adam, and ALPT beside it for a table of integers."""
    adam, alpt = optimizer
    model.train()
    for batch in train[torch.randperm(len(train))].split(1024):

        def closure(batch: Tensor = batch) -> Tensor:
            adam.zero_grad()
            loss = loss_of(model, data, batch) + model.table.auxiliary_loss()
            loss.backward()
            return loss

        closure()
        adam.step()
        if alpt is not None:
            alpt.step(closure)
        model.table.advance()


def optimizers(model: Model) -> tuple[torch.optim.Adam, t.ALPT | None]:
    if isinstance(model.table, t.QuantizedEmbedding):
        layers = torch.optim.Adam(model.layers.parameters(), lr=1e-3)
        return layers, t.ALPT(model.table, lr=0.02, scale_lr=1e-4)
    return torch.optim.Adam(model.parameters(), lr=1e-3), None


def searched(model: Model, first: Tensor | None, budget: int, data: Data, part: Tensor) -> Any:
    """The table to train after the search of a method that has one; None for the others."""
    table: Any = model.table
    if isinstance(table, t.AutoDimEmbedding):
        return table.select()
    if isinstance(table, t.DeepLightEmbedding) or first is None:
        return None
    if isinstance(table, t.OptEmbedding):
        model.eval()
        with torch.no_grad():
            table.search(lambda: float(loss_of(model, data, part)), generations=5, population=10,
                         parents=5)  # fmt: skip
    mask = table.mask(elements_for_budget(budget, data.rows, DIM))
    return t.SparseEmbedding.from_table(first, mask)


def served(model: Model, budget: int) -> TableModule:
    """The form of the table that is stored to serve."""
    table: Any = model.table
    if isinstance(table, t.DeepLightEmbedding):
        rows, dim = table.weight.shape
        return table.freeze(elements_for_budget(budget, rows, dim))
    return table.freeze() if hasattr(table, "freeze") else table


def deduplicated(table: Tensor, budget: int) -> TableModule:
    """Raise the tolerance until the table fits."""
    for tolerance in (0.02, 0.04, 0.08, 0.12, 0.16, 0.24, 0.32, 0.5, 1.0):
        module = t.DeduplicatedEmbedding.from_table(
            table, tolerance=tolerance, width=4 * tolerance, num_bands=8
        )
        if module.num_bytes <= budget:
            return module
    raise ValueError("num_bytes is too small for deduplication")


def run(name: str, share: int, seed: int, epochs: int, data: Data) -> dict[str, Any] | None:
    """One training; None if the method can't be made as small."""
    torch.manual_seed(seed)
    budget = data.rows * DIM * 4 // share
    begin = time.process_time()
    table: Any
    try:
        table = full(data.rows) if name == FULL else METHODS[name](data.rows, budget)
    except ValueError as error:
        if "num_bytes" not in str(error):
            raise
        return None
    test, validation, train = data.split()
    model = Model(table, data.ids.shape[1])
    first = table.weight.detach().clone() if hasattr(table, "mask") else None
    optimizer = optimizers(model)
    if first is not None or isinstance(table, t.AutoDimEmbedding):
        for _ in range(max(1, epochs // 2) if not isinstance(table, t.DeepLightEmbedding) else 0):
            train_epoch(model, optimizer, data, train)
        new = searched(model, first, budget, data, validation)
        if new is not None:
            model = Model(new, data.ids.shape[1])
            optimizer = optimizers(model)
    best: dict[str, Any] = {"validation_loss": math.inf}
    for epoch in range(epochs):
        train_epoch(model, optimizer, data, train)
        if isinstance(model.table, t.ClusteredCompositionalEmbedding) and epoch < epochs // 2:
            model.table.cluster(iterations=5)
            optimizer = optimizers(model)
        whole = model.table
        model.eval()
        with torch.no_grad():
            try:
                small = (
                    deduplicated(whole(torch.arange(data.rows)), budget)
                    if name == "Dedup"
                    else served(model, budget)
                )
            except ValueError:
                return None
            model.table = small
            loss = float(loss_of(model, data, validation))
            if loss < best["validation_loss"]:
                scores = model(data.ids[test])
                best = {
                    "validation_loss": loss,
                    "epoch": epoch + 1,
                    "bytes": small.num_bytes,
                    "log_loss": float(loss_of(model, data, test)),
                    "auc": area_under_curve(scores, data.labels[test]),
                }
            model.table = whole
    return {
        "method": name, "share": share, "seed": seed, "epochs": epochs, "budget": budget, **best,
        "cpu_seconds": round(time.process_time() - begin, 1),
    }  # fmt: skip


def write_report(results: list[dict[str, Any]]) -> None:
    finished = [result for result in results if "log_loss" in result]
    epochs = sorted({result["epochs"] for result in finished})
    shares = sorted({result["share"] for result in finished if result["method"] != FULL})
    lines = [
        "Written by method_zoo.py: test log loss / AUC (mean over the seeds; with several, the",
        "standard deviation of the loss), in brackets the bytes that the method stores to serve.",
        "Budgets are parts of the full table's bytes. All fields share one vocabulary, numbered by",
        f"falling frequency. Epochs: {', '.join(map(str, epochs))}. An empty cell: not run, or the",
        "method can't be made as small. AutoDim chooses its widths itself and may pass the budget.",
        "Few epochs favour methods that learn fast. Seeds: of the budget with the most.",
        "",
    ]
    full_runs = [result for result in finished if result["method"] == FULL]
    if full_runs:
        loss = np.mean([result["log_loss"] for result in full_runs])
        auc = np.mean([result["auc"] for result in full_runs])
        lines += [f"Full table: {loss:.4f} / {auc:.3f} ({full_runs[0]['bytes']:,}).", ""]
    lines += [
        "| method | " + " | ".join(f"1/{share}" for share in shares) + " | seeds |",
        "|---" * (len(shares) + 2) + "|",
    ]
    for name in METHODS:
        cells, seeds = [], 0
        for share in shares:
            own = [r for r in finished if r["method"] == name and r["share"] == share]
            seeds = max(seeds, len(own))
            if not own:
                cells.append("")
                continue
            losses = np.array([r["log_loss"] for r in own])
            spread = f" +- {losses.std():.4f}" if len(own) > 1 else ""
            auc = np.mean([r["auc"] for r in own])
            cells.append(f"{losses.mean():.4f}{spread} / {auc:.3f} ({own[0]['bytes']:,})")
        if seeds:
            lines.append(f"| {name} | " + " | ".join(cells) + f" | {seeds} |")
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")


def plot(results: list[dict[str, Any]]) -> None:
    """Log loss against bytes; needs matplotlib."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6))
    for number, name in enumerate([FULL, *METHODS]):
        own = [r for r in results if r["method"] == name and "log_loss" in r]
        points = sorted({r["share"]: (r["bytes"], r["log_loss"]) for r in own}.values())
        if points:
            axes.plot(*zip(*points, strict=True), marker="osD^v"[number % 5], label=name)
    axes.set(xscale="log", xlabel="bytes stored to serve", ylabel="test log loss")
    axes.legend(fontsize=7, ncol=2)
    figure.savefig(RESULTS.with_suffix(".svg"), metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--shares", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--methods", nargs="+", default=[FULL, *METHODS])
    options = parser.parse_args()
    data = Data(*read(Path(os.environ["EMBLAS_DATA"])))
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    done = {(r["method"], r["share"], r["seed"], r["epochs"]) for r in results}
    for seed in range(options.seeds):
        for share in options.shares:
            for name in options.methods:
                own_share = 1 if name == FULL else share
                key = (name, own_share, seed, options.epochs)
                if key in done:
                    continue
                done.add(key)
                result = run(name, own_share, seed, options.epochs, data)
                entry = dict(zip(("method", "share", "seed", "epochs"), key, strict=True))
                results.append(result or entry)
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
                write_report(results)
                print(results[-1], flush=True)
    try:
        plot(results)
    except ImportError:
        print("matplotlib is not installed: no plot")


if __name__ == "__main__":
    main()
