"""Ids of word n-grams and of floret's subwords, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from emblas._load import _C
from emblas.tables.base import check_at_least
from emblas.tables.text import Bytes, arrays_of, starts_of, string_list

FLORET_SEED = 2166136261


def word_ngram_ids(
    sentences: Sequence[Sequence[str]] | tuple[Any, Any, Any], max_n: int, num_buckets: int
) -> tuple[Tensor, Tensor]:
    """Ids of the n-grams of words of fastText's classifier.

    An n-gram hashes as ``h = h * 116049371 + hash(word)`` over its words, modulo 2^64, each hash
    extended by its sign (dictionary.cc of fastText); its row is ``h mod num_buckets``, after the
    rows of the words.

    Parameters
    ----------
    sentences : sequence of sequences of str, or (bytes, offsets, sentence_offsets)
        The words of each sentence. Or the UTF-8 bytes of all words, uint8; where each word starts
        in them, ``(words + 1,)``; and where each sentence starts in the words,
        ``(sentences + 1,)``; both int64 or int32, as Arrow stores lists of strings.
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
    arrays = arrays_of("sentences", sentences, "bytes", "offsets", "sentence_offsets")
    if arrays is not None:
        data, *starts = arrays
        words, groups = map(starts_of, starts)
        ids, offsets = _C.word_ngram_ids_of_bytes(data, words, groups, max_n, num_buckets)
    else:
        ids, offsets = _C.word_ngram_ids_of_strings(string_list(sentences), max_n, num_buckets)
    return torch.from_numpy(ids), torch.from_numpy(offsets)


def floret_ids(
    words: Sequence[str] | Bytes,
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
    words : sequence of str, or (bytes, offsets)
        Any words; there is no vocabulary. Or their bytes, as for :func:`text_ids`.
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
        If a number is out of range, or bytes are not UTF-8.
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
    options = (min_n, max_n, num_hashes, seed, num_buckets)
    arrays = arrays_of("words", words, "bytes", "offsets")
    if arrays is not None:
        data, starts = arrays
        ids, offsets = _C.floret_ids_of_bytes(data, starts_of(starts), *options)
    else:
        ids, offsets = _C.floret_ids_of_strings(string_list(words), *options)
    return torch.from_numpy(ids), torch.from_numpy(offsets)
