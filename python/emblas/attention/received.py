"""Attention that each key receives, for pooling by it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emblas import _op
from emblas.attention import arguments, op


class _Received(torch.autograd.Function):
    """The transposed matrix P of attention times weights (queries, heads).

    Forward is the gradient that attention gives to its values, ``P^T weights``. With c coming in,
    backward is that of ``c^T P^T weights``: of attention to the values c, ``P c``, with the weights
    coming in; and ``P c`` itself is the gradient of the weights.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        weights: Tensor,
        distance_bias: Tensor | None,
        position_keys: Tensor | None,
        position_queries: Tensor | None,
        pair_bias: Tensor | None,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        numbers: tuple[Any, ...],
        softcap: float,
        *others: Tensor | None,
    ) -> Tensor:
        biases = (distance_bias, position_keys, position_queries, pair_bias)
        ctx.save_for_backward(q, k, weights, cu_seqlens_q, cu_seqlens_k, *biases, *others)
        ctx.numbers, ctx.softcap = numbers, softcap
        shaping = op.arrange(softcap, 0.0, biases, others)
        values = k.new_zeros(k.shape[0], k.shape[1], 1)
        out, lse = op.run(q, k, values, cu_seqlens_q, cu_seqlens_k, numbers, shaping)
        given = (weights[..., None], None, q, k, values, out, lse, cu_seqlens_q, cu_seqlens_k)
        grads = op.gradients(given, numbers, shaping, (False,) * 4)
        received = grads[2]
        assert received is not None
        return received[..., 0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, weights, cu_seqlens_q, cu_seqlens_k, *rest = ctx.saved_tensors
        shaping = op.arrange(ctx.softcap, 0.0, rest[:4], rest[4:])
        values = grad.contiguous()[..., None]
        out, lse = op.run(q, k, values, cu_seqlens_q, cu_seqlens_k, ctx.numbers, shaping)
        given = (weights[..., None], None, q, k, values, out, lse, cu_seqlens_q, cu_seqlens_k)
        grads = op.gradients(given, ctx.numbers, shaping, ctx.needs_input_grad[3:7])
        return *grads[:2], out[..., 0], *grads[3:], *[None] * (4 + len(rest) - 4)


def received_attention(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    *,
    relative_bias: tuple[Tensor, Tensor] | None = None,
    disentangled: tuple[Tensor | None, Tensor | None, Tensor] | None = None,
    attn_bias: Tensor | None = None,
    prefix_len: Tensor | None = None,
    branch: Tensor | None = None,
    block_ids: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Return the attention that each key receives from all queries of its sequence.

    Parameters
    ----------
    q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, \
window_size, softcap, alibi_slopes, relative_bias, disentangled, attn_bias, prefix_len, branch, \
block_ids
        As in :func:`varlen_attention`.
    weights : Tensor, optional
        How much each query counts, ``(q_tokens,)`` or ``(q_tokens, heads)``; default 1.

    Returns
    -------
    Tensor
        ``(k_tokens, heads)``, of the dtype of ``q``: the sum over the queries i of ``weights[i]``
        times the probability that i gives to the key. Gradients flow to ``q``, ``k``, ``weights``
        and to the biases as in :func:`varlen_attention`.

    Raises
    ------
    TypeError
        If an argument has the wrong type or dtype.
    ValueError
        If shapes, devices or offsets don't fit together.

    Notes
    -----
    It is the gradient that attention would give to values of width 1. Like that gradient, it needs
    memory linear in the number of tokens, and has the same bits whatever else is in the batch. Keys
    that several heads share are laid out once for each.
    """
    arguments.vectors(q, k, k)
    offsets_q, offsets_k = arguments.offsets(cu_seqlens_q, cu_seqlens_k, q.device)
    tokens, heads, _ = q.shape
    if weights is None:
        weights = q.new_ones(tokens, heads)
    _op.check_tensor("weights", weights, dtypes=_op.FLOATS, device=q.device)
    if weights.shape not in ((tokens,), (tokens, heads)):
        raise ValueError(
            f"weights must have the shape (q_tokens,) or (q_tokens, heads), ({tokens},) or "
            f"({tokens}, {heads}), got {tuple(weights.shape)}"
        )
    weights = weights if weights.dim() == 2 else weights[:, None].expand(tokens, heads)
    weights = weights.to(q.dtype).contiguous()
    groups = heads // k.shape[1]
    k = k.repeat_interleave(groups, 1)
    if disentangled is not None and disentangled[0] is not None:
        disentangled = (disentangled[0].repeat_interleave(groups, 1), *disentangled[1:])
    shaping = arguments.shaping(
        q, k, offsets_q.shape[0] - 1, max_seqlen_q, max_seqlen_k, softcap, alibi_slopes,
        relative_bias=relative_bias, disentangled=disentangled, attn_bias=attn_bias,
        prefix_len=prefix_len, branch=branch, block_ids=block_ids,
    )  # fmt: skip
    window = arguments.window(window_size, causal)
    numbers = (max_seqlen_q, max_seqlen_k, softmax_scale, *window)
    biases, others = op.parts(shaping)
    tensors = op.distinct(_op.rows(q), _op.rows(k), weights, *biases, offsets_q, offsets_k)
    received: Tensor = _Received.apply(*tensors, numbers, softcap, *others)
    return received
