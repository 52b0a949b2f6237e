"""Tables that lose elements while they are trained, down to a sparse form."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from emblas import _op
from emblas.tables.base import VocabularyEmbedding, check_at_least
from emblas.tables.sparse import SparseEmbedding


def keep_largest(table: Tensor, count: int) -> Tensor:
    """Return the mask of the ``count`` elements of largest magnitude, earlier ones in a tie."""
    order = table.detach().abs().flatten().sort(descending=True, stable=True).indices
    mask = torch.zeros(table.numel(), dtype=torch.bool, device=table.device)
    mask[order[:count]] = True
    return mask.view(table.shape)


class PrunedEmbedding(VocabularyEmbedding):
    """Base of the tables that are pruned: a full table in training, sparse when frozen.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
        Shape of the table.
    padding_id, device, dtype : optional
        As for :class:`HashEmbedding`.

    Attributes
    ----------
    weight : Parameter
        ``(num_embeddings, embedding_dim)``, uniform on (-0.05, 0.05).
    """

    num_embeddings: int

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        padding_id: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_id=padding_id)
        weight = torch.empty(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.weight = nn.Parameter(nn.init.uniform_(weight, -0.05, 0.05))

    @torch.no_grad()
    def table(self) -> Tensor:
        """Return the vectors of the whole vocabulary, as in evaluation."""
        training, self.training = self.training, False
        table = super().table()
        self.training = training
        return table

    def mask(self, num_elements: int | None = None) -> Tensor:
        """Return which elements are kept, bool ``(num_embeddings, embedding_dim)``.

        Parameters
        ----------
        num_elements : int, optional
            The largest so many of the table; default: all that aren't zero.
        """
        table = self.table()
        return table != 0 if num_elements is None else keep_largest(table, num_elements)

    def freeze(self, num_elements: int | None = None) -> SparseEmbedding:
        """Return the sparse form; it has the same vectors if no number of elements is given.

        Parameters
        ----------
        num_elements : int, optional
            Keep the largest so many; default: all that aren't zero.
        """
        return SparseEmbedding.from_table(
            self.table(), self.mask(num_elements), padding_id=self.padding_id
        )


class PepEmbedding(PrunedEmbedding):
    """PEP: elements are shrunk by learned thresholds, and many end at zero.

    Liu et al. (2021), "Learnable Embedding Sizes for Recommender Systems": an element ``v`` is
    looked up as ``sign(v) max(|v| - sigmoid(s), 0)``. The paper then trains the kept elements anew
    from their first values: ``SparseEmbedding.from_table(first_table, module.mask())``.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
        Shape of the table.
    granularity : {"element", "row", "column", "table"}, default "element"
        What has a threshold of its own.
    threshold : float, default -15
        Of ``s`` at the start. The lower, the later pruning begins; the paper's -150 leaves the
        sigmoid at 0 in float32, and without a gradient.
    padding_id, device, dtype : optional
        As for :class:`HashEmbedding`.

    Attributes
    ----------
    weight : Parameter
        As for :class:`PrunedEmbedding`.
    threshold : Parameter
        ``(num_embeddings or 1, embedding_dim or 1)``, s.
    """

    _specified = ("num_embeddings", "embedding_dim", "granularity")

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        granularity: str = "element",
        threshold: float = -15.0,
        padding_id: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_embeddings, embedding_dim, padding_id=padding_id, device=device, dtype=dtype
        )
        shapes = {
            "element": (num_embeddings, embedding_dim),
            "row": (num_embeddings, 1),
            "column": (1, embedding_dim),
            "table": (1, 1),
        }
        self.granularity = _op.check_choice("granularity", granularity, tuple(shapes))
        self.threshold = nn.Parameter(
            torch.full(shapes[granularity], threshold, device=device, dtype=dtype)
        )

    def vectors(self, ids: Tensor) -> Tensor:
        """Embed distinct ids, int64 ``(ids,)``, as ``(ids, embedding_dim)``."""
        threshold = self.threshold[ids] if len(self.threshold) > 1 else self.threshold
        rows = nn.functional.embedding(ids, self.weight)
        return rows.sign() * (rows.abs() - threshold.sigmoid()).relu()


class DeepLightEmbedding(PrunedEmbedding):
    """DeepLight: the smallest elements are set to zero again and again, ever more of them.

    Deng et al. (2021), "DeepLight: Deep Lightweight Feature Interactions for Accelerating CTR
    Predictions in Ad Serving": every ``interval`` steps, a share of ``sparsity * (1 - decay ^ (step
    / 100))`` of the table. Elements that are zero can grow again until the next time.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
        Shape of the table.
    sparsity : float
        Share of zeros in the end, 0 to 1.
    interval : int, default 10
        Steps (calls of :meth:`advance`) from one pruning to the next.
    decay : float, default 0.99
        How slowly the share grows, 0 to 1.
    padding_id, device, dtype : optional
        As for :class:`HashEmbedding`.

    Attributes
    ----------
    weight : Parameter
        As for :class:`PrunedEmbedding`.
    steps : Tensor
        int64: steps so far.
    """

    _specified = ("num_embeddings", "embedding_dim", "sparsity", "interval", "decay")
    steps: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        sparsity: float,
        *,
        interval: int = 10,
        decay: float = 0.99,
        padding_id: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_embeddings, embedding_dim, padding_id=padding_id, device=device, dtype=dtype
        )
        for name, value in (("sparsity", sparsity), ("decay", decay)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be 0 to 1, got {value}")
        check_at_least(1, interval=interval)
        self.sparsity, self.interval, self.decay = sparsity, interval, decay
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))

    def vectors(self, ids: Tensor) -> Tensor:
        """Embed distinct ids, int64 ``(ids,)``, as ``(ids, embedding_dim)``."""
        return nn.functional.embedding(ids, self.weight)

    @torch.no_grad()
    def advance(self) -> None:
        """Count a step, and prune if it is time."""
        self.steps += 1
        step = int(self.steps)
        if step % self.interval == 0:
            share = self.sparsity * (1 - self.decay ** (step / 100))
            kept = math.ceil(self.weight.numel() * (1 - share))
            self.weight.mul_(keep_largest(self.weight, kept))


class AutoSrhEmbedding(PrunedEmbedding):
    """AutoSrh: groups of ids of like frequency learn which dimensions they need.

    Kong et al. (2022), "AutoSrh: An Embedding Dimensionality Search Framework for Tabular Data
    Prediction": the vector of an id is multiplied by the ``alpha`` of its group, which an L1
    penalty (:meth:`auxiliary_loss`) draws to zero. ``freeze(num_elements)`` keeps the largest
    products.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
        Shape of the table; ids are numbered by falling frequency.
    num_groups : int, default 6
        Groups of as many ids each.
    penalty : float, default 1e-5
        Times the sum of ``|alpha|``.
    padding_id, device, dtype : optional
        As for :class:`HashEmbedding`.

    Attributes
    ----------
    weight : Parameter
        As for :class:`PrunedEmbedding`.
    alpha : Parameter
        ``(num_groups, embedding_dim)``, ones at first.
    """

    _specified = ("num_embeddings", "embedding_dim", "num_groups")

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        num_groups: int = 6,
        penalty: float = 1e-5,
        padding_id: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_embeddings, embedding_dim, padding_id=padding_id, device=device, dtype=dtype
        )
        check_at_least(1, num_groups=num_groups)
        if not penalty >= 0:
            raise ValueError(f"penalty must not be negative, got {penalty}")
        self.num_groups, self.penalty = num_groups, penalty
        self.alpha = nn.Parameter(torch.ones(num_groups, embedding_dim, device=device, dtype=dtype))

    def vectors(self, ids: Tensor) -> Tensor:
        """Embed distinct ids, int64 ``(ids,)``, as ``(ids, embedding_dim)``."""
        group = ids * self.num_groups // self.num_embeddings
        return nn.functional.embedding(ids, self.weight) * self.alpha[group]

    def auxiliary_loss(self) -> Tensor:
        """Return the penalty."""
        return self.penalty * self.alpha.abs().sum()
