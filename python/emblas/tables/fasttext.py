"""Ids of word n-grams and of floret's subwords, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from emblas.tables.base import check_at_least

Words = npt.NDArray[np.uint64]
_WORD_MULTIPLIER = np.uint64(116049371)
FLORET_SEED = 2166136261


def _utf8(strings: Sequence[str]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return the bytes of all strings and where each starts."""
    if isinstance(strings, str) or not all(isinstance(string, str) for string in strings):
        raise TypeError("strings must be a sequence of str")
    encoded = [string.encode() for string in strings]
    starts = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum([len(part) for part in encoded], out=starts[1:])
    return np.frombuffer(b"".join(encoded), np.uint8), starts


def word_hashes(words: Sequence[str]) -> npt.NDArray[np.uint32]:
    """FastText's 32-bit hash of words: FNV-1a whose bytes are extended by their sign first."""
    data, starts = _utf8(words)
    signed = data.view(np.int8).astype(np.int32).view(np.uint32)
    sizes = np.diff(starts)
    hashes = np.full(len(words), 2166136261, np.uint32)
    for position in range(int(sizes.max(initial=0))):
        longer = np.flatnonzero(sizes > position)
        byte = signed[starts[longer] + position]
        hashes[longer] = (hashes[longer] ^ byte) * np.uint32(16777619)
    return hashes


def word_ngram_ids(
    sentences: Sequence[Sequence[str]], max_n: int, num_buckets: int
) -> tuple[Tensor, Tensor]:
    """Ids of the n-grams of words of fastText's classifier.

    An n-gram hashes as ``h = h * 116049371 + hash(word)`` over its words, modulo 2^64, each hash
    extended by its sign (dictionary.cc of fastText); its row is ``h mod num_buckets``, after the
    rows of the words.

    Parameters
    ----------
    sentences : sequence of sequences of str
        The words of each sentence.
    max_n : int
        Longest n-gram, in words, at least 2; the shortest is 2.
    num_buckets : int
        1 to 2^62.

    Returns
    -------
    ids : Tensor
        int64, 0 to ``num_buckets - 1``: by sentence, by first word, by length.
    offsets : Tensor
        int32 ``(sentences + 1,)``: sentence ``i`` has the ids from ``offsets[i]`` to the next.

    Raises
    ------
    TypeError
        If ``sentences`` holds something else.
    ValueError
        If a number is out of range.

    Examples
    --------
    >>> word_ngram_ids([["hello", "world"]], 2, 2_000_000)[0].tolist()
    [1485020]
    """
    check_at_least(2, max_n=max_n)
    if not 1 <= num_buckets <= 2**62:
        raise ValueError(f"num_buckets must be 1 to 2^62, got {num_buckets}")
    if any(isinstance(sentence, str) for sentence in sentences):
        raise TypeError("sentences must be sequences of words, got a str")
    sizes = np.array([len(sentence) for sentence in sentences], np.int64)
    words = word_hashes([word for sentence in sentences for word in sentence])
    values = words.view(np.int32).astype(np.int64).view(np.uint64)
    last = np.repeat(np.cumsum(sizes), sizes)  # one past the last word of each word's sentence
    position = np.arange(len(values))
    longest = int(min(max_n, sizes.max(initial=0)))
    hashes = np.zeros((len(values), max(longest - 1, 0)), np.uint64)
    running = values.copy()
    for n in range(2, longest + 1):
        begins = np.flatnonzero(position + n <= last)
        running[begins] = running[begins] * _WORD_MULTIPLIER + values[begins + n - 1]
        hashes[begins, n - 2] = running[begins]
    counts = np.clip(last - position - 1, 0, max(longest - 1, 0))
    used = np.arange(hashes.shape[1]) < counts[:, None]
    ids = (hashes[used] % np.uint64(num_buckets)).astype(np.int64)
    totals = np.concatenate([[0], np.cumsum(counts)])
    offsets = totals[np.concatenate([[0], np.cumsum(sizes)])]
    return torch.from_numpy(ids), torch.from_numpy(offsets.astype(np.int32))


def floret_ids(
    words: Sequence[str],
    num_buckets: int,
    *,
    min_n: int = 4,
    max_n: int = 5,
    num_hashes: int = 2,
    seed: int = FLORET_SEED,
) -> tuple[Tensor, Tensor]:
    """Rows of words in a floret table, whose mean is the word's vector.

    floret hashes the whole word between ``<`` and ``>`` and all its n-grams of ``min_n`` to
    ``max_n`` characters by MurmurHash3_x64_128; each takes ``num_hashes`` rows, the first 32-bit
    words of the hash modulo ``num_buckets``.

    Parameters
    ----------
    words : sequence of str
        Any words; there is no vocabulary.
    num_buckets : int
        Rows of the table, 1 to 2^32 - 1.
    min_n, max_n : int, default 4 and 5
        Lengths of n-grams in characters.
    num_hashes : int, default 2
        1 to 4.
    seed : int, default 2166136261
        0 to 2^32 - 1.

    Returns
    -------
    ids : Tensor
        int64: of the whole word first, then of n-grams by length, then by place.
    offsets : Tensor
        int32 ``(words + 1,)``: word ``i`` has the ids from ``offsets[i]`` to the next.

    Raises
    ------
    TypeError
        If ``words`` holds something else.
    ValueError
        If a number is out of range.
    """
    if not 1 <= min_n <= max_n:
        raise ValueError(f"min_n must be 1 to max_n, got {min_n} and {max_n}")
    for name, value, low, high in (
        ("num_buckets", num_buckets, 1, 2**32 - 1),
        ("num_hashes", num_hashes, 1, 4),
        ("seed", seed, 0, 2**32 - 1),
    ):
        if not low <= value <= high:
            raise ValueError(f"{name} must be {low} to {high}, got {value}")
    _utf8(words)  # refuses what isn't a string
    data, starts = _utf8([f"<{word}>" for word in words])
    first = np.flatnonzero(data & 0xC0 != 0x80)  # byte at which each character starts
    begin_of_word = np.searchsorted(first, starts)  # number of each word's first character
    bounds = np.append(first, len(data))
    word_of = np.repeat(np.arange(len(words)), np.diff(begin_of_word))
    end = begin_of_word[1:][word_of]
    begins, ends, owners = [starts[:-1]], [starts[1:]], [np.arange(len(words))]
    for n in range(min_n, max_n + 1):
        character = np.flatnonzero(np.arange(len(first)) + n <= end)
        begins.append(first[character])
        ends.append(bounds[character + n])
        owners.append(word_of[character])
    owner = np.concatenate(owners)
    order = np.argsort(owner, kind="stable")
    begin, stop = np.concatenate(begins)[order], np.concatenate(ends)[order]
    keys = murmur3_bytes(data, begin, stop, seed)[:, :num_hashes] % num_buckets
    counts = np.bincount(owner, minlength=len(words)) * num_hashes
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return torch.from_numpy(keys.astype(np.int64).reshape(-1)), torch.from_numpy(offsets)


# --- MurmurHash3_x64_128 of many byte strings at once; see csrc/common/hash.h --------------------

_C1, _C2 = np.uint64(0x87C37B91114253D5), np.uint64(0x4CF5AD432745937F)


def _rotate(x: Words, bits: int) -> Words:
    return x << np.uint64(bits) | x >> np.uint64(64 - bits)


def _mix(x: Words) -> Words:
    x = (x ^ x >> np.uint64(33)) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ x >> np.uint64(33)) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ x >> np.uint64(33)


def murmur3_bytes(
    data: npt.NDArray[np.uint8],
    begin: npt.NDArray[np.int64],
    end: npt.NDArray[np.int64],
    seed: int,
) -> npt.NDArray[np.uint32]:
    """Hash the spans ``data[begin[i]:end[i]]``, uint32 ``(spans, 4)``."""
    sizes = end - begin
    h1 = np.full(len(sizes), seed, np.uint64)
    h2 = h1.copy()
    padded = np.append(data, np.zeros(16, np.uint8))
    columns = np.arange(16)
    for block in range(int(sizes.max(initial=0)) // 16 + 1):
        rows = np.flatnonzero(sizes >= 16 * block)
        at = begin[rows] + 16 * block
        left = sizes[rows] - 16 * block
        chunk = padded[at[:, None] + columns] * (columns < left[:, None]).astype(np.uint8)
        k1, k2 = chunk.view("<u8").astype(np.uint64).T
        k1, k2 = _rotate(k1 * _C1, 31) * _C2, _rotate(k2 * _C2, 33) * _C1
        a, b = h1[rows] ^ k1, h2[rows]
        whole = left >= 16  # the tail, maybe of no bytes, is only xored in
        mixed_a = (_rotate(a, 27) + b) * np.uint64(5) + np.uint64(0x52DCE729)
        mixed_b = (_rotate(b ^ k2, 31) + mixed_a) * np.uint64(5) + np.uint64(0x38495AB5)
        h1[rows] = np.where(whole, mixed_a, a)
        h2[rows] = np.where(whole, mixed_b, b ^ k2)
    h1 ^= sizes.astype(np.uint64)
    h2 ^= sizes.astype(np.uint64)
    h1 = h1 + h2
    h2 = h2 + h1
    h1, h2 = _mix(h1), _mix(h2)
    h1 = h1 + h2
    h2 = h2 + h1
    return np.stack([h1, h2], 1).astype("<u8").view("<u4")
