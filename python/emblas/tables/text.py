"""Texts as ids: what tables of words, subwords, characters and bytes are looked up by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from emblas._load import _C

KINDS = (  # in the order of csrc/tables/text.h
    "string", "norm", "prefix", "suffix", "shape", "subwords", "code_points", "bytes",
    "byte_ngrams", "kmers",
)  # fmt: skip
BLT_PRIME = 1000000007

# UTF-8 of all strings, and where each starts (one start more for the end), as Arrow stores them.
Bytes = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64] | npt.NDArray[np.int32]]


def arrays_of(name: str, strings: object, *arrays: str) -> tuple[Any, ...] | None:
    """Return the arrays of bytes and starts, which must be all there; None for strings."""
    if not (isinstance(strings, tuple) and strings and isinstance(strings[0], np.ndarray)):
        return None
    if len(strings) != len(arrays):
        raise ValueError(f"{name} must be ({', '.join(arrays)}), got {len(strings)} arrays")
    return strings


def starts_of(starts: Any) -> npt.NDArray[np.int64]:
    """Widen the int32 starts that most Arrow arrays have; other dtypes are refused in C++."""
    array = np.ascontiguousarray(starts)
    return array.astype(np.int64) if array.dtype == np.int32 else array


def string_list(strings: Any) -> list[Any]:
    """Return a list of its own of a sequence of strings; a single string is no such sequence."""
    if isinstance(strings, (str, bytes)):
        raise TypeError(f"strings must be a sequence of str, got {type(strings).__name__}")
    return list(strings)


def text_ids(
    strings: Sequence[str] | Bytes,
    kind: str = "string",
    *,
    min_n: int = 3,
    max_n: int = 6,
    n: int = 3,
    multiplier: int = BLT_PRIME,
    modulus: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Turn strings into ids, one or many for each, in C++ with the GIL released.

    The two results are the ``ids`` and ``offsets`` that :func:`hash_bag` and :func:`compose_bag`
    take.

    Parameters
    ----------
    strings : sequence of str, or (bytes, offsets)
        Or the UTF-8 bytes of all strings, uint8, and where each starts, int64 or int32
        ``(strings + 1,)``, as Arrow stores them.
    kind : str, default "string"
        One id for each string:

        - ``"string"``: spaCy's id (MurmurHash64A of the UTF-8 bytes, seed 1; 0 for the empty
          string). spaCy's reserved symbols, such as "ORG", have small numbers there instead.
        - ``"norm"``, ``"prefix"``, ``"suffix"``, ``"shape"``: that id of the string in lower case,
          its first character, its last three, and its shape ("Xxxxx", "XXdd"). The attributes of
          spaCy's ``MultiHashEmbed``, but for spaCy's table of exceptions from lower case.

        Many for each:

        - ``"subwords"``: fastText's hashes of the ``min_n`` to ``max_n`` characters long parts of
          ``<string>``; its rows are these mod the number of buckets.
        - ``"code_points"`` (CANINE) and ``"bytes"``.
        - ``"byte_ngrams"``: for each byte, the polynomial hash of the ``n`` bytes that end there
          (BLT), as int64 modulo 2^64.
        - ``"kmers"``: each run of ``n`` letters A, C, G and T as a number of base 4, at most 31.
    min_n, max_n : int, default 3 and 6
        Lengths of subwords.
    n : int, default 3
        Length of byte n-grams and k-mers.
    multiplier : int, default 1000000007
        Base of the polynomial of byte n-grams.
    modulus : int, optional
        Reduce ids to 0 to ``modulus - 1``.

    Returns
    -------
    ids : Tensor
        int64.
    offsets : Tensor
        int32 ``(strings + 1,)``: string ``i`` has the ids from ``offsets[i]`` to the next.

    Raises
    ------
    TypeError
        If ``strings`` holds something else.
    ValueError
        If an option is out of range, or bytes are not UTF-8 where characters are asked for.

    Examples
    --------
    >>> text_ids(["apple"], "string")[0].tolist()
    [8566208034543834098]
    >>> text_ids(["where"], "subwords", modulus=2_000_000)[0].shape
    torch.Size([14])
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not 1 <= min_n <= max_n:
        raise ValueError(f"min_n must be 1 to max_n, got {min_n} and {max_n}")
    if not 1 <= n <= (31 if kind == "kmers" else 2**31):
        raise ValueError(f"n must be 1 to 31 for k-mers and at least 1, got {n}")
    if modulus is not None and not 1 <= modulus < 2**62:
        raise ValueError(f"modulus must be 1 to 2^62 - 1, got {modulus}")
    lengths = (min_n, max_n) if kind == "subwords" else (1, n)
    options = (KINDS.index(kind), *lengths, multiplier % 2**64, modulus or 0)
    arrays = arrays_of("strings", strings, "bytes", "offsets")
    if arrays is not None:
        data, starts = arrays
        ids, offsets = _C.text_ids_of_bytes(data, starts_of(starts), *options)
    else:
        ids, offsets = _C.text_ids_of_strings(string_list(strings), *options)
    return torch.from_numpy(ids), torch.from_numpy(offsets)
