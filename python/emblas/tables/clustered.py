"""Compositional embeddings whose hash functions are learned by clustering."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from emblas.tables.base import VocabularyEmbedding, check_at_least
from emblas.tables.clustering import k_means, means
from emblas.tables.functions import hash_keys
from emblas.tables.spec import TableSpec


class ClusteredCompositionalEmbedding(VocabularyEmbedding):
    """CCE: each chunk of a vector is a row of a learned cluster plus a row of a random hash.

    Tsang and Ahle (2023), "Clustering the Sketch: Dynamic Compression for Embedding Tables":
    ``e = concat_c (T_0c[h_0c[id]] + T_1c[h_1c[id]])``. At first both hashes are random. From time
    to time, after an epoch say, :meth:`cluster` puts ids with similar chunks on one row and gives
    them new random rows for what is left. Both hashes are then stored tables of integers, which
    :attr:`num_bytes` counts.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
        Shape of the table; the dimension is a multiple of ``num_chunks``.
    num_rows : int
        Rows of each of the ``2 num_chunks`` tables.
    num_chunks : int, default 4
        Chunks of a vector.
    seed : int, default 0
        0 to 2^16 - 1; of the random hashes.
    padding_id, device, dtype : optional
        As for :class:`HashEmbedding`.

    Attributes
    ----------
    index : Tensor
        int32 ``(2, num_chunks, num_embeddings)``: row of each id in each table.
    clusterings : Tensor
        int64: how often :meth:`cluster` was called.
    weight : Parameter
        ``(2, num_chunks, num_rows, embedding_dim / num_chunks)``, uniform on (-0.05, 0.05).
    """

    _specified = ("num_embeddings", "embedding_dim", "num_rows", "num_chunks", "seed")
    _size_argument = "num_rows"
    num_embeddings: int
    index: Tensor
    clusterings: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        num_rows: int,
        *,
        num_chunks: int = 4,
        seed: int = 0,
        padding_id: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_id=padding_id)
        check_at_least(1, num_rows=num_rows, num_chunks=num_chunks)
        if embedding_dim % num_chunks:
            raise ValueError(
                f"embedding_dim must be a multiple of num_chunks, got {embedding_dim} and "
                f"{num_chunks}"
            )
        if num_rows >= 2**31:
            raise ValueError(f"num_rows must be below 2^31, got {num_rows}")
        if not 0 <= seed < 2**16:
            raise ValueError(f"seed must be 0 to 65535, got {seed}")
        self.num_rows, self.num_chunks, self.seed = num_rows, num_chunks, seed
        shape = 2, num_chunks, num_rows, embedding_dim // num_chunks
        index = torch.empty(2, num_chunks, num_embeddings, dtype=torch.int32, device=device)
        self.register_buffer("index", index)
        self.register_buffer("clusterings", torch.zeros((), dtype=torch.int64, device=device))
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the tables anew and start from random hashes."""
        nn.init.uniform_(self.weight, -0.05, 0.05)
        if self.index.is_meta:
            return
        self.clusterings.zero_()
        for chunk in range(self.num_chunks):
            self.index[0, chunk] = self._hash(0, chunk)
            self.index[1, chunk] = self._hash(1, chunk)

    def _hash(self, number: int, chunk: int) -> Tensor:
        """Rows of all ids under the random hash with a number."""
        seed = (self.seed << 16) + (number * self.num_chunks + chunk) % 2**16
        ids = torch.arange(self.num_embeddings, device=self.index.device)
        return hash_keys(ids, TableSpec(self.num_rows, 1, "splitmix64", seed))[:, 0].int()

    def vectors(self, ids: Tensor) -> Tensor:
        """Embed distinct ids, int64 ``(ids,)``, as ``(ids, embedding_dim)``."""
        rows = self.index[:, :, ids].long()
        chunks = torch.arange(self.num_chunks, device=ids.device)[:, None]
        first, second = self.weight[0][chunks, rows[0]], self.weight[1][chunks, rows[1]]
        return (first + second).transpose(0, 1).flatten(1)

    @torch.no_grad()
    def resize(self, factor: int) -> ClusteredCompositionalEmbedding:
        """Return a copy for ``factor`` times the vocabulary; ids of before keep their vectors.

        The rows of ids are repeated: a new id starts with those of the old one that differs from it
        by a multiple of the old ``num_embeddings``. (More rows for the same vocabulary: make a
        larger module, and set it by :func:`fit_rows`.)

        Parameters
        ----------
        factor : int
            1 or more.
        """
        check_at_least(1, factor=factor)
        grown = ClusteredCompositionalEmbedding(
            self.num_embeddings * factor, self.embedding_dim, self.num_rows,
            num_chunks=self.num_chunks, seed=self.seed, padding_id=self.padding_id,
            device=self.weight.device, dtype=self.weight.dtype,
        )  # fmt: skip
        grown.index.copy_(self.index.repeat(1, 1, factor))
        grown.clusterings.copy_(self.clusterings)
        grown.weight.copy_(self.weight)
        return grown

    @torch.no_grad()
    def cluster(self, *, iterations: int = 20) -> None:
        """Learn the first hash of each chunk anew from the vectors, and draw the second.

        The first tables become the centroids of a k-means clustering of the chunks, the second the
        mean of what is left of the ids that share a row. The state of an optimizer belongs to the
        old tables: set it to zero.

        Parameters
        ----------
        iterations : int, default 20
            Of k-means, at most.
        """
        check_at_least(0, iterations=iterations)
        self.clusterings += 1
        number = int(self.clusterings)
        for chunk in range(self.num_chunks):
            rows = self.index[:, chunk].long()
            points = self.weight[0, chunk][rows[0]] + self.weight[1, chunk][rows[1]]
            centroids, assignment = k_means(
                points, self.num_rows, iterations=iterations, seed=(self.seed << 16) + number
            )
            self.index[0, chunk] = assignment.int()
            self.index[1, chunk] = self._hash(1 + number, chunk)
            self.weight[0, chunk] = centroids
            rest = points - centroids[assignment]
            self.weight[1, chunk] = means(rest, self.index[1, chunk].long(), self.num_rows)[0]
