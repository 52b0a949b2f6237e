"""Hash functions against published and recorded values, and against other implementations."""

from __future__ import annotations

import executors
import numpy as np
import pytest
import torch
from emblas import use_backend
from emblas._load import _C
from emblas.tables import TableSpec, arrays, hash_keys
from hypothesis import given
from hypothesis import strategies as st

RAW = 2**32  # with this many rows, a row number is the key itself

executor = executors.fixture("hash_keys")

# thinc 8.3: four 32-bit keys of an id.
THINC_KEYS = {
    (0, 0): "cc57c3cb 28df63b7 c4e8fe52 f2557dfc",
    (0, 12345): "ee832997 3cd2dbd3 b2d48d2e 22c2162f",
    (1, 0): "e5476f20 73269217 6728ca0c f1fa3fc8",
    (1, 12345): "dd42e806 361975a8 d5d5ae56 18c432e8",
    (2, 0): "8c57ce16 5b3d684f 94931146 1ba63bef",
    (2, 12345): "d0ac9b45 a58c4268 6b6ca749 f71056b2",
    (3, 0): "89214046 056e0d6c 04c39955 73c2da01",
    (3, 12345): "51644eac 11f73d70 7b7c00e9 f1008ab1",
}
# Rows of 1000 for the ids 0, 1, 2, 12345 and 2^63.
THINC_ROWS = {
    0: "819 695 794 84 / 146 399 942 804 / 896 592 61 878 / 271 795 222 7 / 423 918 846 680",
    1: "968 607 412 384 / 504 80 153 725 / 985 988 535 669 / 510 184 806 272 / 515 966 87 972",
    2: "630 55 182 151 / 813 379 300 723 / 866 624 1 942 / 869 680 825 122 / 234 450 729 849",
    3: "734 476 637 633 / 476 806 168 858 / 538 632 345 254 / 236 792 265 561 / 979 345 243 691",
}


def signed(*ids):
    return torch.from_numpy(np.array(ids, np.uint64).view(np.int64))


def test_thinc_keys(executor):
    for (seed, one), expected in THINC_KEYS.items():
        keys = hash_keys(signed(one), TableSpec(RAW, seed=seed))
        assert keys.tolist() == [[int(key, 16) for key in expected.split()]]
    for seed, expected in THINC_ROWS.items():
        rows = hash_keys(signed(0, 1, 2, 12345, 2**63), TableSpec(1000, seed=seed))
        assert rows.tolist() == [[int(r) for r in e.split()] for e in expected.split("/")]
    first = TableSpec(RAW, seed=8, allow_degenerate_seed=True)  # spaCy's first table
    expected = [[1415810048, 2915517168, 2123715072, 78308456]]
    assert hash_keys(signed(12345), first).tolist() == expected
    rows = TableSpec(5000, seed=8, allow_degenerate_seed=True)
    assert hash_keys(signed(12345), rows).tolist() == [[48, 2168, 72, 3456]]


def test_splitmix64(executor):
    expected = {0: 0xE220A8397B1DCDAF, 1: 0x910A2DEC89025CC1, 2: 0x975835DE1C9756CE,
                12345: 0x22118258A9D111A0, 2**63: 0x481EC0A212A9F3DB}  # fmt: skip
    keys = hash_keys(signed(*expected), TableSpec(RAW, 2, "splitmix64"))
    assert [low | high << 32 for low, high in keys.tolist()] == list(expected.values())
    # Successive outputs of one generator are those of generators started a step further on.
    step = 0x9E3779B97F4A7C15
    many = hash_keys(signed(7), TableSpec(RAW, 16, "splitmix64"))
    starts = signed(*((7 + i * step) % 2**64 for i in range(8)))
    assert many.flatten().equal(hash_keys(starts, TableSpec(RAW, 2, "splitmix64")).flatten())
    # A seed moves the start by the mixed seed.
    seeded = hash_keys(signed(7), TableSpec(RAW, 2, "splitmix64", seed=9))
    assert seeded.equal(hash_keys(signed(7 ^ mix(9)), TableSpec(RAW, 2, "splitmix64")))


def mix(x):
    """The output function of splitmix64, in Python integers."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def murmur3(one, seed):
    """The four keys by the general hash of bytes."""
    words = _C.murmur3_x64_128(int(one).to_bytes(8, "little"), seed)
    return [key for word in words for key in (word & 0xFFFFFFFF, word >> 32)]


@given(
    ids=st.lists(st.integers(0, 2**64 - 1), max_size=140),
    seed=st.integers(0, 2**32 - 1),
    rows=st.one_of(st.integers(1, 2**32), st.sampled_from([1, 2, 3, 2**31, 2**32 - 1, 2**32])),
    num_hashes=st.integers(1, 16),
)
def test_any_key(ids, seed, rows, num_hashes):
    spec = TableSpec(rows, num_hashes, seed=seed, allow_degenerate_seed=True)
    expected = []
    for one in ids:
        keys = [key for group in range(4) for key in murmur3(one, (seed + group) % 2**32)]
        expected.append([key % rows for key in keys[:num_hashes]])
    tensor = signed(*ids)
    actual = hash_keys(tensor, spec)
    assert actual.shape == (len(ids), num_hashes)
    assert actual.tolist() == expected
    with use_backend("reference"):
        assert torch.equal(hash_keys(tensor, spec), actual)
    np.testing.assert_array_equal(arrays.hash_keys(tensor.numpy(), spec), actual.numpy())


def test_executors_agree(executor):
    ids = torch.randint(-(2**63), 2**63 - 1, (1000,))
    for hash in ("murmur3", "splitmix64"):
        for rows in (1, 5000, 2**32 - 1, 2**32):
            spec = TableSpec(rows, 7, hash, seed=1)
            actual = hash_keys(ids, spec)
            with use_backend("reference"):
                assert torch.equal(hash_keys(ids, spec), actual)


def test_shapes():
    ids = torch.arange(24).reshape(2, 3, 4)
    spec = TableSpec(100, 3)
    keys = hash_keys(ids, spec)
    assert keys.shape == (2, 3, 4, 3)
    assert torch.equal(hash_keys(ids.transpose(0, 2), spec), keys.transpose(0, 2))
    assert torch.equal(hash_keys(ids[:, 1, ::2], spec), keys[:, 1, ::2])
    assert torch.equal(hash_keys(ids.to(torch.uint64), spec), keys)
    assert arrays.hash_keys(ids.numpy(), spec).tolist() == keys.tolist()
    assert hash_keys(ids[:0], spec).shape == (0, 3, 4, 3)


def test_equals_thinc():
    thinc = pytest.importorskip("thinc.api", reason="thinc is not installed")
    ids = np.random.default_rng(0).integers(0, 2**64, 3000, np.uint64)
    for seed in (0, 8, 11, 2**32 - 1):
        spec = TableSpec(RAW, seed=seed, allow_degenerate_seed=True)
        expected = thinc.NumpyOps().hash(ids, seed)
        np.testing.assert_array_equal(arrays.hash_keys(ids, spec), expected)


@pytest.mark.parametrize("size", range(50))
def test_murmur3_equals_mmh3(size):
    mmh3 = pytest.importorskip("mmh3", reason="mmh3 is not installed")
    data = bytes((37 * i + size) % 256 for i in range(size))
    for seed in (0, 1, 8, 2**32 - 1):
        expected = mmh3.hash64(data, seed, x64arch=True, signed=False)
        assert _C.murmur3_x64_128(data, seed) == expected


def test_murmur3_of_strings():
    """The keys of floret: seed 2166136261, rows of 50000."""
    for text, expected in {
        "<apple>": [40534, 20033, 12939, 47746],
        "<app": [22888, 26128, 36640, 44173],
    }.items():
        words = _C.murmur3_x64_128(text.encode(), 2166136261)
        assert [k % 50000 for w in words for k in (w & 0xFFFFFFFF, w >> 32)] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", 11901859001352538922),
        ("apple", 8566208034543834098),
        ("Apple", 6418411030699964375),
        ("xxxx", 13110060611322374290),
        ("hello world", 2758594965276909933),
        ("naïve", 16224804062388677344),
        ("12345678", 9871996032675327904),
        ("123456789", 2056675840866671865),
        ("", 14313749767032693980),
    ],
)
def test_string_ids_of_spacy(text, expected):
    assert _C.murmur64a(text.encode(), 1) == expected


def test_ngrams_of_thinc():
    keys = np.arange(1, 5, dtype=np.uint64)
    expected = [2346165840139155392, 16863871380863422640, 17332947814349719869]
    assert [_C.murmur64a(keys[i : i + 2].tobytes(), 0) for i in range(3)] == expected


def test_degenerate_seed():
    """With seed 8 both halves of the hash are multiples of one value: the first key is even."""
    for seed, num_hashes in ((8, 4), (7, 5), (5, 16)):
        with pytest.raises(ValueError, match="seed 8 is degenerate"):
            TableSpec(100, num_hashes, seed=seed)
    spec = TableSpec(RAW, seed=8, allow_degenerate_seed=True)
    assert not (hash_keys(torch.arange(1000), spec)[:, 0] % 2).any()
    TableSpec(100, 4, seed=7)
    TableSpec(100, hash="splitmix64", seed=8)


def test_specification_as_text():
    spec = TableSpec(5000, 2, seed=8, allow_degenerate_seed=True)
    again = TableSpec.from_json(spec.to_json())
    assert again == spec
    assert again.allow_degenerate_seed
    assert TableSpec(10, seed=1) != TableSpec(10, seed=2)
    with pytest.raises(ValueError, match="must have format 1"):
        TableSpec.from_json('{"format": 2, "rows": 5}')


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "num_embeddings must be 1 to 4294967296, got 0", {"num_embeddings": 0}),
        (ValueError, "num_embeddings must be 1 to", {"num_embeddings": 2**32 + 1}),
        (TypeError, "num_embeddings must be an int, got float", {"num_embeddings": 5.0}),
        (ValueError, "num_hashes must be 1 to 16, got 17", {"num_hashes": 17}),
        (ValueError, "seed must be 0 to 4294967295, got -1", {"seed": -1}),
        (ValueError, "hash must be one of murmur3, splitmix64, got 'md5'", {"hash": "md5"}),
    ],
)
def test_bad_specification(error, message, arguments):
    with pytest.raises(error, match=message):
        TableSpec(**{"num_embeddings": 10, **arguments})
