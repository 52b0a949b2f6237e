"""Embeddings of files: shards that are whole or not there, so that a killed run goes on.

A folder holds ``manifest.json`` (what is computed, and of how many texts once all are done) and
``shard-000000.npz``, ... with the arrays of consecutive texts. A shard is written under another
name, brought to the disk and renamed; whoever is killed loses the shard that was being computed. A
shard also holds the hash of its texts, so that another input is noticed instead of mixed in. Where
there are no texts, ``empty.npz`` holds the arrays of none.
"""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import numpy.typing as npt
import torch

from emblas.binary import Int8Quantizer
from emblas.encoder.outputs import Embeddings, Ragged

if TYPE_CHECKING:
    from emblas.encoder.model import Encoder

Array = npt.NDArray[Any]

MANIFEST = "manifest.json"
QUANTIZER = "quantizer.npz"
EMPTY = "empty.npz"
FORMAT = "emblas embeddings"
_OPENERS: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
_DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError, csv.Error)


def read_texts(path: str | Path, field: str | None = None) -> Iterator[str]:
    """Read texts from a file, one by one.

    Parameters
    ----------
    path : str or Path
        By its ending: ``.jsonl`` (one object a line), ``.csv``, ``.tsv`` (both with a header), or
        anything else: one text a line. Each also as ``.gz``, ``.xz`` or ``.bz2``.
    field : str, optional
        Key or column of the text; default "text". Files of lines have none.

    Yields
    ------
    str
        Texts, empty ones among them. Empty lines between objects are none.

    Raises
    ------
    ValueError
        If a line has no such field, isn't JSON or UTF-8, ``field`` is given for a file of lines, or
        the file is damaged.
    OSError
        If the file can't be opened or read.
    """
    path = Path(path)
    kind = path.suffix if path.suffix not in _OPENERS else path.with_suffix("").suffix
    if field is not None and kind not in _FIELDS:
        raise ValueError(f"field is for jsonl, csv and tsv, {path.name} is read as lines")
    # With or without the mark that other systems put at the beginning of UTF-8.
    opened = _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8-sig", newline="")
    with opened as file:
        try:
            yield from _FIELDS.get(kind, _lines)(path, file, field or "text")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} must be UTF-8: {error}") from None
        except _DAMAGED as error:
            # Modules of compression raise OSError as well, without the number of the system's own.
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise ValueError(f"{path} is damaged: {error}") from None


def _lines(path: Path, file: TextIO, key: str) -> Iterator[str]:
    for line in file:
        yield line.rstrip("\r\n")


def _objects(path: Path, file: TextIO, key: str) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} must be JSON: {error}") from None
        if not isinstance(record, dict) or not isinstance(record.get(key), str):
            raise ValueError(f"{path}, line {number} must have a text in field {key!r}")
        yield record[key]


def _cells(path: Path, file: TextIO, key: str, **dialect: Any) -> Iterator[str]:
    csv.field_size_limit(sys.maxsize)
    rows = csv.DictReader(file, **dialect)
    if key not in (rows.fieldnames or ()):
        raise ValueError(f"{path} must have a column {key!r}, has {rows.fieldnames}")
    for row in rows:
        if row[key] is None:
            raise ValueError(f"{path}, line {rows.line_num} must have a column {key!r}")
        yield row[key]


_FIELDS: dict[str, Callable[[Path, TextIO, str], Iterator[str]]] = {
    ".jsonl": _objects,
    ".csv": _cells,
    ".tsv": partial(_cells, delimiter="\t", quoting=csv.QUOTE_NONE),
}


def encode_file(
    encoder: Encoder,
    texts: Iterable[str],
    folder: str | Path,
    *,
    outputs: Sequence[str] = ("dense",),
    dims: Sequence[int] | None = None,
    prompt: str | None = None,
    chunk_size: int = 128,
    chunk_overlap: int = 0,
    branches: Sequence[str] | None = None,
    shard_size: int = 8192,
    progress: bool = False,
) -> dict[str, Any]:
    """Embed texts into a folder, and go on where an earlier run was stopped.

    Parameters
    ----------
    encoder : Encoder
        What embeds them.
    texts : iterable of str
        The same ones, in the same order, in every run; see :func:`read_texts`. Read shard by shard.
        Those of more than ``max_length`` tokens are cut.
    folder : str or Path
        Where shards go; created if it doesn't exist.
    outputs, dims, prompt, chunk_size, chunk_overlap, branches
        As in :meth:`emblas.Encoder.embed`. The range of "int8" codes is that of the first shard.
    shard_size : int, default 8192
        Texts in a shard, and the most that is lost when the run is killed.
    progress : bool, default False
        Show a progress bar.

    Returns
    -------
    dict
        ``texts``, ``encoded`` (in this run), ``cut`` (texts longer than the model takes) and
        ``tokens``.

    Raises
    ------
    TypeError
        If ``texts`` isn't iterable or is a single str, or a text is not a str.
    ValueError
        As in :meth:`emblas.Encoder.embed`, and if a text holds half a character, or the folder
        holds embeddings of another model, other settings or other texts.
    RuntimeError
        If another process is writing to the folder.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size must be at least 1 text, got {shard_size}")
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise TypeError(
            f"texts must be a list or an iterator of str, got a single {type(texts).__name__}"
        )
    settings = {
        "dims": dims,
        "prompt": prompt,
        "chunk_size": chunk_size,
        "chunk_overlap": chunk_overlap,
        "branches": branches,
    }
    empty = encoder.embed([], outputs, **settings)  # which checks them, before anything is written
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": 1,
        "model": encoder.fingerprint(),
        **settings,
        "outputs": outputs,
        "prompt": encoder.prompt_text(prompt),
        "shard_size": shard_size,
    }
    # As a later run reads it: tuples and other sequences come back as lists.
    manifest = json.loads(json.dumps(manifest, default=list))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder), contextlib.ExitStack() as stack:
        _agree(folder, manifest)
        if not any(folder.glob("shard-*.npz")):
            # Of a run that was killed before its first shard, maybe one over other texts.
            (folder / QUANTIZER).unlink(missing_ok=True)
        bar = None
        if progress:
            from tqdm import tqdm

            bar = stack.enter_context(tqdm(unit=" texts"))
        report = {"texts": 0, "encoded": 0, "cut": 0, "tokens": 0}
        rest = iter(texts)
        for number in itertools.count():
            part = list(itertools.islice(rest, shard_size))
            if not part:
                break
            path = folder / f"shard-{number:06d}.npz"
            digest = _digest(part, report["texts"])
            if path.exists():
                with np.load(path) as shard:
                    if not np.array_equal(shard["digest"], digest):
                        raise ValueError(
                            f"texts {report['texts']} to {report['texts'] + len(part) - 1} are not "
                            f"those that {path} was made of"
                        )
                    cut, tokens = shard["tokens_cut"], shard["num_tokens"]
            else:
                result = _shard(encoder, part, folder, outputs, settings)
                _write(path, {**_arrays(result), "digest": digest})
                cut, tokens = result.tokens_cut, result.num_tokens
                report["encoded"] += len(part)
            report["texts"] += len(part)
            report["cut"] += int((cut > 0).sum())
            report["tokens"] += int(tokens.sum())
            if bar is not None:
                bar.update(len(part))
        if (folder / f"shard-{-(-report['texts'] // shard_size):06d}.npz").exists():
            raise ValueError(f"{folder} holds embeddings of more texts than there are now")
        if report["texts"] == 0:  # no shard says what shapes and types the outputs have
            _write(folder / EMPTY, _arrays(empty))
        manifest["texts"] = report["texts"]
        _replace(folder / MANIFEST, json.dumps(manifest, indent=2).encode())
    return report


def load_embeddings(folder: str | Path, name: str = "dense") -> Any:
    """Load one output of a folder that :func:`encode_file` has finished.

    Parameters
    ----------
    folder : str or Path
        The folder.
    name : str, default "dense"
        A field of :class:`emblas.encoder.Embeddings`; ``"matryoshka"`` gives a dict.

    Returns
    -------
    ndarray, Ragged or dict of ndarray

    Raises
    ------
    ValueError
        If the folder isn't finished or has no such output.
    """
    folder = Path(folder)
    manifest = _manifest(folder)
    if manifest is None or "texts" not in manifest:
        raise ValueError(f"{folder} is not finished: run the same command again, it goes on")
    count = -(-manifest["texts"] // manifest["shard_size"])
    paths = [folder / f"shard-{number:06d}.npz" for number in range(count)] or [folder / EMPTY]
    if name == "matryoshka" and name in manifest["outputs"]:
        return {k: _gather(paths, f"matryoshka.{k}") for k in manifest["dims"]}
    try:
        return _gather(paths, name)
    except KeyError:
        raise ValueError(
            f"{folder} has no output {name!r}; it was made with {manifest['outputs']}"
        ) from None


# --- parts ---------------------------------------------------------------------------------------


def _shard(
    encoder: Encoder,
    texts: list[str],
    folder: Path,
    outputs: Sequence[str],
    settings: dict[str, Any],
) -> Embeddings:
    """Embed the texts of one shard; the first one fixes the range of int8 codes."""
    quantizer = None
    path = folder / QUANTIZER
    if path.exists():
        with np.load(path) as stored:
            quantizer = Int8Quantizer(
                *(torch.from_numpy(stored[k]).to(encoder.model.device) for k in ("start", "step"))
            )
    result = encoder.embed(texts, outputs, quantizer=quantizer, truncation="ignore", **settings)
    if result.quantizer is not None and not path.exists():
        fitted = result.quantizer
        _write(path, {"start": fitted.start.cpu().numpy(), "step": fitted.step.cpu().numpy()})
    return result


def _arrays(result: Embeddings) -> dict[str, Array]:
    """Name every array of ``result``: nested ones as ``field.part``."""
    arrays: dict[str, Array] = {}
    for name, value in vars(result).items():
        if isinstance(value, dict):
            arrays |= {f"{name}.{k}": v for k, v in value.items()}
        elif isinstance(value, Ragged):
            arrays |= {f"{name}.{k}": v for k, v in value._asdict().items()}
        elif isinstance(value, np.ndarray):
            arrays[name] = value
    return arrays


def _gather(paths: Sequence[Path], name: str) -> Any:
    parts: dict[str, list[Array]] = {}
    for path in paths:
        with np.load(path) as shard:
            names = [k for k in shard.files if k in (name, f"{name}.values", f"{name}.offsets")]
            if not names:
                raise KeyError(name)
            for k in names:
                parts.setdefault(k, []).append(shard[k])
    if f"{name}.values" not in parts:
        return np.concatenate(parts[name])
    lengths = [np.diff(offsets) for offsets in parts[f"{name}.offsets"]]
    offsets = np.concatenate([[0], *lengths]).cumsum()
    return Ragged(np.concatenate(parts[f"{name}.values"]), offsets)


def _digest(texts: Sequence[str], first: int) -> Array:
    """Hash texts, or say which is none; ``first`` is the number of the first of them."""
    digest = hashlib.sha256()
    for number, text in enumerate(texts, first):
        if not isinstance(text, str):
            raise TypeError(f"texts[{number}] must be a str, got {type(text).__name__}")
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"texts[{number}] must hold whole characters, got half of one, "
                f"{text[error.start]!r}, at {error.start}"
            ) from None
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return np.frombuffer(digest.digest(), np.uint8)


def _manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / MANIFEST
    if not path.exists():
        return None
    manifest: dict[str, Any] = json.loads(path.read_text())
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path} is not of {FORMAT}")
    return manifest


def _agree(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, or compare with the one of an earlier run."""
    for left in folder.glob("*.part"):  # of a run that was killed
        left.unlink()
    before = _manifest(folder)
    if before is None:
        _replace(folder / MANIFEST, json.dumps(manifest, indent=2).encode())
        return
    before.pop("texts", None)
    for key in {**before, **manifest}:
        if before.get(key) != manifest.get(key):
            raise ValueError(
                f"{folder} holds embeddings with {key} = {before.get(key)!r}, not "
                f"{manifest.get(key)!r}: choose another folder"
            )


def _write(path: Path, arrays: dict[str, Array]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    _replace(path, buffer.getbuffer())


def _replace(path: Path, data: bytes | memoryview) -> None:
    """Put a file in place in one step, after all of it has reached the disk."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes out; the system lets go of the lock of one that dies."""
    import fcntl  # not on Windows

    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"another process is writing to {folder}") from None
        yield
