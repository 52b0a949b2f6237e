"""What an encoder returns, and how it is collected batch by batch."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from emblas import packed
from emblas.binary import Int8Quantizer

OUTPUTS = (
    "dense",
    "matryoshka",
    "int8",
    "bits",
    "lexical",
    "tokens",
    "chunks",
    "branches",
    "prefixes",
)


class TruncationWarning(UserWarning):
    """Texts were longer than the model takes, and were cut."""


def warn_truncated(message: str) -> None:
    """Issue a :class:`TruncationWarning` at the line outside of this package that led here.

    Python shows a warning once per line: at a line of the package, it would show the first of all.
    """
    package = __name__.partition(".")[0]
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == package:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, TruncationWarning, stacklevel=level)


class Ragged(NamedTuple):
    """Rows of different numbers per text, end to end: text i has offsets[i] to offsets[i + 1]."""

    values: Any
    """``(rows, ...)``."""
    offsets: Any
    """``(texts + 1,)``, int64."""


@dataclass
class Embeddings:
    """Outputs of :meth:`emblas.Encoder.embed`, in the order of the texts; None if not asked for.

    Arrays of numpy, or tensors.
    """

    num_tokens: Any
    """int64 ``(texts,)``: tokens that the model has seen."""
    tokens_cut: Any
    """int64 ``(texts,)``: tokens that were cut off because the text was too long."""
    dense: Any = None
    """float32 ``(texts, dim)``."""
    matryoshka: dict[int, Any] | None = None
    """float32 ``(texts, k)`` by ``k``, normalized where the dense vectors are."""
    int8: Any = None
    """int8 ``(texts, dim)``; what the codes mean is said by ``quantizer``."""
    quantizer: Int8Quantizer | None = None
    bits: Any = None
    """uint8 ``(texts, ceil(dim / 8))``, as :func:`emblas.binary.pack_sign` packs."""
    lexical_ids: Ragged | None = None
    """int64 token ids with a weight, rising within a text."""
    lexical_weights: Ragged | None = None
    """float32, of the same shape."""
    tokens: Ragged | None = None
    """float32 vectors ``(rows, dim)`` of single tokens, for late interaction."""
    chunks: Ragged | None = None
    """float32 vectors ``(rows, dim)`` of spans, pooled after the model has read the whole text."""
    chunk_spans: Ragged | None = None
    """int64 ``(rows, 2)``: first token of each chunk within its text, and the one after its last.
    """
    branches: Any = None
    """float32 ``(texts, branches, dim)``."""
    prefixes: Any = None
    """float32 ``(texts, prefixes, dim)``."""

    def __len__(self) -> int:
        return len(self.num_tokens)


class Collector:
    """Rows of batches that come in another order than the texts.

    Parameters
    ----------
    count : int
        Number of texts.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._rows: dict[str, Tensor] = {}
        self._lists: dict[str, list[Tensor]] = {}

    def put(self, name: str, batch: Sequence[int], rows: Tensor) -> None:
        """Store one row per text."""
        if name not in self._rows:
            shape = (self.count, *rows.shape[1:])
            self._rows[name] = torch.empty(shape, dtype=rows.dtype, device=rows.device)
        self._rows[name][list(batch)] = rows

    def put_ragged(self, name: str, batch: Sequence[int], rows: Tensor, offsets: Tensor) -> None:
        """Store several rows per text."""
        # The last one is empty: it gives the shape where there are no texts.
        parts = self._lists.setdefault(name, [rows[:0]] * (self.count + 1))
        for text, part in zip(batch, packed.split(rows, offsets), strict=True):
            parts[text] = part

    def rows(self, name: str) -> Tensor | None:
        """Return the rows in the order of the texts; None if there are none."""
        return self._rows.get(name)

    def ragged(self, name: str) -> Ragged | None:
        """Return the rows of all texts, end to end; None if there are none."""
        if name not in self._lists:
            return None
        parts = self._lists[name]
        lengths = torch.tensor([0, *map(len, parts[:-1])])
        return Ragged(torch.cat(parts), lengths.cumsum(0))


def chunk_spans(
    cu_seqlens: Tensor, size: int, overlap: int, skip: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """First and last (exclusive) token of the chunks of a packed batch, and texts' offsets.

    The first ``skip`` tokens of each text are in none.
    """
    lengths = (cu_seqlens.diff().long() - skip).clamp_min(0)
    step = size - overlap
    # The last chunk is the first one that reaches the end.
    counts = torch.where(lengths > 0, (lengths - size).clamp_min(0).add(step - 1) // step + 1, 0)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    inside = torch.arange(int(offsets[-1]), device=lengths.device)
    inside = inside - offsets[:-1].repeat_interleave(counts)
    starts = (cu_seqlens[:-1].long() + skip).repeat_interleave(counts) + inside * step
    ends = torch.minimum(starts + size, cu_seqlens[1:].long().repeat_interleave(counts))
    return starts, ends, offsets


def concatenate(parts: Sequence[Embeddings]) -> Embeddings:
    """Join the embeddings of consecutive texts. Quantizers must be the same."""
    if len(parts) == 1:
        return parts[0]
    joined = {}
    for field in fields(Embeddings):
        values = [getattr(part, field.name) for part in parts]
        joined[field.name] = _concatenate(values)
    return Embeddings(**joined)


def _concatenate(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, dict):
        return {k: _concatenate([value[k] for value in values]) for k in first}
    if isinstance(first, Ragged):
        begins = np.cumsum([0, *(len(value.values) for value in values[:-1])]).tolist()
        offsets = [value.offsets[1:] + begin for value, begin in zip(values, begins, strict=True)]
        return Ragged(
            _concatenate([value.values for value in values]),
            _concatenate([first.offsets[:1], *offsets]),
        )
    if isinstance(first, Tensor):
        return torch.cat(values)
    if isinstance(first, np.ndarray):
        return np.concatenate(values)
    return first


def to_numpy(value: Any) -> Any:
    """Turn every tensor of an :class:`Embeddings` or a part of it into an array."""
    if isinstance(value, Embeddings):
        return Embeddings(**{f.name: to_numpy(getattr(value, f.name)) for f in fields(value)})
    if isinstance(value, dict):
        return {k: to_numpy(v) for k, v in value.items()}
    if isinstance(value, Ragged):
        return Ragged(*map(to_numpy, value))
    return value.cpu().numpy() if isinstance(value, Tensor) else value
