from __future__ import annotations

import executors
import numpy as np
import pytest
import torch
from contract import check_compiled, check_op, check_threads, only_kernels
from emblas import use_backend
from emblas.binary import arrays, hamming_topk, pack_sign
from hypothesis import given
from hypothesis import strategies as st

LARGEST = np.iinfo(np.int32).max
executor = executors.fixture("hamming_topk")


def random_codes(rows, width, seed=0, distinct=256):
    return torch.from_numpy(
        np.random.default_rng(seed).integers(0, distinct, (rows, width), dtype=np.uint8)
    )


def oracle(queries, codes, k):
    """Every distance, then a stable sort: ascending distance, then ascending row."""
    bits = np.unpackbits(codes.numpy(), axis=1).astype(bool)
    distances = np.full((len(queries), k), LARGEST, np.int32)
    ids = np.full((len(queries), k), -1, np.int64)
    for q, query in enumerate(np.unpackbits(queries.numpy(), axis=1).astype(bool)):
        distance = (bits ^ query).sum(1)
        order = np.argsort(distance, kind="stable")[:k]
        distances[q, : len(order)], ids[q, : len(order)] = distance[order], order
    return distances, ids


def check(queries, codes, k):
    actual = hamming_topk(queries, codes, k)
    for a, e in zip(actual, oracle(queries, codes, k), strict=True):
        np.testing.assert_array_equal(a.numpy(), e)


@pytest.mark.parametrize("width", [1, 3, 8, 16, 31, 32, 48, 64, 128, 256, 513])
def test_equals_oracle(executor, width):
    codes = random_codes(777, width)
    for queries in (1, 3, 9):
        check(random_codes(queries, width, seed=1), codes, 10)


def test_more_than_one_tile(executor):
    check(random_codes(7, 32, seed=1), random_codes(20_000, 32), 100)
    check(random_codes(1, 32, seed=1), random_codes(20_000, 32), 3)


def test_ties_everywhere(isa):
    codes = random_codes(5000, 2, distinct=2)
    for k in (1, 10, 1000, 5000):
        check(codes[:5], codes, k)


def test_wide_codes(isa):
    """Distances above 2^16."""
    codes = random_codes(9, 9001)
    codes[3] = 255 - codes[0]
    check(codes[:2], codes, 9)
    assert hamming_topk(codes[:1], codes, 9)[0][0, -1] == 9001 * 8


@given(
    rows=st.integers(0, 90),
    queries=st.integers(0, 12),
    width=st.integers(0, 70),
    k=st.integers(1, 100),
    seed=st.integers(0, 2**31),
    distinct=st.sampled_from([2, 256]),
)
def test_any_shape(rows, queries, width, k, seed, distinct):
    check(
        random_codes(queries, width, seed + 1, distinct),
        random_codes(rows, width, seed, distinct),
        k,
    )


def test_layouts():
    codes, queries = random_codes(100, 20), random_codes(4, 20, seed=1)
    wide = torch.zeros(100, 33, dtype=torch.uint8)
    wide[:, 5:25] = codes
    expected = hamming_topk(queries, codes, 7)
    for view in (wide[:, 5:25], codes.t().contiguous().t(), codes.repeat_interleave(2, 0)[::2]):
        for actual, e in zip(hamming_topk(queries, view, 7), expected, strict=True):
            assert torch.equal(actual, e)


def test_same_bits_for_any_thread_count(isa):
    codes, queries = random_codes(60_000, 16), random_codes(5, 16, seed=1)
    check_threads(lambda: hamming_topk(queries, codes, 50))
    few, many = random_codes(300, 16), random_codes(3000, 16, seed=1)
    check_threads(lambda: hamming_topk(many, few, 20))


def test_reference():
    codes, queries = random_codes(50, 5, distinct=4), random_codes(6, 5, seed=1, distinct=4)
    with use_backend("reference"):
        check(queries, codes, 60)


def test_equals_faiss():
    faiss = pytest.importorskip("faiss", reason="needs emblas[bench]")
    codes, queries = random_codes(5000, 32), random_codes(20, 32, seed=1)
    index = faiss.IndexBinaryFlat(256)
    index.add(codes.numpy())
    np.testing.assert_array_equal(
        hamming_topk(queries, codes, 10)[0].numpy(), index.search(queries.numpy(), 10)[0]
    )


def test_operator_contract():
    codes = random_codes(40, 9)
    check_op("hamming_topk", codes[:3], codes, 5)
    with only_kernels("hamming_topk"):
        hamming_topk(codes, codes, 2)


def test_compiled():
    def search(queries, documents):
        return hamming_topk(pack_sign(queries * 2), pack_sign(documents), 3)

    calls = [(torch.randn(q, 40), torch.randn(n, 40)) for q, n in ((2, 9), (3, 50), (7, 5))]
    check_compiled(search, calls, backward=False)


def test_numpy_door(isa):
    tensors = random_codes(60, 6)
    codes = tensors.numpy()
    for actual, expected in zip(
        arrays.hamming_topk(codes[:5], codes, 7), hamming_topk(tensors[:5], tensors, 7), strict=True
    ):
        np.testing.assert_array_equal(actual, expected.numpy())
    with pytest.raises(TypeError, match="codes must be a C-contiguous array of uint8"):
        arrays.hamming_topk(codes, codes.astype(np.int32), 1)
    with pytest.raises(ValueError, match="same width in bytes"):
        arrays.hamming_topk(codes, codes[:, :3].copy(), 1)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        arrays.hamming_topk(codes, codes, 0)


CODES = torch.zeros(3, 4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "queries must have dtype uint8", lambda: hamming_topk(CODES.int(), CODES, 1)),
        (ValueError, "codes must have 2 dimensions", lambda: hamming_topk(CODES, CODES[0], 1)),
        (ValueError, "the same width, got 4 and 3", lambda: hamming_topk(CODES, CODES[:, :3], 1)),
        (ValueError, "k must be at least 1, got 0", lambda: hamming_topk(CODES, CODES, 0)),
    ],
)
def test_bad_arguments(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_direct_call_is_guarded():
    op = torch.ops.emblas.hamming_topk
    for args in ((CODES.int(), CODES, 1), (CODES, CODES.t(), 1), (CODES, CODES, -1)):
        with pytest.raises(RuntimeError, match="emblas: "):
            op(*args)
