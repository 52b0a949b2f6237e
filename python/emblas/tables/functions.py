"""The public functions of hashed tables: arguments are checked here, by name."""

from __future__ import annotations

import torch
from torch import Tensor

from emblas import _op
from emblas.tables import op
from emblas.tables.compose import compose_bag
from emblas.tables.compose_op import MODES
from emblas.tables.ids import id_pattern as _id_pattern
from emblas.tables.ids import padding_pattern as _padding_pattern
from emblas.tables.optim import FusedOptimizer
from emblas.tables.spec import TableSpec

COMBINES = ("sum", "mean", "product", "concat")


def _check_spec(spec: object) -> TableSpec:
    if not isinstance(spec, TableSpec):
        raise TypeError(f"spec must be a TableSpec, got {type(spec).__name__}")
    return spec


def hash_keys(ids: Tensor, spec: TableSpec) -> Tensor:
    """Row numbers of ids in a hashed table.

    Parameters
    ----------
    ids : Tensor
        int64 or uint64 of any shape: 64-bit patterns, so that the two agree.
    spec : TableSpec
        How ids become rows.

    Returns
    -------
    Tensor
        int64 ``(*ids.shape, spec.num_hashes)``, each below ``spec.num_embeddings``.

    Raises
    ------
    TypeError
        If an argument has the wrong type or dtype.

    Examples
    --------
    >>> hash_keys(torch.tensor([0, 12345]), TableSpec(1000))
    tensor([[819, 695, 794,  84],
            [271, 795, 222,   7]])
    """
    pattern = _id_pattern(ids)
    return op.hash_keys(pattern, _check_spec(spec)).reshape(*ids.shape, spec.num_hashes)


def hash_bag(
    ids: Tensor,
    table: Tensor,
    spec: TableSpec,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
    *,
    mode: str = "sum",
    padding_id: int | None = None,
    combine: str = "sum",
    sparse: bool = False,
    optimizer: FusedOptimizer | None = None,
) -> Tensor:
    """Hash ids and combine their rows of a table, in one pass.

    Without ``offsets``, each id gets the sum of its ``spec.num_hashes`` rows. With ``offsets``,
    these are summed over the ids of each bag; an empty bag gives zeros.

    Parameters
    ----------
    ids : Tensor
        int64 or uint64 (64-bit patterns, any value): of any shape without ``offsets``,
        ``(ids,)`` with them.
    table : Tensor
        ``(spec.num_embeddings, dim)``, float32, float64, bfloat16 or float16; sums are kept in
        float32 (float64 for float64). Rows may be any stride apart.
    spec : TableSpec
        How ids become rows.
    offsets : Tensor, optional
        ``(bags + 1,)``, int32 or int64: bag ``b`` owns the ids ``offsets[b]`` to
        ``offsets[b + 1]``. The first is 0, the last is the number of ids, and they never decrease.
    per_sample_weights : Tensor, optional
        Weight of each id, of the shape of ``ids``; default 1. Or a weight of each of its rows,
        ``(*ids.shape, spec.num_hashes)``: the importance weights of hash embeddings. Gradients
        flow to them.
    mode : {"sum", "mean", "max"}, default "sum"
        How the ids of a bag are combined; the others need ``offsets`` and take no weights.
    padding_id : int, optional
        An id that contributes nothing and sends no gradient. Its rows belong to other ids too and
        are not touched.
    combine : {"sum", "mean", "product", "concat"}, default "sum"
        How the rows of an id are combined. ``concat`` makes the result ``num_hashes`` times as
        wide as the table.
    sparse : bool, default False
        Let the gradient of the table be a coalesced sparse tensor of the rows in use.
    optimizer : FusedOptimizer, optional
        Apply its step to the rows in use inside the backward pass; the table then gets no gradient.
        See :mod:`emblas.tables.optim`.

    Returns
    -------
    Tensor
        ``(*ids.shape, dim)``, or ``(bags, dim)`` with ``offsets``, in the dtype of ``table``. Rows
        are added in the order of the hashes, then of the bag. The bits of a result depend on its
        own ids only; those of the table's gradient on the batch, but not on the number of threads.

    Raises
    ------
    TypeError
        If an argument has the wrong type or dtype.
    ValueError
        If shapes, devices or offsets don't fit together.

    Notes
    -----
    With ``TableSpec(m, seed=s)``, the rows and sums are those of thinc's ``HashEmbed`` with the
    same seed, bit for bit. Formulas stand in ``csrc/tables/tables.h``. Anything but a plain sum is
    a case of :func:`emblas.tables.compose_bag`, for which the table must be contiguous.
    ``torch.func`` transforms are not supported.

    Examples
    --------
    >>> table = torch.arange(40.0).reshape(10, 4)
    >>> hash_bag(torch.tensor([0, 1]), table, TableSpec(10, seed=1))
    tensor([[84., 88., 92., 96.],
            [48., 52., 56., 60.]])
    """
    _check_spec(spec)
    _op.check_choice("mode", mode, MODES)
    _op.check_choice("combine", combine, COMBINES)
    pattern = _id_pattern(ids)
    _op.check_tensor("table", table, ndim=2, dtypes=_op.FLOATS, device=ids.device)
    if table.shape[0] != spec.num_embeddings:
        raise ValueError(
            f"table must have spec.num_embeddings = {spec.num_embeddings} rows, "
            f"got shape {tuple(table.shape)}"
        )
    if offsets is not None:
        _op.check_tensor("ids", ids, ndim=1)
        offsets = _op.offsets("offsets", offsets, ids.device)
    weights = per_sample_weights
    plain = mode == combine == "sum" and not spec.signed
    by_row = isinstance(weights, Tensor) and weights.dim() == ids.dim() + 1
    if not plain or by_row or sparse or optimizer is not None:
        return compose_bag(
            ids, table, spec.composition(table.shape[1], combine), offsets, weights, mode=mode,
            padding_id=padding_id, sparse=sparse, optimizer=optimizer,
        )  # fmt: skip
    if weights is not None:
        _op.check_tensor("per_sample_weights", weights, dtypes=_op.FLOATS, device=ids.device)
        if weights.shape != ids.shape:
            raise ValueError(
                f"per_sample_weights must have the shape of ids, {tuple(ids.shape)}, "
                f"got {tuple(weights.shape)}"
            )
        accumulator = torch.float64 if table.dtype == torch.float64 else torch.float32
        weights = weights.reshape(-1).to(accumulator).contiguous()
    out = op.hash_bag(
        pattern, _op.rows(table), offsets, weights, spec, _padding_pattern(padding_id)
    )
    return out if offsets is not None else out.reshape(*ids.shape, table.shape[1])
