"""What only the CUDA search by scores has: tables, slabs of codes, batches of queries.

Lists, merges and filters are those of test_hamming_cuda.py; that it finds the right thing is in
test_executors.py too.
"""

from __future__ import annotations

import pytest
import torch
from emblas.binary import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from simt import emulator

pytestmark = pytest.mark.skipif(bool(emulator.why_not()), reason=emulator.why_not() or "")

TILE = 256  # codes that a block compares at once
SLAB = 32  # bytes of them
MANY = 1024  # blocks, the operator's default
TABLES = 256  # queries that have tables at the same time


@pytest.fixture(scope="module")
def ops():
    emulator.library()
    return torch.ops.emblas_simt


def codes(rows, width, values=256, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, values, (rows, width), dtype=torch.uint8, generator=generator)


def whole(queries, dim, largest=9):
    """Queries of whole numbers: scores are exact, and ties are ties."""
    return torch.randint(-largest, largest + 1, (queries, dim)).float()


def check(ops, queries, documents, k, filter=None, scale=None, blocks=MANY):
    actual = ops.asymmetric_topk_cuda(queries, documents, k, filter, scale, blocks)
    expected = reference.asymmetric_topk(queries, documents, k, filter, scale)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("planes", [1, 2, 4])
@pytest.mark.parametrize("dim", [1, 4, 5, 8, 9, 33, 8 * SLAB, 8 * SLAB + 1])
def test_widths(ops, dim, planes):
    documents = codes(70, planes * ((dim + 7) // 8))
    for queries in (1, 2, 3):
        check(ops, whole(queries, dim), documents, 9)


@pytest.mark.parametrize("rows", [1, TILE - 1, TILE, TILE + 1, 9 * TILE + 1])
def test_tile_edges(ops, rows):
    for queries in (1, 3):
        for blocks in (1, MANY):
            check(ops, whole(queries, 9, 1), codes(rows, 2), 300, None, None, blocks)


def test_alignment(ops):
    for start, padding in ((0, 16), (4, 12), (1, 15), (0, 4), (0, 1)):
        wide = codes(50, start + 16 + padding)[:, start : start + 16]
        check(ops, whole(2, 128 + 5)[:, 5:], wide, 7)


def test_batches_of_queries(ops):
    """More queries than have tables at once, with a bitmap for each."""
    queries = TABLES + 3
    bitmaps = codes(queries, 2, seed=1)
    check(ops, whole(queries, 8), codes(16, 1), 5, bitmaps)
    check(ops, whole(queries, 8), codes(16, 1), 5, bitmaps[:1])


def test_scores_of_every_size(ops):
    """Tiny and huge, positive and negative, zeros of both signs, in lists that shrink."""
    documents = codes(3 * TILE, 1)
    for largest in (2.0**-100, 1.0, 2.0**100):
        wanted = torch.tensor([[1.0, -2, 4, 8, 16, -32, 64, 128]]) * largest
        for sign in (1, -1):
            check(ops, sign * wanted, documents, 60, None, None, 1)
    scale = 2.0 ** torch.arange(3 * TILE).remainder(200).sub(100)
    check(ops, whole(1, 8, 127), documents, 100, None, scale, 1)
    check(ops, whole(1, 8, 0), documents, 300, None, None, 1)


def test_not_finite(ops):
    """NaN comes last, and nothing breaks."""
    wanted = torch.tensor([[torch.nan, 1.0], [torch.inf, 1.0], [1.0, 1.0]])
    documents = torch.tensor([[0b11000000], [0b01000000], [0]], dtype=torch.uint8)
    scores, ids = ops.asymmetric_topk_cuda(wanted, documents, 3)
    assert scores[0].tolist() == [-torch.inf] * 3
    assert scores[1].tolist() == [torch.inf, -torch.inf, -torch.inf]
    assert ids.tolist() == [[0, 1, 2]] * 3
    assert scores[2].tolist() == [2, 0, -2]


@settings(max_examples=15)
@given(
    rows=st.integers(0, 2 * TILE),
    queries=st.integers(0, 5),
    dim=st.integers(1, 8 * SLAB + 9),
    planes=st.integers(1, 4),
    k=st.integers(0, 200),
    blocks=st.sampled_from([1, 2, MANY]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(ops, rows, queries, dim, planes, k, blocks, seed):
    documents = codes(rows, planes * ((dim + 7) // 8), 4, seed)
    with emulator.schedule("random", seed):
        check(ops, whole(queries, dim), documents, k, None, None, blocks)


def test_same_bits_in_any_order(ops):
    """And alone as together with others."""
    documents, wanted = codes(700, 40), torch.randn(5, 320)
    expected = ops.asymmetric_topk_cuda(wanted, documents, 50)
    alone = ops.asymmetric_topk_cuda(wanted[2:3], documents, 50)
    assert all(torch.equal(a[0], e[2]) for a, e in zip(alone, expected, strict=True))
    for order, seed, preemption in (("reverse", 0, 0), ("random", 1, 0), ("random", 2, 0.02)):
        with emulator.schedule(order, seed, preemption):
            actual = ops.asymmetric_topk_cuda(wanted, documents, 50)
            assert all(map(torch.equal, actual, expected))


def test_bytes_moved(ops):
    """Codes are read once for two queries; tables are written once and read once."""
    emulator.take_traffic()
    rows, width, k, queries = TILE, 40, 10, 2
    wanted, documents = torch.ones(queries, 8 * width), codes(rows, width)
    bitmap = torch.zeros(1, rows // 8, dtype=torch.uint8)
    bitmap[0, 0] = 0b11111111
    ops.asymmetric_topk_cuda(wanted, documents, k, bitmap)
    traffic = emulator.take_traffic()
    tables, lists = queries * width * 128, queries * k * 8
    assert traffic["distinct_read"] == (
        wanted.nbytes + documents.nbytes + bitmap.nbytes + tables + lists
    )
    assert traffic["distinct_write"] == tables + lists + queries * k * (4 + 8)


def test_bad_arguments(ops):
    wanted, documents = whole(2, 16), codes(9, 4)
    for args in (
        (wanted.double(), documents, 1),
        (wanted[0], documents, 1),
        (whole(16, 2).t(), documents, 1),
        (wanted[:, :0], documents, 1),
        (wanted, documents[:, :3], 1),
        (wanted, documents[:, :0], 1),
        (wanted, documents.int(), 1),
        (wanted, documents, -1),
        (wanted, documents, 1, None, torch.ones(8)),
        (wanted, documents, 1, None, torch.ones(9, dtype=torch.float64)),
        (wanted, documents, 1, documents),
    ):
        with pytest.raises(RuntimeError, match="emblas: "):
            ops.asymmetric_topk_cuda(*args)
