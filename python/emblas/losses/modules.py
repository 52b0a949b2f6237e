"""Losses as torch modules, and the wrappers that train through them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from emblas.losses.checks import positive
from emblas.losses.functions import info_nce
from emblas.losses.gather import gather_rows

Pair = tuple[Tensor | None, Tensor | None]  # of queries and of documents


class InfoNCE(nn.Module):
    """Contrastive loss in linear memory; see :func:`emblas.losses.info_nce`.

    Parameters
    ----------
    temperature : float, default 0.05
        Where it starts, if it is learned.
    learn_temperature : bool, default False
        Make it a parameter, kept as its logarithm ``log_temperature``.
    symmetric : bool, default False
        Documents to queries as well.
    gather : bool, default False
        Take the documents of all processes of ``torch.distributed`` as negatives (and all queries,
        if ``symmetric``, where each query has one positive and no negatives of its own), with
        their ids. The mean over processes, which ``DistributedDataParallel`` takes of the
        gradients, is then that of one process with all rows (for equal numbers of rows). A mask is
        refused, and if ``symmetric``, a margin or guide too, which are seen from the query's side.
    **settings
        Further keyword arguments of :func:`emblas.losses.info_nce`, for every call.
    """

    log_temperature: nn.Parameter | None

    def __init__(
        self,
        temperature: float = 0.05,
        *,
        learn_temperature: bool = False,
        symmetric: bool = False,
        gather: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__()
        positive("temperature", temperature)
        start = nn.Parameter(torch.tensor(math.log(temperature))) if learn_temperature else None
        self.register_parameter("log_temperature", start)
        self._temperature = temperature
        self.symmetric = symmetric
        self.gather = gather
        self.settings = settings

    @property
    def temperature(self) -> float | Tensor:
        """The temperature: a number, or a tensor that requires grad if it is learned."""
        return self._temperature if self.log_temperature is None else self.log_temperature.exp()

    def forward(self, queries: Tensor, documents: Tensor, **options: Any) -> Tensor:
        """Loss of ``queries`` (n, dim) against ``documents`` (m, dim).

        ``options`` are keyword arguments of :func:`emblas.losses.info_nce` for this call:
        targets, negatives, ids, masks.

        Raises
        ------
        TypeError, ValueError
            As :func:`emblas.losses.info_nce` does, and for options that ``gather`` excludes.
        RuntimeError
            If ``gather`` is set and ``torch.distributed`` is not initialized.
        """
        options = {**self.settings, **options, "temperature": self.temperature}
        if not self.gather:
            return info_nce(queries, documents, symmetric=self.symmetric, **options)
        if options.get("mask") is not None:
            raise ValueError("mask is not supported with gather=True")
        if self.symmetric and options.get("reduction") == "none":
            raise ValueError("reduction must be 'mean' or 'sum' with symmetric=True, got 'none'")
        rows = torch.arange(queries.shape[0], device=queries.device)
        targets = options.pop("targets", None)
        targets = rows if targets is None else targets
        ids = options.pop("query_ids", None), options.pop("document_ids", None)
        guide = options.pop("guide", None) or (None, None)
        loss = _gathered((queries, documents), targets, ids, guide, **options)
        if not self.symmetric:
            return loss
        if targets.dim() != 1 or options.pop("negatives", None) is not None:
            raise ValueError("with gather=True, symmetric takes one positive each and no negatives")
        if guide[0] is not None or options.get("margin") is not None:
            raise ValueError("with gather=True, symmetric takes no margin and no guide")
        # The other direction, of this process' documents, is an InfoNCE of its own.
        there = targets >= 0
        rows, targets = rows[there], targets[there]
        if options.get("weights") is not None:
            options["weights"] = options["weights"][there]
        ids = (None if ids[1] is None else ids[1][targets]), ids[0]
        back = _gathered((documents[targets], queries), rows, ids, (None, None), **options)
        return (loss + back) / 2

    def extra_repr(self) -> str:
        """Return the settings that ``repr`` shows."""
        settings = {"symmetric": self.symmetric, "gather": self.gather, **self.settings}
        shown = [f"{name}={value!r}" for name, value in settings.items() if value is not False]
        return ", ".join([f"temperature={self._temperature}", *shown])


def _gathered(
    vectors: tuple[Tensor, Tensor], targets: Tensor, ids: Pair, guide: Pair, **options: Any
) -> Tensor:
    """InfoNCE of own queries against the documents of all processes, in one direction."""
    queries, documents = vectors
    everything, begin = gather_rows(documents)
    # What one process gives, all must give.
    options["query_ids"], options["document_ids"] = ids[0], _of_all(ids[1])
    if guide[0] is not None:
        options["guide"] = guide[0], _of_all(guide[1])
    targets = torch.where(targets < 0, -1, targets + begin)
    return info_nce(queries, everything, targets=targets, **options)


def _of_all(x: Tensor | None) -> Tensor | None:
    return None if x is None else gather_rows(x)[0]


class MatryoshkaLoss(nn.Module):
    """Sum of a loss over prefixes of the embeddings, from one pass through the encoder.

    ``loss(x[..., :d], y[..., :d], ...)`` for each ``d`` of ``dims``: the prefixes are views, which
    emblas' losses read in place and (those with cosines) normalize for themselves.

    Parameters
    ----------
    loss : callable
        Loss of embeddings, such as :class:`InfoNCE`.
    dims : sequence of int
        Lengths of the prefixes; the full length is taken only if it is among them.
    weights : sequence of float, optional
        Of each prefix; default 1.
    samples : int, optional
        Take that many prefixes at random in each step, instead of all. If ``loss`` is, or has among
        its modules, an :class:`InfoNCE` with ``gather=True``, the first process draws for all. (A
        function that gathers needs the same state of torch's random generator in all processes.)

    Raises
    ------
    ValueError
        If ``dims`` is empty or holds a length below 1, or ``weights`` or ``samples`` don't fit it.

    Notes
    -----
    Kusupati et al. 2022, arXiv 2205.13147 (eq. 1).
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        dims: Sequence[int],
        weights: Sequence[float] | None = None,
        *,
        samples: int | None = None,
    ) -> None:
        super().__init__()
        if not dims or min(dims) < 1:
            raise ValueError(f"dims must hold positive lengths, got {list(dims)}")
        if weights is not None and len(weights) != len(dims):
            raise ValueError(f"weights must have {len(dims)} values, one per dim, got {weights}")
        if samples is not None and not 1 <= samples <= len(dims):
            raise ValueError(f"samples must lie between 1 and {len(dims)}, got {samples}")
        self.loss = loss
        self.dims = list(dims)
        self.weights = [1.0] * len(dims) if weights is None else list(weights)
        self.samples = samples

    def forward(self, *embeddings: Tensor, **options: Any) -> Tensor:
        """Weighted sum of ``loss`` over the prefixes of ``embeddings``.

        Positional arguments that are vectors of the full length are cut; others, such as labels
        ``(n,)``, and all keyword arguments pass to the loss as they are, except ``negatives``,
        which are cut too.
        """
        if not embeddings:
            raise ValueError("embeddings must hold at least one tensor, got none")
        full = embeddings[0].shape[-1]
        if max(self.dims) > full:
            raise ValueError(f"embeddings must have at least {max(self.dims)} dims, got {full}")
        chosen: Sequence[int] = range(len(self.dims))
        if self.samples is not None:
            drawn = torch.randperm(len(self.dims)).to(embeddings[0].device)
            if any(isinstance(m, InfoNCE) and m.gather for m in self.modules()):
                # Gathered rows must be equally long, whatever the processes' random states.
                drawn, _ = gather_rows(drawn)
            chosen = drawn[: self.samples].tolist()
        negatives = options.pop("negatives", None)
        total = torch.zeros((), device=embeddings[0].device)
        for i in chosen:
            dim = self.dims[i]
            own = {} if negatives is None else {"negatives": negatives[..., :dim]}
            cut = (x[..., :dim] if x.dim() > 1 and x.shape[-1] == full else x for x in embeddings)
            loss = self.loss(*cut, **own, **options)
            total = total + self.weights[i] * loss
        return total

    def extra_repr(self) -> str:
        """Return the settings that ``repr`` shows."""
        return f"dims={self.dims}, weights={self.weights}, samples={self.samples}"


class CachedLoss(nn.Module):
    """A loss of large batches through an encoder that is run on small ones (GradCache).

    All mini-batches are encoded without keeping activations, the loss is taken of all embeddings
    together, and each mini-batch is encoded once more when its gradient arrives. So the loss sees
    the whole batch, while the memory of the encoder is that of one mini-batch; the price is a
    second forward pass. Gradients equal those of the plain loss, dropout included: random states
    and autocast are restored for the second pass.

    Parameters
    ----------
    encoder : callable
        Takes a mini-batch, returns embeddings ``(rows, dim)``. Parameters in training may belong to
        it; batch normalization sees mini-batches.
    loss : callable
        Loss of the embeddings, such as :class:`InfoNCE`.
    mini_batch : int, default 32
        Rows that the encoder sees at a time.

    Notes
    -----
    Gao et al. 2021, arXiv 2101.06983. For several processes, wrap this module (not the encoder) in
    ``DistributedDataParallel`` and give :class:`InfoNCE` ``gather=True``.

    Examples
    --------
    >>> encoder = nn.Linear(4, 2)
    >>> loss = CachedLoss(encoder, InfoNCE(), mini_batch=2)
    >>> loss(torch.ones(6, 4), torch.ones(6, 4)).backward()
    """

    def __init__(
        self, encoder: Callable[..., Tensor], loss: Callable[..., Tensor], mini_batch: int = 32
    ) -> None:
        super().__init__()
        if mini_batch < 1:
            raise ValueError(f"mini_batch must be at least 1 row, got {mini_batch}")
        self.encoder = encoder
        self.loss = loss
        self.mini_batch = mini_batch

    def forward(self, *batches: Any, **options: Any) -> Tensor:
        """``loss(encoder(batch), ..., **options)`` of each of ``batches``.

        A batch is a tensor, a sequence of rows, or a mapping of such, as tokenizers return.
        """
        return self.loss(*(self.encode(batch) for batch in batches), **options)

    def encode(self, batch: Any) -> Tensor:
        """Embeddings ``(rows, dim)`` of a batch, whose activations are not kept."""
        rows = _rows(batch)
        parts = [
            _part(batch, slice(i, i + self.mini_batch)) for i in range(0, rows, self.mini_batch)
        ]
        if not parts:
            raise ValueError("batches must not be empty")
        return torch.cat([checkpoint(self.encoder, p, use_reentrant=False) for p in parts])

    def extra_repr(self) -> str:
        """Return the settings that ``repr`` shows."""
        return f"mini_batch={self.mini_batch}"


def _rows(batch: Any) -> int:
    if not isinstance(batch, Mapping):
        return len(batch)
    counts = {name: len(value) for name, value in batch.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"values of a batch must have the same number of rows, got {counts}")
    return next(iter(counts.values()))


def _part(batch: Any, rows: slice) -> Any:
    if isinstance(batch, Mapping):
        return {name: value[rows] for name, value in batch.items()}
    return batch[rows]
