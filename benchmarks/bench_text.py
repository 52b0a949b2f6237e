"""Texts to ids beside the same in Python, and beside the packages that define them.

20,000 English-like words, made up of syllables, as a list of strings or as bytes and offsets.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import rotate
from emblas import use_backend
from emblas.tables import CodeSpec, floret_ids, random_codes, text_ids, word_ngram_ids

COUNT, WORDS_PER_SENTENCE = 20_000, 20
Words = list[str]


@cache
def _words(seed: int) -> Words:
    generator = np.random.default_rng(seed)
    syllables = [a + b for a in "bcdfglmnprstvw" for b in ("a", "e", "i", "o", "u", "in", "er")]
    lengths = generator.integers(1, 5, COUNT)
    chosen = iter(generator.choice(syllables, int(lengths.sum())).tolist())
    words = ("".join(next(chosen) for _ in range(length)) for length in lengths)
    return [word.capitalize() if i % 9 == 0 else word for i, word in enumerate(words)]


def _arrow(words: Words) -> tuple[Any, Any]:
    encoded = [word.encode() for word in words]
    starts = np.cumsum([0, *map(len, encoded)])
    return np.frombuffer(b"".join(encoded), np.uint8), starts


def _fnv(text: str) -> int:
    h = 2166136261
    for byte in text.encode():
        h = (h ^ (byte if byte < 128 else byte + 0xFFFFFF00)) * 16777619 & 0xFFFFFFFF
    return h


def _subwords(words: Words) -> list[list[int]]:
    return [
        [_fnv(w[i : i + n]) for i in range(len(w)) for n in range(3, 7) if i + n <= len(w)]
        for w in (f"<{word}>" for word in words)
    ]


def _shapes(words: Words) -> list[str]:
    out = []
    for word in words:
        shape = ""
        for c in word:
            unit = ("X" if c.isupper() else "x") if c.isalpha() else "d" if c.isdigit() else c
            if shape[-4:] != unit * 4:
                shape += unit
        out.append(shape)
    return out


def _byte_ngrams(words: Words) -> list[int]:
    out = []
    for word in words:
        data = bytes(2) + word.encode()
        for i in range(2, len(data)):
            h = data[i - 2] + (data[i - 1] + data[i] * 1000000007) * 1000000007
            out.append(h & 2**64 - 1)
    return out


def _word_ngrams(words: Words) -> list[int]:
    out = []
    for begin in range(0, len(words), WORDS_PER_SENTENCE):
        hashes = [_fnv(word) for word in words[begin : begin + WORDS_PER_SENTENCE]]
        hashes = [h - 2**32 if h >= 2**31 else h for h in hashes]
        out += [(a * 116049371 + b) % 2**64 % 2_000_000 for a, b in pairwise(hashes)]
    return out


def _floret(words: Words) -> list[int]:
    mmh3 = pytest.importorskip("mmh3", reason="mmh3 is not installed")
    out: list[int] = []
    for word in (f"<{word}>" for word in words):
        grams = [word, *(word[i : i + n] for n in (4, 5) for i in range(len(word) - n + 1))]
        for gram in grams:
            low, _ = mmh3.hash64(gram.encode(), 2166136261, x64arch=True, signed=False)
            out += [(low & 0xFFFFFFFF) % 50_000, (low >> 32) % 50_000]
    return out


def _package_subwords(name: str, **options: Any) -> Callable[[Words], Any]:
    """The package's own subwords, of a model trained on next to nothing."""
    package = pytest.importorskip(name, reason=f"{name} is not installed")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text")
        path.write_text("a b c d\n" * 20)
        model = package.train_unsupervised(
            str(path), dim=1, minCount=1, epoch=1, thread=1, verbose=0, **options
        )
    return lambda words: [model.get_subwords(word)[1] for word in words]


def _sentences(words: Words) -> list[Words]:
    return [words[i : i + WORDS_PER_SENTENCE] for i in range(0, len(words), WORDS_PER_SENTENCE)]


# Operation: ours of a list and of bytes and offsets, and the contenders.
OPS: dict[str, tuple[Callable[[Any], Any], dict[str, Callable[[], Callable[[Words], Any]]]]] = {
    "spaCy's shapes": (lambda x: text_ids(x, "shape"), {"Python": lambda: _shapes}),
    "fastText subwords": (
        lambda x: text_ids(x, "subwords", modulus=2_000_000),
        {
            "Python": lambda: _subwords,
            "fasttext": lambda: _package_subwords("fasttext", minn=3, maxn=6, bucket=2_000_000),
        },
    ),
    "floret subwords": (
        lambda x: floret_ids(x, 50_000),
        {
            "Python and mmh3": lambda: _floret,
            "floret": lambda: _package_subwords(
                "floret", minn=4, maxn=5, bucket=50_000, mode="floret", hashCount=2
            ),
        },
    ),
    "BLT's byte n-grams": (
        lambda x: text_ids(x, "byte_ngrams"),
        {"Python": lambda: _byte_ngrams},
    ),
}


@pytest.mark.parametrize(
    ("op", "who"),
    [(op, who) for op, (_, peers) in OPS.items() for who in ("emblas", "emblas, bytes", *peers)],
)
def bench_text_ids(row: Any, op: str, who: str) -> None:
    ours, peers = OPS[op]

    def make(seed: int) -> tuple[Any]:
        words = _words(seed % 8)
        return (_arrow(words) if who.endswith("bytes") else words,)

    row(
        "tables", op, who, shape=f"{COUNT} words", dtype="text", inputs=rotate(make, 1 << 24),
        call=peers[who]() if who in peers else ours, single_thread=True,
    )  # fmt: skip


@pytest.mark.parametrize("who", ["emblas", "Python"])
def bench_word_ngrams(row: Any, who: str) -> None:
    def make(seed: int) -> tuple[Any]:
        words = _words(seed % 8)
        return (_sentences(words) if who == "emblas" else words,)

    row(
        "tables", "fastText pairs of words", who, dtype="text", inputs=rotate(make, 1 << 24),
        shape=f"{COUNT} words in sentences of {WORDS_PER_SENTENCE}", single_thread=True,
        call=_word_ngrams if who == "Python" else lambda x: word_ngram_ids(x, 2, 2_000_000),
    )  # fmt: skip


@pytest.mark.parametrize("who", ["emblas", "plain torch", "torch.randn, not of ids"])
@pytest.mark.parametrize("kind", ["normal", "sparse"])
def bench_random_codes(row: Any, kind: str, who: str) -> None:
    count, dim, spec = 4096, 256, CodeSpec(kind, sparsity=3)

    def codes(ids: torch.Tensor) -> torch.Tensor:
        with use_backend("reference" if who == "plain torch" else "cpu"):
            return random_codes(ids, dim, spec)

    if who.startswith("torch.randn") and kind != "normal":
        pytest.skip("torch.randn makes normal numbers")
    row(
        "tables", f"{kind} codes of ids", who, shape=f"{count} ids x {dim}", dtype="float32",
        call=(lambda ids: torch.randn(count, dim)) if who.startswith("torch.randn") else codes,
        inputs=rotate(lambda seed: (torch.arange(count) + seed * count,), count * dim * 4),
        bytes=count * dim * 4,
    )  # fmt: skip
