from __future__ import annotations

import numpy as np
import pytest
import torch
from contract import check_compiled, check_op, check_threads, only_kernels, tolerance
from emblas import use_backend
from emblas.binary import (
    arrays,
    asymmetric_topk,
    hamming_distance,
    hamming_topk,
    inverse_norms,
    near_duplicate_counts,
    near_duplicates,
    pack_planes,
    pack_sign,
    range_search,
    range_search_csr,
    reference,
    search,
    symmetric_topk,
    unpack_planes,
)
from hypothesis import given
from hypothesis import strategies as st

NONE = np.iinfo(np.int32).max


def random_codes(rows, width, seed=0, distinct=256):
    return torch.from_numpy(
        np.random.default_rng(seed).integers(0, distinct, (rows, width), dtype=np.uint8)
    )


def all_distances(a, b):
    a, b = (np.unpackbits(codes.numpy(), axis=1).astype(np.int32) for codes in (a, b))
    return (a[:, None] ^ b[None]).sum(2)


def sorted_within(distances, radius, allowed=None):
    """Per query the (distance, row) pairs within the radius, sorted."""
    return [
        sorted(
            (int(d), n)
            for n, d in enumerate(row)
            if d <= radius and (allowed is None or allowed[q][n])
        )
        for q, row in enumerate(distances)
    ]


# --- distances and ranges ----------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 3, 16, 31, 33, 64, 129, 300])
def test_distance(isa, width):
    for queries, rows in ((1, 70), (5, 64), (13, 1200)):
        a, b = random_codes(queries, width, 1), random_codes(rows, width)
        np.testing.assert_array_equal(hamming_distance(a, b).numpy(), all_distances(a, b))


def test_distance_of_any_width_and_layout(isa):
    a, b = random_codes(2, 9000, 1), random_codes(3, 9000)
    b[0] = 255 - a[0]
    np.testing.assert_array_equal(hamming_distance(a, b).numpy(), all_distances(a, b))
    assert hamming_distance(a[:, :0], b[:, :0]).tolist() == [[0] * 3] * 2
    assert hamming_distance(a[:0], b).shape == (0, 3)
    assert hamming_distance(a, b[:0]).shape == (2, 0)
    np.testing.assert_array_equal(
        hamming_distance(a[:, 7:40], b[::2, 7:40]).numpy(), all_distances(a[:, 7:40], b[::2, 7:40])
    )
    assert torch.equal(arrays_distance(a, b), hamming_distance(a, b))


def arrays_distance(a, b):
    return torch.from_numpy(arrays.hamming_distance(a.numpy(), b.numpy()))


@given(
    rows=st.integers(0, 150),
    queries=st.integers(0, 6),
    width=st.integers(0, 5),
    radius=st.integers(0, 20),
    most=st.integers(0, 40),
    seed=st.integers(0, 2**31),
    filtered=st.booleans(),
)
def test_range_search(rows, queries, width, radius, most, seed, filtered):
    a, b = random_codes(queries, width, seed + 1), random_codes(rows, width, seed)
    mask = torch.rand(rows, generator=torch.Generator().manual_seed(seed)) < 0.5
    expected = sorted_within(
        all_distances(a, b), radius, mask.expand(queries, rows) if filtered else None
    )
    keep = mask if filtered else None
    counts, distances, ids = range_search(a, b, radius, max_results=most, filter=keep)
    assert counts.tolist() == [len(found) for found in expected]
    for q, found in enumerate(expected):
        padded = [*found, *[(NONE, -1)] * most][:most]
        assert list(zip(distances[q].tolist(), ids[q].tolist(), strict=True)) == padded
    offsets, distances, ids = range_search_csr(a, b, radius, filter=keep)
    assert offsets.diff().tolist() == counts.tolist()
    flat = [pair for found in expected for pair in found]
    assert list(zip(distances.tolist(), ids.tolist(), strict=True)) == flat


def test_range_search_with_many_results(isa):
    a, b = random_codes(9, 2, 1), random_codes(30_000, 2)
    counts, distances, ids = range_search(a, b, 6, max_results=50)
    offsets, _, all_ids = range_search_csr(a, b, 6)
    expected = sorted_within(all_distances(a, b), 6)
    for q, found in enumerate(expected):
        assert counts[q] == len(found)
        assert list(zip(distances[q].tolist(), ids[q].tolist(), strict=True)) == found[:50]
        assert all_ids[offsets[q] : offsets[q + 1]].tolist() == [row for _, row in found]


def test_near_duplicates(isa):
    codes = random_codes(300, 2)
    distances = all_distances(codes, codes)
    expected = [
        (i, j, d) for i, found in enumerate(sorted_within(distances, 3)) for d, j in found if j > i
    ]
    pairs, found = near_duplicates(codes, 3)
    assert [(*pair, d) for pair, d in zip(pairs.tolist(), found.tolist(), strict=True)] == expected
    counts, nearest, ids = near_duplicate_counts(codes, 3, max_results=2)
    assert int(counts.sum()) == len(expected)
    for i in range(300):
        mine = [(d, j) for first, j, d in expected if first == i]
        padded = [*mine, (NONE, -1), (NONE, -1)][:2]
        assert list(zip(nearest[i].tolist(), ids[i].tolist(), strict=True)) == padded
    assert near_duplicates(codes[:0], 3)[0].shape == (0, 2)
    check_threads(lambda: near_duplicates(codes, 3))


def test_range_equals_faiss():
    faiss = pytest.importorskip("faiss", reason="needs emblas[bench]")
    a, b = random_codes(20, 4, 1), random_codes(2000, 4)
    index = faiss.IndexBinaryFlat(32)
    index.add(b.numpy())
    limits, _, ids = index.range_search(a.numpy(), 8)  # below 8
    offsets, _, ours = range_search_csr(a, b, 7)
    np.testing.assert_array_equal(offsets.numpy(), limits.astype(np.int64))
    for q in range(20):
        at = slice(limits[q], limits[q + 1])
        assert sorted(ours[at].tolist()) == sorted(ids[at].tolist())


# --- filters -----------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("queries", [1, 5])
def test_filters_are_exact(isa, queries, share):
    rows = 5000
    codes, wanted = random_codes(rows, 4), random_codes(queries, 4, 1)
    generator = torch.Generator().manual_seed(1)
    distances = all_distances(wanted, codes)
    masks = torch.rand(queries, rows, generator=generator) < share
    for mask in (masks[0], masks):
        allowed = mask.expand(queries, rows)
        expected = [(found + [(NONE, -1)] * 20)[:20]
                    for found in sorted_within(distances, 32, allowed)]  # fmt: skip
        forms = [mask, pack_sign(mask.float())]
        if mask.dim() == 1:
            ids = mask.nonzero()[:, 0]
            shuffled = ids[torch.randperm(len(ids), generator=generator)]
            forms += [ids, shuffled.int(), ids.repeat(2)]
        for form in forms:
            found = hamming_topk(wanted, codes, 20, filter=form)
            for q in range(queries):
                pairs = zip(*(part[q].tolist() for part in found), strict=True)
                assert list(pairs) == expected[q]


def test_repeated_ids_on_a_gpu():
    """Their number must not be known there: they are replaced by what is no row."""
    ids = torch.tensor([7, 0, 3, 7, 0, 7])
    assert search._without_repeats(ids).tolist() == [0, -1, 3, 7, -1, -1]
    assert search._without_repeats(ids[:0]).tolist() == []
    codes = random_codes(9, 2)
    found = reference.hamming_topk(codes[:1], codes, 4, search._without_repeats(ids))
    assert sorted(found[1][0].tolist()) == [-1, 0, 3, 7]


def test_some_queries_gather_and_some_mask(isa):
    """Selective and unselective bitmaps in one batch."""
    codes, wanted = random_codes(3000, 8), random_codes(12, 8, 1)
    masks = torch.rand(12, 3000) < torch.tensor([0.01, 1.0, 0.95] * 4)[:, None]
    together = hamming_topk(wanted, codes, 15, filter=masks)
    for q in range(12):
        alone = hamming_topk(wanted[q : q + 1], codes, 15, filter=masks[q])
        assert torch.equal(together[0][q], alone[0][0])
        assert torch.equal(together[1][q], alone[1][0])


# --- scores ------------------------------------------------------------------------------------


def values(codes, dim):
    """Sum over planes of 2^-plane times +1 or -1."""
    planes = np.unpackbits(codes.unflatten(1, (-1, (dim + 7) // 8)).numpy(), axis=2)
    weights = 0.5 ** np.arange(planes.shape[1])
    return ((planes[:, :, :dim] * 2.0 - 1) * weights[:, None]).sum(1)


def check_scores(queries, codes, k, allowed=None, **options):
    scores, ids = asymmetric_topk(queries, codes, k, **options)
    exact = queries.double().numpy() @ values(codes, queries.shape[1]).T
    limits = tolerance(torch.float32, queries.shape[1])
    scale = max([1.0, *queries.float().abs().sum(1).tolist()])
    for q in range(len(queries)):
        rows = np.arange(len(codes)) if allowed is None else np.flatnonzero(allowed)
        order = rows[np.lexsort((rows, -exact[q, rows].astype(np.float32)))][:k]
        found = len(order)
        assert (ids[q, found:] == -1).all()
        assert (scores[q, found:] == -torch.inf).all()
        np.testing.assert_allclose(
            scores[q, :found].numpy(), exact[q, order], atol=limits["atol"] * scale, rtol=0
        )
        np.testing.assert_array_equal(ids[q, :found].numpy(), order)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("dim", [1, 8, 20, 64, 100])
def test_asymmetric(isa, dim, bits):
    codes = pack_planes(torch.randn(700, dim, dtype=torch.float64), bits)
    check_scores(torch.randint(-127, 128, (1, dim), dtype=torch.int8), codes, 20)
    check_scores(torch.randint(-127, 128, (11, dim), dtype=torch.int8), codes, 20)


def test_asymmetric_float_queries(isa):
    codes = pack_sign(torch.randn(9000, 256))
    check_scores(torch.randn(9, 256).double().float(), codes, 50)
    wide = pack_planes(torch.randn(300, 4096), 4)  # sums far above 16 bits at full resolution
    check_scores(torch.randn(3, 4096), wide, 10)


@pytest.mark.parametrize("width", [32, 48, 64, 96, 100, 128, 200, 512, 513])
def test_a_single_query(isa, width):
    """It is scanned by rows where the CPU can, in vectors of codes whole, masked or in pairs."""
    codes = random_codes(203, width + 3)[:, 2 : width + 2]
    hamming = random_codes(1, width, 1)
    rows = torch.tensor([0, 5, 6, 150, 202])
    for some in (codes, codes.contiguous()):
        distances, ids = hamming_topk(hamming, some, 203)
        expected = all_distances(hamming, some)[0]
        np.testing.assert_array_equal(distances[0].numpy(), np.sort(expected))
        np.testing.assert_array_equal(ids[0].numpy(), np.argsort(expected, kind="stable"))
        for query in (torch.randn(1, 8 * width), torch.randn(1, 8 * width).exp()):
            check_scores(query, some, 9)
            check_scores(query, some, 4, np.isin(np.arange(203), rows), filter=rows)
            scale = torch.rand(203) + 0.5
            together = asymmetric_topk(query.repeat(2, 1), some, 4, scale=scale)
            for two, one in zip(
                together, asymmetric_topk(query, some, 4, scale=scale), strict=True
            ):
                assert torch.equal(two[:1], one)


@given(
    rows=st.integers(0, 200),
    queries=st.integers(0, 10),
    dim=st.integers(1, 70),
    bits=st.integers(1, 4),
    k=st.integers(1, 220),
    seed=st.integers(0, 2**31),
    largest=st.sampled_from([0, 1, 3, 127]),
)
def test_asymmetric_of_any_shape(rows, queries, dim, bits, k, seed, largest):
    generator = torch.Generator().manual_seed(seed)
    codes = random_codes(rows, bits * ((dim + 7) // 8), seed, distinct=4)
    shape = (queries, dim)
    wanted = torch.randint(-largest, largest + 1, shape, generator=generator, dtype=torch.int8)
    check_scores(wanted, codes, k)


def test_asymmetric_with_filter(isa):
    codes = pack_sign(torch.randn(4000, 40))
    wanted = torch.randint(-127, 128, (7, 40), dtype=torch.int8)
    for share in (0.005, 0.5):
        mask = torch.rand(4000) < share
        for form in (mask, mask.nonzero()[:, 0]):
            check_scores(wanted, codes, 30, mask.numpy(), filter=form)


def test_scores_do_not_depend_on_the_batch(isa):
    codes, queries = pack_sign(torch.randn(3000, 96)), torch.randn(20, 96)
    together = asymmetric_topk(queries, codes, 30)
    for q in range(20):
        for all_, one in zip(together, asymmetric_topk(queries[q : q + 1], codes, 30), strict=True):
            assert torch.equal(all_[q], one[0])
    check_threads(lambda: asymmetric_topk(queries, codes.repeat(20, 1), 30))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_symmetric(isa, bits):
    for dim in (9, 64, 130):
        x = torch.randn(500, dim)
        codes = pack_planes(x, bits)
        assert codes.shape == (500, bits * ((dim + 7) // 8))
        scores, ids = symmetric_topk(codes[:6], codes, 25, dim=dim)
        exact = values(codes[:6], dim) @ values(codes, dim).T
        for q in range(6):
            order = np.lexsort((np.arange(500), -exact[q]))[:25]
            np.testing.assert_array_equal(ids[q].numpy(), order)
            np.testing.assert_array_equal(scores[q].numpy(), exact[q, order])
        if bits == 1:
            assert torch.equal(ids, hamming_topk(codes[:6], codes, 25)[1])


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_scale(isa, bits):
    """Rows of very different scales, positive and negative scores, at every threshold."""
    codes = pack_planes(torch.randn(3000, 40), bits)
    wanted = torch.randint(-127, 128, (7, 40), dtype=torch.int8)
    scale = torch.rand(3000) * 3 + 0.01
    exact = (wanted.double().numpy() @ values(codes, 40).T) * scale.double().numpy()
    for k in (10, 2990):
        scores, ids = asymmetric_topk(wanted, codes, k, scale=scale)
        for q in range(7):
            order = np.lexsort((np.arange(3000), -exact[q].astype(np.float32)))[:k]
            np.testing.assert_array_equal(ids[q].numpy(), order)
            np.testing.assert_allclose(scores[q].numpy(), exact[q, order], rtol=1e-6, atol=1e-6)


def test_inverse_norms_make_a_cosine():
    codes = pack_planes(torch.randn(400, 50), 2)
    x = values(codes, 50)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    scale = inverse_norms(codes, 50)
    scores, ids = symmetric_topk(codes[:9], codes, 400, dim=50, scale=scale)
    cosines = np.take_along_axis(x[:9] @ x.T, ids.numpy(), 1)
    np.testing.assert_allclose((scores * scale[:9, None]).numpy(), cosines, atol=1e-5)
    assert ids[:, 0].tolist() == list(range(9))


def test_planes():
    x = torch.randn(4000, 16, dtype=torch.float64)
    errors = []
    for bits in (1, 2, 3, 4):
        codes = pack_planes(x, bits)
        assert torch.equal(codes[:, :2], pack_sign(x))
        back = unpack_planes(codes, 16, dtype=torch.float64)
        np.testing.assert_array_equal(back.numpy(), values(codes, 16))
        best = float((x * back).sum() / back.square().sum())
        errors.append(float((x - best * back).square().mean()))
    # Squared error of the best uniform quantizers of a unit normal (Max 1960, table II).
    np.testing.assert_allclose(errors, [0.3634, 0.1188, 0.03744, 0.01154], rtol=0.05)
    scaled = pack_planes(x * 3, 2, scale=torch.full((16,), 3.0))
    assert torch.equal(scaled, pack_planes(x, 2, scale=1.0))


# --- contract ----------------------------------------------------------------------------------


def test_reference(isa):
    a, b = random_codes(4, 3, 1, distinct=8), random_codes(60, 3, distinct=8)
    x = torch.randint(-9, 10, (4, 20), dtype=torch.int8)
    mask = torch.rand(4, 60) < 0.5
    calls = [
        lambda: hamming_distance(a, b),
        lambda: hamming_topk(a, b, 70, filter=mask),
        lambda: hamming_topk(a, b, 7, filter=mask[0].nonzero()[:, 0]),
        lambda: range_search(a, b, 4, max_results=9, filter=mask),
        lambda: range_search_csr(a, b, 4, filter=mask[0]),
        lambda: near_duplicates(b, 3),
        lambda: near_duplicate_counts(b, 3, max_results=2),
        lambda: asymmetric_topk(x, b, 9, filter=mask),
        lambda: symmetric_topk(a, b, 9, dim=20),
        lambda: asymmetric_topk(x, b, 9, scale=2.0 ** torch.arange(60).remainder(5)),
    ]
    for call in calls:
        with use_backend("reference"):
            expected = call()
        actual = call()
        if isinstance(actual, torch.Tensor):
            actual, expected = (actual,), (expected,)
        for one, other in zip(actual, expected, strict=True):
            assert torch.equal(one, other)
            assert one.dtype == other.dtype


def test_operator_contract():
    codes, ids = random_codes(40, 9), torch.arange(0, 40, 3)
    bitmaps = random_codes(3, 5)
    check_op("hamming_topk", codes[:3], codes, 5, bitmaps)
    check_op("hamming_topk", codes[:3], codes, 5, ids)
    check_op("hamming_distance", codes[:3], codes)
    check_op("range_search", codes[:3], codes, 20, 4, bitmaps)
    check_op("range_search_csr", codes[:3], codes, 20, ids)
    check_op("asymmetric_topk", torch.randn(3, 70), codes, 5, bitmaps, torch.ones(40))
    with only_kernels("hamming_distance", "range_search", "range_search_csr", "asymmetric_topk"):
        hamming_distance(codes, codes)
        range_search(codes, codes, 3)
        near_duplicates(codes, 3)
        asymmetric_topk(torch.randn(3, 70), codes, 5)


def test_compiled():
    def search(queries, documents, mask):
        codes = pack_sign(documents)
        wanted = pack_sign(queries)
        return (
            hamming_distance(wanted, codes),
            *range_search(wanted, codes, 15, max_results=4, filter=mask),
            *asymmetric_topk(queries, codes, 3, filter=mask),
        )

    calls = [(torch.randn(q, 40), torch.randn(n, 40), torch.rand(n) < 0.5)
             for q, n in ((2, 9), (3, 50), (7, 17))]  # fmt: skip
    check_compiled(search, calls, backward=False)

    def ranges(queries, documents):
        return range_search_csr(pack_sign(queries), pack_sign(documents), 20)

    check_compiled(ranges, [call[:2] for call in calls], backward=False)


CODES, X = torch.zeros(3, 4, dtype=torch.uint8), torch.zeros(2, 32)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "a must have dtype uint8", lambda: hamming_distance(X, CODES)),
        (ValueError, "same width, got 4 and 3", lambda: hamming_distance(CODES, CODES[:, 1:])),
        (ValueError, "radius must be at least 0, got -1", lambda: range_search(CODES, CODES, -1)),
        (ValueError, "radius must be at least 0", lambda: range_search_csr(CODES, CODES, -1)),
        (ValueError, "radius must be at least 0", lambda: near_duplicates(CODES, -1)),
        (
            ValueError,
            "max_results must be at least 0",
            lambda: range_search(CODES, CODES, 1, max_results=-1),
        ),
        (ValueError, "multiple of .* = 4 bytes", lambda: asymmetric_topk(X, CODES[:, 1:], 1)),
        (ValueError, "queries must be finite", lambda: asymmetric_topk(X * torch.nan, CODES, 1)),
        (ValueError, "k must be at least 1, got 0", lambda: asymmetric_topk(X, CODES, 0)),
        (TypeError, "queries must have dtype", lambda: asymmetric_topk(CODES, CODES, 1)),
        (
            ValueError,
            "scale must have 3 values, one for each code, got 2",
            lambda: asymmetric_topk(X, CODES, 1, scale=torch.ones(2)),
        ),
        (
            ValueError,
            "scale must be positive and finite",
            lambda: asymmetric_topk(X, CODES, 1, scale=torch.zeros(3)),
        ),
        (ValueError, "1 to 24 times", lambda: symmetric_topk(CODES, CODES, 1, dim=99)),
        (ValueError, "bits must be between 1 and 4, got 5", lambda: pack_planes(X, 5)),
        (TypeError, "filter must have dtype", lambda: hamming_topk(CODES, CODES, 1, filter=X)),
        (
            ValueError,
            "filter must have 3 values for 3 rows of codes, got shape .4",
            lambda: hamming_topk(CODES, CODES, 1, filter=torch.ones(4, dtype=torch.bool)),
        ),
        (
            ValueError,
            "one for each of 3 queries, got 2",
            lambda: hamming_topk(CODES, CODES, 1, filter=torch.ones(2, 3, dtype=torch.bool)),
        ),
        (
            ValueError,
            "filter must hold ids of rows",
            lambda: hamming_topk(CODES, CODES, 1, filter=torch.tensor([0, 3])),
        ),
        (
            ValueError,
            "filter must be a vector of ids",
            lambda: hamming_topk(CODES, CODES, 1, filter=torch.zeros(2, 2).long()),
        ),
    ],
)
def test_bad_arguments(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_direct_call_is_guarded():
    ops = torch.ops.emblas
    for op, args in (
        (ops.hamming_distance, (CODES, CODES[:, 1:])),
        (ops.hamming_topk, (CODES, CODES, 1, CODES)),
        (ops.hamming_topk, (CODES, CODES, 1, torch.tensor([1, 0]))),
        (ops.range_search, (CODES, CODES, -1, 2)),
        (ops.range_search, (CODES, CODES, 1, -2)),
        (ops.asymmetric_topk, (X.double(), CODES, 1)),
        (ops.asymmetric_topk, (X[:, :0], CODES, 1)),
    ):
        with pytest.raises(RuntimeError, match="emblas: "):
            op(*args)
