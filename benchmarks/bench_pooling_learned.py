"""Pooling with learned parts beside the models' own forms of it, in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from emblas.pooling import LatentAttentionPooling, LayerPooling, attention_pool, vocab_pool
from torch import Tensor
from torch.nn import functional

MODES = ("forward", "training")


def _training(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Forward and backward by all floating-point arguments."""

    def run(*args: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            for arg in args:
                if arg.is_floating_point():
                    arg.requires_grad_().grad = None
            out = function(*args)
            out.backward(torch.ones_like(out))
        return out

    return run


@pytest.mark.parametrize("who", ["emblas", "torch, materialized"])
@pytest.mark.parametrize("step", MODES)
@pytest.mark.parametrize("mode", ["max", "sum"])
def bench_vocab_pool(row: Any, mode: str, step: str, who: str) -> None:
    batch, length, dim, vocab = 32, 256, 384, 30_522
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32) * length

    def ours(x: Tensor, weight: Tensor, cu_seqlens: Tensor) -> Tensor:
        pooled: Tensor = vocab_pool(x, weight, None, cu_seqlens, mode=mode)
        return pooled

    def theirs(x: Tensor, weight: Tensor, cu_seqlens: Tensor) -> Tensor:
        logits = (x @ weight.T).relu().log1p().view(batch, length, vocab)
        return logits.amax(1) if mode == "max" else logits.sum(1)

    call = ours if who == "emblas" else theirs
    products = 2 * batch * length * dim * vocab
    row(
        "pooling", f"SPLADE {mode}" + ", forward and backward" * (step == "training"), who,
        shape=f"{batch} x {length} x {dim}, vocabulary {vocab}", dtype="float32",
        call=call if step == "forward" else _training(call),
        inputs=[(torch.randn(batch * length, dim), torch.randn(vocab, dim) / 20, cu_seqlens)],
        # Backward, the maximum needs no product and the sum all three.
        flops=products * (4 if mode == "sum" and step == "training" else 1),
    )  # fmt: skip


@pytest.mark.parametrize("who", ["emblas", "torch, padded MultiheadAttention"])
@pytest.mark.parametrize("step", MODES)
def bench_attention_pool(row: Any, step: str, who: str) -> None:
    batch, length, dim = 256, 256, 1024
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32) * length
    peer = torch.nn.MultiheadAttention(dim, 1, batch_first=True)

    def theirs(x: Tensor, query: Tensor, cu_seqlens: Tensor) -> Tensor:
        padded = x.view(batch, length, dim)
        pooled: Tensor = peer(query.expand(batch, 1, dim), padded, padded, need_weights=False)[0]
        return pooled

    call = attention_pool if who == "emblas" else theirs
    row(
        "pooling", "attention of one query" + ", forward and backward" * (step == "training"), who,
        shape=f"{batch} x {length} x {dim}", dtype="float32",
        call=call if step == "forward" else _training(call),
        inputs=[(torch.randn(batch * length, dim), torch.randn(1, dim), cu_seqlens)],
        # Backward reads x again and writes its gradient.
        bytes=batch * length * dim * 4 * (3 if step == "training" else 1),
    )  # fmt: skip


def _published_attention(module: LatentAttentionPooling, x: Tensor) -> Tensor:
    """NV-Embed's attention sublayer, on (batch, length, dim)."""

    def heads(y: Tensor) -> Tensor:
        return y.unflatten(-1, (module.num_cross_heads, -1)).transpose(-3, -2)

    keys, values = module.to_kv(module.norm_context(module.latents)).chunk(2, -1)
    out = functional.scaled_dot_product_attention(
        heads(module.to_q(module.norm(x))), heads(keys)[None], heads(values)[None]
    )
    attended: Tensor = module.to_out(out.transpose(1, 2).flatten(2))
    return attended


def _published(module: LatentAttentionPooling, x: Tensor, mask: Tensor) -> Tensor:
    hidden = x + _published_attention(module, x)
    a, b = module.ff_in(module.norm_ff(hidden)).chunk(2, -1)
    hidden = hidden + module.ff_out(a * functional.gelu(b))
    pooled = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    return functional.normalize(pooled)


@pytest.mark.parametrize("who", ["emblas", "torch, as published"])
@pytest.mark.parametrize("part", ["attention sublayer", "whole module"])
def bench_latent_attention(row: Any, part: str, who: str) -> None:
    """A quarter of NV-Embed in every width, which keeps all proportions; no padding."""
    batch, length, dim, latents, heads = 8, 64, 1024, 128, 8
    module = LatentAttentionPooling(
        latents, heads, hidden_dim=dim, latent_dim=dim, cross_dim_head=dim
    )
    folded = module.fold()
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32) * length
    mask = torch.ones(batch, length)

    def ours(x: Tensor) -> Tensor:
        if part == "whole module":
            pooled: Tensor = folded(x.flatten(0, 1), cu_seqlens)
            return pooled
        return folded.attend(folded.norm(x.flatten(0, 1)), *folded.keys_values())

    def theirs(x: Tensor) -> Tensor:
        whole = part == "whole module"
        return _published(module, x, mask) if whole else _published_attention(module, x)

    row(
        "pooling", f"latent attention (NV-Embed), {part}", who,
        shape=f"{batch} x {length} x {dim}, {latents} latents, {heads} heads", dtype="float32",
        call=ours if who == "emblas" else theirs,
        inputs=[(torch.randn(batch, length, dim),)],
        flops=batch * length * dim * (4 * heads * latents + 16 * dim * (part == "whole module")),
    )  # fmt: skip


def _published_layers(module: LayerPooling, vectors: Tensor) -> Tensor:
    """The authors' form: latents repeated for every text, projections of what is attended."""

    def heads(y: Tensor) -> Tensor:
        return y.unflatten(-1, (module.num_cross_heads, -1)).transpose(-3, -2)

    latents = module.latents.expand(len(vectors), *module.latents.shape)
    context = module.norm(vectors + module.layer_embedding.weight)
    keys, values = module.to_kv(context).chunk(2, -1)
    queries = module.to_q(module.norm_context(latents))
    out = functional.scaled_dot_product_attention(heads(queries), heads(keys), heads(values))
    hidden = latents + module.to_out(out.transpose(1, 2).flatten(2))
    a, b = module.ff_in(module.norm_ff(hidden)).chunk(2, -1)
    hidden = hidden + module.ff_out(a * functional.gelu(b))
    return functional.normalize(hidden.mean(1))


@pytest.mark.parametrize("who", ["emblas", "torch, as published"])
def bench_layer_pooling(row: Any, who: str) -> None:
    """An eighth of the published widths."""
    batch, dim, width, heads, latents, layers = 8, 512, 256, 32, 96, 32
    module = LayerPooling(dim, dim, width, heads, latents, layers)
    row(
        "pooling", "over layers, trainable", who,
        shape=f"{batch} x {layers} layers x {dim}, {latents} latents, {heads} heads",
        dtype="float32",
        call=module if who == "emblas" else lambda vectors: _published_layers(module, vectors),
        inputs=[(torch.randn(batch, layers, dim),)],
        flops=2 * latents * dim * heads * width  # queries, once
        + 2 * batch * dim * (3 * layers * heads * width + latents * (heads * layers + 8 * dim))
        + 2 * batch * heads * latents * layers * width,
    )  # fmt: skip
