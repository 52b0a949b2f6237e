"""Lookups in tables of integers against their definition, one element at a time."""

from __future__ import annotations

import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from contract import (
    check_compiled,
    check_gradients,
    check_op,
    check_threads,
    only_kernels,
    packed,
    tolerance,
)
from emblas import use_backend
from emblas.tables import QuantizedEmbedding, arrays, quantized_bag
from emblas.tables.packed_codes import pack_codes
from hypothesis import given
from hypothesis import strategies as st

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BITS = (2, 4, 8, 16)


def random_table(rows, dim, bits, dtype=torch.float32):
    """Codes with their sign, the same packed, and scales at which rows are of order one."""
    codes = torch.randint(0, 2**bits, (rows, dim))
    scale = (torch.rand(rows) + 0.5) * 2.0 ** (1 - bits)
    return codes - 2 ** (bits - 1), pack_codes(codes, bits), scale.to(dtype)


def random_zeros(rows, bits, dtype=torch.float32):
    """Zero points among the codes and outside of them, whole and not, with codes from 0 on."""
    zero = (torch.rand(rows, dtype=dtype) * 2 - 0.5) * 2**bits
    return torch.where(torch.arange(rows) % 2 == 0, zero.round(), zero)


def oracle(ids, codes, scale, cu=None, weights=None, padding_id=None, mode="sum"):
    """The definition in float64."""
    cu = range(len(ids) + 1) if cu is None else cu.tolist()
    out = torch.zeros(len(cu) - 1, codes.shape[1], dtype=torch.float64)
    for b, (begin, end) in enumerate(pairwise(cu)):
        own = [i for i in range(begin, end) if int(ids[i]) != padding_id]
        rows = [
            codes[ids[i]].double() * float(scale[ids[i]])
            * (1 if weights is None else float(weights[i]))
            for i in own
        ]  # fmt: skip
        if rows:
            stack = torch.stack(rows)
            out[b] = {"sum": stack.sum(0), "mean": stack.mean(0), "max": stack.amax(0)}[mode]
    return out


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_equals_oracle(isa, dtype, bits, mode):
    ids = torch.randint(0, 30, (150,))
    cu = packed((0, 70, 1, 0, 3, 76, 0))
    weights = torch.randn(150) if mode == "sum" else None
    limit = tolerance(dtype, 76)
    limit["atol"] *= 10
    for dim in (1, 7, 16, 37, 64, 130):
        codes, table, scale = random_table(30, dim, bits, dtype)
        got = quantized_bag(ids, table, scale, bits, dim, cu, weights, mode=mode, padding_id=4)
        expected = oracle(ids, codes, scale, cu, weights, 4, mode)
        torch.testing.assert_close(got.double(), expected, **limit)
        with use_backend("reference"):
            plain = quantized_bag(
                ids, table, scale, bits, dim, cu, weights, mode=mode, padding_id=4
            )
        torch.testing.assert_close(plain.double(), expected, **limit)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_zero_points(isa, dtype, bits):
    ids, cu, weights = torch.randint(0, 30, (80,)), packed((0, 60, 1, 19)), torch.randn(80)
    limit = tolerance(dtype, 60)
    limit["atol"] *= 10
    for dim in (1, 16, 37, 130):
        codes, table, scale = random_table(30, dim, bits, dtype)
        zero = random_zeros(30, bits, torch.float64 if dtype == torch.float64 else torch.float32)
        rows = codes + 2 ** (bits - 1) - zero.double()[:, None]
        for mode, w in (("sum", weights), ("mean", None), ("max", None)):
            expected = oracle(ids, rows, scale, cu, w, 4, mode)
            for backend in ("cpu", "reference"):
                leaf = None if w is None else w.clone().requires_grad_()
                with use_backend(backend):
                    got = quantized_bag(
                        ids, table, scale, bits, dim, cu, leaf, mode=mode, padding_id=4,
                        zero_point=zero[:, None],
                    )  # fmt: skip
                torch.testing.assert_close(got.detach().double(), expected, **limit)
                if leaf is not None:
                    (grad,) = torch.autograd.grad(got.double().sum(), leaf)
                    along = (rows * scale.double()[:, None]).sum(1)[ids] * (ids != 4)
                    torch.testing.assert_close(grad.double(), along, rtol=1e-4, atol=1e-3)
    # Half of the range is the default, bit for bit; one id on its own is exact.
    middle = torch.full_like(zero, 2 ** (bits - 1))
    default = quantized_bag(ids, table, scale, bits, dim, cu, weights)
    same = quantized_bag(ids, table, scale, bits, dim, cu, weights, zero_point=middle)
    assert torch.equal(default, same)
    alone = quantized_bag(ids, table, scale, bits, dim, zero_point=zero)
    exact = (codes + 2 ** (bits - 1)).to(zero.dtype) - zero[:, None]
    assert torch.equal(alone, (exact * scale[:, None].to(zero.dtype)).to(dtype)[ids])


@given(
    lengths=st.lists(st.integers(0, 70), max_size=6),
    dim=st.integers(1, 90),
    rows=st.integers(1, 40),
    bits=st.sampled_from(BITS),
    mode=st.sampled_from(("sum", "mean", "max")),
    padded=st.booleans(),
)
def test_any_shape(lengths, dim, rows, bits, mode, padded):
    cu = packed(lengths, torch.int64)
    ids = torch.randint(0, rows, (int(cu[-1]),))
    codes, table, scale = random_table(rows, dim, bits)
    padding_id = rows - 1 if padded else None
    got = quantized_bag(ids, table, scale[:, None], bits, dim, cu, mode=mode, padding_id=padding_id)
    expected = oracle(ids, codes, scale, cu, padding_id=padding_id, mode=mode)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)


def test_shapes_of_ids(isa):
    """One id on its own is exact: one product."""
    codes, table, scale = random_table(9, 21, 4)
    ids = torch.randint(0, 9, (3, 2, 4))
    exact = codes * scale[:, None]
    assert torch.equal(quantized_bag(ids, table, scale, 4, 21), exact[ids])
    assert quantized_bag(ids[:0], table, scale, 4, 21).shape == (0, 2, 4, 21)
    assert torch.equal(quantized_bag(ids[0, 0, 0], table, scale, 4, 21), exact[ids[0, 0, 0]])
    weights = torch.randn(3, 2, 4)
    got = quantized_bag(ids.transpose(0, 2), table, scale, 4, 21, None, weights.transpose(0, 2))
    torch.testing.assert_close(got, exact[ids.transpose(0, 2)] * weights.transpose(0, 2)[..., None])


def test_empty_means_zero(isa):
    codes, table, scale = random_table(3, 5, 8)
    scale[0] = float("inf")
    for mode in ("sum", "mean", "max"):
        out = quantized_bag(
            torch.tensor([1, -1, -1]), table, scale, 8, 5, packed((0, 1, 2, 0)), mode=mode,
            padding_id=-1,
        )  # fmt: skip
        assert torch.equal(out[1], codes[1] * scale[1])
        assert out[[0, 2, 3]].count_nonzero() == 0
    assert quantized_bag(torch.empty(0).long(), table, scale, 8, 5, packed(())).shape == (0, 5)


@pytest.mark.parametrize("bits", BITS)
def test_gradient_of_weights(bits):
    _, table, scale = random_table(20, 19, bits, torch.float64)
    ids = torch.randint(0, 20, (12,))
    cu = packed((5, 0, 7))
    names = ("quantized_bag", "quantized_bag_backward")
    check_gradients(
        lambda w: quantized_bag(ids, table, scale, bits, 19, cu, w, padding_id=int(ids[0])),
        [torch.randn(12)], names,
    )  # fmt: skip
    check_gradients(lambda w: quantized_bag(ids, table, scale, bits, 19, None, w),
                    [torch.randn(12)], names)  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_backward_equals_reference(isa, dtype, bits):
    _, table, scale = random_table(30, 70, bits, dtype)
    ids = torch.randint(0, 30, (150,))
    cu = packed((0, 70, 1, 0, 79))
    grads = []
    for backend in ("cpu", "reference"):
        weights = torch.ones(150, requires_grad=True)
        with use_backend(backend):
            torch.manual_seed(1)
            out = quantized_bag(ids, table, scale, bits, 70, cu, weights, padding_id=2)
            grads += torch.autograd.grad(out, weights, torch.randn_like(out))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
    assert grads[0][ids == 2].count_nonzero() == 0


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_same_bits_for_any_thread_count(isa, dtype):
    _, table, scale = random_table(5000, 96, 8, dtype)
    cu = packed(torch.randint(0, 40, (900,)).tolist())
    ids = torch.randint(0, 5000, (int(cu[-1]),))
    weights = torch.randn(len(ids))

    def call():
        leaf = weights.clone().requires_grad_()
        out = quantized_bag(ids, table, scale, 8, 96, cu, leaf)
        return out.detach(), *torch.autograd.grad(out.sum(), leaf)

    check_threads(call)
    alone = [
        quantized_bag(ids[a:b], table, scale, 8, 96, packed((b - a,)), weights[a:b])
        for a, b in pairwise(cu[:20].tolist())
    ]
    assert torch.equal(call()[0][:19], torch.cat(alone))


def test_large_table():
    """Elements past 2^31: addresses of 64 bits. Pages that are never touched cost nothing."""
    if sys.platform != "linux":
        pytest.skip("needs lazily allocated memory")
    rows, dim = 2**31 // 64 + 5, 64
    table = torch.empty(rows, dim, dtype=torch.uint8)
    table[-1], table[3] = 200, 100
    scale = torch.ones(rows, dtype=torch.float16)
    out = quantized_bag(torch.tensor([rows - 1, 3]), table, scale, 8, dim)
    assert out[:, [0, -1]].tolist() == [[72, 72], [-28, -28]]


def test_module_takes_the_kernel():
    module = QuantizedEmbedding.from_table(torch.randn(9, 5), 4, padding_id=2)
    ids, cu = torch.tensor([0, 2, 8, 8]), packed((2, 0, 2))
    trained = [module(ids, cu, mode=mode).detach() for mode in ("sum", "mean", "max")]
    module.eval()
    with only_kernels("quantized_bag"):
        for mode, expected in zip(("sum", "mean", "max"), trained, strict=True):
            torch.testing.assert_close(module(ids, cu, mode=mode), expected)
        with torch.no_grad():
            assert not module.train()(ids).requires_grad
    weights = torch.ones(4, requires_grad=True)
    module.eval()(ids, cu, weights).sum().backward()
    assert weights.grad is not None
    assert weights.grad.count_nonzero() == 3


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bits", BITS)
def test_numpy_door(isa, dtype, bits):
    _, table, scale = random_table(20, 13, bits, torch.from_numpy(np.zeros(1, dtype)).dtype)
    ids, cu, weights = torch.randint(0, 20, (9,)), packed((4, 0, 5)), torch.randn(9).to(scale.dtype)
    zero = random_zeros(20, bits, scale.dtype)
    for offsets, w, mode, zeros in (
        (None, None, "sum", None), (cu, weights, "sum", zero), (cu, None, "max", None),
    ):  # fmt: skip
        expected = quantized_bag(
            ids, table, scale, bits, 13, offsets, w, mode=mode, padding_id=3, zero_point=zeros
        )
        got = arrays.quantized_bag(
            ids.numpy(), table.numpy(), scale.numpy()[:, None], bits, 13,
            None if offsets is None else offsets.numpy(), None if w is None else w.numpy(),
            mode=mode, padding_id=3,
            zero_point=None if zeros is None else zeros.numpy()[:, None],
        )  # fmt: skip
        assert torch.equal(torch.from_numpy(got), expected)
        assert got.dtype == dtype


def test_numpy_door_refuses():
    def call(ids=(0, 3), table=TABLE, scale=4, bits=8, dim=3, offsets=None, **options):
        if "per_sample_weights" in options:
            options["per_sample_weights"] = np.ones(options["per_sample_weights"], np.float32)
        return arrays.quantized_bag(
            np.array(ids), table.numpy(), np.ones(scale, np.float32), bits, dim,
            None if offsets is None else np.array(offsets, np.int32), **options,
        )  # fmt: skip

    assert call().shape == (2, 3)
    for message, options in (
        ("ids must be 0 to 3, got 4", {"ids": (0, 4)}),
        ("ids must be 0 to 3, got -1", {"ids": (-1, 0)}),
        ("bits must be one of", {"bits": 5}),
        ("packed must have 2 bytes a row", {"bits": 4}),
        ("scale must hold 4 scales", {"scale": 3}),
        ("mode must be one of", {"mode": "x"}),
        ("mode 'max' needs offsets", {"mode": "max"}),
        ("ids must have 1 dim", {"ids": [[0, 1]], "offsets": (0, 2)}),
        ("per_sample_weights must have the shape", {"per_sample_weights": 3}),
        ("per_sample_weights need mode",
         {"per_sample_weights": 2, "mode": "mean", "offsets": (0, 2)}),
        ("offsets must start at 0, never decrease", {"offsets": (0, 2, 1, 2)}),
        ("offsets must start at 0, never decrease", {"offsets": (0, 3)}),
        ("offsets must have at least one", {"offsets": ()}),
        ("zero_point must hold 4 numbers", {"zero_point": np.ones(3, np.float32)}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call(**options)
    for options in (
        {"ids": (0.0, 1.0)}, {"table": TABLE.int()}, {"zero_point": np.ones(4)},
    ):  # fmt: skip
        with pytest.raises(TypeError, match="must be a C-contiguous array of"):
            call(**options)


def test_operator_contract():
    _, table, scale = random_table(9, 7, 4)
    ids, cu = torch.randint(0, 9, (6,)), packed((2, 0, 4))
    for offsets, weights, mode in ((None, None, 0), (cu, torch.randn(6), 0), (cu, None, 2)):
        check_op("quantized_bag", ids, table, scale, offsets, weights, 4, 7, mode, 3)
    check_op("quantized_bag_backward", torch.randn(3, 7), ids, table, scale, cu, 4, 7, None)
    zero = random_zeros(9, 4)
    check_op("quantized_bag", ids, table, scale, cu, torch.randn(6), 4, 7, 0, 3, zero)
    check_op("quantized_bag_backward", torch.randn(3, 7), ids, table, scale, cu, 4, 7, None, zero)


def test_compiled():
    def sized(count, bags):
        _, table, scale = random_table(20, 6, 8)
        cu = packed((0, *[1] * (bags - 2), count - bags + 2))
        return torch.randint(0, 20, (count,)), table, scale, cu, torch.randn(count)

    check_compiled(
        lambda ids, table, scale, cu, w: quantized_bag(ids, table, scale, 8, 6, cu, w),
        [sized(7, 3), sized(30, 5), sized(11, 9)], backward=True,
    )  # fmt: skip


TABLE = torch.zeros(4, 3, dtype=torch.uint8)
IDS = torch.tensor([0, 3])


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "ids must have dtype int64, uint64, got int32",
         lambda: quantized_bag(IDS.int(), TABLE, torch.ones(4), 8, 3)),
        (ValueError, "ids must be 0 to 3, got 4",
         lambda: quantized_bag(IDS + 1, TABLE, torch.ones(4), 8, 3)),
        (ValueError, "ids must be 0 to 3, got -1",
         lambda: quantized_bag(IDS - 1, TABLE, torch.ones(4), 8, 3)),
        (ValueError, "bits must be one of", lambda: quantized_bag(IDS, TABLE, torch.ones(4), 3, 3)),
        (ValueError, "embedding_dim must be at least 1",
         lambda: quantized_bag(IDS, TABLE, torch.ones(4), 8, 0)),
        (ValueError, "packed must be contiguous with 2 bytes a row, for 3 integers of 4 bits",
         lambda: quantized_bag(IDS, TABLE, torch.ones(4), 4, 3)),
        (ValueError, "packed must be contiguous",
         lambda: quantized_bag(IDS, TABLE.t().contiguous().t(), torch.ones(4), 8, 3)),
        (TypeError, "packed must have dtype uint8",
         lambda: quantized_bag(IDS, TABLE.int(), torch.ones(4), 8, 3)),
        (ValueError, r"scale must have shape \(4,\) or \(4, 1\), got \(3,\)",
         lambda: quantized_bag(IDS, TABLE, torch.ones(3), 8, 3)),
        (TypeError, "scale must have dtype", lambda: quantized_bag(IDS, TABLE, IDS, 8, 3)),
        (ValueError, r"zero_point must have shape \(4,\) or \(4, 1\), got \(3,\)",
         lambda: quantized_bag(IDS, TABLE, torch.ones(4), 8, 3, zero_point=torch.ones(3))),
        (TypeError, "zero_point must have dtype float32, got int64",
         lambda: quantized_bag(IDS, TABLE, torch.ones(4), 8, 3, zero_point=torch.arange(4))),
        (TypeError, "zero_point must have dtype float64, got float32",
         lambda: quantized_bag(
             IDS, TABLE, torch.ones(4).double(), 8, 3, zero_point=torch.ones(4))),
        (ValueError, "mode 'mean' needs offsets",
         lambda: quantized_bag(IDS, TABLE, torch.ones(4), 8, 3, mode="mean")),
        (ValueError, "mode must be one of",
         lambda: quantized_bag(IDS, TABLE, torch.ones(4), 8, 3, mode="median")),
        (ValueError, "per_sample_weights need mode 'sum'",
         lambda: quantized_bag(
             IDS, TABLE, torch.ones(4), 8, 3, packed((2,)), torch.ones(2), mode="max")),
        (ValueError, "per_sample_weights must have the shape of ids",
         lambda: quantized_bag(IDS, TABLE, torch.ones(4), 8, 3, None, torch.ones(3))),
        (ValueError, "offsets must start at 0, never decrease and end at the number of ids",
         lambda: quantized_bag(IDS, TABLE, torch.ones(4), 8, 3, torch.tensor([0, 2, 1, 2]))),
        (ValueError, "offsets must start at 0, never decrease and end at the number of ids",
         lambda: quantized_bag(IDS, TABLE, torch.ones(4), 8, 3, torch.tensor([0, 3]))),
        (TypeError, "offsets must have dtype",
         lambda: quantized_bag(IDS, TABLE, torch.ones(4), 8, 3, torch.tensor([0.0, 2]))),
    ],
)  # fmt: skip
def test_bad_arguments(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_direct_call_is_guarded():
    """What reaches the operator without the public function can't read other memory."""
    op = torch.ops.emblas.quantized_bag.default
    good = [IDS, TABLE, torch.ones(4), None, None, 8, 3, 0, None, None]
    assert op(*good).shape == (2, 3)
    for position, value in (
        (0, IDS.int()), (0, IDS + 1), (0, IDS[None]), (1, TABLE[:, :2]), (1, TABLE.int()),
        (2, torch.ones(3)), (2, torch.ones(4, 1)), (2, IDS.repeat(2)), (3, torch.tensor([0, 2])),
        (3, torch.tensor([1, 2]).int()), (4, torch.ones(3)), (4, torch.ones(2).double()), (5, 7),
        (6, 4), (6, 0), (7, 1), (7, 3), (9, torch.ones(3)), (9, torch.ones(4).double()),
    ):  # fmt: skip
        bad = [*good]
        bad[position] = value
        with pytest.raises(RuntimeError, match="emblas: "):
            op(*bad)
    backward = torch.ops.emblas.quantized_bag_backward.default
    for grad in (torch.ones(2, 4), torch.ones(3, 3), torch.ones(2, 3).double()):
        with pytest.raises(RuntimeError, match="emblas: "):
            backward(grad, IDS, TABLE, torch.ones(4), None, 8, 3, None)
