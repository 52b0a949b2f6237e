"""The attention operators: tracing, gradient and routing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def _biases_backward_fake(
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
    softcap: float,
    alibi_slopes: Tensor | None,
    distance_bias: Tensor | None,
    prefix_len: Tensor | None,
    branch: Tensor | None,
    block_ids: Tensor | None,
    position_keys: Tensor | None,
    position_queries: Tensor | None,
    position_lookup: Tensor | None,
    pair_bias: Tensor | None,
    dropout_p: float,
    dropout_seeds: Tensor | None,
    need_distance_bias: bool,
    need_positions: bool,
    need_pair_bias: bool,
) -> tuple[Tensor, ...]:
    def like(bias: Tensor | None, needed: bool, dims: int) -> Tensor:
        shape = bias.shape if bias is not None and needed else (0,) * dims
        return q.new_empty(shape, dtype=_accumulator(q))

    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        like(distance_bias, need_distance_bias, 2),
        like(position_keys, need_positions, 3),
        like(position_queries, need_positions, 3),
        like(pair_bias, need_pair_bias, 2),
    )


def _check_values(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *others: Any
) -> None:
    check_offsets("cu_seqlens_q", cu_seqlens_q, q.shape[0], "tokens of q")
    check_offsets("cu_seqlens_k", cu_seqlens_k, k.shape[0], "tokens of k")


def _few_tiles(x: Tensor, cu_seqlens: Tensor) -> bool:
    """Tell whether CUDA can number the tiles of 64 tokens in all heads."""
    slots = x.shape[0] // 64 + cu_seqlens.shape[0] - 1
    return x.shape[0] < 2**30 and slots * x.shape[1] < 2**31


def _cuda_supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *others: Any,
) -> bool:
    """Tell whether tensor cores multiply these, as mma has it from sm_80 on."""
    return (
        q.dtype in (torch.bfloat16, torch.float16)
        and q.dtype == k.dtype == v.dtype
        and 1 <= q.shape[2] <= 256
        and 1 <= v.shape[2] <= 256
        and _few_tiles(q, cu_seqlens_q)
        and _few_tiles(k, cu_seqlens_k)
        and (not q.is_cuda or torch.cuda.get_device_capability(q.device) >= (8, 0))
    )


def _cuda_supports_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *others: Any,
) -> bool:
    """Tell whether tensor cores multiply the gradient too."""
    return grad_out.dtype == out.dtype == q.dtype and _cuda_supports(q, k, v, *others)


_varlen_attention = Op(
    "varlen_attention",
    reference=reference.varlen_attention,
    fake=_fake,
    triton="emblas.attention.triton",
    cuda_supports=_cuda_supports,
    check_values=_check_values,
    backward="varlen_attention_backward",
)
_varlen_attention_backward = Op(
    "varlen_attention_backward",
    reference=reference.varlen_attention_backward,
    fake=_backward_fake,
    triton="emblas.attention.triton",
    cuda_supports=_cuda_supports_backward,
)
# The gradient where the biases beyond those of distance, or dropout, are in use.
_varlen_attention_biases_backward = Op(
    "varlen_attention_biases_backward",
    reference=reference.varlen_attention_biases_backward,
    fake=_biases_backward_fake,
    triton="emblas.attention.triton",
)


class Shaping(NamedTuple):
    """What shapes the scores after q . k; the optional arguments at the end of the operators."""

    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    distance_bias: Tensor | None = None
    prefix_len: Tensor | None = None
    branch: Tensor | None = None
    block_ids: Tensor | None = None
    position_keys: Tensor | None = None
    position_queries: Tensor | None = None
    position_lookup: Tensor | None = None
    pair_bias: Tensor | None = None
    dropout_p: float = 0.0
    dropout_seeds: Tensor | None = None

    def of_distance(self) -> tuple[Any, ...]:
        """Return the options that all gradient kernels have."""
        return self[:6]

    def beyond(self) -> bool:
        """Tell whether others are in use."""
        tensors = (self.position_lookup, self.pair_bias, self.dropout_seeds)
        return any(x is not None for x in tensors)


class _VarlenAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        distance_bias: Tensor | None,
        position_keys: Tensor | None,
        position_queries: Tensor | None,
        pair_bias: Tensor | None,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        numbers: tuple[Any, ...],
        softcap: float,
        dropout_p: float,
        *others: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        biases = (distance_bias, position_keys, position_queries, pair_bias)
        shaping = arrange(softcap, dropout_p, biases, others)
        out, lse = run(q, k, v, cu_seqlens_q, cu_seqlens_k, numbers, shaping)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, *biases, *others)
        ctx.numbers, ctx.softcap, ctx.dropout_p = numbers, softcap, dropout_p
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, *rest = ctx.saved_tensors
        shaping = arrange(ctx.softcap, ctx.dropout_p, rest[:4], rest[4:])
        grad_out = torch.zeros_like(out) if grad_out is None else rows(grad_out)
        grad_lse = None if grad_lse is None else grad_lse.contiguous()
        given = (grad_out, grad_lse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k)
        grads = gradients(given, ctx.numbers, shaping, ctx.needs_input_grad[3:7])
        return *grads, *[None] * (5 + len(rest) - 4)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    numbers: tuple[Any, ...],
    shaping: Shaping,
) -> tuple[Tensor, Tensor]:
    """Call the operator, which records no gradient, and return the log-sum-exp too."""
    result: tuple[Tensor, Tensor] = _varlen_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, *numbers, True, *shaping
    )
    return result


def gradients(
    given: tuple[Tensor | None, ...],
    numbers: tuple[Any, ...],
    shaping: Shaping,
    need: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of q, k, v and of the biases in need of one (see :func:`arrange`).

    ``given`` holds the operator's arguments from the results' gradients to the offsets.
    """
    if shaping.beyond():
        needs = (need[0], need[1] or need[2], need[3])
        grads = _varlen_attention_biases_backward(*given, *numbers, *shaping, *needs)
    else:
        grads = _varlen_attention_backward(*given, *numbers, *shaping.of_distance(), need[0])
    of_biases = [grad if n else None for grad, n in zip(grads[3:], need, strict=False)]
    return *grads[:3], *of_biases, *[None] * (4 - len(of_biases))


def arrange(
    softcap: float,
    dropout_p: float,
    biases: Sequence[Tensor | None],
    others: Sequence[Tensor | None],
) -> Shaping:
    """Put biases that may have a gradient, and the others, in the order of the operators."""
    distance_bias, position_keys, position_queries, pair_bias = biases
    alibi_slopes, prefix_len, branch, block_ids, position_lookup, dropout_seeds = others
    return Shaping(
        softcap, alibi_slopes, distance_bias, prefix_len, branch, block_ids, position_keys,
        position_queries, position_lookup, pair_bias, dropout_p, dropout_seeds,
    )  # fmt: skip


def parts(shaping: Shaping) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    """Undo :func:`arrange`."""
    return (
        (shaping.distance_bias, shaping.position_keys, shaping.position_queries, shaping.pair_bias),
        (
            shaping.alibi_slopes, shaping.prefix_len, shaping.branch, shaping.block_ids,
            shaping.position_lookup, shaping.dropout_seeds,
        ),
    )  # fmt: skip


def distinct(*tensors: Tensor | None) -> list[Tensor | None]:
    """Alias tensors that come again: torch.compile can't trace a Function that gets one twice."""
    return [
        x.view_as(x) if x is not None and any(x is other for other in tensors[:i]) else x
        for i, x in enumerate(tensors)
    ]


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
    biases, others = parts(shaping)
    if needs_grad(q, k, v, *biases) and not use_reference():
        tensors = distinct(q, k, v, *biases, cu_seqlens_q, cu_seqlens_k)
        result: tuple[Tensor, Tensor] = _VarlenAttention.apply(
            *tensors, numbers, shaping.softcap, shaping.dropout_p, *others
        )
        return result
    attend: Callable[..., Any] = (
        reference.varlen_attention if use_reference() else _varlen_attention
    )
    return attend(q, k, v, cu_seqlens_q, cu_seqlens_k, *numbers, return_lse, *shaping)
