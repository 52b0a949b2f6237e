"""What all table modules have in common."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from emblas.tables.compose import compose_bag
from emblas.tables.composition import Composition, Part
from emblas.tables.ids import checked_ids, padding_pattern
from emblas.tables.optim import FusedOptimizer


class TableModule(nn.Module):
    """Base of the table modules: an embedding of ids with a size that can be asked for.

    Attributes
    ----------
    embedding_dim : int
        Width of the vectors.
    """

    embedding_dim: int

    @property
    def num_parameters(self) -> int:
        """Numbers that are trained."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def num_bytes(self) -> int:
        """Bytes of all that is stored: parameters, and index tables, scales and codes."""
        stored = [*self.parameters(), *self.buffers()]
        return sum(tensor.numel() * tensor.element_size() for tensor in stored)

    # Attributes that fix what the stored numbers mean: the specification in the state dict.
    _specified: ClassVar[tuple[str, ...]] = ()

    def get_extra_state(self) -> Tensor:
        """Return the specification as a tensor, which every checkpoint format can hold."""
        specification = {name: getattr(self, name) for name in self._specified}
        return text_tensor(json.dumps({"class": type(self).__name__, **specification}))

    def set_extra_state(self, state: Tensor) -> None:
        """Raise ValueError unless the state dict was made with this module's specification."""
        saved, own = (json.loads(tensor_text(s)) for s in (state, self.get_extra_state()))
        if saved != own:
            raise ValueError(f"the state dict holds a table of {saved}, this module is {own}")

    def auxiliary_loss(self) -> Tensor:
        """Return what the method adds to the loss, of the lookups since the last call; or 0."""
        return next(self.parameters()).new_zeros(())

    def advance(self) -> None:
        """Do what the method does after each step of the optimizer: nothing, for most."""

    def resize(self, factor: int) -> TableModule:
        """Return a larger copy that gives the same vectors, where the method allows it.

        Raises
        ------
        TypeError
            If it doesn't; the message says what would work.
        """
        raise TypeError(
            f"{type(self).__name__} has no larger form with the same vectors: make a larger module "
            "and set it by fit_rows, or train it, as near to the vectors as it can come"
        )

    # The argument of the class that a budget decides on, None where there is none.
    _size_argument: ClassVar[str | None] = None
    _size_limit: ClassVar[int] = 2**31 - 1

    @classmethod
    def from_budget(cls, num_bytes: int, *args: Any, **kwargs: Any) -> TableModule:
        """Build the largest module that fits a number of bytes.

        Parameters
        ----------
        num_bytes : int
            What :attr:`num_bytes` may be at most.
        *args, **kwargs
            Arguments of the class, without the one that sets its size.

        Raises
        ------
        ValueError
            If not even the smallest fits; the message says what that takes.
        """
        name = cls._size_argument
        if name is None:
            raise TypeError(f"{cls.__name__} has no size to choose: its arguments fix it")

        def size(value: int) -> int:
            return cls(*args, **{name: value, "device": "meta", **kwargs}).num_bytes

        value = largest(size, num_bytes, f"{cls.__name__}({name}=1)", cls._size_limit)
        return cls(*args, **{name: value, **kwargs})


def largest(size: Callable[[int], int], budget: int, what: str, limit: int = 2**31 - 1) -> int:
    """Return the largest argument, 1 to ``limit``, at which ``size`` doesn't pass ``budget``."""
    least = size(1)
    if least > budget:
        raise ValueError(f"num_bytes must be at least {least}, the size of {what}, got {budget}")
    low, high = 1, 2
    while high <= limit and size(high) <= budget:
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= budget else (low, middle)
    return low


def text_tensor(text: str) -> Tensor:
    """Return the bytes of a text as a tensor."""
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def tensor_text(state: Tensor) -> str:
    """Return the text of :func:`text_tensor`."""
    return bytes(state.tolist()).decode()


class VocabularyEmbedding(TableModule):
    """Base of the modules that compute each distinct id's vector once, then hand it out.

    Subclasses give :meth:`vectors`. The distinct ids of a batch make up a small table, which one
    lookup spreads over the batch or pools in bags.

    Parameters
    ----------
    num_embeddings : int or None
        Size of the vocabulary; ids are 0 to ``num_embeddings - 1``. None takes any id.
    embedding_dim : int
        Width of the vectors.
    padding_id : int, optional
        An id that embeds to zeros and sends no gradient.
    """

    _specified: ClassVar[tuple[str, ...]] = ("num_embeddings", "embedding_dim")

    def __init__(
        self, num_embeddings: int | None, embedding_dim: int, *, padding_id: int | None = None
    ) -> None:
        super().__init__()
        check_at_least(1, num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_id = padding_id

    def vectors(self, ids: Tensor) -> Tensor:
        """Embed distinct ascending ids, int64 ``(ids,)``, as ``(ids, embedding_dim)``."""
        raise NotImplementedError

    def forward(
        self,
        ids: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
        *,
        mode: str = "sum",
    ) -> Tensor:
        """Embed ids, or the bags of ids that ``offsets`` delimit; see :func:`compose_bag`."""
        pattern = checked_ids(ids, self.num_embeddings)
        distinct, where = pattern.unique(return_inverse=True)
        padding = None
        if self.padding_id is not None:
            hits = (distinct == padding_pattern(self.padding_id)).nonzero()
            padding = int(hits) if len(hits) else None
        vectors = self.vectors(distinct)
        if len(distinct) == 0:  # a table needs a row
            vectors = torch.cat([vectors, vectors.new_zeros(1, self.embedding_dim)])
        rows = Composition((Part(len(vectors), self.embedding_dim, "radix", a=1),))
        return compose_bag(
            where.reshape(ids.shape), vectors.contiguous(), rows, offsets, per_sample_weights,
            mode=mode, padding_id=padding,
        )  # fmt: skip

    def table(self) -> Tensor:
        """Return the vectors of the whole vocabulary, ``(num_embeddings, embedding_dim)``."""
        if self.num_embeddings is None:
            raise TypeError(f"{type(self).__name__} has no vocabulary whose table could be made")
        device = next((t.device for t in [*self.parameters(), *self.buffers()]), None)
        return self.vectors(torch.arange(self.num_embeddings, device=device))

    def extra_repr(self) -> str:
        """Return the settings that ``repr`` shows."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self._specified)


def check_at_least(least: int, **arguments: int | None) -> None:
    """Raise ValueError for the first argument that is below ``least``; None passes."""
    for name, value in arguments.items():
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


class ComposedEmbedding(TableModule):
    """Base of the modules whose vectors are composed from rows: one flat table, one composition.

    Parameters
    ----------
    composition : Composition
        Stored with the state dict (as the bytes of its JSON text, a uint8 tensor): loading a table
        that was trained with another one raises ValueError, as its rows would mean nothing.
    shape : tuple of int, optional
        Of the table; default ``(composition.size,)``.
    padding_id : int, optional
        An id that embeds to zeros and sends no gradient.
    sparse : bool, default False
        Let the gradient be a coalesced sparse tensor; needs a shape ``(rows, width)``.
    device, dtype : optional
        Of the table.

    Attributes
    ----------
    weight : Parameter
        All tables, one after the other.
    fused_optimizer : FusedOptimizer or None
        Set by the optimizers of :mod:`emblas.tables.optim`.
    """

    weight: nn.Parameter
    fused_optimizer: FusedOptimizer | None

    def __init__(
        self,
        composition: Composition,
        shape: tuple[int, ...] | None = None,
        *,
        padding_id: int | None = None,
        sparse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.composition = composition
        self.embedding_dim = composition.dim
        self.padding_id = padding_id
        self.sparse = sparse
        self.fused_optimizer = None
        self.weight = nn.Parameter(
            torch.empty(shape or (composition.size,), device=device, dtype=dtype)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the tables anew: uniform on (-0.05, 0.05)."""
        nn.init.uniform_(self.weight, -0.05, 0.05)

    def tables(self) -> list[Tensor]:
        """Return the tables as views ``(rows, width)`` of the weight, in the order they lie in.

        Of overlapping rows, the one flat array.
        """
        flat, tables = self.weight.view(-1), {}
        for part in self.composition.parts:
            if part.row_stride < part.width:
                return [flat]
            rows = max(p.rows for p in self.composition.parts if p.base == part.base)
            region = flat[part.base : part.base + rows * part.width]
            tables[part.base] = region.view(rows, part.width)
        return [tables[base] for base in sorted(tables)]

    def forward(
        self,
        ids: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
        *,
        mode: str = "sum",
    ) -> Tensor:
        """Embed ids, or the bags of ids that ``offsets`` delimit; see :func:`compose_bag`."""
        return compose_bag(
            ids, self.weight, self.composition, offsets, per_sample_weights, mode=mode,
            padding_id=self.padding_id, sparse=self.sparse, optimizer=self.fused_optimizer,
        )  # fmt: skip

    def get_extra_state(self) -> Tensor:
        """Return the composition as a tensor, which every checkpoint format can hold."""
        return text_tensor(self.composition.to_json())

    def set_extra_state(self, state: Tensor) -> None:
        """Raise ValueError unless the state dict was made with this module's composition."""
        saved = Composition.from_json(tensor_text(state))
        if saved != self.composition:
            raise ValueError(
                f"the state dict holds tables of {saved}, this module is {self.composition}"
            )
