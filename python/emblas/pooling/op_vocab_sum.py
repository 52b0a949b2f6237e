"""Summed vocabulary pooling: the operator, a loop over tiles around torch's matrix product.

    out_bv = sum_t f(x_t . W_v + bias_v)    over the tokens t of sequence b

with ``f`` one of the activations. A sum has no shortcut as the maximum has (its gradient visits the
maxima only, ``csrc/pooling/vocab_pool.h``): every logit counts, and backward needs each one again,

    g_tv = dout_bv f'(logit_tv)      dx = g W      dW = g^T x      dbias_v = sum_t g_tv

so both directions make the logits a tile at a time, in the accumulator's dtype, and never a tensor
of tokens times vocabulary. The products are the limit: 2 flops per token, word and dimension
forward, 6 backward. All else is torch's on a CPU, element by element over a tile, so the loop is in
Python; to torch.compile it is as opaque as the operators in C++. GPUs have kernels of their own
(``csrc/pooling/vocab_sum_cuda.cuh``, ``triton/vocab_sum.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emblas._op import Op, needs_grad, use_reference
from emblas.pooling import op, reference
from emblas.pooling.op import Segments
from emblas.pooling.reference import Mode, accumulator

_TILE_TOKENS = 1024
_TILE_WORDS = 1024

# The numbers of these activations in the schema are their places here.
ACTIVATIONS = (None, "relu", "log1p_relu", "log1p_log1p_relu")

_library = torch.library.Library("emblas", "FRAGMENT")
_library.define(
    "vocab_sum(Tensor x, Tensor weight, Tensor? bias, Tensor cu_seqlens, int activation,"
    " Tensor? weights=None, Tensor? ends=None) -> Tensor"
)
_library.define(
    "vocab_sum_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor? bias, Tensor cu_seqlens,"
    " int activation, Tensor? weights, Tensor? ends, bool need_x, bool need_weight, bool need_bias)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)"
)


def activate(logits: Tensor, activation: int) -> Tensor:
    """Apply an activation by its number; in place where autograd allows."""
    keep = logits.requires_grad
    if activation > 0:
        logits = logits.relu() if keep else logits.relu_()
    for _ in range(activation - 1):
        logits = logits.log1p() if keep else logits.log1p_()
    return logits


def _slope(logits: Tensor, activation: int) -> Tensor:
    """Return the derivative of an activation."""
    if activation == 0:
        return torch.ones_like(logits)
    slope = (logits > 0).to(logits.dtype)
    inner = logits.relu()
    for _ in range(activation - 1):
        slope /= 1 + inner
        inner = inner.log1p_()
    return slope


class _Tile(NamedTuple):
    """Logits of some tokens and words, and where they are."""

    logits: Tensor
    tokens: slice
    words: slice
    rows: Tensor
    """The tokens, in the accumulator's dtype; those of no sequence are zero."""
    weight: Tensor
    """The words' weights, in the accumulator's dtype."""


class _Tokens:
    """The sequences that the tokens of a batch belong to."""

    def __init__(
        self, x: Tensor, starts: Tensor, weights: Tensor | None, ends: Tensor | None
    ) -> None:
        op.check_segments(Segments(x, starts, weights, ends), disjoint=True)
        self.x = x
        self.first = starts[:-1] if ends is None else starts
        self.last = starts[1:] if ends is None else ends
        self.batch = self.first.shape[0]
        owner = reference.owners(x.shape[0], starts, weights, ends)
        self.owner = owner.clamp_min(0)
        self.present = owner >= 0

    def tiles(self, weight: Tensor, bias: Tensor | None) -> Iterator[_Tile]:
        """Yield the logits tile by tile, in a buffer that is used again."""
        dtype = accumulator(self.x.dtype)
        tokens, words = self.x.shape[0], weight.shape[0]
        buffer = self.x.new_empty(min(tokens, _TILE_TOKENS) * min(words, _TILE_WORDS), dtype=dtype)
        for word in range(0, words, _TILE_WORDS):
            across = slice(word, word + _TILE_WORDS)
            columns = weight[across].to(dtype)
            for token in range(0, tokens, _TILE_TOKENS):
                along = slice(token, token + _TILE_TOKENS)
                rows = self.x[along].to(dtype).where(self.present[along, None], 0)
                logits = buffer[: rows.shape[0] * columns.shape[0]].view(rows.shape[0], -1)
                if bias is None:
                    torch.mm(rows, columns.T, out=logits)
                else:
                    torch.addmm(bias[across], rows, columns.T, out=logits)
                yield _Tile(logits, along, across, rows, columns)

    def add_up(self, values: Tensor, tokens: slice) -> Tensor:
        """Sum of the rows of each sequence, ``values`` being those of ``tokens``."""
        first, last = (
            bound.clamp(tokens.start, tokens.start + values.shape[0]) - tokens.start
            for bound in (self.first, self.last)
        )
        weights = self.present[tokens].to(values.dtype)
        return op.segment_pool(Segments(values, first, weights, last), Mode.sum, False, True)


@torch.no_grad()
def _vocab_sum_tiled(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    activation: int,
    weights: Tensor | None = None,
    ends: Tensor | None = None,
) -> Tensor:
    batch = _Tokens(x, cu_seqlens, weights, ends)
    out = x.new_zeros(batch.batch, weight.shape[0], dtype=accumulator(x.dtype))
    for tile in batch.tiles(weight, bias):
        out[:, tile.words] += batch.add_up(activate(tile.logits, activation), tile.tokens)
    return out


@torch.no_grad()
def _vocab_sum_backward_tiled(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    activation: int,
    weights: Tensor | None,
    ends: Tensor | None,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, dim = accumulator(x.dtype), x.shape[1]
    batch = _Tokens(x, cu_seqlens, weights, ends)
    grad_x = x.new_zeros(x.shape[0] if need_x else 0, dim, dtype=dtype)
    grad_weight = weight.new_zeros(weight.shape[0] if need_weight else 0, dim, dtype=dtype)
    grad_bias = weight.new_zeros(weight.shape[0] if need_bias else 0, dtype=dtype)
    for tile in batch.tiles(weight, bias) if batch.batch else ():
        grad = grad_out[:, tile.words].index_select(0, batch.owner[tile.tokens])
        grad *= _slope(tile.logits, activation)
        grad.masked_fill_(~batch.present[tile.tokens, None], 0)
        if need_x:
            grad_x[tile.tokens].addmm_(grad, tile.weight)
        if need_weight:
            grad_weight[tile.words].addmm_(grad.T, tile.rows)
        if need_bias:
            grad_bias[tile.words] += grad.sum(0)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad_bias


_library.impl("vocab_sum", _vocab_sum_tiled, "CPU")
_library.impl("vocab_sum_backward", _vocab_sum_backward_tiled, "CPU")


def _reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    activation: int,
    weights: Tensor | None = None,
    ends: Tensor | None = None,
) -> Tensor:
    """Sum the activated logits; materializes all of them."""
    dtype = accumulator(x.dtype)
    owned = reference.owners(x.shape[0], cu_seqlens, weights, ends) >= 0
    rows = torch.where(owned[:, None], x.to(dtype), 0)  # others may hold anything
    logits = rows @ weight.to(dtype).T
    logits = logits if bias is None else logits + bias
    values = activate(logits, activation)
    present = None if weights is None else owned.to(dtype)
    return reference.segment_pool(values, cu_seqlens, present, False, Mode.sum, ends)[0]


def _backward_reference(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    activation: int,
    weights: Tensor | None,
    ends: Tensor | None,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the reference."""
    zero = weight.new_zeros(weight.shape[0], dtype=grad_out.dtype)
    x, weight, bias = (
        tensor.detach().requires_grad_() for tensor in (x, weight, zero if bias is None else bias)
    )
    with torch.enable_grad():
        out = _reference(x, weight, bias, cu_seqlens, activation, weights, ends)
    grad_x, grad_weight, grad_bias = torch.autograd.grad(out, (x, weight, bias), grad_out)
    return (
        grad_x if need_x else grad_x[:0],
        grad_weight if need_weight else grad_weight[:0],
        grad_bias if need_bias else grad_bias[:0],
    )


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    activation: int,
    weights: Tensor | None = None,
    ends: Tensor | None = None,
) -> Tensor:
    batch = Segments(x, cu_seqlens, ends=ends).batch
    return x.new_empty(batch, weight.shape[0], dtype=accumulator(x.dtype))


def _backward_fake(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    activation: int,
    weights: Tensor | None,
    ends: Tensor | None,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape[0] if need_x else 0, x.shape[1]),
        weight.new_empty(weight.shape[0] if need_weight else 0, x.shape[1]),
        grad_out.new_empty(weight.shape[0] if need_bias else 0),
    )


def _check_values(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    activation: int,
    weights: Tensor | None = None,
    ends: Tensor | None = None,
) -> None:
    op.check_segments(Segments(x, cu_seqlens, weights, ends), disjoint=True)


_vocab_sum = Op(
    "vocab_sum",
    reference=_reference,
    fake=_fake,
    backward="vocab_sum_backward",
    check_values=_check_values,
    triton="emblas.pooling.triton",
)
_vocab_sum_backward = Op(
    "vocab_sum_backward",
    reference=_backward_reference,
    fake=_backward_fake,
    triton="emblas.pooling.triton",
)


class _VocabSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        starts: Tensor,
        activation: int,
        weights: Tensor | None,
        ends: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, starts, weights, ends)
        ctx.activation = activation
        return _vocab_sum(x, weight, bias, starts, activation, weights, ends)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, starts, weights, ends = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        grads = _vocab_sum_backward(
            grad_out.contiguous(), x, weight, bias, starts, ctx.activation, weights, ends, *needs
        )
        kept = (grad if need else None for grad, need in zip(grads, needs, strict=True))
        return *kept, None, None, None, None


def vocab_sum(
    segments: Segments, weight: Tensor, bias: Tensor | None, activation: str | None
) -> Tensor:
    """Sum the activated logits of checked arguments, in the accumulator's dtype."""
    x, starts, weights, ends, _, _ = segments
    number = ACTIVATIONS.index(activation)
    if needs_grad(x, weight, bias) and not use_reference():
        return _VocabSum.apply(x, weight, bias, starts, number, weights, ends)
    function = _reference if use_reference() else _vocab_sum
    return function(x, weight, bias, starts, number, weights, ends)
