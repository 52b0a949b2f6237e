"""The public function of composed tables: arguments are checked here, by name."""

from __future__ import annotations

import torch
from torch import Tensor

from emblas import _op
from emblas.tables import compose_op
from emblas.tables.composition import Composition
from emblas.tables.ids import id_pattern, padding_pattern
from emblas.tables.optim import FusedOptimizer


def compose_bag(
    ids: Tensor,
    table: Tensor,
    composition: Composition,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
    *,
    mode: str = "sum",
    padding_id: int | None = None,
    sparse: bool = False,
    optimizer: FusedOptimizer | None = None,
) -> Tensor:
    """Compose vectors of ids from rows of tables, and pool them in bags, in one pass.

    One operator for the family: hashing trick, multiple hashes, partitions (quotient-remainder,
    mixed radix, Chinese remainder), feature multiplexing, memory arrays, and several features with
    tables of different width at once. Row numbers never reach memory in the forward pass.

    Parameters
    ----------
    ids : Tensor
        int64 or uint64 (64-bit patterns). One feature: of any shape without ``offsets``, ``(ids,)``
        with them. Several: ``(..., features)`` without, with them ``(ids,)``, feature after
        feature.
    table : Tensor
        ``composition.size`` elements, contiguous, of any shape: all tables one after the other.
        float32, float64, bfloat16 or float16; sums are kept in float32 (float64 for float64).
    composition : Composition
        Which rows belong to an id, and how they are combined.
    offsets : Tensor, optional
        ``(features * bags + 1,)``, int32 or int64: the ids of bag ``b`` of feature ``f`` are those
        from ``offsets[f * bags + b]`` to the next offset. The first is 0, the last is the number
        of ids, and they never decrease.
    per_sample_weights : Tensor, optional
        Weight of each id, of the shape of ``ids``; or of each of its parts,
        ``(*ids.shape, parts)`` (every feature must have as many, and they must be summed). Only
        with mode "sum". Gradients flow to them.
    mode : {"sum", "mean", "max"}, default "sum"
        How the ids of a bag are combined, as in ``nn.EmbeddingBag``; the others need ``offsets``.
    padding_id : int, optional
        An id that contributes nothing (a mean doesn't count it) and sends no gradient.
    sparse : bool, default False
        Let the gradient of the table be a coalesced sparse tensor. Needs a table
        ``(rows, width)`` that all parts share.
    optimizer : FusedOptimizer, optional
        Apply its step to the rows in use inside the backward pass; the table gets no gradient.

    Returns
    -------
    Tensor
        ``(*ids.shape, dim)``, of several features ``(*ids.shape[:-1], dim)``, with ``offsets``
        ``(bags, dim)``. An empty bag gives zeros. The bits of a row depend on its own ids only;
        those of a gradient on the batch, but not on the number of threads.

    Raises
    ------
    TypeError
        If an argument has the wrong type or dtype.
    ValueError
        If shapes, devices, offsets or values of ids don't fit together.

    Notes
    -----
    Formulas stand in ``csrc/tables/compose.h``. ``torch.func`` transforms are not supported;
    ``sparse`` and ``optimizer`` need eager mode.
    """
    if not isinstance(composition, Composition):
        raise TypeError(f"composition must be a Composition, got {type(composition).__name__}")
    _op.check_choice("mode", mode, compose_op.MODES)
    pattern = id_pattern(ids).contiguous()
    _op.check_tensor("table", table, dtypes=_op.FLOATS, device=ids.device)
    if table.numel() != composition.size:
        raise ValueError(
            f"table must have composition.size = {composition.size} elements, "
            f"got shape {tuple(table.shape)}"
        )
    if not table.is_contiguous():
        raise ValueError("table must be contiguous")
    features = composition.num_features
    if offsets is not None:
        _op.check_tensor("ids", ids, ndim=1)
        offsets = _op.offsets("offsets", offsets, ids.device)
        if (offsets.shape[0] - 1) % features:
            raise ValueError(
                f"offsets must have features * bags + 1 elements for {features} features, "
                f"got {offsets.shape[0]}"
            )
    elif features > 1 and (ids.dim() == 0 or ids.shape[-1] != features):
        raise ValueError(
            f"ids must have shape (..., {features}), one column for each feature, "
            f"got {tuple(ids.shape)}"
        )
    if mode != "sum" and offsets is None:
        raise ValueError(f"mode {mode!r} needs offsets: without them each id is on its own")
    weights = _weights(per_sample_weights, ids, table, composition, mode)
    if sparse and table.dim() != 2:
        raise ValueError(f"table must have 2 dimensions if sparse, got shape {tuple(table.shape)}")
    out = compose_op.compose_bag(
        pattern, table, offsets, weights, composition, mode, padding_pattern(padding_id),
        sparse=sparse, optimizer=optimizer,
    )  # fmt: skip
    if offsets is not None:
        return out
    return out.reshape(*(ids.shape if features == 1 else ids.shape[:-1]), composition.dim)


def _weights(
    weights: Tensor | None, ids: Tensor, table: Tensor, composition: Composition, mode: str
) -> Tensor | None:
    if weights is None:
        return None
    _op.check_tensor("per_sample_weights", weights, dtypes=_op.FLOATS, device=ids.device)
    if mode != "sum":
        raise ValueError(f"per_sample_weights need mode 'sum', got {mode!r}")
    accumulator = torch.float64 if table.dtype == torch.float64 else torch.float32
    weights = weights.to(accumulator)
    if weights.shape == ids.shape:
        return weights.reshape(-1).contiguous()
    counts = {composition.parts_of(feature) for feature in range(composition.num_features)}
    parts = counts.pop()
    if counts or weights.shape != (*ids.shape, parts):
        by_part = "" if counts else f" or {(*ids.shape, parts)}"
        raise ValueError(
            f"per_sample_weights must have the shape of ids, {tuple(ids.shape)}{by_part}, "
            f"got {tuple(weights.shape)}"
        )
    if composition.combine == "product" and parts > 1:
        raise ValueError("per_sample_weights of parts need parts that are summed, not a product")
    return weights.reshape(-1, parts).contiguous()
