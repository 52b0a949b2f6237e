"""Word vectors in one memory-mapped file, with subwords for the words that aren't in it."""

from __future__ import annotations

import os
import struct
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from emblas.tables.compose import compose_bag
from emblas.tables.composition import Composition, Part
from emblas.tables.text import text_ids
from emblas.tables.transfer import conjugate_gradients

MAGIC = b"emblaswv"
VERSION = 1
# magic, version, element bytes, dim, words, buckets, min_n, max_n, text bytes, CRC-32 of the rest
_HEADER = struct.Struct("<8sIIQQQIIQI")
_ALIGNMENT = 64
_DTYPES: dict[int, np.dtype[Any]] = {2: np.dtype("<f2"), 4: np.dtype("<f4")}
Array = npt.NDArray[Any]


def _sections(
    size: int, dim: int, words: int, buckets: int, text: int
) -> list[tuple[str, np.dtype[Any], tuple[int, ...]]]:
    """Arrays of a file in order; each starts at a multiple of 64 bytes."""
    return [
        ("vectors", _DTYPES[size], (words, dim)),
        ("buckets", _DTYPES[size], (buckets, dim)),
        ("hashes", np.dtype("<u8"), (words,)),  # of the words, ascending
        ("order", np.dtype("<i8"), (words,)),  # the word of each hash
        ("starts", np.dtype("<i8"), (words + 1,)),  # of the words in the text
        ("text", np.dtype("u1"), (text,)),  # UTF-8
    ]


def _places(sections: list[tuple[str, np.dtype[Any], tuple[int, ...]]]) -> tuple[list[int], int]:
    """Return the offset of each section, and the size of the file."""
    at, places = _HEADER.size, []
    for _, dtype, shape in sections:
        at = -(-at // _ALIGNMENT) * _ALIGNMENT
        places.append(at)
        at += dtype.itemsize * int(np.prod(shape, dtype=object))
    return places, at


class SubwordStore:
    """Word vectors read from a file as they are needed; unknown words are made from subwords.

    The file is mapped into memory: opening costs no time or memory, and processes share it. A
    known word gives its stored vector. Any other gives the mean of the vectors of its n-grams of
    characters (fastText's hashes, see :func:`text_ids`), zeros if it has none. The vectors of
    n-grams come with the words (fastText's own) or are fitted to them: :meth:`fit_subwords` solves
    for those whose means are nearest to the words' vectors, as MIMICK (Pinter, Guthrie and
    Eisenstein, 2017) trains a network to.

    Open one by ``SubwordStore(path)``; make one by :meth:`write`.

    Parameters
    ----------
    path : path-like
        A file of :meth:`write`.
    verify : bool, default True
        Read the whole file once and compare its checksum.

    Attributes
    ----------
    dim : int
        Width of the vectors.
    min_n, max_n : int
        Lengths of n-grams.

    Raises
    ------
    ValueError
        If the file is something else, of another version, cut short or damaged; the message says
        which.
    """

    def __init__(self, path: str | os.PathLike[str], *, verify: bool = True) -> None:
        self.path = Path(path)
        data = self._map()
        if len(data) < _HEADER.size or bytes(data[:8]) != MAGIC:
            raise ValueError(f"{self.path} is no file of word vectors: it doesn't start with them")
        _, version, size, dim, words, buckets, self.min_n, self.max_n, text, checksum = (
            _HEADER.unpack(bytes(data[: _HEADER.size]))
        )
        if version != VERSION:
            raise ValueError(f"{self.path} has version {version}, this is version {VERSION}")
        if size not in _DTYPES:
            raise ValueError(f"{self.path} is damaged: it claims elements of {size} bytes")
        sections = _sections(size, dim, words, buckets, text)
        places, end = _places(sections)
        if end != len(data):
            raise ValueError(f"{self.path} must have {end} bytes, got {len(data)}")
        if verify and _checksum(data) != checksum:
            raise ValueError(f"{self.path} is damaged: its checksum differs")
        self.dim = dim
        arrays = {
            name: data[at : at + dtype.itemsize * int(np.prod(shape))].view(dtype).reshape(shape)
            for (name, dtype, shape), at in zip(sections, places, strict=True)
        }
        self._vectors, self._buckets = arrays["vectors"], arrays["buckets"]
        self._hashes, self._order = arrays["hashes"], arrays["order"]
        self._starts, self._text = arrays["starts"], arrays["text"]

    def _map(self) -> npt.NDArray[np.uint8]:
        if self.path.stat().st_size == 0:
            return np.empty(0, np.uint8)
        return np.memmap(self.path, np.uint8, "r")

    @staticmethod
    def write(
        path: str | os.PathLike[str],
        words: Sequence[str],
        vectors: Array | Tensor,
        buckets: Array | Tensor | None = None,
        *,
        min_n: int = 3,
        max_n: int = 6,
        dtype: str = "float32",
    ) -> None:
        """Write a file, whole or not at all.

        Parameters
        ----------
        path : path-like
            Replaced if it exists, when all is on the disk.
        words : sequence of str
            Distinct.
        vectors : ndarray or Tensor
            ``(words, dim)``.
        buckets : ndarray or Tensor, optional
            ``(buckets, dim)``: vectors of n-grams by their hash modulo the number of buckets;
            default: none, and unknown words are zeros.
        min_n, max_n : int, default 3 and 6
            Lengths of n-grams in characters.
        dtype : {"float32", "float16"}, default "float32"
            Of the stored vectors.

        Raises
        ------
        ValueError
            If shapes don't fit, a word comes twice, or an argument is out of range.
        """
        sizes = {f"float{8 * size}": size for size in _DTYPES}
        if dtype not in sizes:
            raise ValueError(f"dtype must be one of {', '.join(sorted(sizes))}, got {dtype!r}")
        size = sizes[dtype]
        rows = _numbers("vectors", vectors, size)
        if len(rows) != len(words):
            raise ValueError(
                f"vectors must have a row for each of {len(words)} words, got {len(rows)}"
            )
        dim = rows.shape[1]
        grams = np.empty((0, dim)) if buckets is None else buckets
        grams = _numbers("buckets", grams, size)
        if grams.shape[1] != dim:
            raise ValueError(f"buckets must have {dim} columns like vectors, got {grams.shape[1]}")
        if not 1 <= min_n <= max_n < 2**31:
            raise ValueError(f"min_n must be 1 to max_n, got {min_n} and {max_n}")
        if len(set(words)) != len(words):
            raise ValueError("words must be distinct")
        hashes = _hash(words)
        order = np.argsort(hashes, kind="stable")
        encoded = [word.encode() for word in words]
        starts = np.cumsum([0, *map(len, encoded)])
        text = np.frombuffer(b"".join(encoded), np.uint8)
        sections = _sections(size, dim, len(words), len(grams), len(text))
        places, end = _places(sections)
        target = Path(path)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                os.fchmod(file.fileno(), 0o644)
                arrays = (rows, grams, hashes[order], order, starts, text)
                for (_, kind, _), at, array in zip(sections, places, arrays, strict=True):
                    file.seek(at)
                    file.write(np.ascontiguousarray(array, kind).tobytes())
                file.truncate(end)
                file.seek(0)
                fields = MAGIC, VERSION, size, dim, len(words), len(grams), min_n, max_n, len(text)
                file.write(_HEADER.pack(*fields, 0))
                file.flush()
                checksum = _checksum(np.memmap(name, np.uint8, "r"))
                file.seek(0)
                file.write(_HEADER.pack(*fields, checksum))
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, target)
        except BaseException:
            os.unlink(name)
            raise

    @staticmethod
    def fit_subwords(
        words: Sequence[str],
        vectors: Tensor,
        num_buckets: int,
        *,
        min_n: int = 3,
        max_n: int = 6,
        iterations: int = 50,
    ) -> Tensor:
        """Fit vectors of n-grams whose means come near to the vectors of words.

        Least squares by conjugate gradients from zeros, which gives the solution of least norm.
        Stopping early keeps rare n-grams small.

        Parameters
        ----------
        words : sequence of str
            Distinct or not.
        vectors : Tensor
            ``(words, dim)``, float32 or float64.
        num_buckets : int
            Rows of the result, at least 1.
        min_n, max_n : int, default 3 and 6
            Lengths of n-grams in characters.
        iterations : int, default 50
            At most.

        Returns
        -------
        Tensor
            ``(num_buckets, dim)``.
        """
        if len(words) != len(vectors) or vectors.dim() != 2:
            raise ValueError(
                f"vectors must have a row for each of {len(words)} words, "
                f"got shape {tuple(vectors.shape)}"
            )
        if num_buckets < 1:
            raise ValueError(f"num_buckets must be at least 1, got {num_buckets}")
        ids, offsets = text_ids(words, "subwords", min_n=min_n, max_n=max_n, modulus=num_buckets)
        rows = Composition((Part(num_buckets, vectors.shape[1], "radix", a=1),))
        with torch.no_grad():
            return conjugate_gradients(
                lambda table: compose_bag(ids, table, rows, offsets, mode="mean"),
                vectors.new_zeros(num_buckets, vectors.shape[1]), vectors, iterations, 1e-6,
            )[0]  # fmt: skip

    def __len__(self) -> int:
        return len(self._vectors)

    def __contains__(self, word: object) -> bool:
        return isinstance(word, str) and bool(self.find([word])[0] >= 0)

    def word(self, number: int) -> str:
        """Return the word with a number, 0 to ``len(store) - 1``."""
        if not 0 <= number < len(self):
            raise IndexError(f"number must be 0 to {len(self) - 1}, got {number}")
        begin, end = self._starts[number : number + 2]
        return bytes(self._text[begin:end]).decode()

    def find(self, words: Sequence[str]) -> npt.NDArray[np.int64]:
        """Return the numbers of words, -1 for unknown ones, int64 ``(words,)``."""
        numbers = np.full(len(words), -1, np.int64)
        hashes = _hash(words)
        first = np.searchsorted(self._hashes, hashes)
        last = np.searchsorted(self._hashes, hashes, "right")
        for i in np.flatnonzero(
            first < last
        ).tolist():  # two words may share a hash: the text decides
            for number in self._order[first[i] : last[i]]:
                if self.word(int(number)) == words[i]:
                    numbers[i] = number
        return numbers

    def __getitem__(self, word: str) -> npt.NDArray[np.float32]:
        """Return the vector of a word, float32 ``(dim,)``."""
        return self.look_up([word])[0]

    def look_up(self, words: Sequence[str]) -> npt.NDArray[np.float32]:
        """Return the vectors of words, float32 ``(words, dim)``.

        Parameters
        ----------
        words : sequence of str
            Known words or any others.
        """
        numbers = self.find(words)
        out = np.zeros((len(words), self.dim), np.float32)
        known = numbers >= 0
        out[known] = self._vectors[numbers[known]]
        unknown = np.flatnonzero(~known)
        if len(unknown) and len(self._buckets):
            strangers = [words[i] for i in unknown.tolist()]
            ids, offsets = text_ids(
                strangers, "subwords", min_n=self.min_n, max_n=self.max_n,
                modulus=len(self._buckets),
            )  # fmt: skip
            used, where = np.unique(ids.numpy(), return_inverse=True)
            if len(used):  # only these rows of the file are read
                table = torch.from_numpy(self._buckets[used].astype(np.float32))
                rows = Composition((Part(len(used), self.dim, "radix", a=1),))
                means = compose_bag(torch.from_numpy(where), table, rows, offsets, mode="mean")
                out[unknown] = means.numpy()
        return out


def _hash(words: Sequence[str]) -> npt.NDArray[np.uint64]:
    return text_ids(words)[0].numpy().view(np.uint64)


def _numbers(name: str, values: Array | Tensor, size: int) -> Array:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.ndim != 2:
        raise ValueError(f"{name} must have 2 dimensions, got shape {array.shape}")
    return array.astype(_DTYPES[size])


def _checksum(data: npt.NDArray[np.uint8]) -> int:
    """CRC-32 of a file, but for the four bytes of the header that hold it."""
    head, skip = _HEADER.size - 4, _HEADER.size
    total = zlib.crc32(data[:head].tobytes())
    for at in range(skip, len(data), 2**24):
        total = zlib.crc32(data[at : at + 2**24].tobytes(), total)
    return total
