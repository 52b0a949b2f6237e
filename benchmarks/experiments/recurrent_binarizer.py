"""Learned codes of two bits per dimension beside sign bits and ITQ of the same bytes.

Vectors of all-MiniLM-L6-v2 of 176,701 short texts (embeddings.py) are split at random: 1,000
queries, 50,000 documents to search, 100,000 to train on; neither queries nor documents are seen in
training. Recall@10 is the share of the ten that float32 finds (whose own recall is 1 by this
measure) that a code of 48 bytes finds, both sides being codes:

- sign bits: 384; after a random rotation too, as the signs of dimensions may be correlated;
- ITQ: 384 bits (Gong et al. 2013);
- ITQ to 176 dimensions, then two bits each by a uniform quantizer, no training: 44 bytes and 4 for
  the length of the values, which differs where there are several bits;
- learned: RecurrentBinarizer of 176 dimensions and two bits (arXiv 2302.08714), 44 bytes and 4.

It is linear and starts at the solution of ITQ: the encoder is ITQ's rotation, the decoder its
transpose. "distilled" lets the cosines of the codes of a batch follow those of the embeddings
(emblas.losses.distill, KL divergence); "contrastive" trains on pairs of neighbors with
recurrent_binary_loss. Both draw batches of neighborhoods, 16 texts with 32 of their 64 nearest
each, so that all negatives within a neighborhood are hard ones. Adam, one cycle up and down.

The contrastive loss does not serve this measure: it tears neighbors apart that float32 keeps
together (a first run fell from 0.705 at its start to 0.643). It runs last and may be left out.

    EMBLAS_DATA=... python benchmarks/experiments/recurrent_binarizer.py [--seeds 3] [--steps 1000]

Each finished run is added to recurrent_binarizer.json beside this file and not repeated; the table
recurrent_binarizer.md is written from it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import embeddings
import torch
from emblas.binary import (
    HadamardRotation,
    LinearRotation,
    RecurrentBinarizer,
    dense_topk,
    fit_itq,
    hamming_topk,
    inverse_norms,
    pack_planes,
    pack_sign,
    recurrent_binary_loss,
    symmetric_topk,
)
from emblas.losses import distill
from torch import Tensor

RESULTS = Path(__file__).with_suffix(".json")
TOP, BITS, DIM, SAMPLE = 10, 2, 176, 8000
CENTRES, NEIGHBORS, PICKED = 16, 64, 32  # of a batch: neighborhoods, their size, drawn from each


class Data(NamedTuple):
    queries: Tensor
    documents: Tensor
    train: Tensor
    best: Tensor  # ids of the documents that float32 finds
    neighborhoods: Tensor  # (8,000, 64) rows of train, each row's first is its middle


def load() -> Data:
    vectors = embeddings.encode("textpool", embeddings.text_pool(embeddings.data_folder()))
    order = torch.randperm(len(vectors), generator=torch.manual_seed(0))
    parts = vectors[order].split([1000, 50_000, 100_000, len(vectors) - 151_000])
    queries, documents, train = parts[:3]
    return Data(
        queries,
        documents,
        train,
        dense_topk(queries, documents, TOP)[1],
        dense_topk(train[:SAMPLE], train, NEIGHBORS)[1],
    )


def recall(found: Tensor, data: Data) -> float:
    return float((found[:, :, None] == data.best[:, None]).any(1).double().mean())


def sign_recall(data: Data, rotation: Callable[[Tensor], Tensor] | None) -> float:
    queries, documents = (pack_sign(x, rotation=rotation) for x in (data.queries, data.documents))
    return recall(hamming_topk(queries, documents, TOP)[1], data)


def planes_recall(data: Data, encode: Callable[[Tensor], Tensor]) -> float:
    queries, documents = encode(data.queries), encode(data.documents)
    scale = inverse_norms(documents, DIM)
    return recall(symmetric_topk(queries, documents, TOP, dim=DIM, scale=scale)[1], data)


def start(rotation: LinearRotation, sample: Tensor) -> RecurrentBinarizer:
    """A binarizer whose first codes are those of a rotation."""
    module = RecurrentBinarizer(sample.shape[1], DIM, bits=BITS)
    spread = rotation(sample).std()  # the straight-through gradient passes where |x| <= 1
    with torch.no_grad():
        layers = [layer for layer in module.modules() if isinstance(layer, torch.nn.Linear)]
        encoder, decoder, residual = layers
        encoder.weight.copy_(rotation.weight.T / spread)
        encoder.bias.copy_(-(rotation.mean @ rotation.weight) / spread)
        decoder.weight.copy_(rotation.weight * spread * (2 / torch.pi) ** 0.5)  # E|x| of a normal
        decoder.bias.copy_(rotation.mean)
        residual.weight.copy_(rotation.weight.T / spread * 2)
    return module


def batch_loss(method: str, module: RecurrentBinarizer, data: Data, g: torch.Generator) -> Tensor:
    chosen = torch.randint(0, len(data.neighborhoods), (CENTRES,), generator=g)
    columns = torch.rand(CENTRES, NEIGHBORS, generator=g).argsort(1)[:, :PICKED]
    rows = data.neighborhoods[chosen].gather(1, columns).flatten().unique()
    x = data.train[rows[torch.randperm(len(rows), generator=g)]]
    if method == "distilled":
        return distill(module(x), x, "similarity", temperature=0.1)
    # Half of the texts ask for the nearest of the other half.
    count = len(x) // 2
    nearest = (x[:count] @ x[count:].T).argmax(1)
    values = module(x)
    return recurrent_binary_loss(values[:count], values[count:][nearest], nearest)


def learned_recall(data: Data, method: str, rotation: LinearRotation, seed: int, steps: int) -> Any:
    torch.manual_seed(seed)
    module = start(rotation, data.train[:SAMPLE])
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1e-3, total_steps=steps, pct_start=0.1
    )
    generator = torch.Generator().manual_seed(seed)
    begin = time.process_time()
    for _ in range(steps):
        optimizer.zero_grad()
        batch_loss(method, module, data, generator).backward()
        optimizer.step()
        schedule.step()
    seconds = round(time.process_time() - begin, 1)
    module.eval()
    return {"recall": planes_recall(data, module.encode), "cpu_seconds": seconds, "steps": steps}


@cache
def narrow_itq(data: Data, seed: int) -> LinearRotation:
    return fit_itq(data.train[:SAMPLE], DIM, seed=seed)


METHODS = {
    "sign bits": "48",
    "sign bits after a random rotation": "48",
    "ITQ": "48",
    "ITQ, two bits": "44 + 4",
    "learned, distilled": "44 + 4",
    "learned, contrastive": "44 + 4",
}


def run(name: str, seed: int, steps: int, data: Data) -> dict[str, Any]:
    if name == "sign bits":
        return {"recall": sign_recall(data, None)}
    if name == "sign bits after a random rotation":
        return {"recall": sign_recall(data, HadamardRotation(384, seed=seed))}
    sample = data.train[:SAMPLE]
    if name == "ITQ":
        return {"recall": sign_recall(data, fit_itq(sample, seed=seed))}
    rotation = narrow_itq(data, seed)
    if name == "ITQ, two bits":
        # One scale for queries and documents, as the best uniform quantizer of the sample has it.
        scale = float(rotation(sample).square().mean().sqrt()) * 0.9957
        return {"recall": planes_recall(data, lambda x: pack_planes(rotation(x), 2, scale=scale))}
    return learned_recall(data, name.removeprefix("learned, "), rotation, seed, steps)


def write_table(results: list[dict[str, Any]]) -> None:
    lines = [
        "Written by recurrent_binarizer.py, which says what is measured: recall@10 against float32",
        "of held-out queries over held-out documents.",
        "",
        "| code | bytes | recall@10, mean | smallest to largest | seeds | training, CPU seconds |",
        "|---|---|---|---|---|---|",
        "| float32 | 1,536 | 1.000 | | | |",
    ]
    for name, size in METHODS.items():
        own = [result for result in results if result["method"] == name]
        if not own:
            continue
        recalls = [result["recall"] for result in own]
        spread = f"{min(recalls):.4f} to {max(recalls):.4f}" if len(own) > 1 else ""
        seconds = [result["cpu_seconds"] for result in own if "cpu_seconds" in result]
        trained = f"{max(seconds):.0f}" if seconds else ""
        lines.append(
            f"| {name} | {size} | {sum(recalls) / len(own):.4f} | {spread} "
            f"| {len(own) if len(own) > 1 else ''} | {trained} |"
        )
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    data = load()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    done = {(result["method"], result["seed"]) for result in results}
    for name in METHODS:
        for seed in range(options.seeds):
            if (name, seed) in done or (name == "sign bits" and seed):
                continue
            measured = run(name, seed, options.steps, data)
            results.append({"method": name, "seed": seed, **measured})
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            write_table(results)
            print(results[-1], flush=True)


if __name__ == "__main__":
    main()
