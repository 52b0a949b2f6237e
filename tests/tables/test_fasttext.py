"""Word n-grams of fastText and subwords of floret against recorded values and plain Python."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emblas.tables import compose_bag, floret_ids, text_ids, word_ngram_ids
from emblas.tables.composition import Composition, Part
from emblas.tables.fasttext import FLORET_SEED, murmur3_bytes, word_hashes
from hypothesis import given
from hypothesis import strategies as st


def fnv(word):
    h = 2166136261
    for byte in word.encode():
        h = (h ^ (byte - 256 if byte >= 128 else byte) % 2**32) * 16777619 % 2**32
    return h


def test_word_hashes():
    """gensim's and fastText's own values."""
    recorded = {"<ap": 1520206650, "apple": 280767167, "ple>": 131415902, "<na": 1267806890,
                "naï": 3249590546, "ïve": 1813711570, "é": 1023043777, "hello": 1335831723,
                "world": 933488787}  # fmt: skip
    assert word_hashes(list(recorded)).tolist() == list(recorded.values())
    assert [fnv(word) for word in recorded] == list(recorded.values())
    assert word_hashes([]).shape == (0,)


def test_word_ngrams_recorded():
    ids, offsets = word_ngram_ids([["hello", "world"]], 2, 2_000_000)
    assert ids.tolist() == [1485020]
    assert offsets.tolist() == [0, 1]


@given(
    st.lists(st.lists(st.text(max_size=4), max_size=5), max_size=4),
    st.integers(2, 6),
    st.sampled_from([1, 7, 2_000_000, 2**62]),
)
def test_word_ngrams(sentences, max_n, buckets):
    expected, offsets = [], [0]
    for sentence in sentences:
        hashes = [fnv(word) for word in sentence]
        wide = [h - 2**32 if h >= 2**31 else h for h in hashes]
        for i in range(len(wide)):
            h = wide[i]
            for n in wide[i + 1 : i + max_n]:
                h = h * 116049371 + n
                expected.append(h % 2**64 % buckets)
        offsets.append(len(expected))
    got = word_ngram_ids(sentences, max_n, buckets)
    assert got[0].tolist() == expected
    assert got[1].tolist() == offsets


def test_floret_recorded():
    ids, offsets = floret_ids(["apple"], 50_000, min_n=4, max_n=5, num_hashes=4)
    rows = ids.view(-1, 4).tolist()
    assert rows[0] == [40534, 20033, 12939, 47746]  # <apple>
    assert rows[1] == [22888, 26128, 36640, 44173]  # <app
    assert len(rows) == 1 + 4 + 3
    assert offsets.tolist() == [0, 32]


@given(st.lists(st.text(max_size=9), max_size=4), st.integers(1, 3), st.integers(0, 3))
def test_floret(words, min_n, more):
    got, offsets = floret_ids(words, 1000, min_n=min_n, max_n=min_n + more, num_hashes=1)
    grams, ends = [], [0]
    for word in words:
        key = f"<{word}>"
        grams.append(key)
        for n in range(min_n, min_n + more + 1):
            grams += [key[i : i + n] for i in range(len(key) - n + 1)]
        ends.append(len(grams))
    assert offsets.tolist() == ends
    data = "".join(grams).encode()
    starts = np.cumsum([0, *(len(gram.encode()) for gram in grams)])
    alone = murmur3_bytes(np.frombuffer(data, np.uint8), starts[:-1], starts[1:], FLORET_SEED)
    assert got.tolist() == (alone[:, 0] % 1000).tolist()


@given(st.lists(st.binary(max_size=50), max_size=5), st.integers(0, 2**32 - 1))
def test_murmur3_of_bytes(strings, seed):
    mmh3 = pytest.importorskip("mmh3", reason="mmh3 is not installed")
    data = np.frombuffer(b"".join(strings), np.uint8)
    ends = np.cumsum([0, *map(len, strings)])
    got = murmur3_bytes(data, ends[:-1], ends[1:], seed)
    expected = [np.frombuffer(mmh3.hash_bytes(s, seed, x64arch=True), "<u4") for s in strings]
    assert got.tolist() == [row.tolist() for row in expected]


def test_sentence_vectors():
    """Rows of words, then buckets: what fastText's classifier averages."""
    words, buckets = ["good", "book", "bad"], 50
    table = torch.randn(len(words) + buckets, 4)
    sentence = ["good", "bad", "book"]
    ids, _ = word_ngram_ids([sentence], 2, buckets)
    rows = torch.cat([torch.tensor([0, 2, 1]), len(words) + ids])
    out = compose_bag(
        rows, table, Composition((Part(len(table), 4, "radix", a=1),)),
        torch.tensor([0, len(rows)]), mode="mean",
    )  # fmt: skip
    torch.testing.assert_close(out[0], table[rows].mean(0))


def test_subwords_agree():
    """The C++ hashes of n-grams are those of the same strings as words."""
    grams = [w for n in (3, 4) for w in ("<na", "naï", "ïve", "ve>", "<naï", "naïv", "ïve>")
             if len(w) == n]  # fmt: skip
    ids, _ = text_ids(["naïve"], "subwords", min_n=3, max_n=4)
    assert set(word_hashes(grams).tolist()) <= set(ids.tolist())


def test_bad_arguments():
    for error, message, call in (
        (ValueError, "max_n must be at least 2", lambda: word_ngram_ids([["a"]], 1, 5)),
        (ValueError, "num_buckets must be 1 to", lambda: word_ngram_ids([["a"]], 2, 0)),
        (TypeError, "sentences must be sequences", lambda: word_ngram_ids(["a b"], 2, 5)),
        (TypeError, "strings must be a sequence", lambda: word_ngram_ids([[1]], 2, 5)),
        (ValueError, "min_n must be 1 to max_n", lambda: floret_ids(["a"], 5, min_n=6)),
        (ValueError, "num_hashes must be 1 to 4", lambda: floret_ids(["a"], 5, num_hashes=5)),
        (ValueError, "num_buckets must be 1 to", lambda: floret_ids(["a"], 2**32)),
        (TypeError, "strings must be a sequence", lambda: floret_ids("abc", 5)),
        (TypeError, "strings must be a sequence", lambda: floret_ids([b"abc"], 5)),
    ):
        with pytest.raises(error, match=message):
            call()
