"""Pooling beside torch: padded as sentence-transformers does it, and packed with index_add."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import rotate
from emblas.pooling import attention_pool, segment_pool, vocab_pool
from torch import Tensor

SHAPES = {
    "short": (256, 16),  # sequences, mean length
    "mixed": (64, 64),
    "long": (16, 512),
}


def _batch(shape: str, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Packed tokens and offsets, and the same tokens padded with their mask."""
    generator = torch.Generator().manual_seed(seed)
    sequences, mean = SHAPES[shape]
    lengths = torch.randint(mean // 2, mean * 3 // 2, (sequences,), generator=generator)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int()
    x = torch.randn(int(cu_seqlens[-1]), 384, generator=generator).to(dtype)
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    padded = x.new_zeros(*mask.shape, 384)
    padded[mask] = x
    return x, cu_seqlens, padded, mask


def _padded(x: Tensor, cu_seqlens: Tensor, padded: Tensor, mask: Tensor) -> Tensor:
    """Mean over the mask and normalize, in the steps of sentence-transformers' Pooling."""
    expanded = mask.unsqueeze(-1).expand(padded.size()).to(padded.dtype)
    summed = torch.sum(padded * expanded, 1)
    mean = summed / torch.clamp(expanded.sum(1), min=1e-9)
    return torch.nn.functional.normalize(mean)


def _index_add(x: Tensor, cu_seqlens: Tensor, padded: Tensor, mask: Tensor) -> Tensor:
    lengths = cu_seqlens.diff().long()
    segment = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    summed = torch.zeros(len(lengths), x.shape[1]).index_add_(0, segment, x.float())
    return torch.nn.functional.normalize(summed / lengths[:, None]).to(x.dtype)


CONTENDERS: dict[str, Callable[..., Tensor]] = {
    "emblas": lambda x, cu_seqlens, padded, mask: segment_pool(x, cu_seqlens, normalize=True),
    "torch, padded": _padded,
    "torch, index_add": _index_add,
}


@pytest.mark.parametrize("who", CONTENDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def bench_segment_pool(row: Any, shape: str, dtype: torch.dtype, who: str) -> None:
    sequences, mean = SHAPES[shape]
    tokens = sequences * mean
    size = tokens * 384 * dtype.itemsize
    row(
        "pooling", "mean + normalize", who,
        shape=f"{shape}: {sequences} x ~{mean} tokens x 384",
        dtype=str(dtype).removeprefix("torch."),
        call=CONTENDERS[who], inputs=rotate(lambda seed: _batch(shape, dtype, seed), size),
        bytes=size + sequences * 384 * dtype.itemsize,
    )  # fmt: skip


def _splade(x: Tensor, weight: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Pool as SPLADE does, over the logits of all tokens."""
    logits = (x @ weight.T).relu().log1p()
    return logits.view(len(cu_seqlens) - 1, -1, len(weight)).amax(1)


@pytest.mark.parametrize("who", ["emblas", "torch, materialized"])
def bench_vocab_pool(row: Any, who: str) -> None:
    batch, length, dim, vocab = 8, 256, 384, 30_522
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32) * length

    def ours(x: Tensor, weight: Tensor, cu_seqlens: Tensor) -> Tensor:
        return vocab_pool(x, weight, None, cu_seqlens)

    row(
        "pooling", "SPLADE max", who,
        shape=f"{batch} x {length} x {dim}, vocabulary {vocab}", dtype="float32",
        call=ours if who == "emblas" else _splade,
        inputs=[(torch.randn(batch * length, dim), torch.randn(vocab, dim), cu_seqlens)],
        flops=2 * batch * length * dim * vocab,
    )  # fmt: skip


@pytest.mark.parametrize("who", ["emblas", "torch, padded MultiheadAttention"])
def bench_attention_pool(row: Any, who: str) -> None:
    batch, length, dim = 64, 256, 1024
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32) * length
    peer = torch.nn.MultiheadAttention(dim, 1, batch_first=True)

    def theirs(x: Tensor, query: Tensor, cu_seqlens: Tensor) -> Tensor:
        padded = x.view(batch, length, dim)
        pooled: Tensor = peer(query.expand(batch, 1, dim), padded, padded, need_weights=False)[0]
        return pooled

    row(
        "pooling", "attention of one query", who,
        shape=f"{batch} x {length} x {dim}", dtype="float32",
        call=attention_pool if who == "emblas" else theirs,
        inputs=[(torch.randn(batch * length, dim), torch.randn(1, dim), cu_seqlens)] * 2,
        bytes=batch * length * dim * 4,
    )  # fmt: skip


def _backward(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*batch: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            x, cu_seqlens, padded, mask = batch
            x, padded = x.requires_grad_(), padded.requires_grad_()
            x.grad = padded.grad = None
            out = function(x, cu_seqlens, padded, mask)
            out.backward(torch.ones_like(out))
        return out

    return run


@pytest.mark.parametrize("who", CONTENDERS)
@pytest.mark.parametrize("shape", SHAPES)
def bench_segment_pool_training(row: Any, shape: str, who: str) -> None:
    sequences, mean = SHAPES[shape]
    size = sequences * mean * 384 * 4
    row(
        "pooling", "mean + normalize, forward and backward", who,
        shape=f"{shape}: {sequences} x ~{mean} tokens x 384", dtype="float32",
        call=_backward(CONTENDERS[who]),
        inputs=rotate(lambda seed: _batch(shape, torch.float32, seed), size),
        bytes=2 * size,
    )  # fmt: skip
