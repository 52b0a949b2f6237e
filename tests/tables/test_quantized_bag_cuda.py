"""What only the CUDA kernels have: tiles of ids and columns, launch shapes, what isn't checked.

That they compute the right thing is also in tests/test_executors.py, which they run like every
executor.
"""

from __future__ import annotations

import pytest
import torch
from contract import packed, tolerance
from emblas.tables import quantized_op
from emblas.tables.packed_codes import pack_codes, row_bytes
from hypothesis import given
from hypothesis import strategies as st
from simt import emulator

pytestmark = pytest.mark.skipif(bool(emulator.why_not()), reason=emulator.why_not() or "")

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BITS = (2, 4, 8, 16)


@pytest.fixture(scope="module")
def ops():
    emulator.library()
    return torch.ops.emblas_simt


def arguments(count, dim, bits, *, rows=20, dtype=torch.float32, offsets=None, mode=0, zeros=True):
    """Arguments of the operator; weights where the mode takes them."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (
        torch.randint(0, rows, (count,)),
        pack_codes(torch.randint(0, 2**bits, (rows, dim)), bits),
        ((torch.rand(rows) + 0.5) * 2.0 ** (1 - bits)).to(dtype),
        offsets,
        torch.randn(count).to(wide) if mode == 0 else None,
        bits, dim, mode, 3,
        torch.rand(rows).to(wide) * 2**bits if zeros else None,
    )  # fmt: skip


def both(ops, args):
    """Forward and backward by the CUDA kernels, and what they should be."""
    ids, table, scale, offsets, _, bits, dim, *_, padding, zeros = args
    out = ops.quantized_bag_cuda(*args)
    grad = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out.dtype)
    backward = (grad, ids, table, scale, offsets, bits, dim, padding, zeros)
    wide = [[a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in some]
            for some in (args, backward)]  # fmt: skip
    expected = quantized_op.reference(*wide[0]), quantized_op.reference_backward(*wide[1])
    return (out, ops.quantized_bag_backward_cuda(*backward)), expected


def check(results, expected, dtype, length):
    limit = tolerance(dtype, length)
    for actual, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(
            actual.double(), wanted, rtol=4 * limit["rtol"], atol=32 * limit["atol"]
        )


@pytest.mark.parametrize("count", [1, 7, 8, 9, 33, 65])
def test_tiles_of_ids(ops, count):
    """A warp looks up as many ids as it reads rows at once, at least 8; a block 8 times as many."""
    for dim, bits in ((16, 8), (48, 4), (528, 2), (3, 16)):
        check(*both(ops, arguments(count, dim, bits)), torch.float32, dim)


@given(
    lengths=st.lists(st.integers(0, 70), max_size=4),
    dim=st.integers(1, 70),
    bits=st.sampled_from(BITS),
    mode=st.integers(0, 2),
    dtype=st.sampled_from(FLOATS),
    whole=st.booleans(),
    bags=st.booleans(),
    zeros=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_call(ops, lengths, dim, bits, mode, dtype, whole, bags, zeros, seed):
    dim = -(-dim // 16) * 16 if whole else dim
    args = arguments(
        sum(lengths), dim, bits, dtype=dtype, offsets=packed(lengths) if bags else None,
        mode=mode if bags else 0, zeros=zeros,
    )  # fmt: skip
    with emulator.schedule("random", seed):
        made = both(ops, args)
    check(*made, dtype, 4 * max(dim, 70))


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_same_bits_in_any_order(ops, mode):
    offsets = packed((0, 50, 3, 20, 1))
    args = arguments(74, 48, 4, offsets=offsets, mode=mode)
    expected, _ = both(ops, args)
    for order, seed, preemption in (("reverse", 0, 0), ("random", 1, 0), ("random", 2, 0.1)):
        with emulator.schedule(order, seed, preemption):
            actual, _ = both(ops, args)
        assert all(map(torch.equal, actual, expected))
    own = args[4] if args[4] is None else args[4][:50]
    alone = (args[0][:50], *args[1:3], packed((50,)), own, *args[5:])
    assert torch.equal(ops.quantized_bag_cuda(*alone)[0], expected[0][1])


@pytest.mark.parametrize(
    "offsets", [[-5, 500, 90, 2], [300, 200, 100, 0], [2**31 - 1] * 4, [-1] * 4, [3, 4, 9, 20], [7]]
)
def test_wrong_values_stay_in_bounds(ops, offsets):
    """Ids that are no rows count for nothing, and so do ids outside of all bags."""
    cu = torch.tensor(offsets, dtype=torch.int32)
    for dim in (16, 9):
        ids, *rest = arguments(150, dim, 4, offsets=cu)
        ids[::3] = torch.tensor([-1, -(2**63), 20, 2**62, 2**32]).repeat(10)
        with emulator.schedule("reverse"):
            out = ops.quantized_bag_cuda(ids, *rest)
            grad = ops.quantized_bag_backward_cuda(
                out, ids, *rest[:3], *rest[4:6], *rest[7:]
            )  # fmt: skip
        assert not grad[::3].any()
        if offsets == [3, 4, 9, 20]:
            assert not grad[:3].any()
            assert not grad[20:].any()
            used = (ids >= 0) & (ids < 20) & (torch.arange(150) >= 3) & (torch.arange(150) < 20)
            args = ids[used], *rest[:2], None, rest[3][used], *rest[4:]
            torch.testing.assert_close(
                out.double().sum(0), quantized_op.reference(*args).double().sum(0)
            )
    lone = ops.quantized_bag_cuda(ids, *rest[:2], None, *rest[3:])
    assert not lone[::3].any()


@pytest.mark.parametrize("bits", BITS)
def test_bytes_moved(ops, bits):
    """Rows in use with what belongs to them, and results, once."""
    count, dim = 70, 48
    ids, table, scale, _, weights, *rest, zeros = arguments(count, dim, bits)
    ids[ids == 3] = 4  # the padding id's row would not be read
    used, own = len(ids.unique()), row_bytes(dim, bits) + 4 + 4
    emulator.take_traffic()
    for offsets, extra in ((None, 0), (packed((3, 0, 67)), 16)):
        out = ops.quantized_bag_cuda(ids, table, scale, offsets, weights, *rest, zeros)
        traffic = emulator.take_traffic()
        assert traffic["distinct_read"] == (8 + 4) * count + used * own + extra
        assert traffic["distinct_write"] == traffic["global_write"] == out.nbytes
    grad = torch.randn(count, dim)
    backward = (grad, ids, table, scale, None, bits, dim, 3, zeros)
    ops.quantized_bag_backward_cuda(*backward)
    traffic = emulator.take_traffic()
    assert traffic["distinct_read"] == 8 * count + used * own + grad.nbytes
    assert traffic["distinct_write"] == 4 * count


def test_bad_arguments(ops):
    good = list(arguments(4, 6, 4, offsets=packed((4,))))
    ops.quantized_bag_cuda(*good)
    long = torch.arange(8)
    for position, value in (
        (0, good[0].int()), (0, long), (0, long[::2]), (1, good[1][:, :2]), (1, good[1].int()),
        (1, good[1].repeat(1, 2)[:, ::2]), (2, good[2][1:]), (2, good[2][:, None]), (2, long),
        (3, long[:2]), (3, good[3][:0]), (4, good[4][1:]), (4, good[4].double()), (5, 3), (6, 0),
        (6, 9), (7, 1), (7, 3), (9, good[9][1:]), (9, good[9].double()),
    ):  # fmt: skip
        bad = [*good]
        bad[position] = value
        with pytest.raises(RuntimeError, match="emblas: "):
            ops.quantized_bag_cuda(*bad)
    with pytest.raises(RuntimeError, match="mean and max need offsets"):
        ops.quantized_bag_cuda(*good[:3], None, None, 4, 6, 2, None, None)
    for grad in (torch.ones(1, 5), torch.ones(2, 6), torch.ones(1, 6).double(), torch.ones(6)):
        with pytest.raises(RuntimeError, match="grad_out must be"):
            ops.quantized_bag_backward_cuda(grad, *good[:4], 4, 6, None, None)
