"""Checks of the arguments that the functions of attention share, by name."""

from __future__ import annotations

import torch
from torch import Tensor

from emblas import _op
from emblas.attention.op import Shaping


def accumulator(x: Tensor) -> torch.dtype:
    """Return the dtype in which numbers of ``x`` are added."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def vectors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check queries, keys and values."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _op.check_tensor(name, tensor, ndim=3, dtypes=_op.FLOATS)
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {tensor.device}")
    _, heads, head_dim = q.shape
    for name, dim in (("q", head_dim), ("v", v.shape[2])):
        if not 1 <= dim <= 512:
            raise ValueError(f"the head_dim of {name} must be from 1 to 512, got {dim}")
    if k.shape[2] != head_dim:
        raise ValueError(f"k must have the head_dim of q, {head_dim}, got {k.shape[2]}")
    if k.shape[:2] != v.shape[:2]:
        raise ValueError(
            "k and v must have the same tokens and heads, got "
            f"{tuple(k.shape[:2])} and {tuple(v.shape[:2])}"
        )
    if k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(
            f"the heads of q must be a multiple of the heads of k, got {heads} and {k.shape[1]}"
        )


def offsets(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, device: torch.device) -> tuple[Tensor, ...]:
    """Return the offsets of the sequences as kernels take them."""
    offsets_q = _op.offsets("cu_seqlens_q", cu_seqlens_q, device)
    offsets_k = _op.offsets("cu_seqlens_k", cu_seqlens_k, device)
    if offsets_q.shape != offsets_k.shape:
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must have the same length, got "
            f"{offsets_q.shape[0]} and {offsets_k.shape[0]}"
        )
    return offsets_q, offsets_k


def window(window_size: tuple[int, int], causal: bool) -> tuple[int, int]:
    """Return the radii to the left and to the right."""
    left, right = window_size
    if left < -1 or right < -1:
        raise ValueError(f"window_size must hold radii of at least 0, or -1, got {window_size}")
    return left, 0 if causal else right


def _ids(name: str, ids: Tensor | None, size: int, device: torch.device) -> Tensor | None:
    if ids is None:
        return None
    _op.check_tensor(name, ids, ndim=1, dtypes=(torch.int32, torch.int64), device=device)
    if ids.shape[0] != size:
        raise ValueError(f"{name} must have {size} elements, got {ids.shape[0]}")
    return ids.to(torch.int32).contiguous()


def _slopes(slopes: Tensor | None, q: Tensor, batch: int) -> Tensor | None:
    if slopes is None:
        return None
    _op.check_tensor("alibi_slopes", slopes, dtypes=_op.FLOATS, device=q.device)
    heads = q.shape[1]
    if slopes.shape not in ((heads,), (batch, heads)):
        raise ValueError(
            f"alibi_slopes must have the shape (heads,) or (batch, heads), ({heads},) or "
            f"({batch}, {heads}), got {tuple(slopes.shape)}"
        )
    return slopes.detach().reshape(-1, heads).to(accumulator(q)).contiguous()


def _distance_bias(relative_bias: tuple[Tensor, Tensor] | None, q: Tensor) -> Tensor | None:
    """Bias (heads, 2 radius + 1) of each distance."""
    if relative_bias is None:
        return None
    table, lookup = relative_bias
    _op.check_tensor("relative_bias[0]", table, ndim=2, dtypes=_op.FLOATS, device=q.device)
    integers = (torch.int32, torch.int64)
    _op.check_tensor("relative_bias[1]", lookup, ndim=1, dtypes=integers, device=q.device)
    if table.shape[0] != q.shape[1]:
        raise ValueError(
            f"relative_bias[0] must have one row per head of q, {q.shape[1]}, got {table.shape[0]}"
        )
    if lookup.shape[0] % 2 == 0:
        raise ValueError(
            f"relative_bias[1] must have an odd length, 2 radius + 1, got {lookup.shape[0]}"
        )
    return table.index_select(1, lookup).to(accumulator(q)).contiguous()


def _disentangled(
    disentangled: tuple[Tensor | None, Tensor | None, Tensor] | None, q: Tensor, k: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Position vectors as kernels take them, and the lookup of their rows."""
    if disentangled is None:
        return None, None, None
    position_keys, position_queries, lookup = disentangled
    integers = (torch.int32, torch.int64)
    _op.check_tensor("disentangled[2]", lookup, ndim=1, dtypes=integers, device=q.device)
    if lookup.shape[0] % 2 == 0:
        raise ValueError(
            f"disentangled[2] must have an odd length, 2 radius + 1, got {lookup.shape[0]}"
        )

    def checked(table: Tensor | None, i: int, name: str, heads: int) -> Tensor | None:
        if table is None:
            return None
        _op.check_tensor(f"disentangled[{i}]", table, ndim=3, dtypes=_op.FLOATS, device=q.device)
        if table.shape[1:] != (heads, q.shape[2]):
            raise ValueError(
                f"disentangled[{i}] must have the shape (slots, heads of {name}, head_dim), "
                f"(..., {heads}, {q.shape[2]}), got {tuple(table.shape)}"
            )
        return _op.rows(table.to(accumulator(q)))

    return (
        checked(position_keys, 0, "k", k.shape[1]),
        checked(position_queries, 1, "q", q.shape[1]),
        lookup.to(torch.int32).contiguous(),
    )


def _pair_bias(
    attn_bias: Tensor | None, q: Tensor, batch: int, max_seqlen_q: int, max_seqlen_k: int
) -> Tensor | None:
    """Bias (batch, heads, queries, keys) or (heads, pairs)."""
    if attn_bias is None:
        return None
    _op.check_tensor("attn_bias", attn_bias, dtypes=_op.FLOATS, device=q.device)
    heads = q.shape[1]
    shape = attn_bias.shape
    padded = len(shape) == 4 and shape[0] in (1, batch) and shape[1] in (1, heads)
    if not padded and not (len(shape) == 2 and shape[0] in (1, heads)):
        raise ValueError(
            f"attn_bias must have the shape (batch or 1, heads or 1, queries, keys), "
            f"({batch} or 1, {heads} or 1, ...), or (heads or 1, pairs), got {tuple(shape)}"
        )
    if padded and (shape[2] < max_seqlen_q or shape[3] < max_seqlen_k):
        raise ValueError(
            f"attn_bias must have room for {max_seqlen_q} queries and {max_seqlen_k} keys, "
            f"got {tuple(shape[2:])}"
        )
    bias = _op.rows(attn_bias.to(accumulator(q)))
    return bias.expand(batch, heads, *shape[2:]) if padded else bias.expand(heads, shape[1])


def _dropout_seeds(
    dropout_p: float, dropout_seeds: Tensor | None, batch: int, device: torch.device
) -> Tensor | None:
    """Seeds of the sequences; None without dropout."""
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be at least 0 and less than 1, got {dropout_p}")
    if dropout_p == 0:
        return None
    if dropout_seeds is None:
        return torch.randint(-(2**63), 2**63 - 1, (batch,), dtype=torch.int64, device=device)
    _op.check_tensor("dropout_seeds", dropout_seeds, ndim=1, dtypes=(torch.int64,), device=device)
    if dropout_seeds.shape[0] != batch:
        raise ValueError(
            f"dropout_seeds must have one seed per sequence, {batch}, got {dropout_seeds.shape[0]}"
        )
    return dropout_seeds.contiguous()


def shaping(
    q: Tensor,
    k: Tensor,
    batch: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    *,
    relative_bias: tuple[Tensor, Tensor] | None = None,
    disentangled: tuple[Tensor | None, Tensor | None, Tensor] | None = None,
    attn_bias: Tensor | None = None,
    prefix_len: Tensor | None = None,
    branch: Tensor | None = None,
    block_ids: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seeds: Tensor | None = None,
) -> Shaping:
    """Return what shapes the scores, as the operators take it."""
    if softcap < 0:
        raise ValueError(f"softcap must not be negative, got {softcap}")
    return Shaping(
        softcap,
        _slopes(alibi_slopes, q, batch),
        _distance_bias(relative_bias, q),
        _ids("prefix_len", prefix_len, batch, q.device),
        _ids("branch", branch, k.shape[0], q.device),
        _ids("block_ids", block_ids, k.shape[0], q.device),
        *_disentangled(disentangled, q, k),
        _pair_bias(attn_bias, q, batch, max_seqlen_q, max_seqlen_k),
        dropout_p,
        _dropout_seeds(dropout_p, dropout_seeds, batch, q.device),
    )
