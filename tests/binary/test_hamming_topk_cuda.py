"""What only the CUDA search has: tiles, lists and their limits, merges, launch shapes, workspaces.

That it finds the right thing is in test_executors.py too, which runs it like every executor.
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


@pytest.fixture(scope="module")
def ops():
    emulator.library()
    return torch.ops.emblas_simt


def codes(rows, width, values=256, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, values, (rows, width), dtype=torch.uint8, generator=generator)


def check(ops, *args):
    """Equal to the reference; arguments beyond the public operator's choose the launch shape."""
    actual = ops.hamming_topk_cuda(*args)
    expected = reference.hamming_topk(*args[:4])
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("queries", [1, 2, 4, 5, 9])
def test_tile_edges(ops, queries):
    for rows in (1, TILE - 1, TILE, TILE + 1, 8 * TILE + 1):
        check(ops, codes(queries, 2, 2, 1), codes(rows, 2, 2), 7)
        check(ops, codes(queries, 2, seed=1), codes(rows, 2), 3, None, 1)


@pytest.mark.parametrize("width", [0, 1, 3, 4, 15, 16, 17, 48, SLAB, SLAB + 1, SLAB + 4, 2 * SLAB])
def test_widths(ops, width):
    for queries in (1, 3, 8):
        check(ops, codes(queries, width, seed=1), codes(TILE + 9, width), 9)


@pytest.mark.parametrize("k", [1, 31, 32, 33, 255, 256, 257, 511, 512, 513, 1100])
def test_list_lengths(ops, k):
    """k around warps, slack and tiles; ties across tiles and lists."""
    for blocks in (1, 1024):
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


@pytest.mark.parametrize("lists", [1, 15, 16, 17, 33, 257])
def test_merges(ops, lists):
    """Lists around multiples of what is merged at once."""
    rows = lists * TILE - 3
    check(ops, codes(1, 1, seed=1), codes(rows, 1), 5)
    check(ops, codes(5, 1, 2, 1), codes(rows, 1, 2), 40)


def test_any_distance(ops):
    """Every bit of a distance."""
    width = 4095
    distance = torch.tensor([0, 1, 2**5 - 1, 2**5, 2**10 - 1, 2**10, 2**15 - 9, 2**15 - 8] * 40)
    documents = pack_sign((torch.arange(8 * width) < distance[:, None]).float())
    wanted = torch.zeros(1, width, dtype=torch.uint8)
    for k in (1, 39, 120, 319):
        check(ops, wanted, documents, k, None, 1)


@pytest.mark.parametrize("rows", [7, 8, 9, 600])
def test_filters(ops, rows):
    documents, wanted = codes(rows, 4, 4), codes(9, 4, 4, 1)
    for share in (0.0, 0.1, 0.9, 1.0):
        allowed = torch.rand(9, rows) < share
        bitmaps = pack_sign(allowed.float())
        for k in (1, 20):
            check(ops, wanted, documents, k, bitmaps)
            check(ops, wanted, documents, k, bitmaps[3:4])
            check(ops, wanted[:1], documents, k, bitmaps[:1], 1)
            check(ops, wanted, documents, k, allowed[0].nonzero().flatten())


@settings(max_examples=25)
@given(
    rows=st.integers(0, 3 * TILE),
    queries=st.integers(0, 12),
    width=st.integers(0, 2 * SLAB + 2),
    k=st.integers(0, 300),
    padding=st.integers(0, 9),
    values=st.sampled_from([2, 256]),
    blocks=st.sampled_from([1, 2, 1024]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(ops, rows, queries, width, k, padding, values, blocks, seed):
    wide = codes(rows, width + padding, values, seed)
    documents = wide[:, padding // 2 : padding // 2 + width]  # the rest must not be read
    wanted = codes(queries, width, values, seed + 1)
    with emulator.schedule("random", seed):
        check(ops, wanted, documents, k, None, blocks)


def test_same_bits_in_any_order(ops):
    documents, wanted = codes(1500, 20, 4), codes(3, 20, 4, 1)
    for order, seed, preemption in (("reverse", 0, 0), ("random", 1, 0), ("random", 2, 0.05)):
        with emulator.schedule(order, seed, preemption):
            for blocks in (1, 1024):
                check(ops, wanted, documents, 50, None, blocks)
                check(ops, wanted[:1], documents, 300, None, blocks)


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_wrong_ids_stay_in_bounds(ops, order):
    """Results mean nothing then, but no byte outside the arguments is touched."""
    documents, wanted = codes(40, 8), codes(2, 8, seed=1)
    for ids in ([-1, 40, 2**62, -(2**63)], [39, 5, 5, 3] * 100):
        with emulator.schedule(order):
            distances, _ = ops.hamming_topk_cuda(wanted, documents, 3, torch.tensor(ids))
            assert (distances <= 64).all()
    empty = ops.hamming_topk_cuda(wanted, documents[:0], 3, torch.tensor([0]))
    assert (empty[1] == -1).all()


def test_bytes_moved(ops):
    """The codes are read once for 8 queries; a list is written and read once."""
    emulator.take_traffic()
    rows, width, queries, k = 4 * TILE, 32, 8, 10
    documents, wanted = codes(rows, width), codes(queries, width, seed=1)
    ops.hamming_topk_cuda(wanted, documents, k)
    traffic = emulator.take_traffic()
    codes_once = rows * width + queries * width
    lists = 4 * queries * k * 8  # found by the scan; one merge, whose lists are ranked
    final = queries * k * 8
    assert traffic["distinct_read"] == codes_once + lists + final
    assert traffic["distinct_write"] >= lists + final + queries * k * (4 + 8)


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
        (documents, documents, 2**28 + 1),
        (documents, documents, 1, bitmap[:, :1]),
        (documents, documents, 1, bitmap[0]),
        (documents, documents, 1, bitmap.repeat(2, 1)),
        (documents, documents, 1, torch.zeros(2, dtype=torch.int32)),
        (documents, documents, 1, torch.zeros(4, dtype=torch.int64)[::2]),
    ):
        with pytest.raises(RuntimeError, match="emblas: "):
            ops.hamming_topk_cuda(*args)
