"""Vocabulary pooling and lexical weights: tracing, gradient, routing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from emblas._op import Op, check_offsets, needs_grad, use_reference
from emblas.pooling import reference
from emblas.pooling.op import Segments, check_segments
from emblas.pooling.reference import accumulator


def _reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    weights: Tensor | None = None,
    ends: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Largest logit of each word in each segment and its token; materializes all logits."""
    logits = (x @ weight.T).to(accumulator(x.dtype))
    if weights is not None:
        weights = weights.to(logits.dtype)
    out, argmax = reference.segment_max(logits, cu_seqlens, weights, ends)
    return (out if bias is None else torch.where(argmax < 0, out, out + bias)), argmax


def _backward_reference(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    argmax: Tensor,
    cu_seqlens: Tensor,
    ends: Tensor | None,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the largest logits by ``x`` and ``weight``."""
    logits = reference.segment_max_backward(grad_out, argmax, x.shape[0])
    grad_x = logits @ weight.to(logits.dtype) if need_x else x.new_empty(0, x.shape[1])
    grad_w = logits.T @ x.to(logits.dtype) if need_weight else x.new_empty(0, x.shape[1])
    return grad_x.to(x.dtype), grad_w.to(x.dtype)


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    weights: Tensor | None = None,
    ends: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    shape = Segments(x, cu_seqlens, ends=ends).batch, weight.shape[0]
    return (
        x.new_empty(shape, dtype=accumulator(x.dtype)),
        x.new_empty(shape, dtype=torch.int32),
    )


def _backward_fake(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    argmax: Tensor,
    cu_seqlens: Tensor,
    ends: Tensor | None,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape[0] if need_x else 0, x.shape[1]),
        x.new_empty(weight.shape[0] if need_weight else 0, x.shape[1]),
    )


def _check_values(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    weights: Tensor | None = None,
    ends: Tensor | None = None,
) -> None:
    check_segments(Segments(x, cu_seqlens, weights, ends), disjoint=True)


_vocab_max = Op(
    "vocab_max",
    reference=_reference,
    fake=_fake,
    backward="vocab_max_backward",
    check_values=_check_values,
    triton="emblas.pooling.triton",
)
_vocab_max_backward = Op(
    "vocab_max_backward",
    reference=_backward_reference,
    fake=_backward_fake,
    triton="emblas.pooling.triton",
)


class _VocabMax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        starts: Tensor,
        weights: Tensor | None,
        ends: Tensor | None,
    ) -> Tensor:
        out, argmax = _vocab_max(x, weight, bias, starts, weights, ends)
        ctx.save_for_backward(x, weight, argmax, starts, ends)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, argmax, starts, ends = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_x, grad_weight = _vocab_max_backward(
            grad_out.contiguous(), x, weight, argmax, starts, ends, need_x, need_weight
        )
        grad_bias = torch.where(argmax < 0, 0, grad_out).sum(0) if need_bias else None
        return (
            grad_x if need_x else None,
            grad_weight if need_weight else None,
            grad_bias, None, None, None,
        )  # fmt: skip


def vocab_max(segments: Segments, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Take the largest logits of checked arguments, in the accumulator's dtype."""
    x, starts, weights, ends, _, _ = segments
    if needs_grad(x, weight, bias) and not use_reference():
        return _VocabMax.apply(x, weight, bias, starts, weights, ends)
    function = _reference if use_reference() else _vocab_max
    return function(x, weight, bias, starts, weights, ends)[0]


def _lexical_reference(
    token_ids: Tensor, weights: Tensor, cu_seqlens: Tensor, ignored: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct ids of each sequence, each with the first token of its largest weight."""
    crow, columns, tokens = [0], [], []
    for begin, end in pairwise(cu_seqlens.tolist()):
        best: dict[int, int] = {}
        for t in range(begin, end):
            word, weight = int(token_ids[t]), float(weights[t])
            if not weight > 0 or word in ignored:
                continue
            if word not in best or weight > float(weights[best[word]]):
                best[word] = t
        columns += sorted(best)
        tokens += [best[word] for word in sorted(best)]
        crow.append(len(columns))
    rest = [-1] * (len(token_ids) - len(columns))
    like = token_ids.new_tensor
    return like(crow), like(columns + rest), like(tokens + rest)


def _lexical_fake(
    token_ids: Tensor, weights: Tensor, cu_seqlens: Tensor, ignored: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    crow = torch.empty_like(cu_seqlens, dtype=torch.int64)
    return crow, torch.empty_like(token_ids), torch.empty_like(token_ids)


_lexical_index = Op(
    "lexical_index",
    reference=_lexical_reference,
    fake=_lexical_fake,
    check_values=lambda token_ids, weights, cu_seqlens, ignored: check_offsets(
        "cu_seqlens", cu_seqlens, token_ids.shape[0], "tokens"
    ),
    triton="emblas.pooling.triton",
    cuda_supports=lambda token_ids, weights, cu_seqlens, ignored: len(ignored) <= 32,
)


def lexical_index(
    token_ids: Tensor, weights: Tensor, cu_seqlens: Tensor, ignored: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Index checked arguments: row offsets, ids, and the token of each entry, padded with -1."""
    function = _lexical_reference if use_reference() else _lexical_index
    return function(token_ids, weights, cu_seqlens, ignored)
