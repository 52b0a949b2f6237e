"""Word vectors in a file: what comes back, and what happens to damaged files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emblas.tables import SubwordStore, text_ids
from emblas.tables import subword_store as module

WORDS = ["apple", "naïve", "", "日本語", "Apple", "apples"]


@pytest.fixture
def vectors():
    return torch.randn(len(WORDS), 5)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_known_and_unknown_words(tmp_path, vectors, dtype):
    buckets = torch.randn(40, 5)
    SubwordStore.write(tmp_path / "words", WORDS, vectors, buckets, min_n=2, max_n=3, dtype=dtype)
    store = SubwordStore(tmp_path / "words")
    kind = getattr(torch, dtype)
    stored, grams = vectors.to(kind).float(), buckets.to(kind).float()
    assert len(store) == len(WORDS)
    assert [store.word(i) for i in range(len(store))] == WORDS
    assert np.array_equal(store.look_up(WORDS), stored)
    assert store.find(["apples", "x", ""]).tolist() == [5, -1, 2]
    assert "apple" in store
    assert "pear" not in store
    assert 3 not in store
    unknown = ["pear", "日本", "apple", "p"]
    got = store.look_up(unknown)
    for word, vector in zip(unknown, got, strict=True):
        if word == "apple":
            expected = stored[0]
        else:
            padded = f"<{word}>"
            ids = text_ids([word], "subwords", min_n=2, max_n=3, modulus=40)[0]
            assert len(ids) == sum(max(len(padded) - n + 1, 0) for n in (2, 3))
            expected = grams[ids].mean(0)
        np.testing.assert_allclose(vector, expected, rtol=1e-6, atol=1e-6)
    assert np.array_equal(store["pear"], got[0])
    assert store.look_up([]).shape == (0, 5)
    with pytest.raises(IndexError, match="number must be 0 to 5"):
        store.word(6)


def test_without_subwords(tmp_path, vectors):
    SubwordStore.write(tmp_path / "words", WORDS, vectors.numpy())
    store = SubwordStore(tmp_path / "words", verify=False)
    assert store["unknown"].tolist() == [0.0] * 5
    assert np.array_equal(store["naïve"], vectors[1])
    # A word too short for any n-gram: empty means zero.
    SubwordStore.write(tmp_path / "words", WORDS, vectors, vectors, min_n=5, max_n=6)
    assert SubwordStore(tmp_path / "words")["a"].tolist() == [0.0] * 5
    SubwordStore.write(tmp_path / "none", [], torch.empty(0, 3))
    assert SubwordStore(tmp_path / "none")["a"].tolist() == [0.0] * 3


def test_equal_hashes(tmp_path, vectors, monkeypatch):
    """Words whose 64-bit hashes collide are told apart by their text."""
    monkeypatch.setattr(module, "_hash", lambda words: np.full(len(words), 7, np.uint64))
    SubwordStore.write(tmp_path / "words", WORDS, vectors)
    store = SubwordStore(tmp_path / "words")
    assert np.array_equal(store.look_up(WORDS), vectors)
    assert "pear" not in store


def test_subwords_are_fitted():
    """Words that are means of few vectors of n-grams are found again, and new words of them."""
    words = [a + b for a in ("un", "re", "over", "mis") for b in ("do", "take", "lead", "read")]
    ids, offsets = text_ids(words, "subwords", min_n=3, max_n=4, modulus=500)
    hidden = torch.randn(500, 4, dtype=torch.float64)
    sizes = offsets.diff().long()
    owner = torch.repeat_interleave(sizes)
    vectors = torch.zeros(len(words), 4, dtype=torch.float64).index_add(0, owner, hidden[ids])
    vectors /= sizes[:, None]
    buckets = SubwordStore.fit_subwords(words, vectors, 500, min_n=3, max_n=4, iterations=200)
    fitted = torch.zeros_like(vectors).index_add(0, owner, buckets[ids]) / sizes[:, None]
    torch.testing.assert_close(fitted, vectors, rtol=1e-4, atol=1e-4)
    design = torch.zeros(len(words), 500, dtype=torch.float64)
    design.index_put_((owner, ids), (1 / sizes[owner]).double(), accumulate=True)
    best = torch.linalg.lstsq(design, vectors, driver="gelsd").solution  # of least norm
    torch.testing.assert_close(buckets, best, rtol=1e-4, atol=1e-4)


def test_damaged_files(tmp_path, vectors):
    path = tmp_path / "words"
    SubwordStore.write(path, WORDS, vectors, vectors)
    whole = path.read_bytes()
    for at in (8, 12, 16, 24, 32, 50, module._HEADER.size, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=r"is damaged|has version|must have"):
            SubwordStore(path)
    for content in (b"", b"x" * 100, whole[:20], b"PK" + whole[2:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no file of word vectors"):
            SubwordStore(path)
    for content in (whole[:-1], whole + b"x", whole[: module._HEADER.size]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="must have"):
            SubwordStore(path, verify=False)
    path.write_bytes(whole)
    assert len(SubwordStore(path)) == len(WORDS)


def test_writes_are_whole_or_nothing(tmp_path, vectors, monkeypatch):
    path = tmp_path / "words"
    SubwordStore.write(path, WORDS, vectors)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(module.os, "fsync", fail)
    with pytest.raises(OSError, match="the disk is full"):
        SubwordStore.write(path, WORDS, vectors * 2)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["words"]
    monkeypatch.undo()
    store = SubwordStore(path)  # an open store keeps the file that it has mapped
    SubwordStore.write(path, WORDS, vectors * 2)
    assert np.array_equal(store["apple"], vectors[0])
    assert np.array_equal(SubwordStore(path)["apple"], vectors[0] * 2)


def test_bad_arguments(tmp_path, vectors):
    for message, arguments, options in (
        ("vectors must have a row for each of 6", (WORDS, vectors[:3]), {}),
        ("vectors must have 2 dimensions", (WORDS, vectors[0]), {}),
        ("words must be distinct", (["a"] * 6, vectors), {}),
        ("buckets must have 5 columns", (WORDS, vectors, vectors[:, :2]), {}),
        ("dtype must be one of", (WORDS, vectors), {"dtype": "int8"}),
        ("min_n must be 1 to max_n", (WORDS, vectors), {"min_n": 9}),
    ):
        with pytest.raises(ValueError, match=message):
            SubwordStore.write(tmp_path / "words", *arguments, **options)
    with pytest.raises(ValueError, match="num_buckets must be at least 1"):
        SubwordStore.fit_subwords(WORDS, vectors, 0)
    with pytest.raises(ValueError, match="vectors must have a row for each"):
        SubwordStore.fit_subwords(WORDS, vectors[:2], 5)
    assert not list(tmp_path.iterdir())
