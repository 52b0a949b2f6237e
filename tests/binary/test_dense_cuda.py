"""What only the CUDA kernels for vectors have: tiles, slabs of rows, alignment of every dtype.

Lists, merges and filters are those of test_hamming_cuda.py; that it finds the right thing is in
test_executors.py too.
"""

from __future__ import annotations

import pytest
import torch
from contract import tolerance
from emblas.binary import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from simt import emulator

pytestmark = pytest.mark.skipif(bool(emulator.why_not()), reason=emulator.why_not() or "")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
DOT, COSINE, L2 = range(3)
TILE = 256  # rows that a block scores at once
SLAB = 64  # bytes of them
MANY = 1024  # blocks, the operator's default


@pytest.fixture(scope="module")
def ops():
    emulator.library()
    return torch.ops.emblas_simt


def whole(rows, dim, dtype=torch.float32, largest=5):
    """Vectors of whole numbers: scores are exact, and ties are ties."""
    return torch.randint(-largest, largest + 1, (rows, dim)).to(dtype)


def check(ops, queries, documents, k, metric=DOT, filter=None, blocks=MANY):
    actual = ops.dense_topk_cuda(queries, documents, k, metric, filter, blocks)
    expected = reference.dense_topk(queries, documents, k, metric, filter)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_widths(ops, dtype):
    slab = SLAB // dtype.itemsize
    narrow = (0, 1, 3, slab // 4, slab // 4 + 1, slab - 1, slab)
    for dim in (*narrow, slab + 1, slab + slab // 4, 2 * slab + 3):
        for queries in (1, 3, 5):
            wanted, documents = whole(queries, dim), whole(40, dim, dtype)
            check(ops, wanted, documents, 9)
            check(ops, wanted, documents, 9, L2)


@pytest.mark.parametrize("rows", [1, TILE - 1, TILE, TILE + 1, 9 * TILE + 1])
def test_tile_edges(ops, rows):
    for queries in (1, 3):
        for blocks in (1, MANY):
            check(ops, whole(queries, 3), whole(rows, 3), 300, L2, None, blocks)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alignment(ops, dtype):
    for start, padding in ((0, 16), (1, 15), (4, 12), (0, 1), (0, 4)):
        wide = whole(20, start + 16 + padding, dtype)[:, start : start + 16]
        check(ops, whole(2, 16 + 5)[:, 5:], wide, 7, L2)


def test_cosine(ops):
    documents, wanted = torch.randn(300, 20), torch.randn(5, 20)
    documents[7] = 0
    scores, ids = ops.dense_topk_cuda(wanted, documents, 300, COSINE)
    lengths = documents.double().norm(dim=1)
    exact = (wanted.double() @ documents.double().T / lengths).nan_to_num()
    torch.testing.assert_close(
        scores.double(), exact.gather(1, ids), **tolerance(torch.float32, 20)
    )
    assert (scores.diff() <= 0).all()
    assert (scores[ids == 7] == 0).all()
    assert torch.equal(ids.sort().values, torch.arange(300).expand(5, 300))


def test_filters(ops):
    documents, wanted = whole(300, 6), whole(5, 6)
    bitmaps = torch.randint(0, 256, (5, 38), dtype=torch.uint8)
    for filter in (bitmaps, bitmaps[:1], torch.arange(0, 300, 7)):
        check(ops, wanted, documents, 20, L2, filter)


@settings(max_examples=15)
@given(
    rows=st.integers(0, 2 * TILE),
    queries=st.integers(0, 9),
    dim=st.integers(0, 70),
    dtype=st.sampled_from(DTYPES),
    metric=st.sampled_from([DOT, L2]),
    k=st.integers(0, 200),
    blocks=st.sampled_from([1, 2, MANY]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(ops, rows, queries, dim, dtype, metric, k, blocks, seed):
    with emulator.schedule("random", seed):
        check(ops, whole(queries, dim), whole(rows, dim, dtype), k, metric, None, blocks)


def test_same_bits_in_any_order(ops):
    """And alone as together with others."""
    documents, wanted = torch.randn(700, 40), torch.randn(5, 40)
    for metric in (DOT, COSINE, L2):
        expected = ops.dense_topk_cuda(wanted, documents, 50, metric)
        alone = ops.dense_topk_cuda(wanted[2:3], documents, 50, metric)
        assert all(torch.equal(a[0], e[2]) for a, e in zip(alone, expected, strict=True))
        for order, seed, preemption in (("reverse", 0, 0), ("random", 2, 0.02)):
            with emulator.schedule(order, seed, preemption):
                actual = ops.dense_topk_cuda(wanted, documents, 50, metric)
                assert all(map(torch.equal, actual, expected))


def test_bytes_moved(ops):
    """Rows are read once for 4 queries."""
    emulator.take_traffic()
    rows, dim, k, queries = TILE, 40, 10, 4
    wanted, documents = torch.ones(queries, dim), torch.ones(rows, dim).half()
    bitmap = torch.zeros(1, rows // 8, dtype=torch.uint8)
    bitmap[0, 0] = 0b11111111
    ops.dense_topk_cuda(wanted, documents, k, DOT, bitmap)
    traffic = emulator.take_traffic()
    lists = queries * k * 8
    assert traffic["distinct_read"] == wanted.nbytes + documents.nbytes + bitmap.nbytes + lists
    assert traffic["distinct_write"] == lists + queries * k * (4 + 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", [DOT, L2])
def test_gather_scores(ops, dtype, metric):
    """Widths around a warp's vectors, any alignment, ids that don't exist."""
    vector = 16 // dtype.itemsize
    for dim in (0, 1, vector, vector + 1, 32 * vector, 32 * vector + 1):
        wide = whole(11, dim + 16, dtype)
        padded = whole(11, -(-dim // vector) * vector, dtype)[:, :dim]  # rows begin aligned
        ids = torch.tensor([[0, 10, 11, -1, 2**40], [5, 5, -(2**63), 1, 10]])
        existing = ids.where((ids >= 0) & (ids < 11), -1)
        for documents in (wide[:, 16:], wide[:, 1 : 1 + dim], wide[:, :dim].contiguous(), padded):
            wanted = whole(2, dim)
            with emulator.schedule("reverse"):
                actual = ops.gather_scores_cuda(wanted, documents, ids, metric)
            assert torch.equal(actual, reference.gather_scores(wanted, documents, existing, metric))


def test_bytes_gathered(ops):
    """Only the rows that are asked for, and only those that exist."""
    documents, wanted = whole(50, 40), whole(2, 40)
    ids = torch.tensor([[3, 4, -1], [3, 9, 50]])
    emulator.take_traffic()
    ops.gather_scores_cuda(wanted, documents, ids, DOT)
    traffic = emulator.take_traffic()
    assert traffic["distinct_read"] == wanted.nbytes + 3 * documents[0].nbytes + ids.nbytes
    assert traffic["distinct_write"] == 6 * 4


def test_bad_arguments(ops):
    wanted, documents = whole(2, 16), whole(9, 16)
    for args in (
        (wanted.double(), documents, 1, DOT),
        (wanted[0], documents, 1, DOT),
        (wanted, documents.double(), 1, DOT),
        (wanted, documents[:, :3], 1, DOT),
        (wanted, whole(16, 9).t(), 1, DOT),
        (wanted, documents, -1, DOT),
        (wanted, documents, 1, 3),
        (wanted, documents, 1, -1),
        (wanted, documents, 1, DOT, documents),
    ):
        with pytest.raises(RuntimeError, match="emblas: "):
            ops.dense_topk_cuda(*args)
    ids = torch.zeros(2, 3, dtype=torch.int64)
    for args in (
        (wanted, documents, ids.int(), DOT),
        (wanted, documents, ids[0], DOT),
        (wanted, documents, ids[:1], DOT),
        (wanted, documents, ids.t().contiguous().t(), DOT),
        (wanted, documents, ids, 3),
    ):
        with pytest.raises(RuntimeError, match="emblas: "):
            ops.gather_scores_cuda(*args)
