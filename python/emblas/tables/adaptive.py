"""Tables in which ids share rows by frequency, or because their rows came out alike."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from emblas.tables.base import VocabularyEmbedding, check_at_least
from emblas.tables.functions import hash_keys
from emblas.tables.spec import TableSpec


class AdaptiveEmbedding(VocabularyEmbedding):
    """AdaptEmb: frequent ids have rows of their own, all others share hashed rows.

    The method that Zhang et al. (2024), "Experimental Analysis of Large-Scale Learnable Vector
    Storage Compression", call so.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
        Shape of the table; ids are numbered by falling frequency.
    num_frequent : int
        Ids below it have rows of their own.
    num_shared : int
        Rows of the others, at least 1.
    seed : int, default 0
        Of their hash.
    padding_id, device, dtype : optional
        As for :class:`HashEmbedding`.

    Attributes
    ----------
    weight : Parameter
        ``(num_frequent + num_shared, embedding_dim)``, uniform on (-0.05, 0.05).
    """

    _specified = ("num_embeddings", "embedding_dim", "num_frequent", "num_shared", "seed")
    _size_argument = "num_shared"
    num_embeddings: int

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        num_frequent: int,
        num_shared: int,
        *,
        seed: int = 0,
        padding_id: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_id=padding_id)
        if not 0 <= num_frequent <= num_embeddings:
            raise ValueError(f"num_frequent must be 0 to {num_embeddings}, got {num_frequent}")
        check_at_least(1, num_shared=num_shared)
        self.num_frequent, self.num_shared, self.seed = num_frequent, num_shared, seed
        self.spec = TableSpec(num_shared, 1, "splitmix64", seed)
        self.weight = nn.Parameter(
            torch.empty(num_frequent + num_shared, embedding_dim, device=device, dtype=dtype)
        )
        nn.init.uniform_(self.weight, -0.05, 0.05)

    def vectors(self, ids: Tensor) -> Tensor:
        """Embed distinct ids, int64 ``(ids,)``, as ``(ids, embedding_dim)``."""
        shared = self.num_frequent + hash_keys(ids, self.spec)[:, 0]
        return nn.functional.embedding(
            torch.where(ids < self.num_frequent, ids, shared), self.weight
        )

    @torch.no_grad()
    def resize(self, factor: int) -> AdaptiveEmbedding:
        """Return a copy with ``factor`` times the shared rows that gives the same vectors."""
        check_at_least(1, factor=factor)
        grown = AdaptiveEmbedding(
            self.num_embeddings, self.embedding_dim, self.num_frequent, self.num_shared * factor,
            seed=self.seed, padding_id=self.padding_id, device=self.weight.device,
            dtype=self.weight.dtype,
        )  # fmt: skip
        own, shared = self.weight.split([self.num_frequent, self.num_shared])
        grown.weight.copy_(torch.cat([own, shared.repeat(factor, 1)]))
        return grown


class DeduplicatedEmbedding(VocabularyEmbedding):
    """Dedup: blocks of rows that came out almost alike are stored once.

    Zhou et al. (2022), "Serving Deep Learning Models with Deduplication from Relational Databases":
    candidates are found by locality-sensitive hashing, and a block is dropped for an earlier one
    if enough of its elements are close to it. Made by :meth:`from_table`; what is left can be
    trained on.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
        Shape of the table.
    block_rows : int
        Rows of a block; the last may be longer than the table.
    num_blocks : int
        Distinct blocks.
    padding_id, device, dtype : optional
        As for :class:`HashEmbedding`.

    Attributes
    ----------
    index : Tensor
        int32: the distinct block that each block of rows is.
    weight : Parameter
        ``(num_blocks * block_rows, embedding_dim)``.
    """

    _specified = ("num_embeddings", "embedding_dim", "block_rows", "num_blocks")
    index: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        block_rows: int,
        num_blocks: int,
        *,
        padding_id: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_id=padding_id)
        check_at_least(1, block_rows=block_rows, num_blocks=num_blocks)
        self.block_rows, self.num_blocks = block_rows, num_blocks
        blocks = -(-num_embeddings // block_rows)
        self.register_buffer("index", torch.zeros(blocks, dtype=torch.int32, device=device))
        self.weight = nn.Parameter(
            torch.zeros(num_blocks * block_rows, embedding_dim, device=device, dtype=dtype)
        )

    def vectors(self, ids: Tensor) -> Tensor:
        """Embed distinct ids, int64 ``(ids,)``, as ``(ids, embedding_dim)``."""
        blocks = self.index[ids // self.block_rows].long()
        return nn.functional.embedding(
            blocks * self.block_rows + ids % self.block_rows, self.weight
        )

    @classmethod
    def from_table(
        cls,
        table: Tensor,
        block_rows: int = 1,
        *,
        tolerance: float = 0.01,
        share: float = 0.7,
        width: float = 8.0,
        num_hashes: int = 4,
        num_bands: int = 40,
        seed: int = 0,
        padding_id: int | None = None,
    ) -> DeduplicatedEmbedding:
        """Deduplicate a table.

        Parameters
        ----------
        table : Tensor
            ``(num_embeddings, embedding_dim)``.
        block_rows : int, default 1
            Rows of a block.
        tolerance, share : float, default 0.01 and 0.7
            A block is dropped if at least this share of its elements differs by at most the
            tolerance from an earlier block's.
        width : float, default 8
            Of the buckets of the hashes ``floor((a x + b) / width)``, a normal, of Datar et al.
            (2004).
        num_hashes, num_bands : int, default 4 and 40
            Blocks are compared if they agree in all hashes of a band.
        seed : int, default 0
            Of the hashes.
        padding_id : int, optional
            An id that embeds to zeros.
        """
        if table.dim() != 2:
            raise ValueError(f"table must have 2 dimensions, got shape {tuple(table.shape)}")
        check_at_least(1, block_rows=block_rows, num_hashes=num_hashes, num_bands=num_bands)
        for name, value in (("tolerance", tolerance), ("share", share), ("width", width)):
            if not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        rows, dim = table.shape
        padded = nn.functional.pad(table.detach(), (0, 0, 0, -rows % block_rows))
        blocks = padded.reshape(-1, block_rows * dim)
        generator = torch.Generator().manual_seed(seed)
        count = num_bands * num_hashes
        directions = torch.randn(blocks.shape[1], count, generator=generator, dtype=torch.float64)
        shifts = torch.rand(count, generator=generator, dtype=torch.float64) * width
        hashes = ((blocks.cpu().double() @ directions + shifts) / width).floor().long()
        bands = hashes.unflatten(1, (num_bands, num_hashes)).tolist()
        kept: list[int] = []
        index: list[int] = []
        buckets: list[dict[tuple[int, ...], list[int]]] = [{} for _ in range(num_bands)]
        for number, block_bands in enumerate(bands):
            keys = [tuple(band) for band in block_bands]
            found = {k for key, bucket in zip(keys, buckets, strict=True)
                     for k in bucket.get(key, ())}  # fmt: skip
            candidates = sorted(found)
            if candidates:
                others = blocks[[kept[k] for k in candidates]]
                close = ((others - blocks[number]).abs() <= tolerance).float().mean(1) >= share
                same = close.nonzero()[:, 0].tolist()
                if same:
                    index.append(candidates[same[0]])
                    continue
            for key, bucket in zip(keys, buckets, strict=True):
                bucket.setdefault(key, []).append(len(kept))
            index.append(len(kept))
            kept.append(number)
        module = cls(
            rows, dim, block_rows, len(kept), padding_id=padding_id, device=table.device,
            dtype=table.dtype,
        )  # fmt: skip
        with torch.no_grad():
            module.index.copy_(torch.tensor(index))
            module.weight.copy_(blocks[kept].reshape(-1, dim))
        return module
