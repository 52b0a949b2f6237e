"""Packed attention beside torch: padded SDPA with a mask, and SDPA one sequence at a time."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from conftest import rotate
from emblas.attention import varlen_attention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

SHAPES = {"short": (128, 16), "mixed": (32, 64), "long": (8, 256)}  # sequences, mean length
HEADS = {"12 x 32": (12, 32), "12 x 64": (12, 64), "8 x 128": (8, 128)}


def _batch(shape: str, heads: int, dim: int, seed: int) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)
    sequences, mean = SHAPES[shape]
    lengths = torch.randint(mean // 4, mean * 7 // 4, (sequences,), generator=generator)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int()
    qkv = torch.randn(int(cu_seqlens[-1]), 3, heads, dim, generator=generator)
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    padded = qkv.new_zeros(*mask.shape, 3, heads, dim)
    padded[mask] = qkv
    return (*qkv.unbind(1), cu_seqlens, int(lengths.max()), padded, mask)


def _emblas(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, padded: Tensor, mask: Tensor
) -> Tensor:
    return varlen_attention(q, k, v, cu_seqlens, cu_seqlens, longest, longest)


def _padded(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, padded: Tensor, mask: Tensor
) -> Tensor:
    queries, keys, values = padded.permute(2, 0, 3, 1, 4).unbind(0)
    return scaled_dot_product_attention(queries, keys, values, attn_mask=mask[:, None, None])


def _heads_first(q: Tensor, k: Tensor, v: Tensor, a: int, b: int) -> tuple[Tensor, ...]:
    return tuple(x[a:b].transpose(0, 1)[None] for x in (q, k, v))


def _loop(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, padded: Tensor, mask: Tensor
) -> Tensor:
    outs = [
        scaled_dot_product_attention(*_heads_first(q, k, v, a, b))  # type: ignore[arg-type]
        for a, b in pairwise(cu_seqlens.tolist())
    ]
    return torch.cat([out[0].transpose(0, 1) for out in outs])


CONTENDERS: dict[str, Callable[..., Tensor]] = {
    "emblas": _emblas,
    "torch SDPA, padded": _padded,
    "torch SDPA, loop": _loop,
}


@pytest.mark.parametrize("who", CONTENDERS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("shape", SHAPES)
def bench_varlen_attention(row: Any, shape: str, heads: str, who: str) -> None:
    count, dim = HEADS[heads]
    sequences, mean = SHAPES[shape]
    inputs = rotate(
        lambda seed: _batch(shape, count, dim, seed), sequences * mean * count * dim * 16
    )
    pairs = sum(int(i[3].diff().square().sum()) for i in inputs) / len(inputs)
    row(
        "attention", "varlen_attention", who,
        shape=f"{shape}: {sequences} x ~{mean} tokens, {heads}", dtype="float32",
        call=CONTENDERS[who], inputs=inputs, flops=4 * pairs * count * dim, seconds=0.7,
    )  # fmt: skip


# (sequences, heads, length, head_dim): the shapes of an encoder's training step.
UNIFORM = [(16, 12, 64, 32), (16, 12, 128, 32), (4, 12, 512, 32), (4, 12, 512, 64)]


def _training_step(shape: tuple[int, int, int, int], who: str, seed: int) -> tuple[Any, ...]:
    """Results with their graph, the leaves and the gradient that comes in."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads, length, dim = shape
    qkv = torch.randn(batch * length, 3, heads, dim, generator=generator)
    grad = torch.randn(batch * length, heads, dim, generator=generator)
    with torch.inference_mode(False), torch.enable_grad():
        q, k, v = leaves = [x.clone().requires_grad_() for x in qkv.unbind(1)]
        if who == "emblas":
            cu_seqlens = torch.arange(batch + 1, dtype=torch.int32) * length
            return varlen_attention(q, k, v, cu_seqlens, cu_seqlens, length, length), leaves, grad
        views = [x.unflatten(0, (batch, length)).transpose(1, 2) for x in leaves]
        padded = grad.unflatten(0, (batch, length)).transpose(1, 2)
        return scaled_dot_product_attention(*views), leaves, padded


def _gradients(out: Tensor, leaves: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    with torch.inference_mode(False):
        return torch.autograd.grad(out, leaves, grad, retain_graph=True)


@pytest.mark.parametrize("who", ["emblas", "torch SDPA"])
@pytest.mark.parametrize("shape", UNIFORM, ids=str)
def bench_varlen_attention_backward(row: Any, shape: tuple[int, int, int, int], who: str) -> None:
    batch, heads, length, dim = shape
    inputs = rotate(
        lambda seed: _training_step(shape, who, seed), batch * heads * length * dim * 32
    )
    row(
        "attention", "varlen_attention backward", who,
        shape=f"{batch} x {length} tokens, {heads} x {dim}", dtype="float32", call=_gradients,
        inputs=inputs, flops=10 * batch * heads * length**2 * dim, seconds=0.7,
    )  # fmt: skip
