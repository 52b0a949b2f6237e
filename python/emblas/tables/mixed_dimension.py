"""Tables whose blocks of ids have vectors of different width."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from emblas.tables.base import VocabularyEmbedding


def cut_blocks(ids: Tensor, block_sizes: Sequence[int]) -> list[Tensor]:
    """Cut ascending ids into those of each block, numbered from the block's first id."""
    ends = torch.tensor([*accumulate(block_sizes)], device=ids.device)
    parts = ids.tensor_split(torch.searchsorted(ids, ends).cpu()[:-1])
    starts = [0, *accumulate(block_sizes)]
    return [part - start for part, start in zip(parts, starts, strict=False)]


def check_blocks(block_sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the sizes of blocks; ValueError unless there are some, all at least 1."""
    sizes = tuple(block_sizes)
    if not sizes or min(sizes) < 1:
        raise ValueError(f"block_sizes must hold numbers of at least 1, got {list(block_sizes)}")
    return sizes


def popularity_dims(
    block_sizes: Sequence[int],
    embedding_dim: int,
    *,
    temperature: float = 0.3,
    powers_of_two: bool = False,
) -> list[int]:
    """Widths of blocks: the larger a block, and so the rarer its ids, the narrower.

    Ginart et al. (2021), "Mixed Dimension Embeddings with Application to Memory-Efficient
    Recommendation Systems", algorithm 2: ``d_i = d (n_i / n_min)^-temperature``, rounded, at least
    1; the smallest block has the full width ``d``.

    Parameters
    ----------
    block_sizes : sequence of int
        Ids of each block.
    embedding_dim : int
        Width of the smallest block.
    temperature : float, default 0.3
        0 (all alike) to 1.
    powers_of_two : bool, default False
        Round to powers of two.
    """
    if not 0 <= temperature <= 1:
        raise ValueError(f"temperature must be 0 to 1, got {temperature}")
    sizes = torch.tensor(check_blocks(block_sizes), dtype=torch.float64)
    dims = embedding_dim * (sizes / sizes.min()) ** -temperature
    if powers_of_two:
        dims = 2 ** dims.log2().round()
    return [min(embedding_dim, max(1, int(d))) for d in dims.round()]


class MixedDimensionEmbedding(VocabularyEmbedding):
    """MDE: blocks of ids with vectors of their own width, projected to a common one.

    Ginart et al. (2021), "Mixed Dimension Embeddings with Application to Memory-Efficient
    Recommendation Systems". Blocks are the fields of a model, one after the other, or ranges of
    frequency in one vocabulary. A block that is as wide as the result has no projection.

    Parameters
    ----------
    block_sizes : sequence of int
        Ids of each block; the vocabulary is all of them, block after block.
    embedding_dim : int
        Width of the result.
    dims : sequence of int, optional
        Width of each block, 1 to ``embedding_dim``; default ``popularity_dims(block_sizes,
        embedding_dim)``.
    padding_id, device, dtype : optional
        As for :class:`HashEmbedding`.

    Attributes
    ----------
    weights : ParameterList
        ``(block_sizes[i], dims[i])``.
    projections : ParameterList
        ``(dims[i], embedding_dim)``, of the narrower blocks in order. Both by Glorot and Bengio
        (2010), uniform.
    """

    _specified = ("block_sizes", "embedding_dim", "dims")

    def __init__(
        self,
        block_sizes: Sequence[int],
        embedding_dim: int,
        dims: Sequence[int] | None = None,
        *,
        padding_id: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = check_blocks(block_sizes)
        super().__init__(sum(sizes), embedding_dim, padding_id=padding_id)
        self.block_sizes = sizes
        self.dims = tuple(popularity_dims(sizes, embedding_dim) if dims is None else dims)
        if len(self.dims) != len(sizes):
            raise ValueError(
                f"dims must have a number for each of the {len(sizes)} blocks, got {len(self.dims)}"
            )
        if not all(1 <= dim <= embedding_dim for dim in self.dims):
            raise ValueError(f"dims must be 1 to {embedding_dim}, got {list(self.dims)}")

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        blocks = zip(sizes, self.dims, strict=True)
        self.weights = nn.ParameterList(parameter(size, dim) for size, dim in blocks)
        narrow = [dim for dim in self.dims if dim < embedding_dim]
        self.projections = nn.ParameterList(parameter(dim, embedding_dim) for dim in narrow)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw tables and projections anew."""
        for parameter in self.parameters():
            nn.init.xavier_uniform_(parameter)

    @classmethod
    def from_budget(
        cls, num_bytes: int, block_sizes: Sequence[int], embedding_dim: int, **kwargs: object
    ) -> MixedDimensionEmbedding:
        """Build the module with the lowest temperature whose tables fit a number of bytes.

        The temperature, by which widths fall with the sizes of blocks, is looked for in steps of
        1/100; with blocks of one size, or where 1 is not enough, all widths are cut alike.

        Raises
        ------
        ValueError
            If vectors one number wide don't fit.
        """
        trials = [popularity_dims(block_sizes, embedding_dim, temperature=t / 100)
                  for t in range(101)]  # fmt: skip
        trials += [[min(dim, most) for dim in trials[-1]] for most in range(embedding_dim, 0, -1)]
        size = 0
        for dims in trials:
            module = cls(block_sizes, embedding_dim, dims, **{**kwargs, "device": "meta"})  # type: ignore[arg-type]
            size = module.num_bytes
            if size <= num_bytes:
                return cls(block_sizes, embedding_dim, dims, **kwargs)  # type: ignore[arg-type]
        raise ValueError(f"num_bytes must be at least {size}, the size at width 1, got {num_bytes}")

    def vectors(self, ids: Tensor) -> Tensor:
        """Embed distinct ascending ids, int64 ``(ids,)``, as ``(ids, embedding_dim)``."""
        projections, out = iter(self.projections), []
        for own, weight in zip(cut_blocks(ids, self.block_sizes), self.weights, strict=True):
            rows = weight[own]
            out.append(rows if weight.shape[1] == self.embedding_dim else rows @ next(projections))
        return torch.cat(out)


class AutoDimEmbedding(VocabularyEmbedding):
    """AutoDim: the width of each block is searched by training a mixture of widths.

    Zhao et al. (2021), "AutoDim: Field-aware Embedding Dimension Search in Recommender Systems".
    Each block has a table of each candidate width. They are projected to the common width,
    normalized over the batch, so that their sizes compare, and weighted by a Gumbel-softmax of
    learned logits, which sharpens with the steps. :meth:`select` builds the
    :class:`MixedDimensionEmbedding` of the most likely widths, to be trained from new.

    In evaluation, weights are the softmax of the logits, and running statistics normalize.

    Parameters
    ----------
    block_sizes : sequence of int
        As for :class:`MixedDimensionEmbedding`.
    embedding_dim : int
        Width of the result.
    candidates : sequence of int
        Widths to choose from, ascending, 1 to ``embedding_dim``.
    decay : float, default 5e-5
        The temperature is ``max(0.01, 1 - decay * steps)``; steps are calls of :meth:`advance`.
    padding_id, device, dtype : optional
        As for :class:`HashEmbedding`.

    Attributes
    ----------
    logits : Parameter
        ``(blocks, candidates)``, zeros at first. The paper trains them on validation batches, the
        tables on training batches.
    """

    _specified = ("block_sizes", "embedding_dim", "candidates")

    def __init__(
        self,
        block_sizes: Sequence[int],
        embedding_dim: int,
        candidates: Sequence[int],
        *,
        decay: float = 5e-5,
        padding_id: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = check_blocks(block_sizes)
        super().__init__(sum(sizes), embedding_dim, padding_id=padding_id)
        self.block_sizes, self.candidates = sizes, tuple(candidates)
        if not all(a < b for a, b in zip((0, *candidates), candidates, strict=False)) or (
            not candidates or candidates[-1] > embedding_dim
        ):
            raise ValueError(
                f"candidates must ascend from 1 to at most {embedding_dim}, got {list(candidates)}"
            )
        if not decay >= 0:
            raise ValueError(f"decay must not be negative, got {decay}")
        self.decay, self.steps = decay, 0

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        pairs = [(size, dim) for size in sizes for dim in self.candidates]
        self.weights = nn.ParameterList(parameter(size, dim) for size, dim in pairs)
        self.projections = nn.ParameterList(parameter(dim, embedding_dim) for _, dim in pairs)
        self.norms = nn.ModuleList(
            nn.BatchNorm1d(embedding_dim, affine=False, device=device, dtype=dtype) for _ in pairs
        )
        self.logits = nn.Parameter(
            torch.zeros(len(sizes), len(self.candidates), device=device, dtype=dtype)
        )
        for weight in [*self.weights, *self.projections]:
            nn.init.xavier_uniform_(weight)

    @property
    def temperature(self) -> float:
        """Of the Gumbel-softmax."""
        return max(0.01, 1 - self.decay * self.steps)

    def advance(self) -> None:
        """Count a step: the temperature falls."""
        self.steps += 1

    def vectors(self, ids: Tensor) -> Tensor:
        """Embed distinct ascending ids, int64 ``(ids,)``, as ``(ids, embedding_dim)``."""
        if self.training:
            shares = nn.functional.gumbel_softmax(self.logits, tau=self.temperature, dim=1)
        else:
            shares = self.logits.softmax(1)
        out, number = [], 0
        for block, own in enumerate(cut_blocks(ids, self.block_sizes)):
            total = self.weights[0].new_zeros(len(own), self.embedding_dim)
            for share in shares[block]:
                rows = self.weights[number][own] @ self.projections[number]
                # A batch of one has no variance.
                norm = self.norms[number] if len(own) > 1 or not self.training else nn.Identity()
                total = total + share * norm(rows)
                number += 1
            out.append(total)
        return torch.cat(out)

    def select(self) -> MixedDimensionEmbedding:
        """Return a new module whose blocks have the most likely widths."""
        dims = [self.candidates[choice] for choice in self.logits.argmax(1).tolist()]
        return MixedDimensionEmbedding(
            self.block_sizes, self.embedding_dim, dims, padding_id=self.padding_id,
            device=self.logits.device, dtype=self.logits.dtype,
        )  # fmt: skip
