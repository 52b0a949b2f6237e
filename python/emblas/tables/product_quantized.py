"""Embeddings that are trained to be product-quantized."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from emblas import _op
from emblas.tables.base import VocabularyEmbedding, check_at_least, largest
from emblas.tables.packed_codes import row_bytes
from emblas.tables.subspace import MAX_CENTROIDS, SubspaceEmbedding, check_parts, code_bits


class ProductQuantizedEmbedding(VocabularyEmbedding):
    """DPQ: each part of a vector is replaced by a centroid, chosen and learned end to end.

    Chen, Li and Sun (2020), "Differentiable Product Quantization for End-to-End Embedding
    Compression". Training keeps a full table of queries; :meth:`freeze` keeps the codes and the
    centroids, with the same vectors.

    - ``"vq"``: the nearest centroid. The gradient of the vector goes to the query (straight
      through); centroids follow the queries by :meth:`auxiliary_loss`, the mean of
      ``(centroid - query)^2`` over the last lookup.
    - ``"sx"``: the centroid whose key has the largest inner product with the query, by a softmax
      with a hard forward pass; the keys are dropped when frozen.

    There is no batch normalization of the distances, which would let codes depend on the batch.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
        Shape of the table; the dimension is a multiple of ``num_parts``.
    num_parts : int, default 8
        Parts of a vector.
    num_centroids : int, default 32
        Centroids of each part, 1 to 65536.
    kind : {"vq", "sx"}, default "vq"
        How centroids are chosen.
    padding_id, device, dtype : optional
        As for :class:`HashEmbedding`.

    Attributes
    ----------
    queries : Parameter
        ``(num_embeddings, embedding_dim)``, uniform on (-0.05, 0.05).
    centroids : Parameter
        ``(num_parts, num_centroids, embedding_dim / num_parts)``, drawn alike.
    keys : Parameter or None
        Of ``"sx"``, of the shape of ``centroids``.
    """

    _specified: ClassVar[tuple[str, ...]] = (
        "num_embeddings", "embedding_dim", "num_parts", "num_centroids", "kind",
    )  # fmt: skip
    num_embeddings: int

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        num_parts: int = 8,
        num_centroids: int = 32,
        *,
        kind: str = "vq",
        padding_id: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_id=padding_id)
        check_parts(embedding_dim, num_parts, num_centroids)
        self.kind = _op.check_choice("kind", kind, ("vq", "sx"))
        self.num_parts, self.num_centroids = num_parts, num_centroids
        self._auxiliary_loss: Tensor | None = None

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        shape = num_parts, num_centroids, embedding_dim // num_parts
        self.queries = parameter(num_embeddings, embedding_dim)
        self.centroids = parameter(*shape)
        self.keys = parameter(*shape) if kind == "sx" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw queries, keys and centroids anew."""
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.05, 0.05)

    @classmethod
    def from_budget(
        cls,
        num_bytes: int,
        num_embeddings: int,
        embedding_dim: int,
        num_parts: int = 8,
        **kwargs: Any,
    ) -> ProductQuantizedEmbedding:
        """Build the module with the most centroids whose frozen form fits a number of bytes.

        Raises
        ------
        ValueError
            If not even one centroid for each part fits.
        """

        def size(count: int) -> int:
            return cls._frozen_bytes(num_embeddings, embedding_dim, num_parts, count, **kwargs)

        count = largest(size, num_bytes, "one centroid for each part", MAX_CENTROIDS)
        return cls(num_embeddings, embedding_dim, num_parts, count, **kwargs)

    @classmethod
    def _frozen_bytes(
        cls, rows: int, dim: int, num_parts: int, num_centroids: int, **kwargs: Any
    ) -> int:
        element = torch.empty(0, dtype=kwargs.get("dtype")).element_size()
        return rows * row_bytes(num_parts, code_bits(num_centroids)) + num_centroids * dim * element

    def scores(self, ids: Tensor) -> Tensor:
        """Return how well each centroid suits ids, ``(ids, num_parts, num_centroids)``."""
        queries = self.queries[ids].unflatten(1, (self.num_parts, -1))
        keys = self.centroids if self.keys is None else self.keys
        products = torch.einsum("npw,pkw->npk", queries, keys)
        if self.kind == "sx":
            return products
        return 2 * products - keys.square().sum(2)  # of -|q - c|^2, what depends on c

    def vectors(self, ids: Tensor) -> Tensor:
        """Embed distinct ids, int64 ``(ids,)``, as ``(ids, embedding_dim)``."""
        scores = self.scores(ids)
        codes = scores.argmax(2)
        values = self.centroids[torch.arange(self.num_parts, device=ids.device), codes]
        # The terms x - x.detach() are zero: they only carry gradients.
        if self.kind == "sx":
            soft = scores.softmax(2)
            shift = torch.einsum("npk,pkw->npw", soft - soft.detach(), self.centroids)
            return (values + shift).flatten(1)
        queries = self.queries[ids].unflatten(1, (self.num_parts, -1))
        self._auxiliary_loss = (values - queries.detach()).square().mean() if len(ids) else None
        return (values.detach() + (queries - queries.detach())).flatten(1)

    def auxiliary_loss(self) -> Tensor:
        """Return the mean squared distance of queries and centroids of the last lookup."""
        loss, self._auxiliary_loss = self._auxiliary_loss, None
        return super().auxiliary_loss() if loss is None else loss

    @torch.no_grad()
    def freeze(self) -> SubspaceEmbedding:
        """Return the form for inference, codes and centroids, with the same vectors."""
        module = SubspaceEmbedding(
            self.num_embeddings, self.embedding_dim, self.num_parts, self.num_centroids,
            padding_id=self.padding_id, device=self.queries.device, dtype=self.queries.dtype,
            **self._granularity(),
        )  # fmt: skip
        module.codebooks.copy_(self.centroids)
        ids = torch.arange(self.num_embeddings, device=self.queries.device)
        module.set_codes(torch.cat([self.scores(part).argmax(2) for part in ids.split(2**14)]))
        return module

    @torch.no_grad()
    def resize(self, factor: int) -> ProductQuantizedEmbedding:
        """Return a copy for ``factor`` times the vocabulary; ids of before keep their vectors.

        Queries are repeated: a new id starts with that of the old one that differs from it by a
        multiple of the old ``num_embeddings``, and so with its vector, but that in
        :class:`MultiGranularQuantizedEmbedding` new ids are rare ones.

        Parameters
        ----------
        factor : int
            1 or more.
        """
        check_at_least(1, factor=factor)
        grown = type(self)(
            self.num_embeddings * factor, self.embedding_dim, self.num_parts, self.num_centroids,
            kind=self.kind, padding_id=self.padding_id, device=self.queries.device,
            dtype=self.queries.dtype, **self._granularity(),
        )  # fmt: skip
        grown.queries.copy_(self.queries.repeat(factor, 1))
        grown.centroids.copy_(self.centroids)
        if self.keys is not None and grown.keys is not None:
            grown.keys.copy_(self.keys)
        return grown

    def _granularity(self) -> dict[str, int]:
        return {}


class MultiGranularQuantizedEmbedding(ProductQuantizedEmbedding):
    """MGQE: product quantization in which rare ids may use only the first few centroids.

    Kang et al. (2020), "Learning Multi-granular Quantized Embeddings for Large-Vocab Categorical
    Features in Recommender Systems". Frozen, rare ids also store shorter codes.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
        As for :class:`ProductQuantizedEmbedding`; ids are numbered by falling frequency.
    num_parts : int, default 4
        Parts of a vector.
    num_centroids : int, default 256
        Of the frequent ids.
    num_frequent : int, optional
        How many ids are frequent; default: a tenth.
    rare_centroids : int, optional
        Of the others; default: a quarter of ``num_centroids``, at least 1.
    kind, padding_id, device, dtype : optional
        As for :class:`ProductQuantizedEmbedding`.
    """

    _specified = (*ProductQuantizedEmbedding._specified, "num_frequent", "rare_centroids")

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        num_parts: int = 4,
        num_centroids: int = 256,
        *,
        num_frequent: int | None = None,
        rare_centroids: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, num_parts, num_centroids, **kwargs)
        self.num_frequent, self.rare_centroids = self._defaults(
            num_embeddings, num_centroids, num_frequent, rare_centroids
        )
        if not 0 <= self.num_frequent <= num_embeddings:
            raise ValueError(f"num_frequent must be 0 to {num_embeddings}, got {num_frequent}")
        if not 1 <= self.rare_centroids <= num_centroids:
            raise ValueError(f"rare_centroids must be 1 to {num_centroids}, got {rare_centroids}")

    @staticmethod
    def _defaults(
        rows: int, centroids: int, num_frequent: int | None, rare_centroids: int | None
    ) -> tuple[int, int]:
        frequent = rows // 10 if num_frequent is None else num_frequent
        return frequent, max(1, centroids // 4) if rare_centroids is None else rare_centroids

    @classmethod
    def _frozen_bytes(
        cls,
        rows: int,
        dim: int,
        num_parts: int,
        num_centroids: int,
        *,
        num_frequent: int | None = None,
        rare_centroids: int | None = None,
        **kwargs: Any,
    ) -> int:
        frequent, rare = cls._defaults(rows, num_centroids, num_frequent, rare_centroids)
        whole = super()._frozen_bytes(frequent, dim, num_parts, num_centroids, **kwargs)
        return whole + (rows - frequent) * row_bytes(num_parts, code_bits(rare))

    def scores(self, ids: Tensor) -> Tensor:
        """Return how well each centroid suits ids; -inf for those that rare ids can't use."""
        scores = super().scores(ids)
        number = torch.arange(self.num_centroids, device=ids.device)
        barred = (ids >= self.num_frequent)[:, None] & (number >= self.rare_centroids)
        return scores.masked_fill(barred[:, None], -torch.inf)

    def _granularity(self) -> dict[str, int]:
        return {"num_frequent": self.num_frequent, "rare_centroids": self.rare_centroids}
