"""Keys that all queries of a sequence see beside its own, without a copy of the sequence."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from emblas import _op
from emblas.attention import op
from emblas.attention.sequences import sequence_of

# Flips seeds of dropout, so that extra keys don't drop with the sequence's own.
_OTHER_SEEDS = 0x2545F4914F6CDD1D


def merge_attention(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Merge attention to two sets of keys into attention to both.

    Exact, and differentiable in all four arguments.

    Parameters
    ----------
    out_a, out_b : Tensor
        Results ``(tokens, heads, value_dim)`` of the same queries.
    lse_a, lse_b : Tensor
        Log-sum-exp ``(heads, tokens)`` of their scores, as ``return_lse=True`` gives it; -inf where
        a query saw no key.

    Returns
    -------
    out : Tensor
        ``(tokens, heads, value_dim)``, of the dtype of ``out_a``; zero where neither saw a key.
    lse : Tensor
        ``(heads, tokens)`` of both.

    Raises
    ------
    TypeError
        If an argument has the wrong type or dtype.
    ValueError
        If shapes or devices don't fit together.

    Notes
    -----
    ``lse = log(exp(lse_a) + exp(lse_b))`` and ``out = exp(lse_a - lse) out_a + exp(lse_b - lse)
    out_b``: the step of the online softmax (Dao et al., 2022, arXiv 2205.14135, section 3.1).
    """
    _op.check_tensor("out_a", out_a, ndim=3, dtypes=_op.FLOATS)
    heads_first = (out_a.shape[1], out_a.shape[0])
    others = (
        ("out_b", out_b, out_a.shape),
        ("lse_a", lse_a, heads_first),
        ("lse_b", lse_b, heads_first),
    )
    for name, tensor, shape in others:
        _op.check_tensor(name, tensor, dtypes=_op.FLOATS, device=out_a.device)
        if tensor.shape != shape:
            raise ValueError(
                f"{name} must have the shape {tuple(shape)}, got {tuple(tensor.shape)}"
            )
    largest = torch.maximum(lse_a, lse_b).detach()
    empty = largest == -torch.inf
    # Where neither saw a key, -inf - -inf would be NaN, in the gradient too.
    largest = largest.masked_fill(empty, 0)
    weight_a, weight_b = (lse_a - largest).exp(), (lse_b - largest).exp()
    total = (weight_a + weight_b).masked_fill(empty, 1)
    lse = (largest + total.log()).masked_fill(empty, -torch.inf)
    share_a, share_b = ((weight / total).t()[..., None] for weight in (weight_a, weight_b))
    return (share_a * out_a + share_b * out_b).to(out_a.dtype), lse


class ExtraKeys(NamedTuple):
    """So many keys and values for each sequence."""

    k: Tensor
    """``(batch * number, key_heads, head_dim)``"""
    v: Tensor
    number: int
    bias: float | Tensor
    hidden: Tensor | None = None
    """``(q_tokens,)``: queries that see none of them."""

    def attend(
        self,
        q: Tensor,
        cu_seqlens_q: Tensor,
        max_seqlen_q: int,
        softmax_scale: float | None,
        shaping: op.Shaping,
    ) -> tuple[Tensor, Tensor]:
        """Attend to these keys alone, with all that doesn't ask for their position."""
        seeds = shaping.dropout_seeds
        out, lse = op.varlen_attention(
            q,
            _op.rows(self.k),
            _op.rows(self.v),
            cu_seqlens_q,
            torch.arange(len(cu_seqlens_q), dtype=torch.int32, device=q.device) * self.number,
            max_seqlen_q,
            self.number,
            softmax_scale,
            (-1, -1),
            True,
            op.Shaping(
                shaping.softcap,
                dropout_p=shaping.dropout_p,
                dropout_seeds=None if seeds is None else seeds ^ _OTHER_SEEDS,
            ),
        )
        bias = self.bias[:, None] if isinstance(self.bias, Tensor) else self.bias
        lse = lse + bias
        return out, lse if self.hidden is None else lse.masked_fill(self.hidden, -torch.inf)


def _bias(name: str, bias: float | Tensor, q: Tensor) -> float | Tensor:
    if isinstance(bias, Tensor):
        _op.check_tensor(name, bias, ndim=1, dtypes=_op.FLOATS, device=q.device)
        if bias.shape[0] != q.shape[1]:
            raise ValueError(
                f"{name} must have one element per head of q, {q.shape[1]}, got {bias.shape[0]}"
            )
    return bias


def prefix(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: int,
    k_prefix: Tensor | None,
    v_prefix: Tensor | None,
    bias: float | Tensor,
) -> ExtraKeys:
    """Check ``k_prefix`` and ``v_prefix``."""
    tensors = []
    for name, tensor, like in (("k_prefix", k_prefix, k), ("v_prefix", v_prefix, v)):
        _op.check_tensor(name, tensor, dtypes=(q.dtype,), device=q.device)
        assert tensor is not None
        shape = tensor.shape
        if len(shape) not in (3, 4) or shape[-2:] != like.shape[1:]:
            heads, dim = like.shape[1:]
            raise ValueError(
                f"{name} must have the shape (prefix, {heads}, {dim}) or (batch, prefix, {heads}, "
                f"{dim}), got {tuple(shape)}"
            )
        if len(shape) == 4 and shape[0] != batch:
            raise ValueError(f"{name} must be for {batch} sequences, got {shape[0]}")
        tensors.append(tensor.expand(batch, *shape[-3:]))
    keys, values = tensors
    if keys.shape[1] != values.shape[1]:
        raise ValueError(
            f"k_prefix and v_prefix must be as long, got {keys.shape[1]} and {values.shape[1]}"
        )
    bias = _bias("prefix_bias", bias, q)
    return ExtraKeys(keys.flatten(0, 1), values.flatten(0, 1), keys.shape[1], bias)


def last(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    bias: float | Tensor,
) -> ExtraKeys:
    """Take the last key and value of each sequence; there is at least one key."""
    empty = cu_seqlens_k.diff() == 0
    index = (cu_seqlens_k[1:] - 1).clamp_min(0).long()
    # A sequence without keys must not touch those of another, whatever they hold.
    keys, values = (x[index].masked_fill(empty[:, None, None], 0) for x in (k, v))
    queries = torch.arange(q.shape[0], device=q.device)
    hidden = empty[sequence_of(queries, cu_seqlens_q)]
    return ExtraKeys(keys, values, 1, _bias("reroute_bias", bias, q), hidden)
