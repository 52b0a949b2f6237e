"""Files of a binary index: immutable shards in the safetensors format, and a manifest.

A shard is a valid safetensors file: 8 bytes of header length, a JSON header, the tensors one after
the other. The header is padded so that the data starts on a page. The manifest lists the shards
with their sizes and checksums, 16 MiB at a time; it is replaced in one step, after everything that
it names has reached the disk. A process that dies at any point leaves the old manifest or the new
one, and files that nobody names.
"""

from __future__ import annotations

import json
import os
import struct
import uuid
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FORMAT = "emblas binary index"
VERSION = 1
MANIFEST = "manifest.json"
CHUNK = 16 << 20  # bytes of data under one checksum
_PAGE = 4096
_DTYPES = {"U8": np.uint8, "I8": np.int8, "I64": np.int64, "F16": np.float16, "F32": np.float32}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}

Array = npt.NDArray[Any]


class CorruptIndexError(ValueError):
    """A file of an index is damaged, cut off, or not what it should be."""


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _checksums(data: Array) -> list[int]:
    return [zlib.crc32(data[at : at + CHUNK].data) for at in range(0, len(data), CHUNK)]


def write_shard(folder: Path, tensors: Mapping[str, Array]) -> dict[str, Any]:
    """Write arrays as a new shard and return its entry of the manifest."""
    # Wide elements first: each tensor then starts at a multiple of its element size.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "version": str(VERSION)}}
    at = 0
    for name, array in ordered:
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    text = json.dumps(header).encode()
    text = text.ljust(-(-(len(text) + 8) // _PAGE) * _PAGE - 8)
    head = struct.pack("<Q", len(text)) + text
    data = np.concatenate(
        [np.ascontiguousarray(array).reshape(-1).view(np.uint8) for _, array in ordered]
    )
    name = f"shard-{uuid.uuid4().hex}.safetensors"
    with open(folder / name, "xb") as file:
        file.write(head)
        file.write(data.data)
        file.flush()
        os.fsync(file.fileno())
    return {
        "file": name,
        "rows": len(next(iter(tensors.values()))),
        "header_bytes": len(head),
        "header_crc32": zlib.crc32(head),
        "data_bytes": len(data),
        "data_crc32": _checksums(data),
    }


class Shard:
    """An open shard: memory-mapped arrays whose bytes are checked before they are used.

    Opening reads the header only. :meth:`array` checks every chunk with one of the rows, once.
    """

    def __init__(self, folder: Path, entry: Mapping[str, Any]) -> None:
        self.path = folder / entry["file"]
        self._crcs: list[int] = entry["data_crc32"]
        begin, length = entry["header_bytes"], entry["data_bytes"]
        try:
            size = self.path.stat().st_size
            with open(self.path, "rb") as file:
                head = file.read(begin)
        except OSError as error:
            raise CorruptIndexError(f"{self.path}: {error.strerror}") from None
        if size != begin + length:
            raise CorruptIndexError(f"{self.path} must have {begin + length} bytes, has {size}")
        if zlib.crc32(head) != entry["header_crc32"]:
            raise CorruptIndexError(f"{self.path} has a damaged header")
        # Copy on write: never written to, and torch takes it without a warning.
        self._data: Array = np.memmap(self.path, np.uint8, "c", begin, (length,))
        self._header: dict[str, Any] = json.loads(head[8:])
        self._checked = np.zeros(len(self._crcs), bool)

    def array(self, name: str, rows: Array | slice) -> Array:
        """Return a tensor of the shard after the bytes of the rows have been checked."""
        array, begin = self._view(name)
        width = array.nbytes // max(len(array), 1)
        if isinstance(rows, slice):
            first, last = begin + rows.start * width, begin + rows.stop * width
            chunks = np.arange(first // CHUNK, -(-last // CHUNK))
        else:
            starts, ends = begin + rows * width, begin + (rows + 1) * width - 1
            span = np.arange((width - 1) // CHUNK + 2)
            chunks = np.unique(np.minimum(starts[:, None] // CHUNK + span, ends[:, None] // CHUNK))
        self._check(chunks)
        return array

    def check_all(self) -> None:
        """Check every byte."""
        self._check(np.arange(len(self._crcs)))

    def _view(self, name: str) -> tuple[Array, int]:
        entry = self._header[name]
        begin, end = entry["data_offsets"]
        return self._data[begin:end].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"]), begin

    def _check(self, chunks: Array) -> None:
        for chunk in chunks[~self._checked[chunks]]:
            at = int(chunk) * CHUNK
            if zlib.crc32(self._data[at : at + CHUNK].data) != self._crcs[chunk]:
                raise CorruptIndexError(
                    f"{self.path} is damaged: bytes {at} to {at + CHUNK} of its data don't match "
                    "their checksum"
                )
            self._checked[chunk] = True


@contextmanager
def changing(folder: Path) -> Iterator[None]:
    """Keep other processes from changing the folder; a process that dies lets go."""
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def stamp(folder: Path) -> int | None:
    """Return what differs from one manifest of a folder to the next; None if there is none."""
    try:
        return zlib.crc32((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        return None


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Put a manifest in the place of the one there, in one step."""
    body = {"format": FORMAT, "version": VERSION, **content}
    text = json.dumps(body, sort_keys=True)
    signed = json.dumps({"crc32": zlib.crc32(text.encode()), "index": body}, sort_keys=True)
    temporary = folder / f"{MANIFEST}.{uuid.uuid4().hex}.tmp"
    with open(temporary, "x") as file:
        file.write(signed)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / MANIFEST)
    _sync_folder(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check the manifest of a folder."""
    path = folder / MANIFEST
    try:
        signed = json.loads(path.read_bytes())
        body, checksum = signed["index"], signed["crc32"]
        name, version = body["format"], body["version"]
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder} holds no index: there is no {MANIFEST}") from None
    except (ValueError, TypeError, KeyError):
        raise CorruptIndexError(f"{path} is not a manifest of an index, or damaged") from None
    if name != FORMAT or zlib.crc32(json.dumps(body, sort_keys=True).encode()) != checksum:
        raise CorruptIndexError(f"{path} is not a manifest of an index, or damaged")
    if version > VERSION:
        raise CorruptIndexError(f"{path} has version {version}, this library reads up to {VERSION}")
    return body


def remove_leftovers(folder: Path, named: set[str]) -> None:
    """Delete what interrupted saves have left: shards and manifests that nothing names."""
    for pattern in ("shard-*.safetensors", f"{MANIFEST}.*.tmp"):
        for path in folder.glob(pattern):
            if path.name not in named:
                path.unlink(missing_ok=True)
