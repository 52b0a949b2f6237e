"""A table on disk of which a few partitions at a time are in memory and trained."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from emblas.tables.base import VocabularyEmbedding
from emblas.tables.codes import CodeSpec, random_codes

MANIFEST = "table.json"
FORMAT = 1


def bucket_order(num_partitions: int) -> Iterator[tuple[int, int]]:
    """Yield all pairs of partitions from the inside out.

    The order of PyTorch-BigGraph (Lerer et al., 2019) for the edges between partitions: each pair
    but the first has a partition that was trained before, so that all vectors grow into one space,
    and neighbouring pairs share one, so that about one partition is swapped at a time.
    """
    for k in range(num_partitions):
        for i in range(k):
            yield i, k
            yield k, i
        yield k, k


class PartitionedEmbedding(VocabularyEmbedding):
    """A table in partitions that live on disk; some of them are in memory, and are looked up.

    As PyTorch-BigGraph (Lerer et al., 2019) trains graphs larger than memory: the edges between two
    partitions at a time, by row-wise Adagrad. :meth:`swap` says which partitions are in memory;
    those that have to go are written first. A partition that was never written is drawn as a
    function of its ids, so the order of training doesn't change what it starts from::

        for i, j in bucket_order(table.num_partitions):
            table.swap([i, j])
            for ids in edges_between(i, j):
                loss_of(table(ids)).backward()
                table.step()
        table.flush()

    Parameters
    ----------
    folder : path-like
        Where partitions are; made if it isn't there. One that holds such a table is gone on with.
    num_embeddings, embedding_dim : int
        Shape of the table.
    num_partitions : int
        1 to ``num_embeddings``; partition ``p`` has the rows from ``p * num_embeddings //
        num_partitions`` to the next partition's.
    std : float, default 1e-3
        Vectors are drawn from N(0, std^2).
    seed : int, default 0
        Of the draws.
    padding_id : int, optional
        An id that embeds to zeros and sends no gradient.

    Attributes
    ----------
    loaded : tuple of int
        The partitions in memory, ascending.
    weights : ParameterDict
        Their rows, float32, by number as text.

    Raises
    ------
    ValueError
        If the folder holds another table, or an argument is out of range.
    """

    _specified = ("num_embeddings", "embedding_dim", "num_partitions", "std", "seed")
    num_embeddings: int

    def __init__(
        self,
        folder: str | os.PathLike[str],
        num_embeddings: int,
        embedding_dim: int,
        num_partitions: int,
        *,
        std: float = 1e-3,
        seed: int = 0,
        padding_id: int | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_id=padding_id)
        if not 1 <= num_partitions <= num_embeddings:
            raise ValueError(f"num_partitions must be 1 to {num_embeddings}, got {num_partitions}")
        self.num_partitions, self.std, self.seed = num_partitions, std, seed
        self._codes = CodeSpec("normal", seed)
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        own = {"format": FORMAT, **{name: getattr(self, name) for name in self._specified}}
        manifest = self.folder / MANIFEST
        if manifest.exists():
            saved = json.loads(manifest.read_text())
            if saved != own:
                raise ValueError(f"{self.folder} holds a table of {saved}, this module is {own}")
        else:
            _replace(manifest, lambda file: file.write(json.dumps(own, indent=1).encode()))
        self._bounds = [p * num_embeddings // num_partitions for p in range(num_partitions + 1)]
        self.weights = nn.ParameterDict()
        self._sums: dict[int, Tensor] = {}

    @property
    def loaded(self) -> tuple[int, ...]:
        """The partitions in memory, ascending."""
        return tuple(sorted(self._sums))

    def _path(self, partition: int) -> Path:
        return self.folder / f"partition-{partition}.npy"

    def _read(self, partition: int) -> Tensor:
        """Rows of a partition, and a column of their accumulators."""
        begin, end = self._bounds[partition : partition + 2]
        path = self._path(partition)
        if not path.exists():
            rows = random_codes(torch.arange(begin, end), self.embedding_dim, self._codes)
            return torch.cat([self.std * rows, rows.new_zeros(end - begin, 1)], 1)
        array = np.load(path, allow_pickle=False)
        shape = (end - begin, self.embedding_dim + 1)
        if array.shape != shape or array.dtype != np.float32:
            raise ValueError(
                f"{path} must hold float32 of shape {shape}, got {array.dtype} of {array.shape}"
            )
        return torch.from_numpy(array)

    @torch.no_grad()
    def _write(self, partition: int) -> None:
        whole = torch.cat([self.weights[str(partition)], self._sums[partition]], 1)
        array = whole.cpu().numpy()
        _replace(self._path(partition), lambda file: np.save(file, array, allow_pickle=False))

    def swap(self, partitions: Sequence[int]) -> None:
        """Have these partitions in memory, and no others.

        Parameters
        ----------
        partitions : sequence of int
            0 to ``num_partitions - 1``; the same one may come twice.
        """
        wanted = set(partitions)
        for partition in sorted(wanted):
            if not 0 <= partition < self.num_partitions:
                raise ValueError(
                    f"partitions must be 0 to {self.num_partitions - 1}, got {partition}"
                )
        for partition in sorted(set(self._sums) - wanted):
            self._write(partition)
            del self.weights[str(partition)], self._sums[partition]
        for partition in sorted(wanted - set(self._sums)):
            rows, sums = self._read(partition).split([self.embedding_dim, 1], 1)
            self.weights[str(partition)] = nn.Parameter(rows.contiguous())
            self._sums[partition] = sums.contiguous()

    def flush(self) -> None:
        """Write the partitions in memory; they stay there."""
        for partition in self.loaded:
            self._write(partition)

    def vectors(self, ids: Tensor) -> Tensor:
        """Embed distinct ascending ids, int64 ``(ids,)``, of partitions in memory."""
        parts = []
        edges = torch.searchsorted(ids, torch.tensor(self._bounds))
        for partition, (begin, end) in enumerate(
            zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
        ):
            if begin == end:
                continue
            if partition not in self._sums:
                raise ValueError(
                    f"ids must be of the partitions in memory, {list(self.loaded)}, got "
                    f"{int(ids[begin])} of partition {partition}"
                )
            own = ids[begin:end] - self._bounds[partition]
            weight = self.weights[str(partition)]
            parts.append(nn.functional.embedding(own, weight, sparse=True))
        return torch.cat(parts) if parts else torch.zeros(0, self.embedding_dim)

    @torch.no_grad()
    def step(self, lr: float = 0.01, *, eps: float = 1e-10) -> None:
        """Update the rows in use by row-wise Adagrad, and clear their (sparse) gradients.

        ``s += mean(g^2)``, ``w -= lr g / (sqrt(s) + eps)``; rows without a gradient stand still.
        """
        for partition, sums in self._sums.items():
            weight = self.weights[str(partition)]
            if weight.grad is None:
                continue
            gradient = weight.grad.coalesce()
            rows, values = gradient.indices()[0], gradient.values()
            sums[rows] += values.square().mean(1, keepdim=True)
            weight[rows] -= lr * values / (sums[rows].sqrt() + eps)
            weight.grad = None

    @torch.no_grad()
    def table(self) -> Tensor:
        """Return the whole table, which has to fit into memory."""
        rows = [
            self.weights[str(p)] if p in self._sums else self._read(p)[:, : self.embedding_dim]
            for p in range(self.num_partitions)
        ]
        return torch.cat(rows)


def _replace(path: Path, write: Any) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
