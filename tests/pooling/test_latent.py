from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from contract import packed
from emblas.pooling import (
    AttentionPooling,
    FoldedLatentAttentionPooling,
    LatentAttentionPooling,
    latent,
)
from emblas.pooling.key_maps import NV_EMBED, PMA, renamed
from torch.nn import functional

LENGTHS = (0, 5, 1, 30, 0, 4)
CU = packed(LENGTHS)
BOUNDS = list(pairwise(CU.tolist()))


def published(dim, latents, heads, width):
    """A state dict as NV-Embed publishes it."""
    block = "latent_attention_model.cross_attend_blocks"
    inner = heads * width
    shapes = {
        "latent_attention_model.latents": (latents, dim),
        f"{block}.0.fn.to_q.weight": (inner, dim),
        f"{block}.0.fn.to_kv.weight": (2 * inner, dim),
        f"{block}.0.fn.to_out.weight": (dim, inner),
        f"{block}.0.norm.weight": (dim,),
        f"{block}.0.norm.bias": (dim,),
        f"{block}.0.norm_context.weight": (dim,),
        f"{block}.0.norm_context.bias": (dim,),
        f"{block}.1.norm.weight": (dim,),
        f"{block}.1.norm.bias": (dim,),
        f"{block}.1.fn.net.0.weight": (8 * dim, dim),
        f"{block}.1.fn.net.0.bias": (8 * dim,),
        f"{block}.1.fn.net.2.weight": (dim, 4 * dim),
        f"{block}.1.fn.net.2.bias": (dim,),
    }
    return {key: torch.randn(shape) * shape[-1] ** -0.5 for key, shape in shapes.items()}


def oracle(state, x, heads, bounds, skip=0, normalize=True):
    """NV-Embed's definition, token by token in float64, on the published names."""
    p = {k.removeprefix("latent_attention_model."): v.double() for k, v in state.items()}
    first, second = "cross_attend_blocks.0.", "cross_attend_blocks.1."

    def norm(h, at):
        return functional.layer_norm(h, h.shape[-1:], p[f"{at}.weight"], p[f"{at}.bias"])

    context = norm(p["latents"], first + "norm_context")
    keys, values = (context @ p[first + "fn.to_kv.weight"].T).chunk(2, 1)
    width = keys.shape[1] // heads
    out = torch.zeros(len(bounds), x.shape[1], dtype=torch.float64)
    for s, (begin, end) in enumerate(bounds):
        total = []
        for h in x[min(begin + skip, end) : end].double():
            query = p[first + "fn.to_q.weight"] @ norm(h, first + "norm")
            parts = [slice(i * width, (i + 1) * width) for i in range(heads)]
            mixed = [
                (keys[:, at] @ query[at] / width**0.5).softmax(0) @ values[:, at] for at in parts
            ]
            h = h + p[first + "fn.to_out.weight"] @ torch.cat(mixed)
            a, b = (
                p[second + "fn.net.0.weight"] @ norm(h, second + "norm")
                + p[second + "fn.net.0.bias"]
            ).chunk(2)
            gated = a * functional.gelu(b)
            h = h + p[second + "fn.net.2.weight"] @ gated + p[second + "fn.net.2.bias"]
            total.append(h)
        if total:
            out[s] = torch.stack(total).mean(0)
    return functional.normalize(out) if normalize else out


def loaded(state, dim, latents, heads, width, normalize=True):
    module = LatentAttentionPooling(
        num_latents_value=latents, num_cross_heads=heads, output_normalize=normalize,
        hidden_dim=dim, latent_dim=dim, cross_dim_head=width,
    )  # fmt: skip
    module.load_state_dict(renamed(state, NV_EMBED, "latent_attention_model."))
    return module


@pytest.mark.parametrize(("dim", "latents", "heads", "width"), [(12, 5, 3, 8), (7, 1, 1, 3)])
@pytest.mark.parametrize("skip", [0, 3])
def test_latent_attention_is_the_published_one(dim, latents, heads, width, skip):
    state = published(dim, latents, heads, width)
    x = torch.randn(sum(LENGTHS), dim)
    for normalize in (True, False):
        module = loaded(state, dim, latents, heads, width, normalize)
        expected = oracle(state, x, heads, BOUNDS, skip, normalize)
        for pooling in (module, module.fold()):
            for context in (torch.no_grad, torch.enable_grad):
                with context():
                    actual = pooling(x, CU, skip_prefix=skip or None)
                torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
        double = module.double()
        for pooling in (double, double.fold()):
            actual = pooling(x.double(), CU, skip_prefix=skip or None)
            torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_fold_agrees_at_the_published_proportions():
    """An eighth of the width everywhere; the fold is trained no more, but saves and loads."""
    module = LatentAttentionPooling(64, 8, hidden_dim=512, latent_dim=512, cross_dim_head=512)
    x, cu = torch.randn(200, 512), packed((50, 0, 150))
    folded = module.fold()
    with torch.no_grad():
        expected, actual = module(x, cu), folded(x, cu)
    assert (actual - expected).abs().max() < 1e-5
    assert folded.ff_in is module.ff_in
    own = sum(p.numel() for name, p in folded.named_parameters() if name in ("keys", "values"))
    wide = sum(p.numel() for name, p in module.named_parameters() if name.startswith("to_"))
    assert own * 8 < wide
    again = FoldedLatentAttentionPooling(64, 8, hidden_dim=512)
    again.load_state_dict(folded.state_dict())
    with torch.no_grad():
        assert torch.equal(again(x, cu), actual)


@pytest.mark.parametrize("fold", [False, True])
def test_blocks_padding_and_empty_sets(fold, monkeypatch):
    monkeypatch.setattr(latent, "_BLOCK", 7)  # more than the six sequences, less than the tokens
    module = LatentAttentionPooling(4, 2, hidden_dim=8, latent_dim=8, cross_dim_head=6)
    module = module.fold() if fold else module
    x = torch.randn(sum(LENGTHS), 8)
    whole = module(x, CU)  # with gradients, in one block
    with torch.no_grad():
        torch.testing.assert_close(module(x, CU), whole)
        empty = module(x, CU, skip_prefix=100)
        assert torch.equal(empty, torch.zeros_like(empty))
        assert module(x[:0], packed(())).shape == (0, 8)
    assert torch.equal(whole[[0, 4]], torch.zeros(2, 8))
    mask = torch.arange(30)[None] >= 30 - torch.tensor(LENGTHS)[:, None]
    padded = torch.full((6, 30, 8), torch.nan)
    padded[mask] = x
    with torch.no_grad():
        torch.testing.assert_close(module(padded, mask=mask), whole)
        expected = module(x, CU, skip_prefix=2)
        torch.testing.assert_close(module(padded, mask=mask, skip_prefix=2), expected)


def test_latent_attention_trains():
    module = LatentAttentionPooling(4, 2, hidden_dim=8, latent_dim=8, cross_dim_head=6).double()
    x = torch.randn(9, 8).double().requires_grad_()
    cu = packed((4, 0, 5))
    for pooling in (module, module.fold()):
        inputs = [x, *pooling.parameters()]
        assert torch.autograd.gradcheck(lambda x, *p, f=pooling: f(x, cu), inputs, fast_mode=True)


def test_latent_attention_in_bfloat16():
    module = LatentAttentionPooling(16, 2, hidden_dim=64, latent_dim=64, cross_dim_head=64)
    x, cu = torch.randn(50, 64), packed((20, 30))
    expected = module(x, cu)
    for pooling in (module.bfloat16(), module.bfloat16().fold()):
        actual = pooling(x.bfloat16(), cu)
        assert actual.dtype == torch.bfloat16
        torch.testing.assert_close(actual.float(), expected, rtol=2e-2, atol=2e-2)


def test_memory_does_not_grow_with_the_tokens():
    module = LatentAttentionPooling(8, 2, hidden_dim=32, latent_dim=32, cross_dim_head=32).fold()
    largest = []
    for tokens in (2048, 8192):
        x, cu = torch.randn(tokens, 32), packed((tokens // 2, tokens // 2))
        with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
            module(x, cu)
        largest.append(max(event.cpu_memory_usage for event in profile.events()))
    assert largest[1] < 1.1 * largest[0]


@pytest.mark.parametrize("ln", [False, True])
def test_key_map_of_pma(ln):
    """C2LLM nests the layers of the block under the module's seeds."""
    module = AttentionPooling(6, 2, num_seeds=3, compress_dim=4, ln=ln)
    state = {
        "mha_pma." + (key if key == "S" else f"mab.{key}"): torch.randn_like(value)
        for key, value in module.state_dict().items()
    }
    module.load_state_dict(renamed(state, PMA, "mha_pma."))
    assert torch.equal(module.fc_o.weight, state["mha_pma.mab.fc_o.weight"])
    assert module(torch.randn(5, 6).bfloat16(), packed((5,))).dtype == torch.float32


X, FIVE = torch.zeros(5, 8), packed((5,))


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("latent_dim must be hidden_dim", lambda m: LatentAttentionPooling(hidden_dim=8)),
        ("x must have the dimension 8", lambda m: m(X[:, :5], FIVE)),
        ("x must have the dimension 8 and the dtype", lambda m: m(X.double(), FIVE)),
        ("either cu_seqlens", lambda m: m(X)),
        ("cu_seqlens must start at 0", lambda m: m(X, FIVE + 1)),
        ("mask must have the shape", lambda m: m(X[None], mask=torch.ones(1, 4))),
        ("keys of the map under 'a.', got 'a.b'", lambda m: renamed({"a.b": X}, PMA, "a.")),
        ("must hold keys that start with 'c'", lambda m: renamed({"a.b": X}, PMA, "c")),
    ],
)
def test_bad_arguments(message, call):
    module = LatentAttentionPooling(4, 2, hidden_dim=8, latent_dim=8, cross_dim_head=6)
    with pytest.raises(ValueError, match=message):
        call(module)
