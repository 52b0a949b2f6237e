"""Summed vocabulary pooling in Triton. The formulas stand in ``emblas.pooling.op_vocab_sum``.

Forward: a program owns a segment and 64 words. It multiplies 64 tokens at a time with the words'
rows, on tensor cores, and adds up what the activation makes of the products: no logits are ever
stored, and the order of additions depends on the segment's length only. Each word's row is read
once for every 64 tokens, ``x`` once for every 64 words, both from the second-level cache; the
product is the limit.

Backward needs every logit again, twice: for the gradients of ``x`` and of the words. So it goes by
tiles of some thousand tokens and words. ``_logit_slopes`` makes the logits of a tile, and of them
their gradients, which the second-level cache holds, in the dtype of ``x``. ``_add_to_tokens`` and
``_add_to_words`` multiply these by the rows of the other side and add the product to what earlier
tiles gave, in float32: three products in all, and nothing atomic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emblas import _op
from emblas._triton import FLOATS
from emblas.pooling.reference import owners
from emblas.pooling.triton.segments import Places, segment_range
from emblas.pooling.triton.vocab import warps_for

_TILE_TOKENS, _TILE_WORDS = 4096, 2048
_BLOCK, _BLOCK_DIM = 64, 32


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Apply an activation by its number; 1 + x loses less than the product has lost."""
    if ACTIVATION > 0:
        x = tl.where(x < 0, 0.0, x)  # NaN stays
    if ACTIVATION > 1:
        x = tl.log(1 + x)
    if ACTIVATION > 2:
        x = tl.log(1 + x)
    return x


@triton.jit
def slope_at(x, ACTIVATION: tl.constexpr):
    """Derive an activation."""
    slope = tl.full(x.shape, 1.0, tl.float32)
    if ACTIVATION > 0:
        slope = tl.where(x > 0, 1.0, 0.0)
    if ACTIVATION > 1:
        slope /= 1 + activate(x, 1)
    if ACTIVATION > 2:
        slope /= 1 + activate(x, 2)
    return slope


@triton.jit
def logits_of(
    x, weight, bias, t, present, v, vocab, dim,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Logits of tokens ``t`` and words ``v``; those that are not there mean nothing."""
    logits = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    for first in range(0, dim, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        inside = present[:, None] & (d < dim)[None, :]
        rows = tl.load(x + t[:, None] * dim + d[None, :], mask=inside, other=0.0)
        inside = (v < vocab)[:, None] & (d < dim)[None, :]
        words = tl.load(weight + v[:, None] * dim + d[None, :], mask=inside, other=0.0)
        logits = tl.dot(rows, tl.trans(words), logits, input_precision="tf32x3")
    if bias is not None:
        logits += tl.load(bias + v, mask=v < vocab)[None, :]
    return logits


@triton.jit
def _vocab_sum(
    x,
    weight,
    bias,
    begins,
    ends,
    weights,
    tokens: tl.int64,
    out,
    vocab: tl.int64,
    dim,
    ACTIVATION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(vocab, BLOCK_V)
    segment = tl.program_id(0).to(tl.int64) // blocks
    v = tl.program_id(0).to(tl.int64) % blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    begin, end = segment_range(begins, ends, None, segment, tokens)
    total = tl.zeros([BLOCK_V], tl.float32)
    for start in range(begin, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        present = t < end
        if weights is not None:
            present = tl.load(weights + t, mask=present, other=0.0) != 0
        logits = logits_of(x, weight, bias, t, present, v, vocab, dim, BLOCK_T, BLOCK_V, BLOCK_D)
        values = activate(logits, ACTIVATION)
        total += tl.sum(tl.where(present[:, None], values, 0.0), 0)
    tl.store(out + segment * vocab + v, total, mask=v < vocab)


@triton.jit
def _logit_slopes(
    x,
    weight,
    bias,
    owner,
    grad_out,
    first_token: tl.int64,
    last_token: tl.int64,
    first_word: tl.int64,
    last_word: tl.int64,
    vocab: tl.int64,
    dim,
    slopes,
    partial,
    ACTIVATION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    t = first_token + block * BLOCK_T + tl.arange(0, BLOCK_T)
    v = first_word + tl.program_id(1).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    segment = tl.load(owner + t, mask=t < last_token, other=-1).to(tl.int64)
    present = segment >= 0
    logits = logits_of(x, weight, bias, t, present, v, last_word, dim, BLOCK_T, BLOCK_V, BLOCK_D)
    wanted = present[:, None] & (v < last_word)[None, :]
    at = grad_out + segment[:, None] * vocab + v[None, :]
    slope = slope_at(logits, ACTIVATION)
    gradients = tl.where(wanted, tl.load(at, mask=wanted) * slope, 0.0)
    words = last_word - first_word
    to = slopes + (t - first_token)[:, None] * words + (v - first_word)[None, :]
    inside = (t < last_token)[:, None] & (v < last_word)[None, :]
    tl.store(to, gradients.to(slopes.dtype.element_ty), mask=inside)
    if partial is not None:
        to = partial + (first_token // BLOCK_T + block) * words + v - first_word
        tl.store(to, tl.sum(gradients, 0), mask=v < last_word)


@triton.jit
def _add_to_tokens(
    slopes,
    weight,
    tokens,
    words,
    dim,
    grad_x,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for first in range(0, words, BLOCK_V):
        v = first + tl.arange(0, BLOCK_V)
        there = (t < tokens)[:, None] & (v < words)[None, :]
        slope = tl.load(slopes + t[:, None] * words + v[None, :], mask=there, other=0.0)
        there = (v < words)[:, None] & (d < dim)[None, :]
        rows = tl.load(weight + v[:, None].to(tl.int64) * dim + d[None, :], mask=there, other=0.0)
        total = tl.dot(slope, rows, total, input_precision="tf32x3")
    inside = (t < tokens)[:, None] & (d < dim)[None, :]
    to = grad_x + t[:, None] * dim + d[None, :]
    tl.store(to, tl.load(to, mask=inside) + total, mask=inside)


@triton.jit
def _add_to_words(
    slopes,
    x,
    owner,
    tokens,
    words,
    dim,
    grad_weight,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    v = tl.program_id(0).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    for first in range(0, tokens, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        present = tl.load(owner + t, mask=t < tokens, other=-1) >= 0
        there = present[:, None] & (v < words)[None, :]
        at = slopes + t[:, None].to(tl.int64) * words + v[None, :]
        slope = tl.load(at, mask=there, other=0.0)
        there = present[:, None] & (d < dim)[None, :]
        rows = tl.load(x + t[:, None].to(tl.int64) * dim + d[None, :], mask=there, other=0.0)
        total = tl.dot(tl.trans(slope), rows, total, input_precision="tf32x3")
    inside = (v < words)[:, None] & (d < dim)[None, :]
    to = grad_weight + v[:, None] * dim + d[None, :]
    tl.store(to, tl.load(to, mask=inside) + total, mask=inside)


def _supports(x: Tensor, *_: object) -> bool:
    return x.dtype in FLOATS


def _backward_supports(grad_out: Tensor, x: Tensor, *_: object) -> bool:
    return x.dtype in FLOATS


@_op.kernel(_supports)
def vocab_sum(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    activation: int,
    weights: Tensor | None,
    ends: Tensor | None,
) -> Tensor:
    places = Places.of(x, cu_seqlens, weights, ends, None, None)
    (tokens, dim), vocab = x.shape, weight.shape[0]
    batch = places.begins.shape[0]
    out = x.new_empty(batch, vocab, dtype=torch.float32)
    _vocab_sum[(batch * triton.cdiv(vocab, _BLOCK),)](
        x, weight, bias, places.begins, places.ends, weights, tokens, out, vocab, dim,
        ACTIVATION=activation, BLOCK_T=_BLOCK, BLOCK_V=_BLOCK, BLOCK_D=_BLOCK_DIM,
        num_warps=warps_for(x.dtype),
    )  # fmt: skip
    return out


@_op.kernel(_backward_supports)
def vocab_sum_backward(
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
    (tokens, dim), vocab = x.shape, weight.shape[0]
    grad_x = torch.zeros(tokens if need_x else 0, dim, dtype=torch.float32, device=x.device)
    grad_weight = grad_x.new_zeros(vocab if need_weight else 0, dim)
    grad_bias = grad_x.new_zeros(vocab if need_bias else 0)
    owner = owners(tokens, cu_seqlens, weights, ends)
    tile_words = min(vocab, _TILE_WORDS)
    slopes = x.new_empty(min(tokens, _TILE_TOKENS) * tile_words)
    partial = None
    if need_bias:
        partial = grad_x.new_empty(triton.cdiv(tokens, _BLOCK) * tile_words)
    blocks_of_dim, warps = triton.cdiv(dim, _BLOCK), warps_for(x.dtype)
    for word in range(0, vocab, _TILE_WORDS):
        words = min(vocab - word, _TILE_WORDS)
        blocks_of_words = triton.cdiv(words, _BLOCK)
        for token in range(0, tokens, _TILE_TOKENS):
            count = min(tokens - token, _TILE_TOKENS)
            blocks_of_tokens = triton.cdiv(count, _BLOCK)
            _logit_slopes[(blocks_of_tokens, blocks_of_words)](
                x, weight, bias, owner, grad_out, token, token + count, word, word + words, vocab,
                dim, slopes, partial,
                ACTIVATION=activation, BLOCK_T=_BLOCK, BLOCK_V=_BLOCK, BLOCK_D=_BLOCK_DIM,
                num_warps=warps,
            )  # fmt: skip
            if need_x:
                _add_to_tokens[(blocks_of_tokens, blocks_of_dim)](
                    slopes, weight[word:], count, words, dim, grad_x[token:],
                    BLOCK_T=_BLOCK, BLOCK_D=_BLOCK, BLOCK_V=_BLOCK_DIM, num_warps=warps,
                )  # fmt: skip
            if need_weight:
                _add_to_words[(blocks_of_words, blocks_of_dim)](
                    slopes, x[token:], owner[token:], count, words, dim, grad_weight[word:],
                    BLOCK_V=_BLOCK, BLOCK_D=_BLOCK, BLOCK_T=_BLOCK_DIM, num_warps=warps,
                )  # fmt: skip
        if partial is not None:
            used = partial[: triton.cdiv(tokens, _BLOCK) * words]
            grad_bias[word : word + words] = used.view(-1, words).sum(0)
    return grad_x.to(x.dtype), grad_weight.to(x.dtype), grad_bias
