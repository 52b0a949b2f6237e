"""What only the CUDA kernels have: pieces of long sums, tiles, launch shapes, wrong offsets.

That they compute the right thing is also in tests/test_executors.py, which they run like every
executor.
"""

from __future__ import annotations

import pytest
import torch
from contract import packed, tolerance
from emblas import _op
from emblas.tables import Composition, Part
from emblas.tables import compose_reference as reference
from emblas.tables.compose_op import MODES
from emblas.tables.composition import COMBINES
from hypothesis import given
from hypothesis import strategies as st
from simt import emulator

pytestmark = pytest.mark.skipif(bool(emulator.why_not()), reason=emulator.why_not() or "")

PIECE = 64  # lookups of a row that one warp adds up
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def ops():
    emulator.library()
    return torch.ops.emblas_simt


def random_ids(count, generator=None):
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator)


def parts_of(width, features=1, rows=5):
    """Two slots for each feature: three keys of one table, and a digit."""
    parts, column = [], 0
    for feature in range(features):
        for slot, keys in ((0, 3), (1, 1)):
            parts += [
                Part(rows + feature, width, ("murmur3", "splitmix64")[feature % 2], a=1, b=b,
                     signed=bool(b % 2), base=0, column=column, feature=feature) if slot == 0 else
                Part(4, width, "radix", a=3, base=(rows + features) * width, column=column,
                     feature=feature)
                for b in range(keys)
            ]  # fmt: skip
            column += width
    return tuple(parts)


def both(ops, parts, ids, table, offsets=None, weights=None, combine="sum", mode="sum", pad=None):
    """Arguments, and forward and backward by the CUDA kernels."""
    how = (Composition(parts, combine).fields, COMBINES.index(combine), MODES.index(mode), pad)
    args = (ids, table, offsets, weights, *how)
    out, argmax = ops.compose_bag_cuda(*args)
    grad = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(table.dtype)
    backward = (grad, *args[:4], argmax, *how, True, weights is not None)
    return args, backward, (out, argmax, *ops.compose_bag_backward_cuda(*backward))


def check(args, backward, results, length):
    def wide(values):
        return [v.double() if torch.is_tensor(v) and v.is_floating_point() else v for v in values]

    dtype = args[1].dtype
    expected = (
        *reference.compose_bag(*wide(args)),
        *reference.compose_bag_backward(*wide(backward)),
    )
    limit = tolerance(dtype, length)
    for actual, wanted in zip(results, expected, strict=True):
        if not actual.is_floating_point():
            assert torch.equal(actual, wanted)
            continue
        scale = max(1.0, float(wanted.abs().max()) if wanted.numel() else 0.0)
        torch.testing.assert_close(
            actual.double(), wanted, rtol=4 * limit["rtol"], atol=8 * scale * limit["atol"]
        )


def table_for(parts, dtype=torch.float32, generator=None):
    return torch.randn(Composition(parts).size, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("width", [3, 8, 40, 264])
@pytest.mark.parametrize("combine", COMBINES)
def test_pieces(ops, width, dtype, combine):
    """Rows that most lookups hit, in vectors and not, over several tiles of columns."""
    parts = parts_of(width)
    lengths = (2 * PIECE + 1, 0, 9, 1) if width <= 40 else (PIECE, 3)
    ids = random_ids(sum(lengths)).abs()
    ids[::2] = 7
    made = both(ops, parts, ids, table_for(parts, dtype), packed(lengths), combine=combine)
    check(*made, 4 * PIECE)


@pytest.mark.parametrize("bags", [1, 7, 8, 9, 63, 64, 65])
def test_tiles_of_bags(ops, bags):
    """A warp takes 8 ids, a block 64; without offsets the features take turns."""
    for width in (4, 132):
        parts = parts_of(width, features=2, rows=30)
        ids = random_ids(2 * bags)
        check(*both(ops, parts, ids, table_for(parts), weights=torch.randn(2 * bags)), 4 * bags)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_lengths_of_bags(ops, dtype, mode):
    """Tiles of 8 ids; equal maxima go to the first id, wherever its lanes are."""
    lengths = (0, 1, 7, 8, 9, 0, 16, 17, 3, 3)
    for width in (2, 8):
        parts = parts_of(width, features=2)
        ids = torch.arange(sum(lengths)) // 3  # each comes three times
        made = both(ops, parts, ids, table_for(parts, dtype), packed(lengths), mode=mode, pad=2)
        check(*made, 40)


@given(
    lengths=st.lists(st.integers(0, 20), max_size=3),
    width=st.integers(1, 20),
    combine=st.sampled_from(COMBINES),
    mode=st.sampled_from(MODES),
    dtype=st.sampled_from(FLOATS),
    weights=st.sampled_from([0, 1, 4]),
    gap=st.integers(0, 3),
    seed=st.integers(0, 2**31),
    bags=st.booleans(),
    padded=st.booleans(),
)
def test_any_call(ops, lengths, width, combine, mode, dtype, weights, gap, seed, bags, padded):
    generator = torch.Generator().manual_seed(seed)
    # With few rows, sums of the same rows in another order would make winners ambiguous.
    parts = parts_of(width, features=2, rows=500 if mode == "max" else 5)
    lengths = lengths * 2 if bags else [2 * sum(lengths)]
    ids = random_ids(sum(lengths), generator)
    if len(ids):
        ids[::3] = ids[0]
    table = torch.randn(Composition(parts).size + gap, generator=generator).to(dtype)[gap:]
    w = None
    if weights and not (weights > 1 and combine == "product"):
        shape = (len(ids),) if weights == 1 else (len(ids), weights)
        w = torch.randn(shape, generator=generator)
        w = w.double() if dtype == torch.float64 else w
    if w is not None or not bags:
        mode = "sum"
    pad = int(ids[0]) if padded and len(ids) else None
    with emulator.schedule("random", seed):
        made = both(
            ops, parts, ids, table, packed(lengths) if bags else None, w, combine, mode, pad
        )
    check(*made, 8 * max(len(ids), 1))


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("mode", MODES)
def test_same_bits_in_any_order(ops, combine, mode):
    parts = parts_of(12, features=2)
    ids, offsets = random_ids(190), packed((0, 130, 3, 10, 20, 27))
    ids[20:150] = 5
    call = (parts, ids, table_for(parts), offsets, None, combine, mode)
    *_, expected = both(ops, *call)
    for order, seed, preemption in (("reverse", 0, 0), ("random", 1, 0), ("random", 2, 0.1)):
        with emulator.schedule(order, seed, preemption):
            *_, actual = both(ops, *call)
        assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize(
    "offsets",
    [
        [0, 2**31 - 1, -(2**31), 7, 8],
        [-5, 500, 500, 20, 20],
        [300, 200, 100, 0, 0],
        [2**31 - 1] * 5,
        [-1] * 5,
        [30, 40, 90, 100, 110],
        [0],
    ],
)
@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("mode", MODES)
def test_wrong_offsets_stay_in_bounds(ops, offsets, order, mode):
    """Results mean nothing then, but no byte outside the arguments is touched."""
    parts, cu = parts_of(4, features=2), torch.tensor(offsets, dtype=torch.int32)
    call = (parts, random_ids(150), table_for(parts), cu)
    with emulator.schedule(order, check_uninitialized=False, check_races=False):
        both(ops, *call, None, "product", mode)
        if mode == "sum":
            both(ops, *call, torch.rand(150))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_moved(ops, dtype):
    """Rows in use and outputs once in a launch; nothing but lookups' numbers beside them."""
    count, width = 90, 24
    parts, ids = parts_of(width), random_ids(count)
    table = table_for(parts, dtype)
    (row, dim), keys = (width * table.element_size(), 2 * width), 4
    fields = Composition(parts).fields
    used = _rows_in_use(ids, fields)
    emulator.take_traffic()
    ops.compose_bag_cuda(ids, table, None, None, fields, 0, 0, None)
    traffic = emulator.take_traffic()
    assert traffic["distinct_read"] == 8 * count + used * row
    assert traffic["distinct_write"] == traffic["global_write"] == 2 * count * row
    assert dim == 2 * width
    offsets = packed((50, 0, 40))
    ops.compose_bag_cuda(ids, table, offsets, None, fields, 0, 1, None)
    traffic = emulator.take_traffic()
    assert traffic["distinct_read"] == 8 * count + used * row + offsets.nbytes
    assert traffic["distinct_write"] == traffic["global_write"] == 6 * row

    few = ids[:30]  # so that no row is added up in pieces
    grad = torch.randn(len(few), dim).to(dtype)
    lookups, rows = keys * len(few), 5 + 4
    call = (grad, few, table, None, None, None, fields, 0, 0, None)
    ops.compose_bag_backward_cuda(*call, True, False)
    traffic = emulator.take_traffic()
    bounds = 4 * (rows + 1)
    assert traffic["distinct_write"] == 8 * lookups + bounds + rows * row
    # Both tables read the bound between them. find_bounds reads the sorted keys as far as its
    # binary searches come by.
    searched = traffic["distinct_read"] - (
        8 * len(few) + (8 + 4) * lookups + bounds + 4 + 2 * len(few) * row
    )
    assert 0 < searched <= 4 * lookups
    weights = torch.rand(len(few))
    call = (grad, few, table, None, weights, None, fields, 0, 0, None)
    ops.compose_bag_backward_cuda(*call, False, True)
    traffic = emulator.take_traffic()
    assert traffic["distinct_write"] == 8 * lookups + 4 * len(few)
    assert traffic["distinct_read"] == (
        8 * len(few) + 4 * lookups + (_rows_in_use(few, fields) + 2 * len(few)) * row
    )


def _rows_in_use(ids, fields):
    return sum(len(rows) for rows in reference._rows_in_use(ids, None, fields, None).values())


def test_bad_arguments(ops):
    parts = Composition(parts_of(4)).fields
    ids, table, offsets, weights = torch.arange(4), torch.zeros(40), packed((4,)), torch.zeros(4)
    for args in (
        (ids.int(), table, None, None, parts, 0, 0),
        (torch.arange(8)[::2], table, None, None, parts, 0, 0),
        (ids, table[:39], None, None, parts, 0, 0),
        (ids, table.long(), None, None, parts, 0, 0),
        (ids, table[None], None, None, parts, 0, 0),
        (ids, table, offsets.long(), None, parts, 0, 0),
        (ids, table, offsets[:0], None, parts, 0, 0),
        (ids, table, None, weights[:3], parts, 0, 0),
        (ids, table, None, weights.double(), parts, 0, 0),
        (ids, table, None, torch.zeros(4, 3), parts, 0, 0),
        (ids, table, None, torch.zeros(4, 4), parts, 2, 0),
        (ids, table, offsets, weights, parts, 0, 1),
        (ids, table, None, None, parts, 0, 1),
        (ids, table, None, None, parts, 3, 0),
        (ids, table, offsets, None, parts, 0, 3),
        (ids, table, None, None, parts[:-1], 0, 0),
        (ids[:3], torch.zeros(44), None, None, Composition(parts_of(4, 2)).fields, 0, 0),
        (ids, torch.zeros(44), packed((2, 1, 1)), None, Composition(parts_of(4, 2)).fields, 0, 0),
    ):
        with pytest.raises(RuntimeError, match="emblas: "):
            ops.compose_bag_cuda(*args, None)
    call = (ids, table, None, None, None, parts, 0, 0, None, True, True)
    for grad in (torch.zeros(4, 7), torch.zeros(3, 8), torch.zeros(8, 4).t(), table[:32].double()):
        with pytest.raises(RuntimeError, match="emblas: "):
            ops.compose_bag_backward_cuda(grad, *call)
    maximum = (torch.zeros(1, 8), ids, table, offsets, None)
    for argmax in (None, torch.zeros(1, 8), torch.zeros(1, 7).int(), torch.zeros(2, 8).int()):
        with pytest.raises(RuntimeError, match="argmax must be"):
            ops.compose_bag_backward_cuda(*maximum, argmax, parts, 0, 2, None, True, False)


def test_what_is_left_to_others(ops):
    """More parts than arguments hold, rows that overlap in a gradient, too many of anything."""
    forward = _op.ops()["compose_bag"].cuda_supports
    backward = _op.ops()["compose_bag_backward"].cuda_supports
    ids, table, grad = torch.arange(4), torch.zeros(400), torch.zeros(4, 8)

    def fields(*parts):
        return Composition(parts).fields

    for count in (32, 33):
        parts = fields(*(Part(9, 2, a=1, b=b) for b in range(count)))
        assert forward(ids, table, None, None, parts) == (count == 32)
        if count == 33:
            with pytest.raises(RuntimeError, match="at most 32 parts"):
                ops.compose_bag_cuda(ids, table, None, None, parts, 0, 0, None)
        else:
            check(*both(ops, parts_of_one(32), ids, table[:18]), 200)
    for parts, fits in (
        (fields(Part(9, 4), Part(9, 4, base=36, column=4)), True),
        (fields(Part(9, 4), Part(9, 4, base=35, column=4)), False),
        (fields(Part(9, 4, stride=3)), False),
    ):
        assert forward(ids, table, None, None, parts)
        assert backward(grad, ids, table, None, None, None, parts) == fits
        if not fits:
            dim = parts[-3] + parts[-2]
            with pytest.raises(RuntimeError, match="don't overlap"):
                ops.compose_bag_backward_cuda(
                    torch.zeros(4, dim), ids, table, None, None, None, parts, 0, 0, None, True,
                    False,
                )  # fmt: skip
    many = ids[:1].expand(2**29)
    assert forward(many, table, None, None, parts_of_one(4, fields=True))
    assert not backward(grad, many, table, None, None, None, parts_of_one(4, fields=True))
    assert not forward(ids, table, None, None, fields(Part(2**31 - 1, 1)))


def parts_of_one(count, fields=False):
    parts = tuple(Part(9, 2, a=1, b=b) for b in range(count))
    return Composition(parts).fields if fields else parts
