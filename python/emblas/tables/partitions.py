"""Modules for known vocabularies: an id is told apart by its digits, in small tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from emblas.tables.base import ComposedEmbedding, VocabularyEmbedding, check_at_least, largest
from emblas.tables.compose import compose_bag
from emblas.tables.composition import Composition, Part


class QuotientRemainderEmbedding(ComposedEmbedding):
    """Complementary partitions: one row for each digit of the id, multiplied, summed or joined.

    Shi et al. (2020), "Compositional Embeddings Using Complementary Partitions for Memory-Efficient
    Recommendation Systems". Two ids differ in at least one digit, so no two share all rows. Their
    quotient-remainder trick is the case of two digits; it is computed with integers throughout (a
    float division errs from id 2^24 on), and a bag is the sum of its ids' products.

    Parameters
    ----------
    num_embeddings : int
        Size of the vocabulary; ids are 0 to ``num_embeddings - 1``.
    embedding_dim : int
        With ``combine="concat"``, a multiple of the number of digits.
    moduli : int or sequence of int, optional
        Rows of the tables. An int ``m`` stands for ``(ceil(num_embeddings / m), m)``, the tables of
        quotients and of remainders. Default: about the square root, which takes the fewest rows.
    combine : {"product", "sum", "concat"}, default "product"
    coprime : bool, default False
        Take ``id mod m_j`` for each modulus (Chinese remainders) instead of the digits of a mixed
        radix; the moduli must have no common factors.
    padding_id, device, dtype : optional
        As for :class:`HashEmbedding`.

    Attributes
    ----------
    weight : Parameter
        The tables, one after the other, most significant digit first; see :meth:`tables`.
        Uniform on (-0.05, 0.05); for products, the first table on (0.9, 1.1).

    Raises
    ------
    ValueError
        If the moduli can't tell all ids apart, have common factors, or don't divide the dimension.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        moduli: int | Sequence[int] | None = None,
        *,
        combine: str = "product",
        coprime: bool = False,
        padding_id: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_embeddings < 1:
            raise ValueError(f"num_embeddings must be at least 1, got {num_embeddings}")
        if moduli is None:
            moduli = math.isqrt(num_embeddings - 1) + 1
        if isinstance(moduli, int):
            if moduli < 1:
                raise ValueError(f"moduli must be at least 1, got {moduli}")
            moduli = (-(-num_embeddings // moduli), moduli)
        if combine not in ("product", "sum", "concat"):
            raise ValueError(f"combine must be 'product', 'sum' or 'concat', got {combine!r}")
        if math.prod(moduli) < num_embeddings:
            raise ValueError(
                f"moduli must have a product of at least num_embeddings = {num_embeddings}, got "
                f"{tuple(moduli)} with {math.prod(moduli)}"
            )
        for a, b in combinations(moduli if coprime else (), 2):
            if math.gcd(a, b) > 1:
                raise ValueError(f"moduli must have no common factors, got {a} and {b}")
        width = embedding_dim
        if combine == "concat":
            if embedding_dim % len(moduli):
                raise ValueError(
                    f"embedding_dim must be a multiple of the {len(moduli)} digits to join them, "
                    f"got {embedding_dim}"
                )
            width //= len(moduli)
        parts, base = [], 0
        for digit, modulus in enumerate(moduli):
            step = 1 if coprime else math.prod(moduli[digit + 1 :])
            parts.append(
                Part(modulus, width, "radix", a=step, limit=num_embeddings, base=base,
                     column=digit * width if combine == "concat" else 0)
            )  # fmt: skip
            base += modulus * width
        self.num_embeddings, self.moduli = num_embeddings, tuple(moduli)
        self.combine, self.coprime = combine, coprime
        how = "sum" if combine == "concat" else combine
        super().__init__(
            Composition(tuple(parts), how), padding_id=padding_id, device=device, dtype=dtype
        )

    def reset_parameters(self) -> None:
        """Draw the tables anew."""
        super().reset_parameters()
        if self.composition.combine == "product":
            nn.init.uniform_(self.tables()[0].detach(), 0.9, 1.1)

    @torch.no_grad()
    def resize(self, factor: int) -> QuotientRemainderEmbedding:
        """Return a copy for ``factor`` times the vocabulary; ids of before keep their vectors.

        One table is repeated ``factor`` times: that of the most significant digit, or of coprime
        moduli the first whose multiple has no common factors with the others. A new id starts with
        the vector of the old one that differs from it by a multiple of the moduli's product. (More
        rows for the same vocabulary can't keep the vectors: ids of one quotient would be spread
        over several rows of remainders, each the old one times another quotient's row.)

        Parameters
        ----------
        factor : int
            1 or more.

        Raises
        ------
        ValueError
            If ``factor`` is below 1, or has common factors with several coprime moduli.
        """
        check_at_least(1, factor=factor)
        shared = [math.gcd(factor, modulus) > 1 for modulus in self.moduli]
        grows = 0
        if self.coprime and any(shared):
            if sum(shared) > 1:
                raise ValueError(
                    f"factor must have common factors with at most one of the moduli {self.moduli}"
                    f", got {factor}: no table could be repeated"
                )
            grows = shared.index(True)
        moduli = list(self.moduli)
        moduli[grows] *= factor
        grown = QuotientRemainderEmbedding(
            self.num_embeddings * factor, self.embedding_dim, moduli, combine=self.combine,
            coprime=self.coprime, padding_id=self.padding_id, device=self.weight.device,
            dtype=self.weight.dtype,
        )  # fmt: skip
        for number, (to, table) in enumerate(zip(grown.tables(), self.tables(), strict=True)):
            to.copy_(table.repeat(factor if number == grows else 1, 1))
        return grown

    @classmethod
    def from_budget(
        cls, num_bytes: int, num_embeddings: int, embedding_dim: int, **kwargs: Any
    ) -> QuotientRemainderEmbedding:
        """Build the module of two digits with the most rows that fit a number of bytes.

        Parameters
        ----------
        num_bytes : int
            What :attr:`num_bytes` may be at most.
        num_embeddings : int
            Size of the vocabulary.
        embedding_dim : int
            Width of the vectors.
        **kwargs
            Further arguments of the class.

        Raises
        ------
        ValueError
            If not even the fewest rows, about twice the square root of the vocabulary, fit.
        """
        least = math.isqrt(max(num_embeddings, 1) - 1) + 1

        def modulus(k: int) -> int:
            return min(least + k - 1, num_embeddings)

        def size(k: int) -> int:
            module = cls(num_embeddings, embedding_dim, modulus(k), **{**kwargs, "device": "meta"})
            return module.num_bytes

        k = largest(size, num_bytes, f"{least} remainders for {num_embeddings} ids")
        return cls(num_embeddings, embedding_dim, modulus(k), **kwargs)


class MemComEmbedding(VocabularyEmbedding):
    """MEmCom: a shared row, scaled by a number of the id's own: ``U[id mod m] V[id] (+ b[id])``.

    Pansare et al. (2022), "Learning Compressed Embeddings for On-Device Inference".

    Parameters
    ----------
    num_embeddings : int
        Size of the vocabulary; best numbered by falling frequency, so that frequent ids don't
        share a row with each other.
    embedding_dim : int
    num_rows : int
        Rows of the shared table, m.
    bias : bool, default False
        Add a number of the id's own to all dimensions.
    padding_id, device, dtype : optional
        As for :class:`HashEmbedding`.
    """

    _specified = ("num_embeddings", "embedding_dim", "num_rows", "has_bias")
    _size_argument = "num_rows"
    num_embeddings: int

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        num_rows: int,
        *,
        bias: bool = False,
        padding_id: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_id=padding_id)
        own = Composition((Part(num_embeddings, 1, "radix", a=1, limit=num_embeddings),))
        shared = Composition((Part(num_rows, embedding_dim, "radix", a=1, limit=num_embeddings),))
        self._own, self._shared = own, shared
        self.num_rows, self.has_bias = num_rows, bias
        self.weight = nn.Parameter(
            torch.empty(num_rows, embedding_dim, device=device, dtype=dtype).uniform_(-0.05, 0.05)
        )
        self.scale = nn.Parameter(torch.ones(num_embeddings, 1, device=device, dtype=dtype))
        self.bias = (
            nn.Parameter(torch.zeros(num_embeddings, 1, device=device, dtype=dtype))
            if bias
            else None
        )

    @torch.no_grad()
    def resize(self, factor: int) -> MemComEmbedding:
        """Return a copy with ``factor`` times the shared rows that gives the same vectors.

        As :meth:`HashEmbedding.resize`.
        """
        check_at_least(1, factor=factor)
        grown = MemComEmbedding(
            self.num_embeddings, self.embedding_dim, self.num_rows * factor, bias=self.has_bias,
            padding_id=self.padding_id, device=self.weight.device, dtype=self.weight.dtype,
        )  # fmt: skip
        grown.weight.copy_(self.weight.repeat(factor, 1))
        grown.scale.copy_(self.scale)
        if self.bias is not None and grown.bias is not None:
            grown.bias.copy_(self.bias)
        return grown

    def forward(
        self,
        ids: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
        *,
        mode: str = "sum",
    ) -> Tensor:
        """Embed ids, or the bags of ids that ``offsets`` delimit; see :func:`compose_bag`."""
        alone = offsets is None and per_sample_weights is None and mode == "sum"
        if alone and self.padding_id is None:
            return self.vectors(ids)
        return super().forward(ids, offsets, per_sample_weights, mode=mode)

    def vectors(self, ids: Tensor) -> Tensor:
        """Embed ids of any shape, distinct or not."""
        scale = compose_bag(ids, self.scale, self._own)[..., 0]
        out = compose_bag(ids, self.weight, self._shared, per_sample_weights=scale)
        return out if self.bias is None else out + compose_bag(ids, self.bias, self._own)


class TensorTrainEmbedding(VocabularyEmbedding):
    """TT-Rec: the table is a product of small cores, one for each digit of the id.

    Yin et al. (2021), "TT-Rec: Tensor Train Compression for Deep Learning Recommendation Models":
    ``e = reshape(G_1[i_1] G_2[i_2] ... G_k[i_k])`` with ``G_k[i]`` of shape
    ``(r_{k-1}, q_k r_k)``. Digits are taken most significant first, as in FBTT-Embedding.

    Parameters
    ----------
    row_factors : sequence of int
        Radices of the digits; their product is at least the size of the vocabulary.
    dim_factors : sequence of int
        As many; their product is the dimension.
    rank : int
        All inner ranks.
    padding_id, device, dtype : optional
        As for :class:`HashEmbedding`.

    Attributes
    ----------
    cores : ParameterList
        ``(row_factors[k], r_{k-1}, dim_factors[k] * r_k)``, normal, scaled so that an element of
        the product has the variance ``1 / (3 n)`` of a table that is uniform on
        ``+-1 / sqrt(n)``.
    """

    _specified = ("row_factors", "dim_factors", "rank")
    _size_argument = "rank"
    num_embeddings: int

    def __init__(
        self,
        row_factors: Sequence[int],
        dim_factors: Sequence[int],
        rank: int,
        *,
        padding_id: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if len(row_factors) != len(dim_factors) or len(row_factors) < 2:
            raise ValueError(
                "row_factors and dim_factors must have the same length of at least 2, got "
                f"{tuple(row_factors)} and {tuple(dim_factors)}"
            )
        if rank < 1 or min(*row_factors, *dim_factors) < 1:
            raise ValueError("rank and all factors must be at least 1")
        super().__init__(math.prod(row_factors), math.prod(dim_factors), padding_id=padding_id)
        self.row_factors, self.dim_factors = tuple(row_factors), tuple(dim_factors)
        self.rank = rank
        ranks = [1, *[rank] * (len(row_factors) - 1), 1]
        self.cores = nn.ParameterList(
            torch.empty(p, ranks[k], q * ranks[k + 1], device=device, dtype=dtype)
            for k, (p, q) in enumerate(zip(row_factors, dim_factors, strict=True))
        )
        variance = 1 / (3 * self.num_embeddings * rank ** (len(row_factors) - 1))
        for core in self.cores:
            nn.init.normal_(core, 0, variance ** (0.5 / len(row_factors)))

    def vectors(self, ids: Tensor) -> Tensor:
        """Embed distinct ids, int64 ``(ids,)``, as ``(ids, embedding_dim)``."""
        step, width = self.num_embeddings, 1
        out = self.cores[0].new_ones(len(ids), 1, 1)
        for core, radix, factor in zip(self.cores, self.row_factors, self.dim_factors, strict=True):
            step //= radix
            # (q_1 .. q_{k-1}, r_{k-1}) x (r_{k-1}, q_k r_k), then the next core's rank last.
            out = out.reshape(len(ids), width, core.shape[1]) @ core[ids // step % radix]
            width *= factor
        return out.reshape(len(ids), self.embedding_dim)

    @torch.no_grad()
    def resize(self, factor: int) -> TensorTrainEmbedding:
        """Return a copy for ``factor`` times the vocabulary; ids of before keep their vectors.

        The first core, of the most significant digit, is repeated. A new id starts with the vector
        of the old one that differs from it by a multiple of the old ``num_embeddings``.

        Parameters
        ----------
        factor : int
            1 or more.
        """
        check_at_least(1, factor=factor)
        first = self.cores[0]
        grown = TensorTrainEmbedding(
            (self.row_factors[0] * factor, *self.row_factors[1:]), self.dim_factors, self.rank,
            padding_id=self.padding_id, device=first.device, dtype=first.dtype,
        )  # fmt: skip
        for number, (to, core) in enumerate(zip(grown.cores, self.cores, strict=True)):
            to.copy_(core.repeat(factor if number == 0 else 1, 1, 1))
        return grown
