"""What only the CUDA searches have: tiles, lists and their limits, merges, tensor cores.

That they find the right thing is in test_executors.py too, which runs them like every executor.
"""

from __future__ import annotations

import pytest
import torch
from emblas.binary import pack_sign, reference
from hypothesis import given, settings
from hypothesis import strategies as st
from simt import emulator

pytestmark = pytest.mark.skipif(bool(emulator.why_not()), reason=emulator.why_not() or "")

TILE = 256  # codes that a block compares at once
SLAB = 64  # bytes of them
MANY = 1024  # blocks, the operators' default


@pytest.fixture(scope="module")
def ops():
    emulator.library()
    return torch.ops.emblas_simt


@pytest.fixture(params=[True, False], ids=["tensor cores", "popc"])
def tensor_cores(request):
    """Whether more than 4 queries go to tensor cores."""
    return request.param


def codes(rows, width, values=256, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, values, (rows, width), dtype=torch.uint8, generator=generator)


def check(ops, queries, documents, k, filter=None, blocks=MANY, tensor_cores=True):
    actual = ops.hamming_topk_cuda(queries, documents, k, filter, blocks, tensor_cores)
    expected = reference.hamming_topk(queries, documents, k, filter)
    assert all(map(torch.equal, actual, expected))


def check_range(ops, queries, documents, radius, k, filter=None, later_only=False, *launch):
    actual = ops.range_search_cuda(queries, documents, radius, k, filter, later_only, *launch)
    expected = reference.range_search(queries, documents, radius, k, filter, later_only)
    assert all(map(torch.equal, actual, expected))


def check_all(ops, queries, documents, radius, filter=None, later_only=False, *launch):
    actual = ops.range_search_csr_cuda(queries, documents, radius, filter, later_only, *launch)
    expected = reference.range_search_csr(queries, documents, radius, filter, later_only)
    assert all(map(torch.equal, actual, expected))


def check_distance(ops, a, b, *launch):
    assert torch.equal(ops.hamming_distance_cuda(a, b, *launch), reference.hamming_distance(a, b))


@pytest.mark.parametrize("queries", [1, 4, 5, 32, 33])
def test_tile_edges(ops, queries, tensor_cores):
    for rows in (1, TILE, TILE + 1):
        wanted, documents = codes(queries, 2, 2, 1), codes(rows, 2, 2)
        check(ops, wanted, documents, 7, None, MANY, tensor_cores)
        check(ops, wanted, documents, 3, None, 1, tensor_cores)
        check_distance(ops, wanted, documents, 1, tensor_cores)
        check_range(ops, wanted, documents, 1, 5, None, True, 1, tensor_cores)
        check_all(ops, wanted, documents, 1, None, True, 1, tensor_cores)


@pytest.mark.parametrize("width", [0, 1, 3, 4, 15, 16, 17, 32, 33, 48, SLAB, SLAB + 1, SLAB + 20])
def test_widths(ops, width, tensor_cores):
    for queries in (1, 3, 8):
        wanted, documents = codes(queries, width, seed=1), codes(70, width)
        check(ops, wanted, documents, 9, None, MANY, tensor_cores)
        check_distance(ops, wanted, documents, MANY, tensor_cores)


@pytest.mark.parametrize("width", [16, 20, 80])
def test_alignment(ops, width):
    """Rows and addresses that allow 16, 4 or 1 bytes at a time, on either side."""
    for start, padding in ((0, 16), (16, 32), (4, 16), (0, 4), (1, 15), (0, 1)):
        for queries in (2, 6):
            wide = codes(30, start + width + padding)[:, start : start + width]
            asked = codes(queries, start + width + padding, seed=1)[:, start : start + width]
            check_distance(ops, asked.contiguous(), wide)
            check_distance(ops, asked, wide.contiguous())


@pytest.mark.parametrize("k", [1, 31, 32, 33, 255, 256, 257, 511, 512, 513, 1100])
def test_list_lengths(ops, k):
    """k around warps, slack and tiles; ties across tiles and lists."""
    for blocks in (1, MANY):
        check(ops, codes(2, 2, 2, 1), codes(1000, 2, 2), k, None, blocks)
        check(ops, codes(1, 2, seed=1), codes(1000, 2), k, None, blocks)


@pytest.mark.parametrize("k", [1, 5, 100, 300])
def test_lists_shrink(ops, k):
    """Rows that get nearer and nearer all enter a list at first; farther and farther, few do."""
    width, rows = 40, 4 * TILE
    distance = torch.arange(rows).flip(0) * (8 * width) // rows
    falling = pack_sign((torch.arange(8 * width) < distance[:, None]).float())
    for documents in (falling, falling.flip(0).contiguous(), falling[torch.randperm(rows)]):
        for queries in (1, 9):
            wanted = torch.zeros(queries, width, dtype=torch.uint8)
            wanted[-1] = 255
            check(ops, wanted, documents, k, None, 1)


@pytest.mark.parametrize("lists", [1, 15, 16, 17, 33])
def test_merges(ops, lists):
    """Lists around multiples of what is merged at once."""
    rows = lists * TILE - 3
    check(ops, codes(1, 1, seed=1), codes(rows, 1), 5)
    check(ops, codes(5, 1, 2, 1), codes(rows, 1, 2), 40)
    check_range(ops, codes(5, 1, 2, 1), codes(rows, 1, 2), 2, 40)
    check_all(ops, codes(17, 1, 2, 1), codes(rows, 1, 2), 0)


def test_three_merges(ops):
    check(ops, codes(1, 1, seed=1), codes(257 * TILE, 1), 5)


def test_any_distance(ops):
    """Every digit of a distance."""
    width = 4095
    distance = torch.tensor([0, 1, 2**5 - 1, 2**5, 2**10 - 1, 2**10, 2**15 - 9, 2**15 - 8] * 33)
    documents = pack_sign((torch.arange(8 * width) < distance[:, None]).float())
    order = distance.sort(stable=True)
    for queries, k in ((1, 38), (1, 200), (5, 99)):
        wanted = torch.zeros(queries, width, dtype=torch.uint8)
        actual = ops.hamming_topk_cuda(wanted, documents, k, None, 1)
        assert (actual[0] == order.values[:k]).all()
        assert (actual[1] == order.indices[:k]).all()


@pytest.mark.parametrize("rows", [7, 8, 9, 300])
def test_filters(ops, rows, tensor_cores):
    documents, wanted = codes(rows, 4, 4), codes(9, 4, 4, 1)
    for share in (0.0, 0.1, 0.9, 1.0):
        allowed = torch.rand(9, rows) < share
        bitmaps = pack_sign(allowed.float())
        for filter in (bitmaps, bitmaps[3:4], allowed[0].nonzero().flatten()):
            check(ops, wanted, documents, 20, filter, MANY, tensor_cores)
            check_range(ops, wanted, documents, 7, 6, filter, True, MANY, tensor_cores)
            check_all(ops, wanted, documents, 7, filter, True, MANY, tensor_cores)
        check(ops, wanted[:1], documents, 1, bitmaps[:1], 1)


@pytest.mark.parametrize("radius", [0, 1, 5, 16, 17, 2**31 - 1])
def test_radii(ops, radius):
    """Counts go on where the lists are full, and where there are none."""
    documents = codes(3 * TILE + 5, 2, 4)
    for queries, most, blocks in ((1, 0, 1), (2, 3, MANY), (9, 300, 1), (9, 2, MANY)):
        for later_only in (False, True):
            wanted = documents[:queries]
            check_range(ops, wanted, documents, radius, most, None, later_only, blocks)
            if most == 0 or queries == 9:
                check_all(ops, wanted, documents, radius, None, later_only, blocks)


def test_every_digit(ops):
    """A radius of one, two and three digits, distances around powers of 32, long runs of equals."""
    width = 130
    distance = torch.tensor([0, 1, 31, 32, 33, 63, 64, 1023, 1024, 1025, 1040] * 12)
    distance = distance[torch.randperm(len(distance))]
    documents = pack_sign((torch.arange(8 * width) < distance[:, None]).float())
    wanted = torch.zeros(3, width, dtype=torch.uint8)
    for radius in (0, 31, 32, 1023, 1024, 2**40):
        check_all(ops, wanted[:1], documents, radius)
    check_all(ops, wanted, documents, 1024, torch.arange(0, len(documents), 3))


@settings(max_examples=15)
@given(
    rows=st.integers(0, 2 * TILE),
    queries=st.integers(0, 40),
    width=st.integers(0, 2 * SLAB + 2),
    k=st.integers(0, 300),
    padding=st.integers(0, 9),
    values=st.sampled_from([2, 256]),
    blocks=st.sampled_from([1, 2, MANY]),
    seed=st.integers(0, 2**31),
    tensor_cores=st.booleans(),
)
def test_any_shape(ops, rows, queries, width, k, padding, values, blocks, seed, tensor_cores):
    wide = codes(rows, width + padding, values, seed)
    documents = wide[:, padding // 2 : padding // 2 + width]  # the rest must not be read
    wanted = codes(queries, width, values, seed + 1)
    with emulator.schedule("random", seed):
        check(ops, wanted, documents, k, None, blocks, tensor_cores)


def test_same_bits_in_any_order(ops):
    documents, wanted = codes(600, 20, 4), codes(9, 20, 4, 1)
    for order, seed, preemption in (("reverse", 0, 0), ("random", 1, 0), ("random", 2, 0.05)):
        with emulator.schedule(order, seed, preemption):
            for blocks in (1, MANY):
                check(ops, wanted, documents, 50, None, blocks)
                check(ops, wanted[:1], documents, 300, None, blocks)
                check_range(ops, wanted[:3], documents, 30, 70, None, True, blocks)
                check_all(ops, wanted[:3], documents, 60, None, True, blocks)
            check_distance(ops, wanted, documents)


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_wrong_ids_find_nothing(ops, order):
    """Nor do they touch a byte outside the arguments; those in no order find something."""
    documents, wanted = codes(40, 8), codes(2, 8, seed=1)
    with emulator.schedule(order):
        for right in ([], [0, 39]):
            ids = torch.tensor([-1, *right, 40, 2**62, -(2**63)])
            distances, found = ops.hamming_topk_cuda(wanted, documents, 3, ids)
            assert (found.sort().values == torch.tensor(([-1] * 3 + right)[-3:])).all()
            assert (distances[found >= 0] <= 64).all()
            for later in (False, True):
                counts, _, _ = ops.range_search_cuda(wanted, documents, 64, 3, ids, later)
                offsets, _, _ = ops.range_search_csr_cuda(wanted, documents, 64, ids, later)
                expected = [sum(row > q or not later for row in right) for q in range(2)]
                assert counts.tolist() == offsets.diff().tolist() == expected
        unordered = torch.tensor([39, 5, 5, 3] * 100)
        distances, _ = ops.hamming_topk_cuda(wanted, documents, 3, unordered)
        assert (distances <= 64).all()
        ops.range_search_csr_cuda(wanted, documents, 40, unordered, True)
    empty = ops.hamming_topk_cuda(wanted, documents[:0], 3, torch.tensor([0]))
    assert (empty[1] == -1).all()


@pytest.mark.parametrize("queries", [4, 32])
def test_bytes_moved(ops, queries):
    """The codes are read once for all queries of a block; lists are written once and read once."""
    emulator.take_traffic()
    width, k, lists = 32, 10, 4
    documents = torch.full((lists * TILE, width), 255, dtype=torch.uint8)
    documents.view(lists, TILE, width)[:, :k] = 0
    wanted = torch.zeros(queries, width, dtype=torch.uint8)
    bytes_of_codes = documents.nbytes + wanted.nbytes
    ops.hamming_topk_cuda(wanted, documents, k, pack_sign((documents[:, 0] == 0)[None].float()))
    traffic = emulator.take_traffic()
    bitmap = lists * TILE // 8
    kept, merged = queries * lists * k * 8, queries * k * 8
    offered = queries * lists * k * 8  # to one list, which then shrinks
    assert traffic["distinct_read"] == bytes_of_codes + bitmap + kept + merged
    assert traffic["distinct_write"] == kept + offered + queries * k * (4 + 8)
    ops.hamming_distance_cuda(wanted, documents)
    traffic = emulator.take_traffic()
    assert traffic["distinct_read"] == bytes_of_codes
    assert traffic["distinct_write"] == queries * len(documents) * 4


def test_bad_arguments(ops):
    documents = codes(9, 4)
    bitmap = torch.zeros(1, 2, dtype=torch.uint8)
    for args in (
        (documents.int(), documents, 1),
        (documents, documents[0], 1),
        (documents, codes(4, 9).t(), 1),
        (documents, documents[:, :3], 1),
        (codes(1, 4096), codes(1, 4096), 1),
        (documents, documents, -1),
        (documents, documents, 2**27 + 1),
        (documents, documents, 1, bitmap[:, :1]),
        (documents, documents, 1, bitmap[0]),
        (documents, documents, 1, bitmap.repeat(2, 1)),
        (documents, documents, 1, torch.zeros(2, dtype=torch.int32)),
        (documents, documents, 1, torch.zeros(4, dtype=torch.int64)[::2]),
    ):
        with pytest.raises(RuntimeError, match="emblas: "):
            ops.hamming_topk_cuda(*args)
    for args in ((documents, documents, -1, 1), (documents, documents, 1, -1)):
        with pytest.raises(RuntimeError, match="emblas: "):
            ops.range_search_cuda(*args)
    for args in ((documents, documents, -1), (documents, documents[:, :3], 1)):
        with pytest.raises(RuntimeError, match="emblas: "):
            ops.range_search_csr_cuda(*args)
    for args in ((documents, documents[:, :3]), (documents[0], documents), (documents, bitmap[0])):
        with pytest.raises(RuntimeError, match="emblas: "):
            ops.hamming_distance_cuda(*args)
