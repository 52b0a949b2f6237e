"""What only the CUDA kernels of summed vocabulary pooling have: tiles, chunks, guards.

That they compute the right thing is in test_executors.py too.
"""

from __future__ import annotations

import pytest
import torch
from contract import packed
from emblas.pooling import op_vocab_sum, reference
from hypothesis import given, settings
from hypothesis import strategies as st
from simt import emulator

pytestmark = pytest.mark.skipif(bool(emulator.why_not()), reason=emulator.why_not() or "")

TOKENS, WORDS, CHUNK = 4096, 2048, 128  # of a tile of logits; of a chunk of a segment
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(scope="module")
def ops():
    emulator.library()
    return torch.ops.emblas_simt


def integers(*shape, dtype=torch.float32):
    """Sums of products of these are exact in every dtype, and many are 0."""
    return torch.randint(-2, 3, shape).to(dtype)


def batch_of(starts, ends):
    return len(starts) - 1 if ends is None else len(ends)


def check(ops, x, weight, bias, starts, weights=None, ends=None, activation=1):
    """Compare bits, where the activation is no logarithm; tokens of no segment hold NaN."""
    x[reference.owners(len(x), starts, weights, ends) < 0] = torch.nan
    args = x, weight, bias, starts, activation, weights, ends
    error = 0 if activation < 2 else 16 * torch.finfo(x.dtype).eps
    limit = {"rtol": error, "atol": error}
    expected = op_vocab_sum._reference(*args)
    torch.testing.assert_close(ops.vocab_sum_cuda(*args), expected, **limit)
    grad = integers(batch_of(starts, ends), len(weight), dtype=expected.dtype)
    for needs in ((True, True, True), (True, False, False), (False, True, False)):
        actual = ops.vocab_sum_backward_cuda(grad, *args, *needs)
        expected = op_vocab_sum._backward_reference(grad, *args, *needs)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, **limit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_edges(ops, dtype):
    """Around the warps of a chunk and the vectors of a row."""
    vectors = 32 * 16 // dtype.itemsize
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    lengths = (7, 8, 9, 0, 1)
    for vocab, dim in ((1, 1), (vectors - 1, 3), (vectors, 5), (vectors + 8, 4), (260, 2)):
        x, weight = integers(sum(lengths), dim, dtype=dtype), integers(vocab, dim, dtype=dtype)
        for activation in range(4):
            bias = integers(vocab, dtype=wide) if activation % 2 else None
            check(ops, x, weight, bias, packed(lengths), activation=activation)


def test_chunks(ops):
    """Segments end before, at and behind the edge of a chunk, and begin anywhere."""
    for edge in (CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK):
        lengths = (3, edge, 0, 5, edge, CHUNK, 1)
        x, weight = integers(sum(lengths), 2), integers(5, 2)
        check(ops, x, weight, integers(5), packed(lengths))
        weights = torch.ones(sum(lengths))
        weights[::3] = 0
        check(ops, x.nan_to_num(1), weight, None, packed(lengths), weights)


def test_spans(ops):
    """Tokens before, between and behind the segments."""
    starts, ends = torch.tensor([[2, 9, 9, 40, 230], [5, 9, 30, 200, 250]], dtype=torch.int32)
    for tokens in (250, 257):
        check(ops, integers(tokens, 3), integers(20, 3), integers(20), starts, None, ends)


def test_tiles_of_tokens(ops):
    """Chunks that begin in one tile and end in the next; the last tile has one token."""
    weight, bias = integers(3, 2), integers(3)
    for tokens, edge in ((TOKENS + 1, TOKENS - 1), (TOKENS + 300, TOKENS), (TOKENS, TOKENS)):
        lengths = (7, edge - 14, 7, 0, tokens - edge, 0)
        check(ops, integers(tokens, 2), weight, bias, packed(lengths))
    check(ops, integers(2 * TOKENS + 9, 1), weight[:, :1].clone(), None, packed((2 * TOKENS + 9,)))


def test_tiles_of_words(ops):
    x, weight = integers(3, 2), integers(2 * WORDS + 9, 2)
    check(ops, x, weight, integers(2 * WORDS + 9), packed((1, 2)))
    check(ops, x, weight[:WORDS], None, packed((3,)))


def test_bits_do_not_depend_on_the_batch(ops):
    """Chunks count from a segment's own beginning, also across the edges of tiles.

    Products of one dimension have one term, whatever tile they are in.
    """
    x, weight, bias = torch.randn(400, 1), torch.randn(9, 1), torch.randn(9)
    alone = ops.vocab_sum_cuda(x, weight, bias, packed((400,)), 0)
    for before in (5, 100, TOKENS - 200, TOKENS - 1):
        padded = torch.cat([torch.randn(before, 1), x])
        out = ops.vocab_sum_cuda(padded, weight, bias, packed((before, 400)), 0)
        assert torch.equal(out[1], alone[0])


@settings(max_examples=15)
@given(
    lengths=st.lists(st.integers(0, 20), max_size=8),
    vocab=st.integers(0, 40),
    dim=st.integers(1, 8),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_any_shape(ops, lengths, vocab, dim, dtype, seed):
    with emulator.schedule("random", seed, 0.01):
        x, weight = integers(sum(lengths), dim, dtype=dtype), integers(vocab, dim, dtype=dtype)
        check(ops, x, weight, None, packed(lengths))


def test_special_values(ops):
    """Infinite and missing logits."""
    x = torch.tensor([[-torch.inf], [1], [torch.inf], [torch.nan]])
    starts, weight = packed((2, 1, 1)), torch.ones(2, 1)
    for activation in range(4):
        args = x, weight, None, starts, activation
        expected = op_vocab_sum._reference(*args)
        actual = ops.vocab_sum_cuda(*args)
        torch.testing.assert_close(actual, expected, equal_nan=True)
    *_, grad = ops.vocab_sum_backward_cuda(torch.ones(3, 2), *args, None, None, False, False, True)
    assert grad.isnan().all()


@pytest.mark.parametrize(
    "wrong",
    [[2**31 - 1, -5, 3, -(2**31), 9], [0, 600, 2**31 - 1, 5, 300], [-(2**31), 300, 299, 1, 0]],
)
def test_wrong_offsets_stay_in_bounds(ops, wrong):
    """Results mean nothing then, but no byte outside the arguments is touched."""
    x, weight, bias = integers(300, 2), integers(4, 2), integers(4)
    wrong = torch.tensor(wrong, dtype=torch.int32)
    present = torch.ones(300)
    with emulator.schedule(check_uninitialized=False):
        ops.vocab_sum_cuda(x, weight, bias, wrong, 2)
        for starts, ends, batch in ((wrong, None, 4), (wrong, wrong.flip(0), 5)):
            args = x, weight, bias, starts, 2, present, ends
            ops.vocab_sum_cuda(*args)
            grads = ops.vocab_sum_backward_cuda(torch.ones(batch, 4), *args, True, True, True)
            assert all(grad.isfinite().all() for grad in grads)


def test_bad_arguments(ops):
    x, weight, starts = torch.zeros(4, 3), torch.zeros(5, 3), packed((4,))
    for args in (
        (x.long(), weight.long(), None, starts, 0),
        (x[0], weight, None, starts, 0),
        (x[:, :2], weight[:, :2], None, starts, 0),
        (x, weight.double(), None, starts, 0),
        (x, weight[:, :2].clone(), None, starts, 0),
        (x, weight, torch.zeros(4), starts, 0),
        (x, weight, torch.zeros(5).double(), starts, 0),
        (x, weight, None, starts.long(), 0),
        (x, weight, None, starts[:0], 0),
        (x, weight, None, starts, -1),
        (x, weight, None, starts, 4),
        (x, weight, None, starts, 0, torch.ones(3)),
    ):
        grad = torch.zeros(1, 5)
        others = args + (None,) * (7 - len(args))
        with pytest.raises(RuntimeError, match="emblas: "):
            ops.vocab_sum_cuda(*args)
        with pytest.raises(RuntimeError, match="emblas: "):
            ops.vocab_sum_backward_cuda(grad, *others, True, True, True)
    for grad in (torch.zeros(1, 4), torch.zeros(2, 5), torch.zeros(5), torch.zeros(1, 5).double()):
        with pytest.raises(RuntimeError, match="grad_out must be"):
            ops.vocab_sum_backward_cuda(
                grad, x, weight, None, starts, 0, None, None, True, True, True
            )
