"""Bit codes beside faiss, numpy and torch: packing, and exact search of every kind."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from conftest import rotate
from emblas.binary import (
    HadamardRotation,
    asymmetric_topk,
    dense_topk,
    hamming_distance,
    hamming_topk,
    maxsim,
    pack_sign,
    range_search_csr,
    symmetric_topk,
    unpack_planes,
    unpack_sign,
)

ROWS = 1_000_000
K = 10


@lru_cache(maxsize=1)
def _codes(rows: int, bits: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (rows, bits // 8), dtype=np.uint8)


def _emblas(codes: np.ndarray, k: int, threads: int) -> Callable[[np.ndarray], Any]:
    documents = torch.from_numpy(codes)
    return lambda queries: hamming_topk(torch.from_numpy(queries), documents, k)


def _faiss(codes: np.ndarray, k: int, threads: int) -> Callable[[np.ndarray], Any]:
    faiss.omp_set_num_threads(threads)
    index = faiss.IndexBinaryFlat(codes.shape[1] * 8)
    index.add(codes)
    return lambda queries: index.search(queries, k)


def _usearch(codes: np.ndarray, k: int, threads: int) -> Callable[[np.ndarray], Any]:
    usearch = pytest.importorskip("usearch.index")
    return lambda queries: usearch.search(
        codes, queries, k, usearch.MetricKind.Hamming, exact=True, threads=threads,
        dtype=usearch.ScalarKind.B1,
    )  # fmt: skip


def _nearest(distances: np.ndarray, k: int) -> np.ndarray:
    nearest = np.argpartition(distances, k)[:k]
    return nearest[np.argsort(distances[nearest], kind="stable")]


def _numkong(codes: np.ndarray, k: int, threads: int) -> Callable[[np.ndarray], Any]:
    numkong = pytest.importorskip("numkong")
    packed = numkong.hammings_pack(codes)
    return lambda queries: [
        _nearest(row, k) for row in np.asarray(numkong.hammings_packed(queries, packed))
    ]


def _numpy(codes: np.ndarray, k: int, threads: int) -> Callable[[np.ndarray], Any]:
    words = codes.view(np.uint64)
    return lambda queries: [
        _nearest(np.bitwise_count(words ^ query).sum(1, dtype=np.int32), k)
        for query in queries.view(np.uint64)
    ]


CONTENDERS = {
    "emblas": _emblas,
    "faiss IndexBinaryFlat": _faiss,
    "usearch exact": _usearch,
    "numkong hammings_packed": _numkong,
    "numpy bitwise_count": _numpy,
}
# Of those that take the same time for each query of a batch, or nearly: the largest batch.
LARGEST_BATCH = {"usearch exact": 16, "numkong hammings_packed": 16, "numpy bitwise_count": 1}


@pytest.mark.parametrize("who", CONTENDERS)
@pytest.mark.parametrize("k", [10, 100])
@pytest.mark.parametrize("queries", [1, 16, 256])
@pytest.mark.parametrize("bits", [256, 512, 1024])
@pytest.mark.parametrize("millions", [1, 8])
def bench_hamming_topk(
    row: Any, threads: int, millions: int, bits: int, queries: int, k: int, who: str
) -> None:
    if queries > LARGEST_BATCH.get(who, queries):
        pytest.skip("the same for each query of a larger batch")
    if millions > 1 and (queries > 16 or k != K or who not in ("emblas", "faiss IndexBinaryFlat")):
        pytest.skip("the same for each code as with one million")
    codes = _codes(millions * ROWS, bits)
    batches = [
        (np.random.default_rng(seed).integers(0, 256, (queries, bits // 8), dtype=np.uint8),)
        for seed in range(1, 9)
    ]
    row(
        "binary", f"hamming_topk k={k}", who,
        shape=f"{queries} queries x {millions}M codes", dtype=f"{bits} bits",
        call=CONTENDERS[who](codes, k, threads), inputs=batches, bytes=codes.nbytes,
        single_thread=who.startswith(("numpy", "numkong")),
    )  # fmt: skip


def _asymmetric(codes: torch.Tensor, k: int) -> dict[str, Callable[[torch.Tensor], Any]]:
    dim = codes.shape[1] * 8
    signs = unpack_sign(codes[:100_000], dim)  # the dense form needs 32 times the memory
    return {
        "emblas": lambda queries: asymmetric_topk(queries, codes, k),
        "emblas hamming_topk": lambda queries: hamming_topk(pack_sign(queries.float()), codes, k),
        "torch matmul + topk, 100k": lambda queries: (queries.float() @ signs.T).topk(k),
    }


@pytest.mark.parametrize("who", ["emblas", "emblas hamming_topk", "torch matmul + topk, 100k"])
@pytest.mark.parametrize("queries", [1, 16])
@pytest.mark.parametrize("bits", [256, 512, 1024])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def bench_asymmetric_topk(
    row: Any, threads: int, dtype: str, bits: int, queries: int, who: str
) -> None:
    if dtype == "float32" and bits > 256:
        pytest.skip("the scan is that of int8")
    codes = torch.from_numpy(_codes(ROWS, bits))
    wanted = [torch.randn(queries, bits) for _ in range(8)]
    if dtype == "int8":
        wanted = [(x * 40).round().clamp(-127, 127).to(torch.int8) for x in wanted]
    row(
        "binary", "asymmetric_topk k=10", who,
        shape=f"{queries} queries x 1M codes", dtype=f"{dtype} x {bits} bits",
        call=_asymmetric(codes, K)[who], inputs=[(x,) for x in wanted], bytes=codes.numel(),
    )  # fmt: skip


@pytest.mark.parametrize("who", ["emblas", "emblas hamming_topk", "torch matmul + topk, 100k"])
@pytest.mark.parametrize("dim", [256, 512])
def bench_symmetric_topk(row: Any, threads: int, dim: int, who: str) -> None:
    codes, width = torch.from_numpy(_codes(ROWS, 2 * dim)), dim // 8
    values, signs = unpack_planes(codes[:100_000], dim), codes[:, :width].contiguous()
    calls: dict[str, Callable[[torch.Tensor], Any]] = {
        "emblas": lambda queries: symmetric_topk(queries, codes, K, dim=dim),
        "emblas hamming_topk": lambda queries: hamming_topk(queries[:, :width], signs, K),
        "torch matmul + topk, 100k": lambda queries: (unpack_planes(queries, dim) @ values.T).topk(
            K
        ),
    }
    row(
        "binary", "symmetric_topk k=10", who, shape="16 queries x 1M codes",
        dtype=f"{dim} x 2 bits", call=calls[who],
        inputs=[(codes[i : i + 16],) for i in range(0, 800, 100)], bytes=codes.numel(),
    )  # fmt: skip


@pytest.mark.parametrize("who", ["emblas", "faiss IndexBinaryFlat"])
def bench_range_search(row: Any, threads: int, who: str) -> None:
    codes = np.random.default_rng(0).integers(0, 256, (ROWS, 32), dtype=np.uint8)
    faiss.omp_set_num_threads(threads)
    index = faiss.IndexBinaryFlat(256)
    index.add(codes)
    documents = torch.from_numpy(codes)
    calls: dict[str, Callable[[np.ndarray], Any]] = {
        "emblas": lambda queries: range_search_csr(torch.from_numpy(queries), documents, 92),
        "faiss IndexBinaryFlat": lambda queries: index.range_search(queries, 93),
    }
    row(
        "binary", "range_search_csr", who, shape="16 queries x 1M codes, radius 92",
        dtype="256 bits", call=calls[who],
        inputs=[(codes[i : i + 16] ^ codes[i + 16 : i + 32],) for i in range(0, 800, 100)],
        bytes=codes.nbytes,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["none", "50%", "10%", "1%", "1%, contiguous"])
@pytest.mark.parametrize("queries", [1, 16])
def bench_filter(row: Any, threads: int, queries: int, kind: str) -> None:
    codes = torch.from_numpy(_codes(ROWS, 256))
    if kind.endswith("contiguous"):
        wanted = torch.arange(ROWS) < ROWS // 100
    else:
        wanted = torch.rand(ROWS) < (1.0 if kind == "none" else float(kind[:-1]) / 100)
    mask = None if kind == "none" else pack_sign(wanted.float())
    row(
        "binary", f"hamming_topk k=10, filter: {kind}", "emblas",
        shape=f"{queries} queries x 1M codes", dtype="256 bits",
        call=lambda some: hamming_topk(some, codes, K, filter=mask),
        inputs=[(codes[i : i + queries],) for i in range(0, 800, 100)], bytes=codes.numel(),
    )  # fmt: skip


@pytest.mark.parametrize("who", ["emblas", "numpy bitwise_count"])
def bench_hamming_distance(row: Any, threads: int, who: str) -> None:
    codes = np.random.default_rng(0).integers(0, 256, (100_000, 32), dtype=np.uint8)
    words, documents = codes.view(np.uint64), torch.from_numpy(codes)
    calls: dict[str, Callable[[np.ndarray], Any]] = {
        "emblas": lambda queries: hamming_distance(torch.from_numpy(queries), documents),
        "numpy bitwise_count": lambda queries: [
            np.bitwise_count(words ^ query).sum(1, dtype=np.int32)
            for query in queries.view(np.uint64)
        ],
    }
    row(
        "binary", "hamming_distance", who, shape="16 x 100k", dtype="256 bits", call=calls[who],
        inputs=[(codes[i : i + 16],) for i in range(0, 800, 100)],
        bytes=16 * 100_000 * 4, single_thread=who.startswith("numpy"),
    )  # fmt: skip


def _dense(documents: torch.Tensor, threads: int) -> dict[str, Callable[[torch.Tensor], Any]]:
    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatIP(documents.shape[1])
    index.add(documents.numpy())
    codes = (documents * 40).round().clamp(-127, 127).to(torch.int8)
    return {
        "emblas": lambda queries: dense_topk(queries, documents, K),
        "emblas, int8 documents": lambda queries: dense_topk(queries, codes, K),
        "faiss IndexFlatIP": lambda queries: index.search(queries.numpy(), K),
        "torch matmul + topk": lambda queries: (queries @ documents.T).topk(K),
    }


@pytest.mark.parametrize(
    "who", ["emblas", "emblas, int8 documents", "faiss IndexFlatIP", "torch matmul + topk"]
)
@pytest.mark.parametrize("queries", [1, 16])
def bench_dense_topk(row: Any, threads: int, queries: int, who: str) -> None:
    documents = torch.randn(100_000, 384)
    row(
        "binary", "dense_topk k=10", who, shape=f"{queries} queries x 100k", dtype="float32 x 384",
        call=_dense(documents, threads)[who],
        inputs=[(torch.randn(queries, 384),) for _ in range(8)], bytes=documents.numel() * 4,
        flops=2 * queries * documents.numel(),
    )  # fmt: skip


@pytest.mark.parametrize("who", ["emblas", "torch einsum"])
@pytest.mark.parametrize("form", ["float x float", "float x bits", "bits x bits"])
def bench_maxsim(row: Any, threads: int, form: str, who: str) -> None:
    """One query of 32 tokens, 1000 documents of 180 tokens, 128 dimensions."""
    documents = torch.randn(1000, 180, 128)
    starts = torch.arange(0, 180_001, 180, dtype=torch.int32)
    packed = documents.flatten(0, 1)
    tokens = packed if form == "float x float" else pack_sign(packed)
    query_starts = torch.tensor([0, 32], dtype=torch.int32)
    calls: dict[str, Callable[[torch.Tensor], Any]] = {
        "emblas": lambda query: maxsim(
            pack_sign(query) if form == "bits x bits" else query,
            tokens, query_starts, starts, dim=128,
        ),
        "torch einsum": lambda query: (
            torch.einsum("qd,ntd->nqt", query, documents).amax(2).sum(1)
        ),
    }  # fmt: skip
    row(
        "binary", "maxsim", who, shape="32 tokens x 1000 documents x 180 tokens",
        dtype=f"{form}, 128", call=calls[who], inputs=[(torch.randn(32, 128),) for _ in range(8)],
        bytes=tokens.numel() * tokens.element_size(), flops=2 * 32 * 180_000 * 128,
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


UNPACKERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "emblas": lambda codes: unpack_sign(codes, 768),
    "numpy unpackbits": lambda codes: (
        np.unpackbits(codes.numpy(), axis=1).astype(np.float32) * 2 - 1
    ),
}


@pytest.mark.parametrize("who", UNPACKERS)
def bench_unpack_sign(row: Any, who: str) -> None:
    size = 10_000 * 768 * 4
    row(
        "binary", "unpack_sign", who, shape="10000 x 768", dtype="float32", call=UNPACKERS[who],
        inputs=rotate(lambda seed: (torch.randint(0, 256, (10_000, 96)).byte(),), size), bytes=size,
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
