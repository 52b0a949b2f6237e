"""What only the CUDA kernels of vocabulary pooling have: tiles of logits, sorted winners, guards.

That they compute the right thing is in test_executors.py too.
"""

from __future__ import annotations

import pytest
import torch
from contract import packed
from emblas.pooling import op_vocab
from hypothesis import given, settings
from hypothesis import strategies as st
from simt import emulator

pytestmark = pytest.mark.skipif(bool(emulator.why_not()), reason=emulator.why_not() or "")

TOKENS, WORDS = 4096, 2048  # of a tile of logits
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(scope="module")
def ops():
    emulator.library()
    return torch.ops.emblas_simt


def integers(*shape, dtype=torch.float32):
    """Sums of products of these are exact, and equal ones are many."""
    return torch.randint(-2, 3, shape).to(dtype)


def check(ops, x, weight, bias, starts, weights=None, ends=None, backward=True):
    args = x, weight, bias, starts, weights, ends
    out, argmax = ops.vocab_max_cuda(*args)
    expected, expected_argmax = op_vocab._reference(*args)
    assert torch.equal(argmax, expected_argmax)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    grad = integers(*out.shape, dtype=out.dtype)
    if not backward:  # which knows no tiles
        return
    for needs in ((True, True), (True, False), (False, True)):
        args = grad, x.nan_to_num(0, 1, 1), weight, argmax, starts, ends, *needs
        actual = ops.vocab_max_backward_cuda(*args)
        for a, e in zip(actual, op_vocab._backward_reference(*args), strict=True):
            assert torch.equal(a, e)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_edges(ops, dtype):
    """Around the warps of a segment and the vectors of a row."""
    vectors = 32 * 16 // dtype.itemsize
    lengths = (7, 8, 9, 0, 1)
    for vocab, dim in ((1, 1), (vectors - 1, 8), (vectors, 9), (vectors + 8, 16)):
        x, weight = integers(sum(lengths), dim, dtype=dtype), integers(vocab, dim, dtype=dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        check(ops, x, weight, integers(vocab, dtype=wide), packed(lengths))
    x = integers(5, vectors + 8, dtype=dtype)
    check(ops, x, integers(3, vectors + 8, dtype=dtype), None, packed((2, 3)))


def test_unaligned(ops):
    storage = integers(5 * 8 + 1)
    x, weight = storage[1:].view(5, 8), integers(24, 8)
    check(ops, x, weight, None, packed((2, 3)))
    check(ops, weight[:7].clone(), x, None, packed((2, 5)))


def test_tiles_of_tokens(ops):
    """Segments end before, at and behind the edge of a tile; the bias is added once."""
    weight, bias = integers(3, 2), integers(3)
    x = integers(TOKENS + 5, 2)
    x[:-3] = x[:-3].clamp(max=1)
    for edge in (TOKENS - 1, TOKENS, TOKENS + 1):
        lengths = (edge, TOKENS + 5 - edge, 0)
        check(ops, x, weight, bias, packed(lengths), backward=False)
    starts = torch.tensor([4, TOKENS - 3], dtype=torch.int32)
    check(ops, x, weight, bias, starts, None, starts + 6, backward=False)
    weights = torch.zeros(TOKENS + 5)
    weights[:2] = 1
    check(ops, x, weight, bias, packed((TOKENS + 5,)), weights, backward=False)


def test_tiles_of_words(ops):
    x, weight = integers(3, 2), integers(WORDS + 9, 2)
    check(ops, x, weight, integers(WORDS + 9), packed((1, 2)), backward=False)
    check(ops, x, weight[:WORDS], None, packed((3,)), backward=False)


def test_special_values(ops):
    """Infinite and missing logits; one of -infinity is a logit."""
    x = torch.tensor([[-torch.inf], [-torch.inf], [1], [torch.nan], [torch.inf], [torch.nan]])
    check(ops, x, torch.ones(2, 1), integers(2), packed((2, 1, 3)))


@settings(max_examples=15)
@given(
    lengths=st.lists(st.integers(0, 20), max_size=8),
    vocab=st.integers(0, 40),
    dim=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_any_shape(ops, lengths, vocab, dim, dtype, seed):
    with emulator.schedule("random", seed, 0.01):
        x, weight = integers(sum(lengths), dim, dtype=dtype), integers(vocab, dim, dtype=dtype)
        check(ops, x, weight, None, packed(lengths))


def test_wrong_arguments_stay_in_bounds(ops):
    """Results mean nothing then, but no byte outside the arguments is touched."""
    x, weight = integers(7, 5), integers(4, 5)
    wrong = torch.tensor([2**31 - 1, -5, 3, -(2**31), 9], dtype=torch.int32)
    with emulator.schedule(check_uninitialized=False):
        ops.vocab_max_cuda(x, weight, None, wrong)
        ops.vocab_max_cuda(x, weight, None, wrong, torch.ones(7), wrong.flip(0))
    argmax = wrong[:, None].repeat(1, 4)
    argmax[:, 0] = torch.tensor([7, -1, -2, 8, 0])
    args = torch.ones(5, 4), x, weight, argmax, wrong, wrong
    grad_x, grad_weight = ops.vocab_max_backward_cuda(*args, True, True)
    assert torch.equal(grad_x[0], weight[0])
    assert torch.equal(grad_x[3], weight[1:].sum(0))
    assert torch.equal(grad_weight[0], x[0])
    assert torch.equal(grad_weight[1], x[3])


def test_bytes_moved(ops):
    """Pairs without a gradient read no row."""
    x, weight, starts = integers(6, 8), integers(9, 8), packed((4, 2))
    _, argmax = ops.vocab_max_cuda(x, weight, None, starts)
    grad = torch.zeros(2, 9)
    grad[0, 3] = grad[1, 5] = 1
    emulator.take_launches()
    ops.vocab_max_backward_cuda(grad, x, weight, argmax, starts, None, True, True)
    _, _, tokens, words = (counts for _, counts in emulator.take_launches())
    assert tokens["distinct_read"] == 7 * 8 + 2 * (8 + 4) + 2 * 32
    assert words["distinct_read"] == 2 * 9 * 8 + 2 * 32
    assert tokens["distinct_write"] == x.nbytes


def test_bad_arguments(ops):
    x, weight, starts = torch.zeros(4, 3), torch.zeros(5, 3), packed((4,))
    for args in (
        (x.long(), weight.long(), None, starts),
        (x[0], weight, None, starts),
        (x[:, :2], weight[:, :2], None, starts),
        (x, weight.double(), None, starts),
        (x, weight[:, :2].clone(), None, starts),
        (x, weight[0], None, starts),
        (x, weight, torch.zeros(4), starts),
        (x, weight, torch.zeros(5).double(), starts),
        (x, weight, None, starts.long()),
        (x, weight, None, starts, torch.zeros(3)),
        (x, weight, None, starts, None, starts[:1]),
    ):
        with pytest.raises(RuntimeError, match="emblas: "):
            ops.vocab_max_cuda(*args)
    grad, argmax = torch.zeros(1, 5), torch.zeros(1, 5, dtype=torch.int32)
    for args in (
        (grad.double(), x, weight, argmax),
        (grad, x, weight, argmax.long()),
        (grad[:, :4], x, weight, argmax),
        (grad, x, weight, argmax[0]),
        (grad, x, weight.double(), argmax),
    ):
        with pytest.raises(RuntimeError, match="emblas: "):
            ops.vocab_max_backward_cuda(*args, starts, None, True, True)


# --- lexical weights -----------------------------------------------------------------------------


@settings(max_examples=15)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    words=st.integers(1, 30),
    ignored=st.lists(st.integers(0, 30), max_size=3),
    seed=st.integers(0, 2**31),
)
def test_lexical_index(ops, lengths, words, ignored, seed):
    ids = torch.randint(0, words, (sum(lengths),))
    args = ids, torch.randint(-1, 4, ids.shape) / 2, packed(lengths), ignored
    with emulator.schedule("random", seed, 0.01):
        actual = ops.lexical_index_cuda(*args)
    assert all(map(torch.equal, actual, op_vocab._lexical_reference(*args)))


def test_lexical_blocks(ops):
    """More tokens, and more sequences, than a block has threads."""
    for lengths in ((100, 200), (1,) * 130 + (0,) * 140 + (2,)):
        ids = torch.randint(0, 50, (sum(lengths),))
        args = ids, torch.rand(len(ids)), packed(lengths), [*range(32)]
        actual = ops.lexical_index_cuda(*args)
        assert all(map(torch.equal, actual, op_vocab._lexical_reference(*args)))


def test_lexical_index_stays_in_bounds(ops):
    ids, weights = torch.tensor([3, 1, 1, 2, 3, 0, 3]), torch.ones(7)
    with emulator.schedule(check_uninitialized=False, check_races=False):
        for wrong in ([2**31 - 1, -5, 3, -(2**31), 9], [5, 5], [0, 9], [-3, 2], [4, 6], [9, 4, 7]):
            ops.lexical_index_cuda(ids, weights, torch.tensor(wrong, dtype=torch.int32), [])


def test_lexical_bad_arguments(ops):
    ids, weights, starts = torch.zeros(4, dtype=torch.int64), torch.zeros(4), packed((4,))
    for args in (
        (ids.int(), weights, starts, []),
        (ids, weights[:3], starts, []),
        (ids, weights.double(), starts, []),
        (ids, weights, starts.long(), []),
        (ids, weights, starts[:0], []),
        (ids, weights, starts[:1], []),
        (ids, weights, starts, [0] * 33),
    ):
        with pytest.raises(RuntimeError, match="emblas: "):
            ops.lexical_index_cuda(*args)
