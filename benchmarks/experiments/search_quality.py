"""What each way of storing embeddings costs and keeps, on real texts.

Two parts, both with the vectors of all-MiniLM-L6-v2 (embeddings.py):

- scifact: nDCG@10 of the 300 test claims over 5,183 abstracts, beside the numbers that an
  independent computation gave; the script fails if one is off by more than 0.001.
- pool: 1,000 texts drawn from 176,701 short ones ask for the others. Recall@10 is the share of the
  exact search's ten (cosine in float32) that a scheme finds.

    EMBLAS_DATA=... python benchmarks/experiments/search_quality.py [scifact] [pool] [plot]

Queries per second are of one thread and count its processor time, the best of the rounds (1,000
queries in one call) that fit in four seconds: other work on the machine does not lower them.
Everything that is fitted (thresholds, rotations, ranges) sees 10,000 documents and no query.
search_quality.md and search_quality.svg are written from search_quality.json, both beside this
file.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import embeddings
import emblas
import torch
from emblas.binary import (
    HadamardRotation,
    Int8Quantizer,
    asymmetric_topk,
    dense_topk,
    fit_itq,
    fit_threshold,
    hamming_topk,
    inverse_norms,
    pack_planes,
    pack_rabitq,
    pack_sign,
    rescored_topk,
    symmetric_topk,
)
from emblas.evaluation import ndcg
from torch import Tensor

RESULTS = Path(__file__).with_suffix(".json")
QUERIES, SAMPLE, TOP = 1000, 10000, 10
EXPECTED = {  # nDCG@10 on scifact, computed with sentence-transformers and numpy
    "float": 0.64508,
    "sign bits": 0.58814,
    "sign bits, 4 x rescored by float": 0.63904,
    "asymmetric": 0.62285,
}


# --- scifact -----------------------------------------------------------------------------------


def scifact() -> dict[str, float]:
    folder = embeddings.data_folder() / "scifact"
    documents = list(embeddings.read_tsv(folder / "corpus.tsv.xz"))
    asked = [
        row for row in embeddings.read_tsv(folder / "queries.tsv.gz") if row["split"] == "test"
    ]
    row_of = {row["doc_id"]: i for i, row in enumerate(documents)}
    relevant: dict[str, dict[int, float]] = {row["query_id"]: {} for row in asked}
    for row in embeddings.read_tsv(folder / "qrels.tsv.gz"):
        if row["split"] == "test":
            relevant[row["query_id"]][row_of[row["doc_id"]]] = float(row["relevance"])
    vectors = embeddings.encode(
        "scifact-corpus", [row["title"] + " " + row["text"] for row in documents]
    )
    queries = embeddings.encode("scifact-queries-test", [row["text"] for row in asked])
    codes = pack_sign(vectors)
    found = {
        "float": dense_topk(queries, vectors, TOP)[1],
        "sign bits": hamming_topk(pack_sign(queries), codes, TOP)[1],
        "sign bits, 4 x rescored by float": rescored_topk(
            queries, codes, TOP, documents=vectors, multiplier=4
        )[1],
        "asymmetric": asymmetric_topk(queries, codes, TOP)[1],
    }
    return {name: ndcg(ids, list(relevant.values())) for name, ids in found.items()}


# --- the text pool -----------------------------------------------------------------------------


class Scheme(NamedTuple):
    name: str
    group: str  # for the plot
    bytes: float  # per document
    search: Callable[[Tensor], Tensor]  # queries to ids


def schemes(documents: Tensor) -> list[Scheme]:
    """Every scheme, its documents encoded; searching includes encoding the queries."""
    sample = documents[torch.randperm(len(documents), generator=torch.manual_seed(1))[:SAMPLE]]
    half = documents.half()
    quantizer = Int8Quantizer.fit(sample)
    int8 = quantizer.quantize(documents)
    rotation = HadamardRotation(documents.shape[1])
    itq = fit_itq(sample)
    signs = pack_sign(documents)

    def by_int8(queries: Tensor) -> Tensor:
        return dense_topk(quantizer.fold(queries)[0], int8, TOP)[1]

    found = [
        Scheme("float32, exact", "vectors", 1536, lambda q: dense_topk(q, documents, TOP)[1]),
        Scheme("float16", "vectors", 768, lambda q: dense_topk(q, half, TOP)[1]),
        Scheme("int8", "vectors", 384, by_int8),
    ]

    def bits(name: str, **options: Any) -> None:
        codes = pack_sign(documents, **options)
        found.append(
            Scheme(name, "Hamming", codes.shape[1],
                   lambda q: hamming_topk(pack_sign(q, **options), codes, TOP)[1])
        )  # fmt: skip

    bits("sign bits")
    bits("bits above the mean", threshold=fit_threshold(sample))
    bits("bits above the median", threshold=fit_threshold(sample, "median"))
    bits("bits after a random rotation", rotation=rotation)
    bits("ITQ bits", rotation=itq)

    def asymmetric(name: str, codes: Tensor, scale: Tensor | None = None,
                   rotate: Callable[[Tensor], Tensor] = lambda q: q) -> None:  # fmt: skip
        found.append(
            Scheme(name, "asymmetric", codes.shape[1] + (0 if scale is None else 4),
                   lambda q: asymmetric_topk(rotate(q), codes, TOP, scale=scale)[1])
        )  # fmt: skip

    asymmetric("asymmetric, sign bits", signs)
    # The mean shifts all scores of a query alike, so queries are rotated only.
    asymmetric("asymmetric, ITQ bits", pack_sign(documents, rotation=itq),
               rotate=lambda q: q @ itq.weight)  # fmt: skip
    rotated = rotation(documents)
    for count in (1, 2, 4):
        codes, scale, _ = pack_rabitq(rotated, count)
        asymmetric(f"RaBitQ, {count} bit{'s' * (count > 1)}", codes, scale, rotation)
    for count in (2, 4):
        codes = pack_planes(documents, count)
        asymmetric(f"asymmetric, {count} bits", codes, inverse_norms(codes, 384))

    two = pack_planes(documents, 2)
    norms = inverse_norms(two, 384)
    found.append(
        Scheme("symmetric, 2 bits", "symmetric", two.shape[1] + 4,
               lambda q: symmetric_topk(pack_planes(q, 2), two, TOP, dim=384, scale=norms)[1])
    )  # fmt: skip

    def rescored(name: str, width: int, **options: Any) -> None:
        found.append(
            Scheme(name, "rescored", 48 + width,
                   lambda q: rescored_topk(q, signs, TOP, **options)[1])
        )  # fmt: skip

    rescored("sign bits, 4 x by the bits themselves", 0)
    rescored("sign bits, 4 x by int8", 384, documents=int8, quantizer=quantizer)
    rescored("sign bits, 10 x by int8", 384, documents=int8, quantizer=quantizer, multiplier=10)
    rescored("sign bits, 4 x by float16", 768, documents=half)
    rescored("sign bits, 10 x by float16", 768, documents=half, multiplier=10)
    return found


def timed(search: Callable[[], Tensor], budget: float = 4.0) -> tuple[Tensor, float]:
    """The result, and the processor time of the fastest round within a budget of seconds."""
    begin = time.process_time()
    best = float("inf")
    while True:
        start = time.process_time()
        ids = search()
        best = min(best, time.process_time() - start)
        if time.process_time() - begin > budget:
            return ids, best


def pool() -> dict[str, Any]:
    vectors = embeddings.encode("textpool", embeddings.text_pool(embeddings.data_folder()))
    order = torch.randperm(len(vectors), generator=torch.manual_seed(0))
    queries, documents = vectors[order[:QUERIES]], vectors[order[QUERIES:]]
    exact = dense_topk(queries, documents, TOP)[1]
    torch.set_num_threads(1)
    rows = []
    for scheme in schemes(documents):
        ids, took = timed(lambda scheme=scheme: scheme.search(queries))  # type: ignore[misc]
        hits = (ids[:, :, None] == exact[:, None]).any(1).double().mean()
        rows.append(
            {
                "scheme": scheme.name, "group": scheme.group, "bytes": scheme.bytes,
                "recall": round(float(hits), 4), "queries_per_second": round(QUERIES / took),
            }
        )  # fmt: skip
        print(rows[-1], flush=True)
    return {"documents": len(documents), "queries": QUERIES, "rows": rows}


# --- table and plot ----------------------------------------------------------------------------


def machine() -> dict[str, str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "isa": emblas.info()["isa"],
        "torch": torch.__version__,
    }


def write_table(results: dict[str, Any]) -> None:
    lines = ["Written by search_quality.py, which says what is measured and how."]
    if "scifact" in results:
        lines += [
            "", "SciFact, test split, 384 dimensions:", "",
            "| scores | nDCG@10 | computed independently |", "|---|---|---|",
        ]  # fmt: skip
        lines += [
            f"| {name} | {value:.5f} | {EXPECTED[name]:.5f} |"
            for name, value in results["scifact"].items()
        ]
    if "pool" in results:
        pool, on = results["pool"], results["pool"]["machine"]
        lines += [
            "",
            f"Text pool, {pool['queries']:,} queries over {pool['documents']:,} documents, one "
            f"thread of {on['processor']} ({on['isa']}), torch {on['torch']}:",
            "", "| scheme | bytes per document | recall@10 | queries per second |",
            "|---|---|---|---|",
        ]  # fmt: skip
        lines += [
            f"| {row['scheme']} | {row['bytes']:,} | {row['recall']:.3f} "
            f"| {row['queries_per_second']:,} |"
            for row in pool["rows"]
        ]
        lines += ["", "![Recall against bytes and speed](search_quality.svg)"]
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")


def plot(results: dict[str, Any]) -> None:
    """Recall against bytes and against speed; needs matplotlib."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "emblas"  # the same file for the same numbers
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 5), sharey=True, layout="constrained")
    rows = results["pool"]["rows"]
    for group in dict.fromkeys(row["group"] for row in rows):
        own = [row for row in rows if row["group"] == group]
        for panel, key in zip(panels, ("bytes", "queries_per_second"), strict=True):
            panel.plot([row[key] for row in own], [row["recall"] for row in own], "o", label=group)
    for panel, key in zip(panels, ("bytes", "queries_per_second"), strict=True):
        panel.set_xscale("log")
        panel.set_xlabel(key.replace("_", " ").replace("bytes", "bytes per document"))
        panel.grid(alpha=0.3)
    # Names in a column beside the plot, in the order of recall, each with a line to its point.
    ordered = sorted(rows, key=lambda row: (row["recall"], row["queries_per_second"]))
    for place, row in enumerate(ordered):
        panels[1].annotate(
            row["scheme"], (row["queries_per_second"], row["recall"]), fontsize=7, va="center",
            xytext=(1.04, (place + 0.5) / len(rows)), textcoords="axes fraction",
            arrowprops={"arrowstyle": "-", "color": "0.8", "linewidth": 0.6},
        )  # fmt: skip
    panels[0].set_ylabel("recall@10 against float32")
    panels[0].legend()
    figure.savefig(RESULTS.with_suffix(".svg"), metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", help="scifact, pool, plot; all by default")
    parts = parser.parse_args().parts or ["scifact", "pool", "plot"]
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if "scifact" in parts:
        results["scifact"] = scifact()
    if "pool" in parts:
        results["pool"] = {**pool(), "machine": machine()}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_table(results)
    if "plot" in parts:
        plot(results)
    for name, value in results.get("scifact", {}).items():
        if abs(value - EXPECTED[name]) > 1e-3:
            raise SystemExit(f"scifact, {name}: {value:.5f}, not {EXPECTED[name]:.5f}")


if __name__ == "__main__":
    main()
