"""Vocabulary pooling in Triton. The formulas stand in ``csrc/pooling/vocab_pool.h``.

Forward: a program owns a segment and 64 words. It multiplies 64 tokens at a time with the words'
rows, on tensor cores, and keeps of each word the largest product and its first token, NaN above all
numbers: no logits are ever stored. Each word's row is read once for every 64 tokens, ``x`` once for
every 64 words, both from the second-level cache; the product is the limit. Unlike torch's product,
logits of 16-bit inputs are compared in float32.

Backward: of each (sequence, word) one token is the winner. ``_gradients_of_words`` adds for a word
the tokens that won it. For the tokens the pairs are sorted (stably) by the winner, and
``_gradients_of_tokens`` adds for a token the words that it won. Nothing is added in an order that
depends on another sequence, and nothing atomically. Bytes: a row for each pair whose gradient is
not 0, most of them from the second-level cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emblas import _op
from emblas._triton import FLOATS
from emblas.pooling.triton.segments import Places, segment_range

_BLOCK_TOKENS, _BLOCK_WORDS, _BLOCK_DIM = 64, 64, 32
_BLOCK_PAIRS = 32


def warps_for(dtype: torch.dtype) -> int:
    """Give a program of float32 more warps: the three products of its parts take registers."""
    return 8 if dtype == torch.float32 else 4


_NOWHERE = tl.constexpr(2147483647)


@triton.jit
def first_largest(values, present, t):
    """Largest value of each column, NaN above all numbers, and the first row that holds it."""
    missing = (values != values) & present
    any_missing = tl.max(missing.to(tl.int32), 0) > 0
    numbers = tl.where(present & (values == values), values, float("-inf"))
    largest = tl.max(numbers, 0)
    holds = tl.where(any_missing[None, :], missing, numbers == largest[None, :]) & present
    first = tl.min(tl.where(holds, t, _NOWHERE), 0)
    return tl.where(any_missing, float("nan"), largest), first


@triton.jit
def _vocab_max(
    x,
    weight,
    bias,
    begins,
    ends,
    weights,
    tokens: tl.int64,
    out,
    argmax,
    vocab: tl.int64,
    dim,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(vocab, BLOCK_V)
    segment = tl.program_id(0).to(tl.int64) // blocks
    v = tl.program_id(0).to(tl.int64) % blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    begin, end = segment_range(begins, ends, None, segment, tokens)
    best = tl.full([BLOCK_V], float("-inf"), tl.float32)
    where = tl.full([BLOCK_V], -1, tl.int32)
    for start in range(begin, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        present = t < end
        if weights is not None:
            present = tl.load(weights + t, mask=present, other=0.0) != 0
        logits = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
        for first in range(0, dim, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            inside = present[:, None] & (d < dim)[None, :]
            rows = tl.load(x + t[:, None] * dim + d[None, :], mask=inside, other=0.0)
            inside = (v < vocab)[:, None] & (d < dim)[None, :]
            words = tl.load(weight + v[:, None] * dim + d[None, :], mask=inside, other=0.0)
            logits = tl.dot(rows, tl.trans(words), logits, input_precision="tf32x3")
        there = present[:, None] & (v < vocab)[None, :]
        value, row = first_largest(logits, there, t[:, None].to(tl.int32))
        larger = (where < 0) | (value > best) | ((value != value) & (best == best))
        larger = larger & (row != _NOWHERE)
        best = tl.where(larger, value, best)
        where = tl.where(larger, row, where)
    if bias is not None:
        best += tl.load(bias + v, mask=v < vocab, other=0.0)
    to = segment * vocab + v
    tl.store(out + to, tl.where(where < 0, 0.0, best), mask=v < vocab)
    tl.store(argmax + to, where, mask=v < vocab)


@triton.jit
def _gradients_of_tokens(
    grad_out,
    weight,
    order,
    bounds,
    grad_x,
    vocab: tl.int64,
    dim,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin, end = tl.load(bounds + token), tl.load(bounds + token + 1)
    total = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_P):
        i = start + tl.arange(0, BLOCK_P)
        pair = tl.load(order + i, mask=i < end, other=0)
        gradient = tl.load(grad_out + pair, mask=i < end, other=0.0)
        inside = (i < end)[:, None] & (d < dim)[None, :]
        at = (pair % vocab)[:, None] * dim + d[None, :]
        rows = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        total += gradient[:, None] * rows
    summed = tl.sum(total, 0).to(grad_x.dtype.element_ty)
    tl.store(grad_x + token * dim + d, summed, mask=d < dim)


@triton.jit
def _gradients_of_words(
    grad_out,
    argmax,
    x,
    grad_weight,
    batch: tl.int64,
    vocab: tl.int64,
    tokens: tl.int64,
    dim,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    v = tl.program_id(0).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    for b in range(0, batch):
        pair = b * vocab + v
        gradient = tl.load(grad_out + pair, mask=v < vocab, other=0.0)
        token = tl.load(argmax + pair, mask=v < vocab, other=-1).to(tl.int64)
        won = (gradient != 0) & (token >= 0) & (token < tokens)
        inside = won[:, None] & (d < dim)[None, :]
        rows = tl.load(x + token[:, None] * dim + d[None, :], mask=inside, other=0.0)
        total += tl.where(won, gradient, 0.0)[:, None] * rows.to(tl.float32)
    inside = (v < vocab)[:, None] & (d < dim)[None, :]
    total = total.to(grad_weight.dtype.element_ty)
    tl.store(grad_weight + v[:, None] * dim + d[None, :], total, mask=inside)


def _supports(x: Tensor, *_: object) -> bool:
    return x.dtype in FLOATS


def _backward_supports(grad_out: Tensor, x: Tensor, *_: object) -> bool:
    return x.dtype in FLOATS


@_op.kernel(_supports)
def vocab_max(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    weights: Tensor | None,
    ends: Tensor | None,
) -> tuple[Tensor, Tensor]:
    places = Places.of(x, cu_seqlens, weights, ends, None, None)
    (tokens, dim), vocab = x.shape, weight.shape[0]
    batch = places.begins.shape[0]
    out = x.new_empty(batch, vocab, dtype=torch.float32)
    argmax = torch.empty_like(out, dtype=torch.int32)
    _vocab_max[(batch * triton.cdiv(vocab, _BLOCK_WORDS),)](
        x, weight, bias, places.begins, places.ends, weights, tokens, out, argmax, vocab, dim,
        BLOCK_T=_BLOCK_TOKENS, BLOCK_V=_BLOCK_WORDS, BLOCK_D=_BLOCK_DIM,
        num_warps=warps_for(x.dtype),
    )  # fmt: skip
    return out, argmax


@_op.kernel(_backward_supports)
def vocab_max_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    argmax: Tensor,
    cu_seqlens: Tensor,
    ends: Tensor | None,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    (batch, vocab), (tokens, dim) = grad_out.shape, x.shape
    grad_x = x.new_empty(tokens if need_x else 0, dim)
    grad_weight = x.new_empty(vocab if need_weight else 0, dim)
    if need_x:
        wins = (grad_out != 0) & (argmax >= 0) & (argmax < tokens)
        winner, order = argmax.where(wins, tokens).flatten().sort(stable=True)
        edges = torch.arange(tokens + 1, device=x.device, dtype=torch.int32)
        bounds = torch.searchsorted(winner, edges)
        _gradients_of_tokens[(tokens, triton.cdiv(dim, 64))](
            grad_out, weight, order, bounds, grad_x, vocab, dim, BLOCK_P=_BLOCK_PAIRS, BLOCK_D=64
        )
    if need_weight:
        _gradients_of_words[(triton.cdiv(vocab, 32), triton.cdiv(dim, 64))](
            grad_out, argmax, x, grad_weight, batch, vocab, tokens, dim, BLOCK_V=32, BLOCK_D=64
        )
    return grad_x, grad_weight
