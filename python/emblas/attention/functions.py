"""The public functions of attention: arguments are checked here, by name."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from emblas import _op
from emblas.attention import op


@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = ...,
    softmax_scale: float | None = ...,
    causal: bool = ...,
    window_size: tuple[int, int] = ...,
    softcap: float = ...,
    alibi_slopes: Tensor | None = ...,
    deterministic: bool = ...,
    *,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = ...,
    softmax_scale: float | None = ...,
    causal: bool = ...,
    window_size: tuple[int, int] = ...,
    softcap: float = ...,
    alibi_slopes: Tensor | None = ...,
    deterministic: bool = ...,
    *,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = True,
    *,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend within each sequence of a packed batch, exactly.

    Arguments are named and ordered as those of ``flash_attn_varlen_func``. This version has no
    gradient.

    Parameters
    ----------
    q : Tensor
        Queries ``(q_tokens, heads, head_dim)``, float32 or float64; head_dim a multiple of 8 from
        16 to 256. Tokens and heads may be any stride apart: slices of a fused projection and
        transposed views are read in place.
    k, v : Tensor
        Keys and values ``(k_tokens, key_heads, head_dim)``, of the dtype of ``q``. ``key_heads``
        divides ``heads``: query head h reads key head ``h // (heads // key_heads)``.
    cu_seqlens_q, cu_seqlens_k : Tensor
        Offsets ``(batch + 1,)`` of the sequences, int32 or int64. Empty sequences are legal.
    max_seqlen_q, max_seqlen_k : int
        Upper bounds of the sequence lengths. Kernels that plan by them need them to be right.
    dropout_p : float, default 0.0
        Must be 0: there is no dropout yet.
    softmax_scale : float, optional
        Factor of the scores; default ``head_dim ** -0.5``.
    causal : bool, default False
        Hide the keys after a query. Queries are aligned with the last keys of their sequence.
    window_size : tuple of int, default (-1, -1)
        Keys seen to the left and to the right of a query, its own not counted; -1 sees all.
    softcap : float, default 0.0
        Must be 0: scores are not capped yet.
    alibi_slopes : Tensor, optional
        Must be None: there are no biases yet.
    deterministic : bool, default True
        Accepted for compatibility: results are always deterministic.
    return_lse : bool, default False
        Also return the log-sum-exp of the scores.

    Returns
    -------
    out : Tensor
        ``(q_tokens, heads, head_dim)``, contiguous, of the dtype of ``q``. A query that sees no key
        gets zeros. The bits of a sequence don't depend on the rest of the batch nor on the number
        of threads.
    lse : Tensor
        Only with ``return_lse``: ``(heads, q_tokens)``, -inf for a query that sees no key.

    Raises
    ------
    TypeError
        If an argument has the wrong type or dtype.
    ValueError
        If shapes, devices or offsets don't fit together.
    NotImplementedError
        If an option is asked for that this version doesn't have, or a gradient.

    Notes
    -----
    Online softmax over blocks of keys (Dao et al., 2022, arXiv 2205.14135, algorithm 1), in float32
    (float64 for float64); memory is linear in the number of tokens.
    """
    for name, given in (
        ("dropout_p", dropout_p != 0.0),
        ("softcap", softcap != 0.0),
        ("alibi_slopes", alibi_slopes is not None),
    ):
        if given:
            raise NotImplementedError(f"varlen_attention has no {name} in this version")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _op.check_tensor(name, tensor, ndim=3, dtypes=(torch.float32, torch.float64))
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {tensor.device}")
    if _op.needs_grad(q, k, v):
        raise NotImplementedError(
            "varlen_attention has no gradient in this version: call it under torch.no_grad(), or "
            "detach q, k and v"
        )
    _, heads, head_dim = q.shape
    if head_dim % 8 or not 16 <= head_dim <= 256:
        raise ValueError(f"head_dim must be a multiple of 8 from 16 to 256, got {head_dim}")
    if k.shape != v.shape or k.shape[2] != head_dim:
        raise ValueError(
            f"k and v must have one shape and the head_dim of q, {head_dim}, got "
            f"{tuple(k.shape)} and {tuple(v.shape)}"
        )
    if k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(
            f"the heads of q must be a multiple of the heads of k, got {heads} and {k.shape[1]}"
        )
    offsets_q = _op.offsets("cu_seqlens_q", cu_seqlens_q, q.device)
    offsets_k = _op.offsets("cu_seqlens_k", cu_seqlens_k, q.device)
    if offsets_q.shape != offsets_k.shape:
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must have the same length, got "
            f"{offsets_q.shape[0]} and {offsets_k.shape[0]}"
        )
    left, right = window_size
    if left < -1 or right < -1:
        raise ValueError(f"window_size must hold radii of at least 0, or -1, got {window_size}")
    out, lse = op.varlen_attention(
        _op.rows(q),
        _op.rows(k),
        _op.rows(v),
        offsets_q,
        offsets_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        (left, 0 if causal else right),
        return_lse,
    )
    return (out, lse) if return_lse else out
