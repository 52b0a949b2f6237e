"""The attention operators: tracing, gradient and routing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emblas._op import Op, check_offsets, needs_grad, rows, use_reference
from emblas.attention import reference


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None,
    window_left: int,
    window_right: int,
    return_lse: bool,
    *shaping: Any,
) -> tuple[Tensor, Tensor]:
    tokens, heads, _ = q.shape
    lse = q.new_empty(heads if return_lse else 0, tokens, dtype=_accumulator(q))
    return q.new_empty(tokens, heads, v.shape[2]), lse


def _backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None,
    window_left: int,
    window_right: int,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    distance_bias: Tensor | None = None,
    prefix_len: Tensor | None = None,
    branch: Tensor | None = None,
    block_ids: Tensor | None = None,
    need_distance_bias: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (0, 0) if distance_bias is None or not need_distance_bias else distance_bias.shape
    grad_bias = q.new_empty(shape, dtype=_accumulator(q))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), grad_bias


def _check_values(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *others: Any
) -> None:
    check_offsets("cu_seqlens_q", cu_seqlens_q, q.shape[0], "tokens of q")
    check_offsets("cu_seqlens_k", cu_seqlens_k, k.shape[0], "tokens of k")


_varlen_attention = Op(
    "varlen_attention",
    reference=reference.varlen_attention,
    fake=_fake,
    triton="emblas.attention.triton",
    check_values=_check_values,
    backward="varlen_attention_backward",
)
_varlen_attention_backward = Op(
    "varlen_attention_backward",
    reference=reference.varlen_attention_backward,
    fake=_backward_fake,
)


class Shaping(NamedTuple):
    """What shapes the scores after q . k; the optional arguments at the end of the operators."""

    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    distance_bias: Tensor | None = None
    prefix_len: Tensor | None = None
    branch: Tensor | None = None
    block_ids: Tensor | None = None


class _VarlenAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        distance_bias: Tensor | None,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        numbers: tuple[Any, ...],
        softcap: float,
        alibi_slopes: Tensor | None,
        *masks: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        out, lse = _varlen_attention(
            q, k, v, cu_seqlens_q, cu_seqlens_k, *numbers, True, softcap, alibi_slopes,
            distance_bias, *masks,
        )  # fmt: skip
        ctx.save_for_backward(
            q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, alibi_slopes, distance_bias, *masks
        )
        ctx.numbers, ctx.softcap = numbers, softcap
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, *shaping = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else rows(grad_out)
        grad_lse = None if grad_lse is None else grad_lse.contiguous()
        need_bias = ctx.needs_input_grad[3]
        *grads, grad_bias = _varlen_attention_backward(
            grad_out, grad_lse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, *ctx.numbers,
            ctx.softcap, *shaping, need_bias,
        )  # fmt: skip
        return *grads, grad_bias if need_bias else None, *[None] * 8


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None,
    window: tuple[int, int],
    return_lse: bool,
    shaping: Shaping = Shaping(),  # noqa: B008  (immutable)
) -> tuple[Tensor, Tensor]:
    """Attend with checked arguments; see :func:`emblas.attention.varlen_attention`."""
    numbers = (max_seqlen_q, max_seqlen_k, softmax_scale, *window)
    if needs_grad(q, k, v, shaping.distance_bias) and not use_reference():
        softcap, alibi_slopes, distance_bias, *masks = shaping
        # torch.compile can't trace a Function that gets one tensor twice: alias the others.
        given = (q, k, v, distance_bias, cu_seqlens_q, cu_seqlens_k)
        tensors = [
            x.view_as(x) if x is not None and any(x is other for other in given[:i]) else x
            for i, x in enumerate(given)
        ]
        result: tuple[Tensor, Tensor] = _VarlenAttention.apply(
            *tensors, numbers, softcap, alibi_slopes, *masks
        )
        return result
    run: Callable[..., Any] = reference.varlen_attention if use_reference() else _varlen_attention
    return run(q, k, v, cu_seqlens_q, cu_seqlens_k, *numbers, return_lse, *shaping)
