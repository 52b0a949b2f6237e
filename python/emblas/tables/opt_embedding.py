"""OptEmbed: which ids and which dimensions a table needs, learned in one training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from emblas.tables.base import check_at_least
from emblas.tables.mixed_dimension import check_blocks
from emblas.tables.pruned import PrunedEmbedding


class _Step(torch.autograd.Function):
    """``1[x > 0]``, with the derivative ``2 - 4|x|`` up to 0.4, 0.4 up to 1, and 0 beyond."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        size = x.abs()
        slope = torch.where(size <= 0.4, 2 - 4 * size, torch.where(size <= 1, 0.4, 0.0))
        return grad * slope


class OptEmbedding(PrunedEmbedding):
    """OptEmbed: ids with small vectors are dropped, and blocks lose their last dimensions.

    Lyu et al. (2022), "OptEmbed: Learning Optimal Embedding Table for Click-through Rate
    Prediction". An id is kept if the L1 norm of its vector is above the learned threshold of its
    block; ``alpha sum exp(-threshold)``, the :meth:`auxiliary_loss`, pushes thresholds up. In
    training each id's vector is cut to a random width, so that one table is good at all of them.
    :meth:`search` then looks for the widths of blocks by an evolutionary search, and sets them. The
    paper trains the kept elements anew: ``SparseEmbedding.from_table(first_table, module.mask())``.

    Parameters
    ----------
    block_sizes : sequence of int
        Ids of each block (the fields of a model); the vocabulary is all of them, block after block.
    embedding_dim : int
        Width of the vectors.
    alpha : float, default 1e-5
        Weight of the auxiliary loss; the paper searches 1e-6 to 1e-4.
    padding_id, device, dtype : optional
        As for :class:`HashEmbedding`.

    Attributes
    ----------
    weight : Parameter
        As for :class:`PrunedEmbedding`.
    threshold : Parameter
        ``(blocks,)``, zeros at first. The paper gives it a lower learning rate, 1e-4.
    widths : Tensor
        int64 ``(blocks,)``: dimensions that are used in evaluation; all at first.
    """

    _specified = ("block_sizes", "embedding_dim")
    block_ends: Tensor
    widths: Tensor

    def __init__(
        self,
        block_sizes: Sequence[int],
        embedding_dim: int,
        *,
        alpha: float = 1e-5,
        padding_id: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = check_blocks(block_sizes)
        super().__init__(
            sum(sizes), embedding_dim, padding_id=padding_id, device=device, dtype=dtype
        )
        if not alpha >= 0:
            raise ValueError(f"alpha must not be negative, got {alpha}")
        self.block_sizes, self.alpha = sizes, alpha
        self.threshold = nn.Parameter(torch.zeros(len(sizes), device=device, dtype=dtype))
        ends = torch.tensor(sizes, device=device).cumsum(0)
        self.register_buffer("block_ends", ends, persistent=False)
        self.register_buffer("widths", torch.full_like(ends, embedding_dim))

    def vectors(self, ids: Tensor) -> Tensor:
        """Embed distinct ids, int64 ``(ids,)``, as ``(ids, embedding_dim)``."""
        rows = nn.functional.embedding(ids, self.weight)
        block = torch.searchsorted(self.block_ends, ids, right=True)
        kept = _Step.apply(rows.abs().sum(1) - self.threshold[block])
        if self.training:
            widths = torch.randint(1, self.embedding_dim + 1, (len(ids),), device=ids.device)
        else:
            widths = self.widths[block]
        inside = torch.arange(self.embedding_dim, device=ids.device) < widths[:, None]
        return rows * kept[:, None] * inside

    def auxiliary_loss(self) -> Tensor:
        """Return ``alpha sum exp(-threshold)``."""
        return self.alpha * (-self.threshold).exp().sum()

    def search(
        self,
        evaluate: Callable[[], float],
        *,
        generations: int = 30,
        population: int = 20,
        parents: int = 10,
        mutation: float = 0.1,
        seed: int = 0,
    ) -> float:
        """Search the widths of blocks by evolution, and set the best.

        Each generation keeps the best ``parents``, and adds as many mutants of them (each width
        drawn anew with probability ``mutation``) and as many crossings.

        Parameters
        ----------
        evaluate : callable
            Returns the loss of the model on validation data, with the module in evaluation mode
            and :attr:`widths` set to a candidate.
        generations, population, parents : int, default 30, 20, 10
            ``population`` candidates to begin with, the full widths among them.
        mutation : float, default 0.1
            See above.
        seed : int, default 0
            Of the draws.

        Returns
        -------
        float
            The loss of the best widths.
        """
        check_at_least(1, generations=generations, population=population, parents=parents)
        if not 0 <= mutation <= 1:
            raise ValueError(f"mutation must be 0 to 1, got {mutation}")
        generator = torch.Generator().manual_seed(seed)
        blocks = len(self.block_sizes)
        training, self.training = self.training, False
        losses: dict[tuple[int, ...], float] = {}

        def draw(*shape: int) -> Tensor:
            return torch.randint(1, self.embedding_dim + 1, shape, generator=generator)

        def chance(p: float) -> Tensor:
            return torch.rand(blocks, generator=generator) < p

        candidates = [torch.full((blocks,), self.embedding_dim), *draw(population - 1, blocks)]
        best: list[tuple[int, ...]] = []
        for _ in range(generations):
            for candidate in candidates:
                key = tuple(candidate.tolist())
                if key not in losses:
                    self.widths.copy_(candidate)
                    losses[key] = float(evaluate())
            best = sorted(losses, key=lambda key: (losses[key], sum(key), key))[:parents]
            pool = torch.tensor(best)
            picks = torch.randint(len(pool), (3, parents), generator=generator)
            candidates = [
                *(torch.where(chance(mutation), draw(blocks), pool[i]) for i in picks[0]),
                *(torch.where(chance(0.5), pool[i], pool[j]) for i, j in picks[1:].t()),
            ]
        self.widths.copy_(torch.tensor(best[0]))
        self.training = training
        return losses[best[0]]
