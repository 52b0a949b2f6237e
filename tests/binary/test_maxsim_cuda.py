"""What only the CUDA kernels of late interaction have: tiles, pieces of tokens, alignment, warps.

That they compute the right thing is in test_executors.py too.
"""

from __future__ import annotations

import pytest
import torch
from contract import packed
from emblas.binary import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from simt import emulator

pytestmark = pytest.mark.skipif(bool(emulator.why_not()), reason=emulator.why_not() or "")

FLOAT, DOUBLE, BITS = torch.float32, torch.float64, torch.uint8
BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16
# Dtypes of queries and documents, the dimensions in 16 bytes of shared memory, tensor cores.
KINDS = {
    "float32": (FLOAT, FLOAT, 4, False),
    "bfloat16": (BFLOAT16, BFLOAT16, 8, True),
    "bfloat16, no tensor cores": (BFLOAT16, BFLOAT16, 4, False),
    "float16": (FLOAT16, FLOAT16, 8, True),
    "float16, no tensor cores": (FLOAT16, FLOAT16, 4, False),
    "float64": (DOUBLE, DOUBLE, 2, False),
    "floats and bits": (FLOAT, BITS, 4, False),
    "bits": (BITS, BITS, 128, True),
    "bits, no tensor cores": (BITS, BITS, 128, False),
}
PIECES = 8  # of 16 bytes, of each token at a time


@pytest.fixture(scope="module")
def ops():
    emulator.library()
    return torch.ops.emblas_simt


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def whole(rows, dim, dtype):
    """Whole numbers, whose products are exact: ties are ties."""
    values = torch.randint(-3, 4, (rows, dim))
    return reference.pack_sign(values.float()) if dtype == BITS else values.to(dtype)


def check(ops, queries, starts, documents, document_starts, dim, tensor_cores=True):
    args = queries, starts, documents, document_starts, dim
    expected = reference.maxsim(*args, True)
    for need_argmax in (True, False):
        scores, argmax = ops.maxsim_cuda(*args, need_argmax, tensor_cores)
        assert torch.equal(scores, expected[0])
        assert torch.equal(argmax, expected[1] if need_argmax else expected[1][:0])
    return expected


def check_kind(ops, kind, lengths, document_lengths, dim):
    starts, document_starts = packed(lengths), packed(document_lengths)
    q, d = (
        whole(sum(n), dim, dtype)
        for n, dtype in zip((lengths, document_lengths), kind[:2], strict=True)
    )
    return check(ops, q, starts, d, document_starts, dim, kind[3])


def test_tile_edges(ops, kind):
    for tokens in (1, 31, 32, 33):
        check_kind(ops, kind, (tokens,), (1, 63, 64, 65), 5)
    check_kind(ops, kind, (65, 0, 2), (130, 0), 5)


def test_widths(ops, kind):
    values = kind[2]
    slab = PIECES * values
    for dim in (0, 1, values - 1, values, values + 1, slab - 1, slab, slab + 1, 2 * slab + values):
        check_kind(ops, kind, (2,), (3, 0), dim)


def test_alignment(ops, kind):
    """Tokens of documents wherever they start; those of queries are contiguous."""
    dim = 128 if BITS in kind[:2] else 16
    starts, document_starts = packed((3,)), packed((5, 2))
    for start, padding in ((0, 16), (0, 4), (1, 15), (4, 12), (2, 1)):
        q, d = whole(3, dim, kind[0]), whole(7, dim, kind[1])
        wide = torch.cat((d[:, :1].repeat(1, start), d, d[:, :1].repeat(1, padding)), 1)
        wide = wide[:, start : start + d.shape[1]]
        check(ops, q, starts, wide, document_starts, dim, kind[3])
        shifted = torch.cat((q.flatten()[:1], q.flatten()))[1:].view_as(q)
        check(ops, shifted, starts, d, document_starts, dim, kind[3])


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT16], ids=str)
def test_ties_go_to_the_first_token(ops, dtype):
    """Within a thread, a tile and a set, and where all products are far below zero."""
    starts, document_starts = packed((40,)), packed((200,))
    q, d = torch.ones(40, 4, dtype=dtype), torch.full((200, 4), -(2.0**99), dtype=dtype)
    for first in (0, 1, 7, 8, 9, 15, 16, 17, 70, 199):
        d[first:] = -(2.0**98)
        _, argmax = check(ops, q, starts, d, document_starts, 4)
        assert (argmax == first).all()
        d[first:] = -(2.0**99)


def gradients(ops, lengths, document_lengths, dim, dtype=FLOAT, shift=0):
    starts, document_starts = packed(lengths), packed(document_lengths)
    d = whole(sum(document_lengths), dim, dtype)
    q = whole(1, sum(lengths) * dim + shift, dtype)[0, shift:].view(sum(lengths), dim)
    _, argmax = reference.maxsim(q, starts, d, document_starts, dim, True)
    grad = whole(len(lengths), len(document_lengths), dtype)
    args = grad, q, starts, d, document_starts, argmax
    assert all(map(torch.equal, ops.maxsim_backward_cuda(*args), reference.maxsim_backward(*args)))
    return args


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)
def test_gradients(ops, dtype):
    """Warps of candidates, tiles of columns, rows that start at a multiple of 16 bytes or not."""
    vectors = 32 * 16 // dtype.itemsize  # columns of a block
    for dim in (1, 8, 9, vectors - 1, vectors, vectors + 1, vectors + 8):
        gradients(ops, (2, 0, 1), (1, 0, 2), dim, dtype)
    for sets in (32, 33, 257):  # so many candidates has a query token
        gradients(ops, (1,), (1,) * sets, 4, dtype)
    for tokens in (32, 33, 65):  # and a document token
        gradients(ops, (tokens - 3, 3), (2, 1), 4, dtype)
    gradients(ops, (3, 4), (5,), 8, dtype, shift=1)


@settings(max_examples=15)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=3),
    document_lengths=st.lists(st.integers(0, 70), max_size=3),
    dim=st.integers(0, 40),
    kind=st.sampled_from(list(KINDS.values())),
    seed=st.integers(0, 2**31),
)
def test_any_shape(ops, lengths, document_lengths, dim, kind, seed):
    with emulator.schedule("random", seed):
        check_kind(ops, kind, lengths, document_lengths, dim)
        if kind[0] == kind[1] in (FLOAT, DOUBLE):
            gradients(ops, lengths, document_lengths, dim, kind[0])


@pytest.mark.parametrize("dtype", [FLOAT, FLOAT16], ids=str)
def test_same_bits_in_any_order(ops, dtype):
    """And alone as together with others."""
    q, d, starts, document_starts = torch.randn(40, 9), torch.randn(150, 9), (7, 33), (70, 3, 77)
    args = q.to(dtype), packed(starts), d.to(dtype), packed(document_starts)
    scores, _ = ops.maxsim_cuda(*args, 9, True)
    alone, _ = ops.maxsim_cuda(
        args[0][7:], packed(starts[1:]), args[2][:70], packed((70,)), 9, False
    )
    assert torch.equal(alone[0, 0], scores[1, 0])
    for order, seed in (("reverse", 0), ("random", 1)):
        with emulator.schedule(order, seed, 0.02 * seed):
            assert torch.equal(ops.maxsim_cuda(*args, 9, True)[0], scores)


def test_same_gradients_in_any_order(ops):
    q, d = torch.randn(40, 9), torch.randn(150, 9)
    args = q, packed((7, 33)), d, packed((70, 3, 77))
    scores, argmax = ops.maxsim_cuda(*args, 9, True)
    expected = ops.maxsim_backward_cuda(scores, *args, argmax)
    for order, seed, preemption in (("reverse", 0, 0), ("random", 1, 0), ("random", 2, 0.02)):
        with emulator.schedule(order, seed, preemption):
            actual = ops.maxsim_backward_cuda(scores, *args, argmax)
            assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("wrong", [[0, -5, 9], [7, 3, 0], [2**31 - 1, -(2**31), 5], [1, 2, 3]])
def test_wrong_offsets_stay_in_bounds(ops, wrong):
    """Results mean nothing then, but no byte outside the arguments is touched."""
    q, d = torch.randn(5, 3), torch.randn(6, 3)
    offsets = torch.tensor(wrong, dtype=torch.int32)
    for starts, document_starts in ((offsets, packed((6,))), (packed((5,)), offsets)):
        scores, argmax = ops.maxsim_cuda(q, starts, d, document_starts, 3, False)
        argmax = torch.randint(-9, 9, (5, scores.shape[1]), dtype=torch.int32)
        argmax[:3] = torch.tensor([[2**31 - 1], [-(2**31)], [len(d)]])
        ops.maxsim_backward_cuda(scores, q, starts, d, document_starts, argmax)


def test_bytes_moved(ops):
    """Tokens are read once, and of those that did not win nothing is read again."""
    q, d = torch.ones(32, 16), torch.zeros(64, 16)
    d[::9] = 1
    args = q, packed((32,)), d, packed((20, 44))
    emulator.take_traffic()
    scores, argmax = ops.maxsim_cuda(*args, 16, True)
    traffic = emulator.take_traffic()
    assert traffic["distinct_read"] == q.nbytes + d.nbytes + 2 * 4 + 3 * 4
    assert traffic["distinct_write"] == scores.nbytes + argmax.nbytes
    ops.maxsim_backward_cuda(scores, *args, argmax)
    traffic = emulator.take_traffic()
    won = len(argmax.unique()) * d[0].nbytes
    both = argmax.nbytes + scores.nbytes  # read by both kernels
    offsets = 1 * 4  # of the second document
    assert traffic["distinct_read"] == 2 * both + won + q.nbytes + offsets
    assert traffic["distinct_write"] == q.nbytes + d.nbytes


def test_bad_arguments(ops):
    q, d, starts, document_starts = torch.zeros(2, 8), torch.zeros(3, 8), packed((2,)), packed((3,))
    codes = torch.zeros(3, 1, dtype=torch.uint8)
    for args in (
        (q.half(), starts, d, document_starts, 8),
        (q.double(), starts, d, document_starts, 8),
        (q, starts, d.double(), document_starts, 8),
        (q, starts, d.int(), document_starts, 8),
        (codes[:2], starts, d, document_starts, 8),
        (q, starts, d, document_starts, 7),
        (q, starts, codes, document_starts, 9),
        (q[0], starts, d, document_starts, 8),
        (q, starts.long(), d, document_starts, 8),
        (q, starts[:0], d, document_starts, 8),
        (q, starts[:1], d, document_starts, 8),
        (q, starts, torch.zeros(8, 3).t(), document_starts, 8),
    ):
        with pytest.raises(RuntimeError, match="emblas: "):
            ops.maxsim_cuda(*args, True)
    grad, argmax = torch.zeros(1, 1), torch.zeros(2, 1, dtype=torch.int32)
    for args in (
        (grad.half(), q, starts, d, document_starts, argmax),
        (grad.double(), q, starts, d, document_starts, argmax),
        (grad[0], q, starts, d, document_starts, argmax),
        (grad, q, starts, d[:, :7], document_starts, argmax),
        (grad, torch.zeros(8, 2).t(), starts, d, document_starts, argmax),
        (grad, q, starts, d, document_starts, argmax.long()),
        (grad, q, starts, d, document_starts, argmax[:1]),
        (grad, q, starts[:1], d, document_starts, argmax),
    ):
        with pytest.raises(RuntimeError, match="emblas: "):
            ops.maxsim_backward_cuda(*args)
