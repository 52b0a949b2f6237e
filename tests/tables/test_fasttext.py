"""Word n-grams of fastText and subwords of floret against recorded values and plain Python."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emblas._load import _C
from emblas.tables import compose_bag, floret_ids, text_ids, word_ngram_ids
from emblas.tables.composition import Composition, Part
from emblas.tables.fasttext import FLORET_SEED
from hypothesis import given
from hypothesis import strategies as st


def fnv(word):
    h = 2166136261
    for byte in word.encode():
        h = (h ^ (byte - 256 if byte >= 128 else byte) % 2**32) * 16777619 % 2**32
    return h


def arrow(strings):
    """The bytes of strings and where they start, as Arrow stores them."""
    encoded = [string.encode() for string in strings]
    starts = np.cumsum([0, *map(len, encoded)])
    return np.frombuffer(b"".join(encoded), np.uint8), starts


def lists(ids):
    return [x.tolist() for x in ids]


def test_word_hashes():
    """gensim's and fastText's own values."""
    recorded = {"<ap": 1520206650, "apple": 280767167, "ple>": 131415902, "<na": 1267806890,
                "naï": 3249590546, "ïve": 1813711570, "é": 1023043777, "hello": 1335831723,
                "world": 933488787}  # fmt: skip
    assert [fnv(word) for word in recorded] == list(recorded.values())


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
    data, starts = arrow([word for sentence in sentences for word in sentence])
    groups = np.cumsum([0, *map(len, sentences)]).astype(np.int32)
    assert lists(word_ngram_ids((data, starts, groups), max_n, buckets)) == lists(got)
    assert got[0].tolist() == expected
    assert got[1].tolist() == offsets


def test_floret_recorded():
    ids, offsets = floret_ids(["apple"], 50_000, min_n=4, max_n=5, num_hashes=4)
    rows = ids.view(-1, 4).tolist()
    assert rows[0] == [40534, 20033, 12939, 47746]  # <apple>
    assert rows[1] == [22888, 26128, 36640, 44173]  # <app
    assert len(rows) == 1 + 4 + 3
    assert offsets.tolist() == [0, 32]


@given(
    st.lists(st.text(max_size=9), max_size=4), st.integers(1, 3), st.integers(0, 3),
    st.integers(1, 4),
)  # fmt: skip
def test_floret(words, min_n, more, num_hashes):
    got, offsets = floret_ids(words, 1000, min_n=min_n, max_n=min_n + more, num_hashes=num_hashes)
    grams, ends = [], [0]
    for word in words:
        key = f"<{word}>"
        grams.append(key)
        for n in range(min_n, min_n + more + 1):
            grams += [key[i : i + n] for i in range(len(key) - n + 1)]
        ends.append(len(grams) * num_hashes)
    assert offsets.tolist() == ends
    murmur3 = _C.murmur3_x64_128
    hashes = [murmur3(gram.encode(), FLORET_SEED) for gram in grams]
    assert got.tolist() == [
        word % 1000
        for low, high in hashes
        for word in (low % 2**32, low >> 32, high % 2**32, high >> 32)[:num_hashes]
    ]
    options = {"min_n": min_n, "max_n": min_n + more, "num_hashes": num_hashes}
    assert lists(floret_ids(arrow(words), 1000, **options)) == lists((got, offsets))


@given(st.binary(max_size=50), st.integers(0, 2**32 - 1))
def test_murmur3_of_bytes(string, seed):
    mmh3 = pytest.importorskip("mmh3", reason="mmh3 is not installed")
    expected = np.frombuffer(mmh3.hash_bytes(string, seed, x64arch=True), "<u8")
    assert _C.murmur3_x64_128(string, seed) == tuple(expected.tolist())


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
    assert set(map(fnv, grams)) <= set(ids.tolist())


def test_bad_arguments():
    for error, message, call in (
        (ValueError, "max_n must be at least 2", lambda: word_ngram_ids([["a"]], 1, 5)),
        (ValueError, "num_buckets must be 1 to", lambda: word_ngram_ids([["a"]], 2, 0)),
        (TypeError, "sentences must be sequences", lambda: word_ngram_ids(["a b"], 2, 5)),
        (TypeError, "sentences must be sequences", lambda: word_ngram_ids([[1]], 2, 5)),
        (TypeError, "sentences must be sequences", lambda: word_ngram_ids([7], 2, 5)),
        (ValueError, "sentences must be .bytes, offsets, sentence_offsets., got 2 arrays",
         lambda: word_ngram_ids(arrow(["a"]), 2, 5)),
        (ValueError, "offsets of sentences must lie inside the words",
         lambda: word_ngram_ids((*arrow(["a"]), np.array([0, 2])), 2, 5)),
        (ValueError, "offsets of sentences must lie inside the words",
         lambda: word_ngram_ids((*arrow(["a", "b"]), np.array([0, 2, 1, 2])), 2, 5)),
        (TypeError, "sentences must be a C-contiguous array of int64",
         lambda: word_ngram_ids((*arrow(["a"]), np.array([0.0, 1])), 2, 5)),
        (ValueError, "offsets must lie inside bytes",
         lambda: floret_ids((np.zeros(2, np.uint8), np.array([0, 3])), 5)),
        (ValueError, "strings must be UTF-8, number 1 is not",
         lambda: floret_ids((np.array([65, 0xC0, 0x80], np.uint8), np.array([0, 1, 3])), 5)),
        (ValueError, "surrogates not allowed", lambda: floret_ids(["\ud800"], 5)),
        (ValueError, "min_n must be 1 to max_n", lambda: floret_ids(["a"], 5, min_n=6)),
        (ValueError, "num_hashes must be 1 to 4", lambda: floret_ids(["a"], 5, num_hashes=5)),
        (ValueError, "num_buckets must be 1 to", lambda: floret_ids(["a"], 2**32)),
        (TypeError, "strings must be a sequence", lambda: floret_ids("abc", 5)),
        (TypeError, "strings must be a list of str", lambda: floret_ids([b"abc"], 5)),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()
