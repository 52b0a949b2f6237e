"""Rows in use on GPUs: steps of optimizers and sparse gradients by the CUDA kernels.

That they compute the right thing is also in tests/test_executors.py and test_optim.py, which they
run like every executor.
"""

from __future__ import annotations

import pytest
import torch
from contract import packed, tolerance
from emblas.tables import Composition, Part, TableSpec, hash_bag
from emblas.tables import compose_reference as reference
from emblas.tables.compose_op import MODES
from emblas.tables.composition import COMBINES
from executors import EXECUTORS
from hypothesis import given
from hypothesis import strategies as st
from simt import emulator

pytestmark = pytest.mark.skipif(bool(emulator.why_not()), reason=emulator.why_not() or "")

PIECE = 64  # lookups of a row that one warp adds up
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
KINDS = range(4)
ADAM = reference.ADAM
CHANGED = (2, 10, 11, 12, 13)  # the table and the state


@pytest.fixture(scope="module")
def ops():
    emulator.library()
    return torch.ops.emblas_simt


def two_tables(width, features=1):
    """A table that all features share, and one of each; an element before them is nobody's."""
    parts = []
    for f in range(features):
        parts += [
            Part(5, width, a=1, b=f, signed=True, base=1, column=width * f, feature=f),
            Part(4, width, "radix", a=3, base=1 + (5 + 4 * f) * width, column=width * f, feature=f),
        ]
    return tuple(parts)


def arguments(ops, kind, parts, ids, dtype, offsets=None, weights=None, combine="sum", mode="sum",
              pad=None, generator=None):  # fmt: skip
    """Arguments of an update: gradient, lookups, and the state after some steps."""
    composition = Composition(parts, combine)
    table = torch.randn(composition.size + 2, generator=generator).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weights = None if weights is None else weights.to(wide)
    how = (composition.fields, COMBINES.index(combine), MODES.index(mode), pad)
    out, argmax = ops.compose_bag_cuda(ids, table, offsets, weights, *how)
    grad = torch.randn(out.shape, generator=generator).to(dtype)
    rows, elements = composition.num_rows, table.numel()
    state = (
        torch.rand((0, rows, elements, elements)[kind], dtype=wide, generator=generator),
        torch.rand(elements if kind == ADAM else 0, dtype=wide, generator=generator),
        torch.randint(0, 4, (rows if kind == ADAM else 0,), generator=generator),
        torch.tensor([4]),
    )
    settings = (kind, 0.05, 0.1, 0.9, 0.99, 0.3)
    return grad, ids, table, offsets, weights, argmax, *how, *state, *settings


def step(run, args):
    """What a step changes, of copies of the arguments."""
    args = [a.clone() if torch.is_tensor(a) else a for a in args]
    run(*args)
    return [args[place] for place in CHANGED]


def check(ops, args, length, actual=None):
    actual = step(ops.compose_bag_update__cuda, args) if actual is None else actual
    wide = [a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
    limit = tolerance(args[0].dtype, length)
    for one, wanted in zip(actual, step(reference.compose_bag_update_, wide), strict=True):
        torch.testing.assert_close(
            one.to(wanted.dtype), wanted, rtol=4 * limit["rtol"], atol=32 * limit["atol"]
        )
    return actual


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("width", "dtype"), [(3, torch.float32), (8, torch.float16),
                                              (128, torch.float32), (132, torch.float32),
                                              (66, torch.float64)])  # fmt: skip
def test_pieces_and_tiles(ops, kind, width, dtype):
    """Rows that most lookups hit; rows of one tile of columns, in vectors or not, and of two."""
    lengths = (2 * PIECE + 1, 0, 9) if width < 100 else (2 * PIECE, 3)
    ids = torch.arange(sum(lengths))
    ids[::2] = 7
    check(ops, arguments(ops, kind, two_tables(width), ids, dtype, packed(lengths)), 8 * PIECE)


@given(
    lengths=st.lists(st.integers(0, 20), max_size=3),
    width=st.integers(1, 20),
    kind=st.sampled_from(KINDS),
    combine=st.sampled_from(COMBINES),
    mode=st.sampled_from(MODES),
    dtype=st.sampled_from(FLOATS),
    weights=st.sampled_from([0, 1, 2]),
    seed=st.integers(0, 2**31),
    padded=st.booleans(),
)
def test_any_call(ops, lengths, width, kind, combine, mode, dtype, weights, seed, padded):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-(2**63), 2**63 - 1, (2 * sum(lengths),), generator=generator)
    ids[::3] = ids[:1].clone()
    mode = "sum" if weights else mode
    w = None
    if weights and not (weights == 2 and combine == "product"):
        shape = (len(ids),) if weights == 1 else (len(ids), 2)
        w = torch.randn(shape, generator=generator)
    pad = int(ids[0]) if padded and len(ids) else None
    args = arguments(ops, kind, two_tables(width, 2), ids, dtype, packed(lengths * 2), w, combine,
                     mode, pad, generator)  # fmt: skip
    with emulator.schedule("random", seed):
        actual = step(ops.compose_bag_update__cuda, args)
    check(ops, args, 8 * max(len(ids), 1), actual)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("combine", ["mean", "product"])
def test_same_bits_in_any_order(ops, kind, combine):
    ids, offsets = torch.arange(190), packed((0, 130, 3, 10, 20, 27))
    ids[20:150] = 5
    args = arguments(
        ops, kind, two_tables(12, 2), ids, torch.float32, offsets, None, combine, "mean"
    )
    one_table = TableSpec(9, 1).composition(12).fields
    rows_of = (torch.randn(6, 12), *args[1:5], None, one_table, 0, 1, None)

    def run():
        rows, values, count = ops.compose_bag_backward_rows_cuda(*rows_of)
        used = int(count)
        return *step(ops.compose_bag_update__cuda, args), rows[:used], values[:used]

    expected = run()
    for order, seed, preemption in (("reverse", 0, 0), ("random", 1, 0), ("random", 2, 0.1)):
        with emulator.schedule(order, seed, preemption):
            assert all(map(torch.equal, run(), expected))


@pytest.mark.parametrize(
    "offsets",
    [[0, 2**31 - 1, -(2**31), 7, 8], [300, 200, 100, 0, 0], [-1] * 5, [30, 40, 90, 100, 110], [0]],
)
@pytest.mark.parametrize("mode", MODES)
def test_wrong_offsets_stay_in_bounds(ops, offsets, mode):
    """Results mean nothing then, but no byte outside the arguments is touched."""
    ids, cu = torch.arange(150), torch.tensor(offsets, dtype=torch.int32)
    with emulator.schedule("reverse", check_uninitialized=False, check_races=False):
        for kind, combine in ((ADAM, "product"), (reference.ROW_WISE_ADAGRAD, "sum")):
            args = arguments(
                ops, kind, two_tables(4, 2), ids, torch.float32, cu, None, combine, mode
            )
            step(ops.compose_bag_update__cuda, args)


def test_rows_through_the_front_door():
    """The public function reaches the kernels; a lookup of all ids in a table of few rows."""
    names = ("compose_bag", "compose_bag_backward", "compose_bag_backward_rows")
    spec, ids = TableSpec(40, 2), torch.arange(70) % 20
    table, grad = torch.randn(40, 130), torch.randn(70, 130)
    grads = []
    for sparse in (True, False):
        leaf = table.clone().requires_grad_()
        with EXECUTORS["simt"](names):
            hash_bag(ids, leaf, spec, sparse=sparse, mode="sum", combine="mean").backward(grad)
        grads.append(leaf.grad)
    assert torch.equal(grads[0].to_dense(), grads[1])
    assert torch.equal(grads[0]._indices()[0], grads[1].any(1).nonzero()[:, 0])


def test_bad_arguments(ops):
    ids, table = torch.arange(4), torch.zeros(40)
    parts, grad = Composition((Part(10, 4),)).fields, torch.zeros(4, 4)
    call = (grad, ids, table, None, None, None, parts, 0, 0, None)
    count, rows, elements, nothing = torch.zeros(1).long(), torch.zeros(10), table, torch.zeros(0)
    none, steps = nothing.long(), rows.long()
    settings = (0.1, 0.1, 0.9, 0.9, 0.1)
    for kind, state in enumerate(
        ((nothing, nothing, none), (rows, nothing, none), (elements, nothing, none),
         (elements, elements, steps))
    ):  # fmt: skip
        good = [*call, *(s.clone() for s in state), count, kind, *settings]
        ops.compose_bag_update__cuda(*good)
        for place, value in (
            (0, grad[:3]), (10, torch.zeros(11)), (10, good[10].double()),
            (10, torch.zeros(20)[::2]), (11, torch.zeros(11)), (12, torch.zeros(11).long()),
            (12, good[12].int()), (13, none), (13, count.int()), (14, 4), (14, -1),
        ):  # fmt: skip
            bad = [*good]
            bad[place] = value
            with pytest.raises(RuntimeError, match="emblas: "):
                ops.compose_bag_update__cuda(*bad)
    overlapping = Composition((Part(10, 4, stride=3),)).fields
    apart = Composition((Part(3, 4), Part(3, 4, base=12, column=4))).fields
    for fields, width, message in (
        (overlapping, 4, "don't overlap"), (apart, 8, "parts of one table"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            ops.compose_bag_backward_rows_cuda(
                torch.zeros(4, width), *call[1:6], fields, *call[7:]
            )  # fmt: skip
