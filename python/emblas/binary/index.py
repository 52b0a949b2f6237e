"""A searchable collection of bit codes, in memory and on disk."""

from __future__ import annotations

import base64
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emblas import _op
from emblas.binary import formats, op, storage
from emblas.binary.correction import pack_rabitq
from emblas.binary.dense import Int8Quantizer, best_candidates, bit_scores
from emblas.binary.functions import pack_sign
from emblas.binary.rotation import HadamardRotation
from emblas.binary.search import _check_at_least, asymmetric_topk, hamming_topk, range_search_csr
from emblas.binary.segment import Segment

SECOND_LEVELS = ("none", "float32", "float16", "int8")
CORRECTIONS = ("none", "rabitq")
_INTEGERS = (torch.int64, torch.int32)


class BinaryIndex:
    """Bit codes with ids, and optionally vectors that decide between the nearest codes.

    Parameters
    ----------
    dim : int
        Dimensions of the vectors.
    second_level : {"none", "float32", "float16", "int8"}, default "none"
        What is kept of the vectors beside their bits, for rescoring.
    threshold : Tensor, optional
        ``(dim,)`` threshold of the bits; see :func:`emblas.binary.pack_sign`.
    quantizer : Int8Quantizer, optional
        Of second level "int8"; by default it is fitted to the first vectors added.
    correction : {"none", "rabitq"}, default "none"
        "rabitq" rotates vectors and queries before bits are taken, keeps 4 bytes more for each row
        (:func:`emblas.binary.pack_rabitq`) and ranks codes by the estimated cosine with the query's
        real values in place of the Hamming distance. Goes without a threshold.

    Raises
    ------
    ValueError
        If an argument is out of range or missing its counterpart.

    Notes
    -----
    Search is exact over the codes: Hamming distance, or the estimate of the correction, then order
    of insertion among equals. A process may add to and save an index while others have it open;
    they keep what they opened, and can't save over what they have not seen.
    """

    def __init__(
        self,
        dim: int,
        *,
        second_level: str = "none",
        threshold: Tensor | None = None,
        quantizer: Int8Quantizer | None = None,
        correction: str = "none",
    ) -> None:
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self.dim = dim
        self.second_level = _op.check_choice("second_level", second_level, SECOND_LEVELS)
        if quantizer is not None and second_level != "int8":
            raise ValueError("quantizer must be left out unless second_level is 'int8'")
        if threshold is not None and threshold.shape != (dim,):
            raise ValueError(f"threshold must have shape ({dim},), got {tuple(threshold.shape)}")
        self.correction = _op.check_choice("correction", correction, CORRECTIONS)
        if threshold is not None and correction != "none":
            raise ValueError("threshold must be left out where there is a correction")
        self.threshold = None if threshold is None else threshold.float()
        self.quantizer = quantizer
        self.rotation = None if correction == "none" else HadamardRotation(dim)
        self._segments: list[Segment] = []
        self._next_id = 0
        self._row_of: dict[int, int] | None = None  # of live ids; built when first needed
        self._stamps: dict[Path, int | None] = {}  # of the manifests that this index stands for

    def __len__(self) -> int:
        return sum(int(segment.live.sum()) for segment in self._segments)

    def __repr__(self) -> str:
        return (
            f"BinaryIndex(dim={self.dim}, second_level={self.second_level!r}, "
            f"correction={self.correction!r}, rows={len(self)})"
        )

    # --- rows ------------------------------------------------------------------------------------

    def _like(self) -> BinaryIndex:
        """Return an empty index that encodes vectors as this one does."""
        index = BinaryIndex(
            self.dim,
            second_level=self.second_level,
            threshold=self.threshold,
            quantizer=self.quantizer,
            correction=self.correction,
        )
        index.rotation = self.rotation
        return index

    def _starts(self) -> list[int]:
        lengths = [len(segment.live) for segment in self._segments]
        return [sum(lengths[:i]) for i in range(len(lengths) + 1)]

    def _rows(self) -> dict[int, int]:
        if self._row_of is None:
            self._row_of = {}
            for start, segment in zip(self._starts(), self._segments, strict=False):
                ids = segment.tensor("ids")
                for row in segment.live.nonzero()[:, 0].tolist():
                    self._row_of[int(ids[row])] = start + row
        return self._row_of

    def _check_ids(self, ids: Tensor, count: int | None = None) -> Tensor:
        _op.check_tensor("ids", ids, ndim=1, dtypes=_INTEGERS)
        if count is not None and len(ids) != count:
            raise ValueError(f"ids must have one entry for each of {count} rows, got {len(ids)}")
        if len(ids.unique()) != len(ids):
            raise ValueError("ids must be different from each other")
        return ids.long()

    def add(self, vectors: Tensor, ids: Tensor | None = None) -> Tensor:
        """Add vectors and return their ids.

        Parameters
        ----------
        vectors : Tensor
            ``(rows, dim)``; floating-point.
        ids : Tensor, optional
            int64 ``(rows,)``, new to the index; by default the numbers after the largest id.

        Raises
        ------
        TypeError
            If an argument has a wrong type.
        ValueError
            If shapes don't fit, vectors contain NaN, or infinity where there is a correction, or
            an id is taken.
        """
        _op.check_tensor("vectors", vectors, ndim=2, dtypes=_op.FLOATS)
        if vectors.shape[1] != self.dim:
            raise ValueError(f"vectors must have {self.dim} dimensions, got {vectors.shape[1]}")
        if bool(vectors.isnan().any()):
            raise ValueError("vectors must not contain NaN")
        if self.rotation is None:
            arrays = {"codes": self._pack(vectors)}
        else:
            if bool(vectors.isinf().any()):
                raise ValueError("vectors must be finite where there is a correction")
            unit = torch.nn.functional.normalize(vectors.float(), dim=1)
            codes, scale, _ = pack_rabitq(self.rotation(unit))
            arrays = {"codes": codes, "scale": scale}
        if self.second_level == "int8" and len(vectors):
            if self.quantizer is None:
                self.quantizer = Int8Quantizer.fit(vectors)
            arrays["vectors"] = self.quantizer.quantize(vectors)
        elif self.second_level.startswith("float"):
            arrays["vectors"] = vectors.to(getattr(torch, self.second_level), copy=True)
        return self._append(arrays, ids)

    def add_codes(self, codes: Tensor, ids: Tensor | None = None) -> Tensor:
        """Add codes of :func:`emblas.binary.pack_sign` to an index without a second level."""
        _op.check_tensor("codes", codes, ndim=2, dtypes=(torch.uint8,))
        if self.second_level != "none":
            raise ValueError("codes need vectors beside them unless second_level is 'none'")
        if self.correction != "none":
            raise ValueError("codes need vectors beside them where there is a correction")
        width = (self.dim + 7) // 8
        if codes.shape[1] != width:
            raise ValueError(f"codes must be {width} bytes wide, got {codes.shape[1]}")
        tail = (1 << 8 * width - self.dim) - 1
        if bool((codes[:, -1] & tail).any()):
            raise ValueError(f"codes must have zeros after bit {self.dim}")
        return self._append({"codes": codes.clone()}, ids)

    def _append(self, arrays: dict[str, Tensor], ids: Tensor | None) -> Tensor:
        count = len(arrays["codes"])
        if ids is None:
            ids = torch.arange(self._next_id, self._next_id + count)
        else:
            ids = self._check_ids(ids, count).clone()
            taken = [value for value in ids.tolist() if value in self._rows()]
            if taken:
                raise ValueError(f"ids must be new, but {taken[0]} is in the index")
        if count == 0:
            return ids
        start = self._starts()[-1]
        live = torch.ones(count, dtype=torch.bool)
        self._segments.append(Segment(live, {**arrays, "ids": ids}))
        self._next_id = max(self._next_id, int(ids.max()) + 1)
        if self._row_of is not None:
            self._row_of.update(zip(ids.tolist(), range(start, start + count), strict=True))
        return ids

    def add_batches(self, batches: Iterable[Tensor], *, progress: bool = False) -> None:
        """Add vectors as they come, with a progress bar if asked for (needs tqdm)."""
        if progress:
            try:
                from tqdm.auto import tqdm
            except ImportError:
                raise ImportError("progress=True needs tqdm: pip install tqdm") from None
            batches = tqdm(batches, desc="index", unit="batch")
        for batch in batches:
            self.add(batch)

    def remove(self, ids: Tensor) -> None:
        """Remove rows by id.

        Raises
        ------
        KeyError
            If an id is not in the index; nothing is removed then.
        """
        rows = self._rows()
        values = self._check_ids(ids).tolist()
        for value in values:
            if value not in rows:
                raise KeyError(f"id {value} is not in the index")
        starts = self._starts()
        for value in values:
            row = rows.pop(value)
            segment = int(np.searchsorted(starts, row, side="right")) - 1
            self._segments[segment].live[row - starts[segment]] = False

    def update(self, ids: Tensor, vectors: Tensor) -> None:
        """Replace the vectors of ids.

        Raises
        ------
        KeyError
            If an id is not in the index.
        TypeError, ValueError
            As :meth:`add`. Nothing is changed by a call that raises.
        """
        ids = self._check_ids(ids, len(vectors))
        replacement = self._like()
        replacement.add(vectors, ids)  # raises before anything has been removed
        self.remove(ids)
        for segment in replacement._segments:
            assert segment.arrays is not None
            arrays = {name: array for name, array in segment.arrays.items() if name != "ids"}
            self._append(arrays, ids)

    # --- search ----------------------------------------------------------------------------------

    def _allowed(self, segment: Segment, filter: Tensor | None) -> Tensor | None:
        if filter is None:
            return None if bool(segment.live.all()) else segment.live
        return segment.live & torch.isin(segment.tensor("ids"), filter)

    def _check_filter(self, filter: Tensor | None) -> Tensor | None:
        if filter is None:
            return None
        _op.check_tensor("filter", filter, ndim=1, dtypes=_INTEGERS)
        for value in filter.tolist():
            if value not in self._rows():
                raise KeyError(f"id {value} is not in the index")
        return filter.long()

    def _check_queries(self, queries: Tensor) -> None:
        _op.check_tensor("queries", queries, ndim=2, dtypes=_op.FLOATS)
        if queries.shape[1] != self.dim:
            raise ValueError(f"queries must have {self.dim} dimensions, got {queries.shape[1]}")
        if not bool(queries.isfinite().all()):
            raise ValueError("queries must be finite")

    def _check_search(self, queries: Tensor, k: int, multiplier: int) -> None:
        self._check_queries(queries)
        _check_at_least("k", k, 1)
        _check_at_least("multiplier", multiplier, 1)

    def _pack(self, x: Tensor) -> Tensor:
        return pack_sign(x, threshold=self.threshold, rotation=self.rotation)

    def _nearest(self, queries: Tensor, k: int, filter: Tensor | None) -> tuple[Tensor, Tensor]:
        """Find the k best rows by their codes, then by row, with their scores."""
        if self.rotation is None:
            wanted = self._pack(queries)
        else:
            wanted = self.rotation(torch.nn.functional.normalize(queries.float(), dim=1))
        scores = [torch.empty(len(queries), 0)]
        rows = [torch.empty(len(queries), 0, dtype=torch.int64)]
        for start, segment in zip(self._starts(), self._segments, strict=False):
            allowed, codes = self._allowed(segment, filter), segment.tensor("codes")
            if self.rotation is None:
                distances, local = hamming_topk(wanted, codes, k, filter=allowed)
                found = -distances.float()
            else:
                found, local = asymmetric_topk(
                    wanted, codes, k, filter=allowed, scale=segment.tensor("scale")
                )
            scores.append(found.masked_fill(local < 0, -torch.inf))
            rows.append(torch.where(local < 0, -1, local + start))
        return best_candidates(torch.cat(scores, 1), torch.cat(rows, 1), k)

    def _score(self, queries: Tensor, rows: Tensor) -> Tensor:
        """Cosines of queries with the best that is known of each row; -inf for row -1."""
        unit = torch.nn.functional.normalize(queries.float(), dim=1)
        scores = torch.full(rows.shape, -torch.inf)
        for start, segment in zip(self._starts(), self._segments, strict=False):
            inside = (rows >= start) & (rows < start + len(segment.live))
            if not bool(inside.any()):
                continue
            local = torch.where(inside, rows - start, -1)
            if self.second_level == "none":
                found = bit_scores(unit, segment.tensor("codes"), local)
            else:
                vectors = segment.tensor("vectors", local[inside])
                wanted, constant = unit, torch.zeros(len(unit), 1)
                if self.quantizer is not None:
                    wanted, constant = self.quantizer.fold(unit)
                metric = 0 if self.second_level == "int8" else 1
                found = op.gather_scores(wanted, vectors, local, metric) + constant
            scores = torch.where(inside, found, scores)
        return scores

    def _ids(self, rows: Tensor) -> Tensor:
        ids = torch.full(rows.shape, -1, dtype=torch.int64)
        for start, segment in zip(self._starts(), self._segments, strict=False):
            inside = (rows >= start) & (rows < start + len(segment.live))
            ids[inside] = segment.tensor("ids")[rows[inside] - start]
        return ids

    def search(
        self, queries: Tensor, k: int, *, multiplier: int = 4, filter: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Find the vectors nearest to each query: bits first, then rescoring.

        Parameters
        ----------
        queries : Tensor
            ``(Q, dim)``; floating-point, finite.
        k : int
            Number of results per query, at least 1.
        multiplier : int, default 4
            Candidates per result that are rescored, with the second level or, without one, with
            the query's real values against the bits. At least 1; not used by a correction without
            a second level, whose estimates are final.
        filter : Tensor, optional
            int64 ids that may be returned.

        Returns
        -------
        scores : Tensor
            float32 ``(Q, k)``, descending, on the scale of a cosine.
        ids : Tensor
            int64 ``(Q, k)``; -1, with score -inf, beyond the last row.

        Raises
        ------
        KeyError
            If an id of the filter is not in the index.
        TypeError, ValueError
            If an argument has a wrong type, shape or range.
        """
        self._check_search(queries, k, multiplier)
        _, fine, rows = self._candidates(queries, k, multiplier, self._check_filter(filter))
        scores, rows = best_candidates(fine, rows, k)
        return scores, self._ids(rows)

    def _candidates(
        self, queries: Tensor, k: int, multiplier: int, filter: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Find the rows that the codes choose: scores by their codes, final scores, rows."""
        if self.correction != "none" and self.second_level == "none":
            scores, rows = self._nearest(queries, k, filter)
            return scores, scores, rows
        coarse, rows = self._nearest(queries, k * multiplier, filter)
        return coarse, self._score(queries, rows), rows

    def range_search(
        self, queries: Tensor, radius: int, *, filter: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Find all codes within a Hamming distance; see :func:`emblas.binary.range_search_csr`.

        Returns
        -------
        offsets, distances, ids : Tensor
            int64 ``(Q + 1,)``, int32 and int64: per query ascending by distance, then in the order
            of insertion.
        """
        self._check_queries(queries)
        filter = self._check_filter(filter)
        wanted = self._pack(queries)
        query, distance, row = [], [], []
        for start, segment in zip(self._starts(), self._segments, strict=False):
            offsets, distances, rows = range_search_csr(
                wanted, segment.tensor("codes"), radius, filter=self._allowed(segment, filter)
            )
            query.append(torch.arange(len(queries)).repeat_interleave(offsets.diff()))
            distance.append(distances)
            row.append(rows + start)
        if not query:
            empty = torch.zeros(0, dtype=torch.int64)
            return torch.zeros(len(queries) + 1, dtype=torch.int64), empty.int(), empty
        queries_, distances, rows = torch.cat(query), torch.cat(distance), torch.cat(row)
        order = torch.from_numpy(np.lexsort((rows, distances, queries_)))
        counts = torch.bincount(queries_, minlength=len(queries))
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        return offsets, distances[order], self._ids(rows[order])

    def shard(self, rank: int, size: int) -> BinaryIndex:
        """Return one of ``size`` consecutive parts of about the same number of rows.

        Nothing is copied; of a memory-mapped index only the part's own bytes are checked and read.
        :class:`emblas.binary.ShardedIndex` searches the parts of several processes.

        Parameters
        ----------
        rank : int
            Which part, 0 to ``size - 1``.
        size : int
            Number of parts, at least 1.

        Raises
        ------
        ValueError
            If a number is out of range.
        """
        if not 0 <= rank < size:
            raise ValueError(f"rank must lie between 0 and size - 1, got {rank} and {size}")
        part = self._like()
        part._next_id = self._next_id
        starts = self._starts()
        begin, end = (starts[-1] * number // size for number in (rank, rank + 1))
        for start, segment in zip(starts, self._segments, strict=False):
            low, high = (min(max(row - start, 0), len(segment.live)) for row in (begin, end))
            if low < high:
                part._segments.append(segment.part(low, high))
        return part

    # --- files -----------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the index to a folder, or what is new if it is there already.

        Shards are never changed; the manifest that names them is replaced in one step at the end.
        Until then the folder holds the index of before. Processes that save wait for each other.

        Raises
        ------
        RuntimeError
            If the folder has been saved to since this index was opened from it or saved there: its
            changes would be lost.
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        with storage.changing(path):
            found = storage.stamp(path)
            known = self._stamps.get(path.resolve(), found)
            if found is not None and found != known:
                raise RuntimeError(
                    f"{path} has been changed since this index was opened or saved: open it again"
                )
            self._write(path)
            self._stamps[path.resolve()] = storage.stamp(path)

    def _write(self, path: Path) -> None:
        entries = []
        for segment in self._segments:
            entry = segment.entry if segment.folder == path.resolve() else None
            if entry is None or not (path / entry["file"]).exists():
                names = ["ids", "codes"]
                names += ["vectors"] if self.second_level != "none" else []
                names += ["scale"] if self.correction != "none" else []
                tensors = {name: segment.tensor(name).numpy() for name in names}
                entry = segment.entry = storage.write_shard(path, tensors)
                segment.folder = path.resolve()
            removed = ""
            if not bool(segment.live.all()):
                bits = np.packbits(~segment.live.numpy()).tobytes()
                removed = base64.b64encode(zlib.compress(bits)).decode()
            entries.append({**entry, "removed": removed})
        quantizer, rotation = self.quantizer, self.rotation
        storage.write_manifest(
            path,
            {
                "dim": self.dim,
                "bit_order": "big",
                "second_level": self.second_level,
                "threshold": None if self.threshold is None else self.threshold.tolist(),
                "quantizer": quantizer
                and {"start": quantizer.start.tolist(), "step": quantizer.step.tolist()},
                "correction": self.correction,
                "rotation": rotation and rotation.signs.tolist(),
                "next_id": self._next_id,
                "shards": entries,
            },
        )
        storage.remove_leftovers(path, {entry["file"] for entry in entries} | {storage.MANIFEST})

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, verify: str = "lazy") -> BinaryIndex:
        """Open a saved index: its arrays are memory-mapped.

        Parameters
        ----------
        folder : path
            What :meth:`save` wrote.
        verify : {"lazy", "full"}, default "lazy"
            The manifest, headers and sizes are always checked. "lazy" checks the bytes of a chunk
            of 16 MiB before its first use, "full" all of them now.

        Raises
        ------
        FileNotFoundError
            If the folder holds no index.
        CorruptIndexError
            If a file is damaged, cut off or of a newer version; later, too, at the first use of a
            damaged chunk.
        """
        _op.check_choice("verify", verify, ("lazy", "full"))
        path = Path(folder)
        while True:
            stamp = storage.stamp(path)
            try:
                index = cls._open(path, verify)
            except storage.CorruptIndexError:
                # Another index may have been saved here, and its files taken the place of these.
                if storage.stamp(path) == stamp:
                    raise
            else:
                if storage.stamp(path) == stamp:
                    index._stamps[path.resolve()] = stamp
                    return index

    @classmethod
    def _open(cls, path: Path, verify: str) -> BinaryIndex:
        manifest = storage.read_manifest(path)
        threshold, quantizer = manifest["threshold"], manifest["quantizer"]
        index = cls(
            manifest["dim"],
            second_level=manifest["second_level"],
            threshold=None if threshold is None else torch.tensor(threshold),
            quantizer=quantizer
            and Int8Quantizer(torch.tensor(quantizer["start"]), torch.tensor(quantizer["step"])),
            correction=manifest["correction"],
        )
        if index.rotation is not None:  # its signs, whatever a generator gives by now
            index.rotation.signs = torch.tensor(manifest["rotation"], dtype=torch.int8)
        for entry in manifest["shards"]:
            removed = entry.pop("removed")
            live = np.ones(entry["rows"], bool)
            if removed:
                bits = np.frombuffer(zlib.decompress(base64.b64decode(removed)), np.uint8)
                live = ~np.unpackbits(bits, count=entry["rows"]).astype(bool)
            shard = storage.Shard(path, entry)
            if verify == "full":
                shard.check_all()
            index._segments.append(
                Segment(torch.from_numpy(live), None, shard, entry, path.resolve())
            )
        index._next_id = manifest["next_id"]
        return index

    # --- faiss -----------------------------------------------------------------------------------

    @classmethod
    def from_faiss(cls, index: Any) -> BinaryIndex:
        """Take the codes of a ``faiss.IndexBinaryFlat``; ids are its row numbers."""
        import faiss

        stored = faiss.vector_to_array(index.xb).reshape(index.ntotal, index.code_size)
        ours = cls(index.d)
        ours.add_codes(formats.from_faiss(torch.from_numpy(stored)))
        return ours

    def to_faiss(self) -> Any:
        """Return a ``faiss.IndexBinaryFlat`` of the rows in the order of insertion.

        The codes of a corrected index are those of vectors turned by its ``rotation``.

        Raises
        ------
        ValueError
            If ``dim`` is not divisible by 8, which faiss needs.
        """
        import faiss

        if self.dim % 8:
            raise ValueError(f"dim must be divisible by 8 for faiss, got {self.dim}")
        index = faiss.IndexBinaryFlat(self.dim)
        for segment in self._segments:
            codes = segment.tensor("codes")[segment.live]
            index.add(formats.to_faiss(codes).numpy())
        return index
