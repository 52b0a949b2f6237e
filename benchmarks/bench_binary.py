"""Bit codes beside faiss, numpy and torch: exact Hamming top-10 and sign packing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from conftest import rotate
from emblas.binary import HadamardRotation, hamming_topk, pack_sign

ROWS = 1_000_000
K = 10


def _emblas(codes: np.ndarray, threads: int) -> Callable[[np.ndarray], Any]:
    documents = torch.from_numpy(codes)
    return lambda queries: hamming_topk(torch.from_numpy(queries), documents, K)


def _faiss(codes: np.ndarray, threads: int) -> Callable[[np.ndarray], Any]:
    faiss.omp_set_num_threads(threads)
    index = faiss.IndexBinaryFlat(codes.shape[1] * 8)
    index.add(codes)
    return lambda queries: index.search(queries, K)


def _numpy(codes: np.ndarray, threads: int) -> Callable[[np.ndarray], Any]:
    words = codes.view(np.uint64)

    def search(queries: np.ndarray) -> None:
        for query in queries.view(np.uint64):
            distances = np.bitwise_count(words ^ query).sum(1, dtype=np.int32)
            nearest = np.argpartition(distances, K)[:K]
            nearest[np.argsort(distances[nearest], kind="stable")]

    return search


CONTENDERS = {"emblas": _emblas, "faiss IndexBinaryFlat": _faiss, "numpy bitwise_count": _numpy}


@pytest.mark.parametrize("who", CONTENDERS)
@pytest.mark.parametrize("queries", [1, 16, 256])
@pytest.mark.parametrize("bits", [256, 512, 1024])
def bench_hamming_topk(row: Any, threads: int, bits: int, queries: int, who: str) -> None:
    if who.startswith("numpy") and queries > 1:
        pytest.skip("one query at a time: the same per query")
    codes = np.random.default_rng(0).integers(0, 256, (ROWS, bits // 8), dtype=np.uint8)
    batches = [
        (np.random.default_rng(seed).integers(0, 256, (queries, bits // 8), dtype=np.uint8),)
        for seed in range(8)
    ]
    row(
        "binary", "hamming_topk k=10", who,
        shape=f"{queries} queries x 1M codes", dtype=f"{bits} bits",
        call=CONTENDERS[who](codes, threads), inputs=batches, bytes=codes.nbytes,
        single_thread=who.startswith("numpy"),
    )  # fmt: skip


PACKERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "emblas": pack_sign,
    "numpy packbits": lambda x: np.packbits(x.numpy() > 0, axis=1),
}


@pytest.mark.parametrize("who", PACKERS)
def bench_pack_sign(row: Any, who: str) -> None:
    size = 10_000 * 768 * 4
    row(
        "binary", "pack_sign", who, shape="10000 x 768", dtype="float32", call=PACKERS[who],
        inputs=rotate(lambda seed: (torch.randn(10_000, 768),), size), bytes=size,
        single_thread=who.startswith("numpy"),
    )  # fmt: skip


@pytest.mark.parametrize("who", ["emblas", "torch matmul"])
def bench_hadamard_rotation(row: Any, threads: int, who: str) -> None:
    size = 10_000 * 768 * 4
    matrix, rotation = torch.randn(768, 768), HadamardRotation(768)
    row(
        "binary", "random rotation", who, shape="10000 x 768", dtype="float32",
        call=rotation if who == "emblas" else lambda x: x @ matrix,
        inputs=rotate(lambda seed: (torch.randn(10_000, 768),), size), bytes=2 * size,
    )  # fmt: skip
