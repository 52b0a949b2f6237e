"""The public function of quantized tables: arguments are checked here, by name."""

from __future__ import annotations

import torch
from torch import Tensor

from emblas import _op
from emblas.tables import quantized_op
from emblas.tables.compose_op import MODES
from emblas.tables.ids import id_pattern, padding_pattern
from emblas.tables.packed_codes import row_bytes

BITS = (2, 4, 8, 16)


def check_bits(bits: int) -> None:
    """Raise ValueError unless integers may have so many bits."""
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, got {bits}")


def quantized_bag(
    ids: Tensor,
    packed: Tensor,
    scale: Tensor,
    bits: int,
    embedding_dim: int,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
    *,
    mode: str = "sum",
    padding_id: int | None = None,
    zero_point: Tensor | None = None,
) -> Tensor:
    """Look up rows of integers, multiply them by their scales and pool them in bags, in one pass.

    A row of the table is ``scale (integers - zero_point)``. No row of floats reaches memory but the
    results.

    Parameters
    ----------
    ids : Tensor
        int64, 0 to ``rows - 1``: of any shape without ``offsets``, ``(ids,)`` with them.
    packed : Tensor
        uint8 ``(rows, ceil(embedding_dim * bits / 8))``, contiguous: unsigned integers, packed
        least significant bit first.
    scale : Tensor
        Of each row, ``(rows,)`` or ``(rows, 1)``: float32, float64, bfloat16 or float16. Sums are
        kept in float32 (float64 for float64).
    bits : {2, 4, 8, 16}
        Of an integer.
    embedding_dim : int
        Integers of a row.
    offsets : Tensor, optional
        ``(bags + 1,)``, int32 or int64: bag ``b`` owns the ids ``offsets[b]`` to
        ``offsets[b + 1]``. The first is 0, the last is the number of ids, and they never decrease.
    per_sample_weights : Tensor, optional
        Weight of each id, of the shape of ``ids``, with mode "sum". Gradients flow to them, not to
        the table, which :class:`ALPT` trains.
    mode : {"sum", "mean", "max"}, default "sum"
        How the ids of a bag are combined; the others need ``offsets``.
    padding_id : int, optional
        An id, maybe outside the table, that contributes nothing (a mean doesn't count it).
    zero_point : Tensor, optional
        The integer of each row that stands for zero, ``(rows,)`` or ``(rows, 1)``: float32, or
        float64 where ``scale`` is; it needn't be whole, nor one that the row could hold. Default:
        ``2^(bits-1)`` for all, so that the integers are signed ones.

    Returns
    -------
    Tensor
        ``(*ids.shape, embedding_dim)``, or ``(bags, embedding_dim)`` with ``offsets``, in the dtype
        of ``scale``. An empty bag gives zeros. The bits of a row depend on its own ids only.

    Raises
    ------
    TypeError
        If an argument has the wrong type or dtype.
    ValueError
        If shapes, devices, offsets or values of ids don't fit together.

    Notes
    -----
    Formulas stand in ``csrc/tables/quantized.h``. ``torch.func`` transforms are not supported.

    Examples
    --------
    >>> packed = torch.tensor([[128, 129], [127, 0]], dtype=torch.uint8)
    >>> quantized_bag(torch.tensor([1, 0]), packed, torch.tensor([0.5, 2.0]), 8, 2)
    tensor([[  -2., -256.],
            [   0.,    0.5000]])
    """
    _op.check_choice("mode", mode, MODES)
    check_bits(bits)
    if embedding_dim < 1:
        raise ValueError(f"embedding_dim must be at least 1, got {embedding_dim}")
    pattern = id_pattern(ids).contiguous()
    _op.check_tensor("packed", packed, ndim=2, dtypes=(torch.uint8,), device=ids.device)
    size = row_bytes(embedding_dim, bits)
    if packed.shape[1] != size or not packed.is_contiguous():
        raise ValueError(
            f"packed must be contiguous with {size} bytes a row, for {embedding_dim} integers of "
            f"{bits} bits, got shape {tuple(packed.shape)}"
        )
    _op.check_tensor("scale", scale, dtypes=_op.FLOATS, device=ids.device)
    rows = packed.shape[0]
    if scale.shape not in ((rows,), (rows, 1)):
        raise ValueError(
            f"scale must have shape {(rows,)} or {(rows, 1)}, got {tuple(scale.shape)}"
        )
    if offsets is not None:
        _op.check_tensor("ids", ids, ndim=1)
        offsets = _op.offsets("offsets", offsets, ids.device)
    elif mode != "sum":
        raise ValueError(f"mode {mode!r} needs offsets: without them each id is on its own")
    weights = per_sample_weights
    if weights is not None:
        _op.check_tensor("per_sample_weights", weights, dtypes=_op.FLOATS, device=ids.device)
        if mode != "sum":
            raise ValueError(f"per_sample_weights need mode 'sum', got {mode!r}")
        if weights.shape != ids.shape:
            raise ValueError(
                f"per_sample_weights must have the shape of ids, {tuple(ids.shape)}, "
                f"got {tuple(weights.shape)}"
            )
        accumulator = torch.float64 if scale.dtype == torch.float64 else torch.float32
        weights = weights.reshape(-1).to(accumulator).contiguous()
    if zero_point is not None:
        exact = torch.float64 if scale.dtype == torch.float64 else torch.float32
        _op.check_tensor("zero_point", zero_point, dtypes=(exact,), device=ids.device)
        if zero_point.shape not in ((rows,), (rows, 1)):
            raise ValueError(
                f"zero_point must have shape {(rows,)} or {(rows, 1)}, "
                f"got {tuple(zero_point.shape)}"
            )
        zero_point = zero_point.reshape(-1).contiguous()
    out = quantized_op.quantized_bag(
        pattern, packed, scale.reshape(-1).contiguous(), offsets, weights, bits, embedding_dim,
        mode, padding_pattern(padding_id), zero_point,
    )  # fmt: skip
    return out if offsets is not None else out.reshape(*ids.shape, embedding_dim)
