"""Vectors joined from rows of small codebooks, which a stored code names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from emblas.tables.base import VocabularyEmbedding, check_at_least
from emblas.tables.clustering import k_means
from emblas.tables.packed_codes import pack_codes, row_bytes, unpack_codes

MAX_CENTROIDS = 2**16


def code_bits(num_centroids: int) -> int:
    """Return the bits of a code of 0 to ``num_centroids - 1``."""
    return max(1, (num_centroids - 1).bit_length())


def check_parts(embedding_dim: int, num_parts: int, num_centroids: int) -> None:
    """Raise ValueError unless vectors can be cut into parts with so many centroids."""
    if num_parts < 1 or embedding_dim % num_parts:
        raise ValueError(
            f"embedding_dim must be a multiple of num_parts, got {embedding_dim} and {num_parts}"
        )
    if not 1 <= num_centroids <= MAX_CENTROIDS:
        raise ValueError(f"num_centroids must be 1 to {MAX_CENTROIDS}, got {num_centroids}")


class SubspaceEmbedding(VocabularyEmbedding):
    """Vectors that are joined from parts, each one of a few shared centroids.

    An id stores only the numbers of its centroids. This is the form of product quantization
    (:class:`ProductQuantizedEmbedding` freezes to it) and of the subspace embeddings of Jaiswal and
    Liu (2023): :meth:`from_table` clusters the parts of a trained table, and a new module gives ids
    the digits of their number as codes (a Cartesian product; :class:`QuotientRemainderEmbedding`
    with ``combine="concat"`` computes the same digits instead of storing them). Codebooks can be
    trained, codes stay.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
        Shape of the table; the dimension is a multiple of ``num_parts``.
    num_parts : int
        Parts of a vector.
    num_centroids : int
        Centroids of each part, 1 to 65536. Digits tell all ids apart if
        ``num_centroids ** num_parts`` is at least ``num_embeddings``.
    num_frequent : int, optional
        Only ids below it may use all centroids, and store codes of so many bits; default: all.
    rare_centroids : int, optional
        The other ids use the first so many; default: all.
    padding_id, device, dtype : optional
        As for :class:`HashEmbedding`.

    Attributes
    ----------
    packed : Tensor
        uint8 ``(num_frequent, bytes)``: codes, packed least significant bit first.
    packed_rare : Tensor
        The same of the other ids.
    codebooks : Parameter
        ``(num_parts, num_centroids, embedding_dim / num_parts)``, uniform on (-0.05, 0.05).
    """

    _specified = (
        "num_embeddings", "embedding_dim", "num_parts", "num_centroids", "num_frequent",
        "rare_centroids",
    )  # fmt: skip
    _size_argument = "num_centroids"
    _size_limit = MAX_CENTROIDS
    num_embeddings: int
    packed: Tensor
    packed_rare: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        num_parts: int,
        num_centroids: int,
        *,
        num_frequent: int | None = None,
        rare_centroids: int | None = None,
        padding_id: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_id=padding_id)
        check_parts(embedding_dim, num_parts, num_centroids)
        self.num_parts, self.num_centroids = num_parts, num_centroids
        self.num_frequent = num_embeddings if num_frequent is None else num_frequent
        self.rare_centroids = num_centroids if rare_centroids is None else rare_centroids
        if not 0 <= self.num_frequent <= num_embeddings:
            raise ValueError(f"num_frequent must be 0 to {num_embeddings}, got {num_frequent}")
        if not 1 <= self.rare_centroids <= num_centroids:
            raise ValueError(f"rare_centroids must be 1 to {num_centroids}, got {rare_centroids}")
        for name, rows, centroids in (
            ("packed", self.num_frequent, num_centroids),
            ("packed_rare", num_embeddings - self.num_frequent, self.rare_centroids),
        ):
            size = row_bytes(num_parts, code_bits(centroids))
            buffer = torch.empty(rows, size, dtype=torch.uint8, device=device)
            self.register_buffer(name, buffer)
        width = embedding_dim // num_parts
        codebooks = torch.empty(num_parts, num_centroids, width, device=device, dtype=dtype)
        self.codebooks = nn.Parameter(codebooks)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the codebooks anew, and let codes be digits of the ids."""
        nn.init.uniform_(self.codebooks, -0.05, 0.05)
        if self.packed.is_meta:
            return
        ids = torch.arange(self.num_embeddings, device=self.packed.device)[:, None]
        limit = torch.where(ids < self.num_frequent, self.num_centroids, self.rare_centroids)
        codes, rest = [], ids
        for _ in range(self.num_parts):
            codes.append(rest % limit)
            rest = rest // limit
        self.set_codes(torch.cat(codes, 1))

    def set_codes(self, codes: Tensor) -> None:
        """Store the codes of all ids, int64 ``(num_embeddings, num_parts)``.

        Raises
        ------
        ValueError
            If the shape is another one or a code is out of range.
        """
        if codes.shape != (self.num_embeddings, self.num_parts):
            raise ValueError(
                f"codes must have shape {(self.num_embeddings, self.num_parts)}, "
                f"got {tuple(codes.shape)}"
            )
        for buffer, part, centroids in (
            (self.packed, codes[: self.num_frequent], self.num_centroids),
            (self.packed_rare, codes[self.num_frequent :], self.rare_centroids),
        ):
            if part.numel() and not 0 <= int(part.min()) <= int(part.max()) < centroids:
                raise ValueError(f"codes must be 0 to {centroids - 1}, got {int(part.max())}")
            buffer.copy_(pack_codes(part, code_bits(centroids)))

    def codes(self, ids: Tensor) -> Tensor:
        """Return the codes of ids ``(ids,)``, int64 ``(ids, num_parts)``."""
        frequent = ids < self.num_frequent
        codes = ids.new_empty(len(ids), self.num_parts)
        for buffer, where, first, centroids in (
            (self.packed, frequent, 0, self.num_centroids),
            (self.packed_rare, ~frequent, self.num_frequent, self.rare_centroids),
        ):
            rows = buffer[ids[where] - first]
            codes[where] = unpack_codes(rows, code_bits(centroids), self.num_parts)
        return codes

    def vectors(self, ids: Tensor) -> Tensor:
        """Embed distinct ids, int64 ``(ids,)``, as ``(ids, embedding_dim)``."""
        parts = torch.arange(self.num_parts, device=ids.device)
        return self.codebooks[parts, self.codes(ids)].flatten(1)

    @torch.no_grad()
    def resize(self, factor: int) -> SubspaceEmbedding:
        """Return a copy for ``factor`` times the vocabulary; ids of before keep their vectors.

        Codes are repeated: a new id starts with those of the old one that differs from it by a
        multiple of the old ``num_embeddings``.

        Parameters
        ----------
        factor : int
            1 or more.

        Raises
        ------
        ValueError
            If ``factor`` is below 1, or above it while rare ids have fewer centroids: the new ids
            would be rare ones, and the codes of frequent ids mean nothing to them.
        """
        check_at_least(1, factor=factor)
        if factor > 1 and self.num_frequent < self.num_embeddings:
            raise ValueError(
                f"num_frequent must be num_embeddings = {self.num_embeddings} to repeat codes, got "
                f"{self.num_frequent}: resize the MultiGranularQuantizedEmbedding before it is "
                "frozen, or copy the codes into a module whose ids can use all centroids"
            )
        grown = SubspaceEmbedding(
            self.num_embeddings * factor, self.embedding_dim, self.num_parts, self.num_centroids,
            num_frequent=self.num_frequent * factor, rare_centroids=self.rare_centroids,
            padding_id=self.padding_id, device=self.codebooks.device, dtype=self.codebooks.dtype,
        )  # fmt: skip
        grown.packed.copy_(self.packed.repeat(factor, 1))
        grown.packed_rare.copy_(self.packed_rare)
        grown.codebooks.copy_(self.codebooks)
        return grown

    @classmethod
    def from_table(
        cls,
        table: Tensor,
        num_parts: int,
        num_centroids: int,
        *,
        iterations: int = 20,
        seed: int = 0,
        padding_id: int | None = None,
    ) -> SubspaceEmbedding:
        """Compress a table: the parts of its rows are clustered by k-means.

        Parameters
        ----------
        table : Tensor
            ``(num_embeddings, embedding_dim)``.
        num_parts, num_centroids : int
            As for the class.
        iterations : int, default 20
            Of k-means.
        seed : int, default 0
            Of the first centroids.
        padding_id : int, optional
            An id that embeds to zeros.
        """
        if table.dim() != 2:
            raise ValueError(f"table must have 2 dimensions, got shape {tuple(table.shape)}")
        check_at_least(0, iterations=iterations)
        rows, dim = table.shape
        module = cls(
            rows, dim, num_parts, num_centroids, padding_id=padding_id, device=table.device,
            dtype=table.dtype,
        )  # fmt: skip
        codes = []
        with torch.no_grad():
            for number, part in enumerate(table.detach().chunk(num_parts, 1)):
                centroids, code = k_means(
                    part, num_centroids, iterations=iterations, seed=seed + number
                )
                module.codebooks[number] = centroids
                codes.append(code)
        module.set_codes(torch.stack(codes, 1))
        return module
