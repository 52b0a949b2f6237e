"""Ids of texts against recorded values of spaCy, fastText, BLT and plain Python."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emblas.tables import Composition, Part, compose_bag, text_ids
from hypothesis import given
from hypothesis import strategies as st


def signed(*ids):
    return np.array(ids, np.uint64).view(np.int64).tolist()


@pytest.mark.parametrize(
    ("text", "norm", "prefix", "suffix", "shape"),
    [
        ("Apple", 8566208034543834098, 14862748245026736845, 16838316573854262908,
         16072095006890171862),
        ("C3PO", 8310680770960006612, 149303876845869574, 12749843712497747422,
         11086287042636485786),
        ("WNUT17", 12120683888938196268, 14825646868312541310, 7463336318720370622,
         15842436937160261016),
    ],
)  # fmt: skip
def test_attributes_of_spacy(text, norm, prefix, suffix, shape):
    for kind, expected in (("norm", norm), ("prefix", prefix), ("suffix", suffix),
                           ("shape", shape)):  # fmt: skip
        assert text_ids([text], kind)[0].tolist() == signed(expected)


def test_string_ids():
    words = {"a": 11901859001352538922, "apple": 8566208034543834098, "xxxx": 13110060611322374290,
             "hello world": 2758594965276909933, "naïve": 16224804062388677344, "": 0,
             "123456789": 2056675840866671865}  # fmt: skip
    ids, offsets = text_ids(list(words))
    assert ids.tolist() == signed(*words.values())
    assert offsets.tolist() == list(range(8))
    assert text_ids([])[1].tolist() == [0]


def shape_of(text):
    """The shape by Python's own character tests."""
    if len(text) >= 100:
        return "LONG"
    units = [
        ("X" if c.isupper() else "x") if c.isalpha() else "d" if c.isdigit() else c for c in text
    ]
    return "".join(u for i, u in enumerate(units) if units[i - 4 : i] != [u] * 4 or i < 4)


@given(st.lists(st.text(max_size=12), max_size=5))
def test_any_text(texts):
    def plain(strings):
        return text_ids(strings)[0].tolist()

    def own(kind, **options):
        ids, offsets = text_ids(texts, kind, **options)
        data = "".join(texts).encode()
        starts = np.cumsum([0, *(len(t.encode()) for t in texts)]).astype(np.int64)
        arrow = np.frombuffer(data, np.uint8), starts
        assert [x.tolist() for x in text_ids(arrow, kind, **options)] == [
            ids.tolist(), offsets.tolist(),
        ]  # fmt: skip
        return [x.tolist() for x in ids.split(offsets.diff().tolist())]

    assert [one for (one,) in own("norm")] == plain([t.lower() for t in texts])
    assert [one for (one,) in own("prefix")] == plain([t[:1] for t in texts])
    assert [one for (one,) in own("suffix")] == plain([t[-3:] for t in texts])
    assert [one for (one,) in own("shape")] == plain([shape_of(t) for t in texts])
    assert own("code_points") == [[ord(c) for c in t] for t in texts]
    assert own("bytes") == [list(t.encode()) for t in texts]
    for n in (1, 3):
        assert own("byte_ngrams", n=n, modulus=500) == [
            [polynomial(t.encode(), i, n) % 500 for i in range(len(t.encode()))] for t in texts
        ]
    assert own("subwords", min_n=1, max_n=3) == [
        [fasttext(w[i : i + n]) for w in [f"<{t}>"] for i in range(len(w)) for n in (1, 2, 3)
         if i + n <= len(w) and not (n == 1 and i in (0, len(w) - 1))]
        for t in texts
    ]  # fmt: skip


def fasttext(text):
    h = 2166136261
    for byte in text.encode():
        h = (h ^ (byte if byte < 128 else byte + 0xFFFFFF00)) * 16777619 % 2**32
    return h


def polynomial(data, position, n):
    window = [0] * n + list(data[: position + 1])
    h = sum(t * 1000000007**i for i, t in enumerate(window[-n:])) % 2**64
    return h - 2**64 if h >= 2**63 else h


def test_recorded_hashes():
    for text, expected in {"<ap": 1520206650, "ple>": 131415902, "<na": 1267806890,
                           "naï": 3249590546, "ïve": 1813711570}.items():  # fmt: skip
        word = text.strip("<>")
        assert expected in text_ids([word], "subwords", min_n=2, max_n=4)[0].tolist() or (
            expected in text_ids(["naïve"], "subwords")[0].tolist()
            or expected in text_ids(["apple"], "subwords")[0].tolist()
        )
    assert len(text_ids(["where"], "subwords")[0]) == 14
    blt = {"n": 3, "modulus": 500_000}
    assert text_ids([bytes([1, 2, 3]).decode()], "byte_ngrams", **blt)[0][-1] == 162
    assert text_ids(["hel"], "byte_ngrams", **blt)[0][-1] == 196407
    assert text_ids(["hel"], "byte_ngrams", n=3)[0][-1] == -2680462829257303593


def test_lower_case_is_pythons():
    """Every character with a lower case, and what that is after and before letters."""
    capitals = [chr(c) for c in range(0x110000) if chr(c).lower() != chr(c)]
    assert len(capitals) > 1300
    sigma = "\N{GREEK CAPITAL LETTER SIGMA}"
    texts = [*capitals, *(f"\u00e9{c}1" for c in capitals), f"A{sigma}", f"{sigma}A", f"A{sigma}'A"]
    expected = text_ids([text.lower() for text in texts])
    assert torch.equal(text_ids(texts, "norm")[0], expected[0])


def test_arrow_of_int32():
    data = np.frombuffer("naïveé".encode(), np.uint8)
    for dtype in (np.int32, np.int64):
        ids, offsets = text_ids((data, np.array([0, 6, 6, 8], dtype)), "code_points")
        assert ids.tolist() == [ord(c) for c in "naïveé"]
        assert offsets.tolist() == [0, 5, 5, 6]


def test_kmers():
    ids, offsets = text_ids(["ACGTNacg", "AC"], "kmers", n=3)
    assert ids.tolist() == [0b000110, 0b011011, 0b000110]
    assert offsets.tolist() == [0, 3, 3]


def test_feeds_the_tables():
    """fastText's vector of a word: the mean of the rows of its subwords."""
    ids, offsets = text_ids(["where", "", "naïve"], "subwords")
    composition = Composition((Part(100, 8, "radix", a=1),))
    table = torch.randn(100, 8)
    out = compose_bag(ids, table, composition, offsets, mode="mean")
    torch.testing.assert_close(out[0], table[ids[:14] % 100].mean(0))


def test_bad_arguments():
    for error, message, call in (
        (ValueError, "kind must be one of", lambda: text_ids(["a"], "words")),
        (ValueError, "min_n must be 1 to max_n", lambda: text_ids(["a"], "subwords", min_n=7)),
        (ValueError, "n must be 1 to 31", lambda: text_ids(["a"], "kmers", n=32)),
        (ValueError, "modulus must be", lambda: text_ids(["a"], modulus=0)),
        (TypeError, "strings must be a list of str", lambda: text_ids([b"a"])),
        (TypeError, "strings must be a sequence of str, got str", lambda: text_ids("a")),
        (ValueError, "strings must be .bytes, offsets., got 1 arrays",
         lambda: text_ids((np.zeros(2, np.uint8),))),
        (ValueError, "strings must be UTF-8, number 0 is not",  # a longer form of "A"
         lambda: text_ids((np.array([0xC1, 0x81], np.uint8), np.array([0, 2])), "norm")),
        (ValueError, "strings must be UTF-8, number 1 is not",
         lambda: text_ids((np.array([65, 255], np.uint8), np.array([0, 1, 2])), "prefix")),
        (ValueError, "offsets must lie inside bytes",
         lambda: text_ids((np.zeros(2, np.uint8), np.array([0, 3])))),
        (TypeError, "bytes must be a C-contiguous array",
         lambda: text_ids((np.zeros(2), np.array([0, 2])))),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()
