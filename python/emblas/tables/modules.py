"""Modules of hashed tables: any id has a vector, no vocabulary is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn

from emblas.tables.base import (
    ComposedEmbedding,
    TableModule,
    check_at_least,
    tensor_text,
    text_tensor,
)
from emblas.tables.composition import Composition, Part
from emblas.tables.functions import hash_bag
from emblas.tables.optim import FusedOptimizer
from emblas.tables.spec import TableSpec


class HashEmbedding(TableModule):
    """Embedding of ids from an unbounded vocabulary: the sum of ``num_hashes`` rows of a table.

    The layer is thinc's and spaCy's ``HashEmbed``, whose tables load by
    ``weight.data.copy_(torch.from_numpy(model.get_param("E")))`` with the same seed. Two ids share
    a vector only if all their rows coincide, so a table of a few thousand rows tells apart hundreds
    of thousands of ids.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
        Shape of the table.
    num_hashes, hash, seed, allow_degenerate_seed, signed
        How ids become rows; see :class:`emblas.tables.TableSpec`. Layers side by side need
        different seeds. One signed hash is the hashing trick of Weinberger et al. (2009).
    padding_id : int, optional
        An id that embeds to zeros and sends no gradient.
    sparse : bool, default False
        Let the gradient be a coalesced sparse tensor.
    device, dtype : optional
        Of the table.

    Attributes
    ----------
    weight : Parameter
        The table, ``(num_embeddings, embedding_dim)``, drawn from the uniform distribution on
        (-0.1, 0.1).
    spec : TableSpec
        Stored with the state dict (as the bytes of its JSON text, a uint8 tensor). Loading a table
        that was trained with another one raises ValueError: its rows would mean nothing.
    """

    weight: nn.Parameter
    fused_optimizer: FusedOptimizer | None
    _size_argument = "num_embeddings"

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        num_hashes: int = 4,
        hash: str = "murmur3",
        seed: int = 0,
        allow_degenerate_seed: bool = False,
        signed: bool = False,
        padding_id: int | None = None,
        sparse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spec = TableSpec(num_embeddings, num_hashes, hash, seed, allow_degenerate_seed, signed)
        self.embedding_dim = embedding_dim
        self.padding_id = padding_id
        self.sparse = sparse
        self.fused_optimizer = None
        self.weight = nn.Parameter(
            torch.empty(num_embeddings, embedding_dim, device=device, dtype=dtype)
        )
        self.reset_parameters()

    @property
    def composition(self) -> Composition:
        """The rows of an id as a composition."""
        return self.spec.composition(self.embedding_dim)

    def reset_parameters(self) -> None:
        """Draw the table anew."""
        nn.init.uniform_(self.weight, -0.1, 0.1)

    def forward(
        self,
        ids: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
        *,
        mode: str = "sum",
    ) -> Tensor:
        """Embed ids, or the bags of ids that ``offsets`` delimit; see :func:`hash_bag`."""
        return hash_bag(
            ids, self.weight, self.spec, offsets, per_sample_weights, mode=mode,
            padding_id=self.padding_id, sparse=self.sparse, optimizer=self.fused_optimizer,
        )  # fmt: skip

    def resize(self, factor: int) -> HashEmbedding:
        """Return a copy with ``factor`` times the rows that gives the same vectors.

        A key mod ``factor * m`` is its row mod ``m`` plus a multiple of ``m``, so the old table is
        repeated: exact, and training then tells ids apart that shared a row.

        Parameters
        ----------
        factor : int
            1 or more.

        Raises
        ------
        ValueError
            If ``factor`` is below 1 or the table would pass its largest size.
        """
        check_at_least(1, factor=factor)
        spec = self.spec
        grown = HashEmbedding(
            spec.num_embeddings * factor, self.embedding_dim, num_hashes=spec.num_hashes,
            hash=spec.hash, seed=spec.seed, allow_degenerate_seed=spec.allow_degenerate_seed,
            signed=spec.signed, padding_id=self.padding_id, sparse=self.sparse,
            device=self.weight.device, dtype=self.weight.dtype,
        )  # fmt: skip
        with torch.no_grad():
            grown.weight.copy_(self.weight.repeat(factor, 1))
        return grown

    def get_extra_state(self) -> Tensor:
        """Return the specification as a tensor, which every checkpoint format can hold."""
        return text_tensor(self.spec.to_json())

    def set_extra_state(self, state: Tensor) -> None:
        """Raise ValueError unless the state dict was made with this module's specification."""
        saved = TableSpec.from_json(tensor_text(state))
        if saved != self.spec:
            raise ValueError(f"the state dict holds a table of {saved}, this module is {self.spec}")

    def extra_repr(self) -> str:
        """Return the settings that ``repr`` shows."""
        text = f"{self.spec.num_embeddings}, {self.weight.shape[1]}"
        text += f", num_hashes={self.spec.num_hashes}, hash={self.spec.hash!r}"
        text += f", seed={self.spec.seed}"
        return text if self.padding_id is None else f"{text}, padding_id={self.padding_id}"


class MultiHashEmbedding(ComposedEmbedding):
    """Several features, each with its own hashed table; their vectors stand side by side.

    The first layer of spaCy's ``MultiHashEmbed``: for NORM, PREFIX, SUFFIX and SHAPE of each token,
    a table of its own, four hashes summed, the results concatenated. One call for all features.

    Parameters
    ----------
    num_embeddings : sequence of int
        Rows of each feature's table.
    embedding_dim : int
        Width of each table; the result is ``len(num_embeddings)`` times as wide.
    num_hashes : int, default 4
    hash : {"murmur3", "splitmix64"}, default "murmur3"
    seed : int, default 16
        Of the first table; the others count on, as in spaCy. spaCy's is 8, which is degenerate
        (see :class:`TableSpec`): only :meth:`from_thinc` uses it.
    allow_degenerate_seed : bool, default False
    padding_id, device, dtype : optional
        As for :class:`HashEmbedding`.
    """

    def __init__(
        self,
        num_embeddings: Sequence[int],
        embedding_dim: int,
        *,
        num_hashes: int = 4,
        hash: str = "murmur3",
        seed: int = 16,
        allow_degenerate_seed: bool = False,
        padding_id: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._hashing: dict[str, Any] = {
            "num_hashes": num_hashes,
            "hash": hash,
            "seed": seed,
            "allow_degenerate_seed": allow_degenerate_seed,
        }
        parts: list[Part] = []
        base = 0
        for feature, rows in enumerate(num_embeddings):
            spec = TableSpec(rows, num_hashes, hash, seed + feature, allow_degenerate_seed)
            parts += (
                replace(part, base=base, column=feature * embedding_dim, feature=feature)
                for part in spec.composition(embedding_dim).parts
            )
            base += rows * embedding_dim
        super().__init__(
            Composition(tuple(parts)), (base // embedding_dim, embedding_dim),
            padding_id=padding_id, device=device, dtype=dtype,
        )  # fmt: skip

    def reset_parameters(self) -> None:
        """Draw the tables anew: uniform on (-0.1, 0.1), as thinc does."""
        nn.init.uniform_(self.weight, -0.1, 0.1)

    @torch.no_grad()
    def resize(self, factor: int) -> MultiHashEmbedding:
        """Return a copy with ``factor`` times the rows that gives the same vectors.

        As :meth:`HashEmbedding.resize`, for the table of each feature.
        """
        check_at_least(1, factor=factor)
        tables = self.tables()
        grown = MultiHashEmbedding(
            [len(table) * factor for table in tables], self.weight.shape[1],
            padding_id=self.padding_id, device=self.weight.device, dtype=self.weight.dtype,
            **self._hashing,
        )  # fmt: skip
        for to, table in zip(grown.tables(), tables, strict=True):
            to.copy_(table.repeat(factor, 1))
        return grown

    @classmethod
    def from_thinc(cls, tables: Sequence[npt.NDArray[Any]], seed: int = 8) -> MultiHashEmbedding:
        """Load the tables of spaCy's ``MultiHashEmbed``.

        Parameters
        ----------
        tables : sequence of ndarray
            The parameter ``E`` of each ``HashEmbed`` layer, in the order of the attributes.
        seed : int, default 8
            Of the first layer; the layers' seeds count on.
        """
        dims = {table.shape[1] for table in tables}
        if len(dims) != 1:
            raise ValueError(f"tables must all have one width, got {sorted(dims)}")
        module = cls(
            [len(table) for table in tables], dims.pop(), seed=seed, allow_degenerate_seed=True
        )
        with torch.no_grad():
            for to, table in zip(module.tables(), tables, strict=True):
                to.copy_(torch.from_numpy(table))
        return module


class WeightedHashEmbedding(TableModule):
    """Hash embeddings with learned importance weights: ``sum_j p_j(id) E[row_j(id)]``.

    Svenstrup, Hansen and Winther (2017), "Hash Embeddings for Efficient Word Representations",
    section 3. An id has ``num_hashes`` rows and, in a much longer table of numbers, one weight for
    each, so colliding ids can choose different rows. Ids are hashed anew for the weights (the
    paper's improved variant), so two ids are confused only if both hashes collide.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
        Shape of the table of vectors.
    num_importances : int
        Rows of the table of weights.
    num_hashes : int, default 2
    append_weights : bool, default False
        Append the ``num_hashes`` weights to the vector, as the paper does for text classification.
    hash, seed, padding_id, device, dtype : optional
        As for :class:`HashEmbedding`; the weights take the seed ``seed + 32``.

    Attributes
    ----------
    weight : Parameter
        ``(num_embeddings, embedding_dim)``, drawn from N(0, 0.1^2) as in the paper.
    importance : Parameter
        ``(num_importances, num_hashes)``, drawn from the uniform distribution on (-1, 1). (The
        paper's N(0, 0.0005^2) makes all vectors and gradients almost vanish at the start.)
    """

    weight: nn.Parameter
    importance: nn.Parameter
    _size_argument = "num_embeddings"

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        num_importances: int,
        *,
        num_hashes: int = 2,
        append_weights: bool = False,
        hash: str = "murmur3",
        seed: int = 0,
        padding_id: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spec = TableSpec(num_embeddings, num_hashes, hash, seed)
        self.importance_spec = TableSpec(num_importances, 1, hash, seed + 32)
        self.embedding_dim = embedding_dim + (num_hashes if append_weights else 0)
        self.append_weights = append_weights
        self.padding_id = padding_id
        self.weight = nn.Parameter(
            torch.empty(num_embeddings, embedding_dim, device=device, dtype=dtype)
        )
        self.importance = nn.Parameter(
            torch.empty(num_importances, num_hashes, device=device, dtype=dtype)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw both tables anew."""
        nn.init.normal_(self.weight, 0, 0.1)
        nn.init.uniform_(self.importance, -1, 1)

    def forward(self, ids: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Embed ids, or sum over the bags of ids that ``offsets`` delimit."""
        padding = self.padding_id
        weights = hash_bag(ids, self.importance, self.importance_spec, padding_id=padding)
        out = hash_bag(ids, self.weight, self.spec, offsets, weights, padding_id=padding)
        if not self.append_weights:
            return out
        if offsets is not None:
            weights = hash_bag(
                ids, self.importance, self.importance_spec, offsets, padding_id=padding
            )
        return torch.cat([out, weights], -1)

    @torch.no_grad()
    def resize(self, factor: int, importance_factor: int = 1) -> WeightedHashEmbedding:
        """Return a copy with more rows that gives the same vectors.

        As :meth:`HashEmbedding.resize`.

        Parameters
        ----------
        factor, importance_factor : int
            Times the rows of vectors and of weights.
        """
        check_at_least(1, factor=factor, importance_factor=importance_factor)
        spec = self.spec
        grown = WeightedHashEmbedding(
            spec.num_embeddings * factor, self.weight.shape[1],
            self.importance_spec.num_embeddings * importance_factor, num_hashes=spec.num_hashes,
            append_weights=self.append_weights, hash=spec.hash, seed=spec.seed,
            padding_id=self.padding_id, device=self.weight.device, dtype=self.weight.dtype,
        )  # fmt: skip
        grown.weight.copy_(self.weight.repeat(factor, 1))
        grown.importance.copy_(self.importance.repeat(importance_factor, 1))
        return grown

    def get_extra_state(self) -> Tensor:
        """Return both specifications as a tensor."""
        text = self.spec.to_json() + "\n" + self.importance_spec.to_json()
        return text_tensor(text)

    def set_extra_state(self, state: Tensor) -> None:
        """Raise ValueError unless the state dict was made with this module's specifications."""
        lines = tensor_text(state).split("\n")
        saved, own = (
            [TableSpec.from_json(line) for line in lines],
            [self.spec, self.importance_spec],
        )
        if saved != own:
            raise ValueError(f"the state dict holds tables of {saved}, this module is {own}")


class UnifiedEmbedding(ComposedEmbedding):
    """Feature multiplexing: all features share one table of chunks.

    Coleman et al. (2023), "Unified Embedding: Battle-Tested Feature Representations for Web-Scale
    ML Systems": the vector of feature ``t`` is ``chunks[t]`` rows side by side, each from its own
    hash of the value, so features of different width share one table.

    Parameters
    ----------
    num_embeddings, chunk_dim : int
        Shape of the table.
    chunks : sequence of int
        Chunks of each feature, 1 to 64; feature ``t`` is ``chunks[t] * chunk_dim`` wide.
    seed : int, default 0
        Feature ``t`` takes the keys of splitmix64 with seed ``seed + t``.
    padding_id, sparse, device, dtype : optional
        As for :class:`HashEmbedding`.
    """

    _size_argument = "num_embeddings"

    def __init__(
        self,
        num_embeddings: int,
        chunk_dim: int,
        chunks: Sequence[int],
        *,
        seed: int = 0,
        padding_id: int | None = None,
        sparse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not chunks or not all(1 <= count <= 64 for count in chunks):
            raise ValueError(f"chunks must hold numbers of 1 to 64, got {list(chunks)}")
        parts = [
            Part(num_embeddings, chunk_dim, "splitmix64", a=seed + feature, b=chunk,
                 column=(sum(chunks[:feature]) + chunk) * chunk_dim, feature=feature)
            for feature, count in enumerate(chunks)
            for chunk in range(count)
        ]  # fmt: skip
        self.chunks, self.seed = tuple(chunks), seed
        super().__init__(
            Composition(tuple(parts)), (num_embeddings, chunk_dim), padding_id=padding_id,
            sparse=sparse, device=device, dtype=dtype,
        )  # fmt: skip

    @torch.no_grad()
    def resize(self, factor: int) -> UnifiedEmbedding:
        """Return a copy with ``factor`` times the rows that gives the same vectors.

        As :meth:`HashEmbedding.resize`.
        """
        check_at_least(1, factor=factor)
        rows, chunk_dim = self.weight.shape
        grown = UnifiedEmbedding(
            rows * factor, chunk_dim, self.chunks, seed=self.seed, padding_id=self.padding_id,
            sparse=self.sparse, device=self.weight.device, dtype=self.weight.dtype,
        )  # fmt: skip
        grown.weight.copy_(self.weight.repeat(factor, 1))
        return grown


class RobeEmbedding(ComposedEmbedding):
    """ROBE-Z: chunks of a vector lie at hashed places of one memory array that all ids share.

    Desai, Chou and Shrivastava (2022), "Random Offset Block Embedding (ROBE) for compressed
    embedding tables in deep learning recommendation systems". Chunk ``c`` of id ``x`` starts at
    ``((x + offset) A + c B + C) mod P mod (memory_size - chunk_size + 1)``. The constants are those
    of the authors' code.

    Parameters
    ----------
    memory_size : int
        Numbers in the array.
    embedding_dim : int
        A multiple of ``chunk_size``.
    chunk_size : int
        Z. Larger chunks read memory in longer runs.
    offset : int, default 0
        Added to ids: tables that share an array differ by it.
    constants : (int, int, int), optional
        A, B and C.
    padding_id, device, dtype : optional
        As for :class:`HashEmbedding`.
    """

    PRIME = 2038074743

    def __init__(
        self,
        memory_size: int,
        embedding_dim: int,
        chunk_size: int,
        *,
        offset: int = 0,
        constants: tuple[int, int, int] = (871205356, 1825252241, 634329019),
        padding_id: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if chunk_size < 1 or embedding_dim % chunk_size:
            raise ValueError(
                f"embedding_dim must be a multiple of chunk_size, got {embedding_dim} and "
                f"{chunk_size}"
            )
        if memory_size < chunk_size:
            raise ValueError(
                f"memory_size must be at least chunk_size = {chunk_size}, got {memory_size}"
            )
        a, b, c = constants
        parts = tuple(
            Part(memory_size - chunk_size + 1, chunk_size, "linear", a=a,
                 b=(offset * a + chunk * b + c) % self.PRIME, p=self.PRIME, stride=1,
                 column=chunk * chunk_size)
            for chunk in range(embedding_dim // chunk_size)
        )  # fmt: skip
        super().__init__(Composition(parts), padding_id=padding_id, device=device, dtype=dtype)
        self.chunk_size, self.offset, self.constants = chunk_size, offset, constants

    @torch.no_grad()
    def resize(self, factor: int) -> RobeEmbedding:
        """Return a copy with ``factor`` times the numbers that gives the same vectors.

        As :meth:`HashEmbedding.resize`, but only chunks of one number can do it. Longer ones
        overlap: in a repeated array, a chunk that starts near the end of one copy would have to
        run on in its own copy and the next chunk to start anew at the same place.

        Parameters
        ----------
        factor : int
            1 or more.

        Raises
        ------
        ValueError
            If ``factor`` is below 1, or above it with a ``chunk_size`` above 1.
        """
        check_at_least(1, factor=factor)
        size = self.weight.numel()
        if factor > 1 and self.chunk_size > 1:
            raise ValueError(
                f"chunk_size must be 1 for an exact resize, got {self.chunk_size}: chunks overlap "
                "at the seams of a repeated array. Make a larger RobeEmbedding, and set it by "
                "fit_rows as near as it can come"
            )
        grown = RobeEmbedding(
            size * factor, self.embedding_dim, self.chunk_size, offset=self.offset,
            constants=self.constants, padding_id=self.padding_id, device=self.weight.device,
            dtype=self.weight.dtype,
        )  # fmt: skip
        grown.weight.copy_(self.weight.repeat(factor))
        return grown

    @classmethod
    def from_budget(
        cls, num_bytes: int, embedding_dim: int, chunk_size: int, **kwargs: Any
    ) -> RobeEmbedding:
        """Build the module whose array fills a number of bytes.

        Parameters
        ----------
        num_bytes : int
            What :attr:`num_bytes` may be at most.
        embedding_dim : int
            A multiple of ``chunk_size``.
        chunk_size : int
            Z.
        **kwargs
            Further arguments of the class.

        Raises
        ------
        ValueError
            If not even one chunk fits.
        """
        size = torch.empty(0, dtype=kwargs.get("dtype")).element_size()
        if num_bytes < chunk_size * size:
            raise ValueError(
                f"num_bytes must be at least {chunk_size * size}, the size of one chunk, "
                f"got {num_bytes}"
            )
        return cls(num_bytes // size, embedding_dim, chunk_size, **kwargs)
