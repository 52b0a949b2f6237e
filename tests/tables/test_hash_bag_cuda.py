"""What only the CUDA kernels have: pieces of long sums, workspaces, launch shapes, wrong offsets.

That they compute the right thing is also in test_hash_bag.py and test_hash_keys.py, which they run
like every executor.
"""

from __future__ import annotations

import pytest
import torch
from contract import layouts, packed, tolerance
from emblas import _op
from emblas.tables import reference
from hypothesis import given
from hypothesis import strategies as st
from simt import emulator

pytestmark = pytest.mark.skipif(bool(emulator.why_not()), reason=emulator.why_not() or "")

PIECE = 64  # entries that one warp adds up
BLOCK = 256  # threads
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def ops():
    emulator.library()
    return torch.ops.emblas_simt


def random_ids(count, generator=None):
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator)


def weights_for(table, count, generator=None):
    dtype = torch.float64 if table.dtype == torch.float64 else torch.float32
    return torch.randn(count, generator=generator).to(dtype)


def both(ops, ids, table, offsets=None, weights=None, family=0, hashes=4, padding=None):
    """Arguments, and forward and backward by the CUDA kernels."""
    args = (ids, table, offsets, weights, family, 3, hashes, padding)
    out = ops.hash_bag_cuda(*args)
    grad = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(table.dtype)
    backward = (grad, *args, True, True)
    return args, backward, (out, *ops.hash_bag_backward_cuda(*backward))


def check(args, backward, results, length):
    def wide(values):
        return [v.double() if torch.is_tensor(v) and v.is_floating_point() else v for v in values]

    gradients = reference.hash_bag_backward(*wide(backward))
    expected = (reference.hash_bag(*wide(args)), *gradients)
    dtypes = (args[1].dtype, args[1].dtype, backward[4].dtype if backward[4] is not None else None)
    limit = tolerance(args[1].dtype, length)
    for actual, wanted, dtype in zip(results, expected, dtypes, strict=True):
        assert dtype in (actual.dtype, None)
        scale = max(1.0, float(wanted.abs().max()) if wanted.numel() else 0.0)
        torch.testing.assert_close(
            actual.double(), wanted, rtol=4 * limit["rtol"], atol=8 * scale * limit["atol"]
        )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dim", [3, 8, 40, 136, 264])
def test_pieces(ops, dim, dtype):
    """Bags and rows around multiples of a piece, starting anywhere in it."""
    lengths = (1, 2 * PIECE - 1, 0, 2 * PIECE, 2 * PIECE + 1, 0, 0, 3 * PIECE, PIECE + 3)
    if dim > 40:
        lengths = (5, 2 * PIECE + 1, 9)
    table = torch.randn(5, dim).to(dtype)
    ids = random_ids(sum(lengths))
    ids[::2] = 12345  # two rows in three have most of the lookups
    weights = weights_for(table, len(ids))
    check(*both(ops, ids, table, packed(lengths), weights, hashes=2), 8 * PIECE)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 63, 64, 65])
def test_tiles_of_ids(ops, count):
    """A warp takes 8 ids, a block 64."""
    for dim, dtype in ((4, torch.float32), (1, torch.float16), (132, torch.float32)):
        table = torch.randn(9, dim).to(dtype)
        check(*both(ops, random_ids(count), table, weights=weights_for(table, count)), 4 * count)


@pytest.mark.parametrize("count", [BLOCK - 1, BLOCK, BLOCK + 1])
@pytest.mark.parametrize("rows", [6, BLOCK - 1, BLOCK])
def test_blocks_of_keys(ops, count, rows):
    ids = random_ids(count)
    for hashes in (1, 4, 6):
        keys = ops.hash_keys_cuda(ids, 1, 5, hashes, rows)
        assert torch.equal(keys, reference.hash_keys(ids, 1, 5, hashes, rows))
    check(*both(ops, ids, torch.randn(rows, 2), packed((count,)), hashes=1), count)


@given(
    lengths=st.lists(st.integers(0, 2 * PIECE + 2), max_size=4),
    dim=st.integers(1, 40),
    rows=st.integers(1, 12),
    hashes=st.sampled_from([1, 2, 4, 5, 13, 16]),
    family=st.integers(0, 1),
    dtype=st.sampled_from(FLOATS),
    gap=st.integers(0, 9),
    seed=st.integers(0, 2**31),
    bags=st.booleans(),
    weighted=st.booleans(),
    padded=st.booleans(),
)
def test_any_shape(
    ops, lengths, dim, rows, hashes, family, dtype, gap, seed, bags, weighted, padded
):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(rows, dim + gap, generator=generator).to(dtype)
    table = wide[:, gap // 2 : gap // 2 + dim]  # the rest must not be read
    ids = random_ids(2 * sum(lengths), generator=generator)[::2]
    if len(ids):
        ids[::3] = ids[0]
    padding = int(ids[0]) if padded and len(ids) else None
    weights = weights_for(table, len(ids), generator) if weighted else None
    offsets = packed(lengths) if bags else None
    with emulator.schedule("random", seed):
        made = both(ops, ids, table, offsets, weights, family, hashes, padding)
    check(*made, max(len(ids), 1) * hashes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("bags", [False, True])
def test_same_bits_in_any_order(ops, dtype, bags):
    """Block and thread order, interruptions and memory layout change nothing."""
    table = torch.randn(7, 24).to(dtype)
    ids = random_ids(173)
    ids[20:90] = 5
    call = (packed((0, 150, 3, 20)) if bags else None, weights_for(table, 173))
    *_, expected = both(ops, ids, table, *call)
    for order, seed, preemption in (("reverse", 0, 0), ("random", 1, 0), ("random", 2, 0.1)):
        with emulator.schedule(order, seed, preemption):
            *_, actual = both(ops, ids, table, *call)
        assert all(map(torch.equal, actual, expected))
    for view in layouts(table).values():
        if view.stride(1) != 1:
            continue
        *_, actual = both(ops, ids, view, *call)
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other, **tolerance(dtype, 500))


def test_long_bag_has_no_neighbour_in_the_bits(ops):
    ids, table = random_ids(400), torch.randn(50, 24)
    whole = ops.hash_bag_cuda(ids, table, packed((10, 3, 277, 110)), None, 0, 3, 4, None)
    alone = ops.hash_bag_cuda(ids[13:290], table, packed((277,)), None, 0, 3, 4, None)
    assert torch.equal(whole[2], alone[0])


@pytest.mark.parametrize(
    "offsets",
    [
        [0, 2**31 - 1, -(2**31), 7],
        [-5, 500, 500, 20],
        [300, 200, 100, 0],
        [2**31 - 1] * 4,
        [-1] * 4,
        [130, 140, 290, 300],
        [0, 10, 20, 30],
        [0, 129, 128, 300],
        [7],
    ],
)
@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("dim", [4, 9])
def test_wrong_offsets_stay_in_bounds(ops, offsets, order, dim):
    """Results mean nothing then, but no byte outside the arguments is touched."""
    cu = torch.tensor(offsets, dtype=torch.int32)
    table, weights = torch.randn(3, dim), torch.rand(300)
    # Bags that overlap write the same bytes and leave parts of the workspace unwritten.
    with emulator.schedule(order, check_uninitialized=False, check_races=False):
        _, backward, results = both(ops, random_ids(300), table, cu, weights)
    # Ids outside of all bags have no gradient.
    if offsets in ([0, 10, 20, 30], [130, 140, 290, 300]):
        outside = torch.ones(300, dtype=torch.bool)
        outside[offsets[0] : offsets[-1]] = False
        assert not results[2][outside].any()
        inside = backward[1][~outside]
        first = backward[4][~outside]
        again = (backward[0], inside, table, cu - offsets[0], first, *backward[5:])
        expected = reference.hash_bag_backward(*again)[0]
        torch.testing.assert_close(results[1], expected, **tolerance(torch.float32, 1200))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_moved(ops, dtype):
    """Each row in use is read once, each output written once; keys stay in registers."""
    count, rows, dim, hashes = 120, 40, 24, 4
    table, ids = torch.randn(rows, dim).to(dtype), random_ids(count)
    row, wide_row = dim * table.element_size(), dim * 4
    keys = reference.hash_keys(ids, 0, 3, hashes, rows)
    used, lookups = len(keys.unique()), keys.numel()
    emulator.take_traffic()

    def moved():
        traffic = emulator.take_traffic()
        assert traffic["distinct_write"] == traffic["global_write"]
        return traffic["distinct_read"], traffic["distinct_write"]

    ops.hash_keys_cuda(ids, 0, 3, hashes, rows)
    assert moved() == (8 * count, 8 * lookups)
    hashing = (0, 3, hashes, None)
    ops.hash_bag_cuda(ids, table, None, None, *hashing)
    assert moved() == (8 * count + used * row, count * row)
    offsets = packed((50, 0, 70))
    ops.hash_bag_cuda(ids, table, offsets, None, *hashing)
    assert moved() == (8 * count + used * row + offsets.nbytes, 3 * row)
    # Of two bags the long one is added up in two pieces. Each of three kernels reads the offsets.
    twice, two = ids.repeat(2), packed((2 * PIECE - 1, 240 - 2 * PIECE + 1 + 2 * PIECE))
    twice = torch.cat([twice, random_ids(2 * PIECE)])
    row_sets = [reference.hash_keys(part, 0, 3, hashes, rows).unique()
                for part in twice.split(two.diff().tolist())]  # fmt: skip
    pieces = int(two.diff()[1]) // PIECE
    ops.hash_bag_cuda(twice, table, two, None, *hashing)
    assert moved() == (
        8 * len(twice) + sum(map(len, row_sets)) * row + pieces * wide_row + 3 * two.nbytes,
        2 * row + pieces * wide_row,
    )

    grad = torch.randn(count, dim).to(dtype)
    ops.hash_bag_backward_cuda(grad, ids, table, None, None, *hashing, False, True)
    assert moved() == (8 * count + (used + count) * row, 4 * count)
    ops.hash_bag_backward_cuda(grad, ids, table, None, None, *hashing, True, False)
    read, written = moved()
    bounds = 4 * (rows + 1)
    assert written == 4 * lookups + bounds + rows * row
    # find_bounds reads the sorted keys as far as its binary searches come by.
    searched = read - (8 * count + 8 * lookups + bounds + count * row)
    assert 0 < searched <= 4 * lookups
    # One row with all lookups, in pieces.
    ops.hash_bag_backward_cuda(grad, ids, table[:1], None, None, *hashing, True, False)
    read, written = moved()
    pieces, bounds = lookups // PIECE, 8
    assert written == 4 * lookups + bounds + pieces * wide_row + row
    searched = read - (8 * count + 8 * lookups + 3 * bounds + count * row + pieces * wide_row)
    assert 0 < searched <= 4 * lookups


def test_bad_arguments(ops):
    ids, table, offsets = torch.arange(4), torch.zeros(5, 3), packed((4,))
    weights, hashing = torch.zeros(4), (0, 1, 4, None)
    for args in (
        (ids.int(), 0, 1, 4, 5),
        (ids[None], 0, 1, 4, 5),
        (ids, 2, 1, 4, 5),
        (ids, -1, 1, 4, 5),
        (ids, 0, -1, 4, 5),
        (ids, 0, 2**32, 4, 5),
        (ids, 0, 1, 0, 5),
        (ids, 0, 1, 17, 5),
        (ids, 0, 1, 4, 0),
        (ids, 0, 1, 4, 2**32 + 1),
    ):
        with pytest.raises(RuntimeError, match="emblas: "):
            ops.hash_keys_cuda(*args)
    for args in (
        (ids, table.long(), None, None, *hashing),
        (ids, table.t(), None, None, *hashing),
        (ids, table[0], None, None, *hashing),
        (ids, table[:0], None, None, *hashing),
        (ids, table, offsets.long(), None, *hashing),
        (ids, table, offsets[:0], None, *hashing),
        (ids, table, None, weights[:3], *hashing),
        (ids, table, None, weights.double(), *hashing),
        (ids, table.double(), None, weights, *hashing),
    ):
        with pytest.raises(RuntimeError, match="emblas: "):
            ops.hash_bag_cuda(*args)
    for grad in (torch.zeros(4, 2), torch.zeros(3, 3), torch.zeros(3, 4).t(), table[:4].double()):
        with pytest.raises(RuntimeError, match="emblas: "):
            ops.hash_bag_backward_cuda(grad, ids, table, None, None, *hashing, True, True)


def test_too_many_lookups(ops):
    supports = _op.ops()["hash_bag_backward"].cuda_supports
    ids, table = torch.zeros(1).long(), torch.zeros(5, 0)
    for count, fits in ((2**27 - 1, True), (2**27, False)):
        call = (torch.zeros(1, 0).expand(count, 0), ids.expand(count), table)
        hashing = (None, None, 0, 1, 16, None, False, False)
        assert supports(*call, *hashing) == fits
        if not fits:
            with pytest.raises(RuntimeError, match=r"fewer than 2\^31"):
                ops.hash_bag_backward_cuda(*call, *hashing)
    rows = torch.zeros(1, 1).expand(2**31, 1)
    assert not supports(torch.zeros(1, 1), ids, rows, *hashing)


def test_nothing_wanted(ops):
    ids, table = torch.arange(4), torch.zeros(5, 3)
    call = (torch.zeros(4, 3), ids, table, None, None, 0, 1, 4, None, False, False)
    assert [g.shape for g in ops.hash_bag_backward_cuda(*call)] == [(0, 3), (0,)]
