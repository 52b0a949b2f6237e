"""Link prediction among Debian packages, with a table in partitions on disk.

PyTorch-BigGraph (Lerer et al., 2019) trains bucket by bucket, with two partitions of the table in
memory. What does that cost in quality? Task: which package does a package depend on, recommend or
suggest? Score of an edge: inner product of the two vectors, the target's multiplied by a vector of
the kind of edge. Loss: softmax against 50 targets of the batch and 50 drawn from the partition.
Row-wise Adagrad with 0.1, 64 dimensions, batches of 1000 edges; 5 % of the edges are for testing.
Measured: mean reciprocal rank and hits at 10 of a test edge's target among 1000 drawn packages.

    EMBLAS_DATA=... python benchmarks/experiments/link_prediction.py [--seeds 3] [--epochs 5]
        [--partitions 1 4]

Each finished run is added to link_prediction.json beside this file and not repeated;
link_prediction.md is written from it.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from emblas.tables import PartitionedEmbedding, bucket_order
from torch import Tensor, nn

RESULTS = Path(__file__).with_suffix(".json")
DIM = 64
KINDS = {"D": 0, "R": 1, "S": 2}


def read(folder: Path) -> Tensor:
    """Edges (edges, 3): source, target, kind."""
    with lzma.open(folder / "debian_deps" / "edges.tsv.xz", "rt") as file:
        next(file)
        rows = [line.rstrip("\n").split("\t") for line in file]
    return torch.tensor([[int(source), int(target), KINDS[kind]] for source, target, kind in rows])


class Model(nn.Module):
    def __init__(self, table: PartitionedEmbedding) -> None:
        super().__init__()
        self.table = table
        self.kinds = nn.Parameter(torch.ones(len(KINDS), DIM))

    def scores(self, edges: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        """Of edges (edges,), and of their sources with other targets (edges, others)."""
        ids = torch.cat([edges[:, 0], edges[:, 1], others])
        source, target, other = self.table(ids).split([len(edges), len(edges), len(others)])
        source = source * self.kinds[edges[:, 2]]
        return (source * target).sum(1), source @ other.t()


def loss_of(model: Model, edges: Tensor, low: int, high: int) -> Tensor:
    drawn = torch.randint(low, high, (50,))
    batch = edges[torch.randint(0, len(edges), (50,)), 1]
    others = torch.cat([batch, drawn])
    right, wrong = model.scores(edges, others)
    wrong = wrong.masked_fill(edges[:, 1:2] == others, -torch.inf)
    return nn.functional.cross_entropy(
        torch.cat([right[:, None], wrong], 1), torch.zeros(len(edges), dtype=torch.int64)
    )


def ranks(model: Model, edges: Tensor, num_nodes: int) -> Tensor:
    """Rank of each edge among 1000 others with the same source."""
    found = []
    for part in edges.split(1000):
        others = torch.randint(0, num_nodes, (1000,))
        right, wrong = model.scores(part, others)
        wrong = wrong.masked_fill(part[:, 1:2] == others, -torch.inf)
        found.append(1 + (wrong >= right[:, None]).sum(1))
    return torch.cat(found)


def run(partitions: int, seed: int, epochs: int, edges: Tensor) -> dict[str, Any]:
    torch.manual_seed(seed)
    num_nodes = int(edges[:, :2].max()) + 1
    shuffled = edges[torch.randperm(len(edges))]
    test, train = shuffled.tensor_split([len(edges) // 20])
    bounds = torch.tensor([p * num_nodes // partitions for p in range(partitions + 1)])
    part = torch.bucketize(train[:, :2].contiguous(), bounds, right=True) - 1
    begin = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        table = PartitionedEmbedding(folder, num_nodes, DIM, partitions, std=0.1, seed=seed)
        model = Model(table)
        optimizer = torch.optim.Adagrad([model.kinds], lr=0.1)
        most = 0
        for _ in range(epochs):
            for i, j in bucket_order(partitions):
                table.swap([i, j])
                most = max(most, sum(weight.numel() for weight in table.weights.values()))
                own = train[(part == torch.tensor([i, j])).all(1)]
                for batch in own[torch.randperm(len(own))].split(1000):
                    optimizer.zero_grad()
                    loss_of(model, batch, int(bounds[j]), int(bounds[j + 1])).backward()
                    optimizer.step()
                    table.step(0.1)
        seconds = time.process_time() - begin
        table.swap(range(partitions))
        with torch.no_grad():
            rank = ranks(model, test, num_nodes).double()
    return {
        "partitions": partitions, "seed": seed, "epochs": epochs, "nodes": num_nodes,
        "share_in_memory": most / (num_nodes * DIM), "mrr": float((1 / rank).mean()),
        "hits_at_10": float((rank <= 10).double().mean()), "cpu_seconds": round(seconds, 1),
    }  # fmt: skip


def write_table(results: list[dict[str, Any]]) -> None:
    lines = [
        "Written by link_prediction.py: mean and standard deviation over the seeds.",
        "",
        "| partitions | part in memory | mean reciprocal rank | hits at 10 | seeds | epochs |",
        "|---|---|---|---|---|---|",
    ]
    for partitions, epochs in sorted({(r["partitions"], r["epochs"]) for r in results}):
        own = [r for r in results if (r["partitions"], r["epochs"]) == (partitions, epochs)]
        cells = [
            f"{np.mean([r[key] for r in own]):.4f} +- {np.std([r[key] for r in own]):.4f}"
            for key in ("mrr", "hits_at_10")
        ]
        share = own[0]["share_in_memory"]
        lines.append(
            f"| {partitions} | {share:.2f} | {' | '.join(cells)} | {len(own)} | {epochs} |"
        )
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--partitions", type=int, nargs="+", default=[1, 4])
    options = parser.parse_args()
    edges = read(Path(os.environ["EMBLAS_DATA"]))
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    done = {(r["partitions"], r["seed"], r["epochs"]) for r in results}
    for seed in range(options.seeds):
        for partitions in options.partitions:
            if (partitions, seed, options.epochs) in done:
                continue
            results.append(run(partitions, seed, options.epochs, edges))
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            write_table(results)
            print(results[-1], flush=True)


if __name__ == "__main__":
    main()
