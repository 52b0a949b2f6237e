from __future__ import annotations

import weakref

import pytest
import torch
from contract import packed
from emblas.pooling import (
    LayerPooling,
    WeightedLayerPooling,
    pooled_outputs,
    segment_pool,
    two_part_similarity,
    zscore,
)
from emblas.pooling.key_maps import MULTI_LAYER, renamed
from torch.nn import functional


def published(dim, latents, heads, width, layers):
    """A state dict as the authors of the multi-layer pooling save it."""
    inner, first, second = heads * width, "cross_attend_blocks.0.", "cross_attend_blocks.1."
    shapes = {
        "latents": (latents, dim),
        "pos_emb.weight": (layers, dim),
        first + "fn.to_q.weight": (inner, dim),
        first + "fn.to_kv.weight": (2 * inner, dim),
        first + "fn.to_out.weight": (dim, inner),
        first + "norm.weight": (dim,),
        first + "norm.bias": (dim,),
        first + "norm_context.weight": (dim,),
        first + "norm_context.bias": (dim,),
        second + "norm.weight": (dim,),
        second + "norm.bias": (dim,),
        second + "fn.net.0.weight": (8 * dim, dim),
        second + "fn.net.0.bias": (8 * dim,),
        second + "fn.net.2.weight": (dim, 4 * dim),
        second + "fn.net.2.bias": (dim,),
    }
    return {key: torch.randn(shape) * shape[-1] ** -0.5 for key, shape in shapes.items()}


def oracle(state, vectors, heads):
    """The definition, one latent at a time in float64, on the published names."""
    p = {key: value.double() for key, value in state.items()}
    first, second = "cross_attend_blocks.0.", "cross_attend_blocks.1."

    def norm(h, at):
        return functional.layer_norm(h, h.shape[-1:], p[f"{at}.weight"], p[f"{at}.bias"])

    out = []
    for layers in vectors.double():
        context = norm(layers + p["pos_emb.weight"], first + "norm")
        keys, values = (context @ p[first + "fn.to_kv.weight"].T).chunk(2, 1)
        width, total = keys.shape[1] // heads, []
        for latent in p["latents"]:
            query = p[first + "fn.to_q.weight"] @ norm(latent, first + "norm_context")
            parts = [slice(i * width, (i + 1) * width) for i in range(heads)]
            mixed = [
                (keys[:, at] @ query[at] / width**0.5).softmax(0) @ values[:, at] for at in parts
            ]
            h = latent + p[first + "fn.to_out.weight"] @ torch.cat(mixed)
            inner = p[second + "fn.net.0.weight"] @ norm(h, second + "norm")
            a, b = (inner + p[second + "fn.net.0.bias"]).chunk(2)
            gated = a * functional.gelu(b)
            total.append(h + p[second + "fn.net.2.weight"] @ gated + p[second + "fn.net.2.bias"])
        out.append(torch.stack(total).mean(0))
    return functional.normalize(torch.stack(out))


@pytest.mark.parametrize(("dim", "latents", "heads", "width"), [(12, 5, 3, 8), (7, 1, 1, 3)])
def test_layer_pooling_is_the_published_one(dim, latents, heads, width):
    state = published(dim, latents, heads, width, layers=4)
    module = LayerPooling(
        hidden_dim=dim, latent_dim=dim, cross_dim_head=width, num_cross_heads=heads,
        num_latents_value=latents, layers=4,
    )  # fmt: skip
    module.load_state_dict(renamed(state, MULTI_LAYER))
    vectors = torch.randn(3, 4, dim)
    expected = oracle(state, vectors, heads)
    torch.testing.assert_close(module(vectors).double(), expected, rtol=1e-5, atol=1e-5)
    module, vectors = module.double(), vectors.double().requires_grad_()
    torch.testing.assert_close(module(vectors), expected, rtol=1e-11, atol=1e-11)
    inputs = [vectors, *module.parameters()]
    assert torch.autograd.gradcheck(lambda v, *p: module(v), inputs, fast_mode=True)


def test_weighted_layers_are_those_of_sentence_transformers():
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    peer = modules.WeightedLayerPooling(6, num_hidden_layers=5, layer_start=2)
    module = WeightedLayerPooling(num_hidden_layers=5, layer_start=2)
    with torch.no_grad():
        peer.layer_weights.copy_(torch.rand(4))
    module.load_state_dict(peer.state_dict())
    layers, mask = torch.randn(6, 3, 7, 6), torch.ones(3, 7).tril(3)
    features = {"token_embeddings": layers[-1], "all_layer_embeddings": list(layers)}
    expected = segment_pool(peer(features)["token_embeddings"], mask=mask)
    vectors = torch.stack([segment_pool(x, mask=mask) for x in layers[2:]], 1)
    torch.testing.assert_close(module(vectors), expected)
    module(vectors).sum().backward()
    assert module.layer_weights.grad is not None


def test_token_vectors_of_layers_are_not_kept():
    layers = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(8)])
    x, cu_seqlens, alive = torch.randn(512, 64), packed((100, 412)), []

    def pool(tokens):
        alive.append(weakref.ref(tokens))
        # When a layer is done, there are its output and its input; nothing before them.
        assert sum(ref() is not None for ref in alive) <= 2
        return segment_pool(tokens, cu_seqlens)

    with torch.no_grad():
        expected, hidden = [], x
        for layer in layers:
            hidden = layer(hidden)
            expected.append(segment_pool(hidden, cu_seqlens))
        with pooled_outputs(layers, pool) as vectors:
            layers(x)
    assert torch.equal(torch.stack(vectors), torch.stack(expected))
    assert all(ref() is None for ref in alive)


def test_hooks_leave_with_the_context():
    layer, seen = torch.nn.Linear(2, 2), []

    def fail():
        with pooled_outputs([layer], seen.append):
            layer(torch.zeros(3, 2))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    layer(torch.zeros(3, 2))
    assert len(seen) == 1


def test_gradients_reach_the_layers():
    layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
    pooling = LayerPooling(4, 4, 4, 2, 3, layers=3)
    with pooled_outputs(layers, lambda x: segment_pool(x, packed((2, 3)))) as vectors:
        x = torch.randn(5, 4)
        for layer in layers:
            x = layer(x)
    pooling(torch.stack(vectors, 1)).sum().backward()
    assert all(layer.weight.grad is not None for layer in layers)


def test_zscore():
    x = torch.randn(5, 3, dtype=torch.float64) * torch.tensor([1.0, 5, 0]) + 2
    expected = (x - x.mean(0)) / (x.std(0) + 1e-8)
    torch.testing.assert_close(zscore(x), expected)
    assert torch.equal(zscore(x)[:, 2], torch.zeros(5).double())
    torch.testing.assert_close(zscore(x[:2], sample=x), expected[:2])
    assert torch.equal(zscore(x[:1]), torch.zeros(1, 3).double())
    assert zscore(x[:0]).shape == (0, 3)
    assert zscore(x.bfloat16()).dtype == torch.bfloat16


def test_two_part_similarity():
    queries, documents = (
        (torch.randn(n, 4, dtype=torch.float64), torch.randn(n, 6, dtype=torch.float64))
        for n in (3, 5)
    )
    queries[1][1] = 0
    actual = two_part_similarity(queries, documents, alpha=0.5)
    for i in range(3):
        for j in range(5):
            hidden, routing = (
                functional.cosine_similarity(q[i], d[j], dim=0)
                for q, d in zip(queries, documents, strict=True)
            )
            torch.testing.assert_close(actual[i, j], hidden + 0.5 * routing)
    # The form that any index of inner products takes.
    whole = [
        torch.cat([functional.normalize(part) * factor for part, factor in zip(
            pair, (1, 0.5**0.5), strict=True)], 1)
        for pair in (queries, documents)
    ]  # fmt: skip
    torch.testing.assert_close(actual, whole[0] @ whole[1].T)


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "latent_dim must be hidden_dim", lambda: LayerPooling(hidden_dim=8)),
        (ValueError, "layer_start must be between 0 and 12", lambda: WeightedLayerPooling(12, 13)),
        (ValueError, r"vectors must have the shape \(batch, 9, dim", lambda: WeightedLayerPooling()(
            torch.zeros(1, 8, 4))),
        (ValueError, "vectors must have 3 dim", lambda: WeightedLayerPooling()(X)),
        (ValueError, r"vectors must have the shape \(batch, 2, 4\)", lambda: LayerPooling(
            4, 4, 2, 1, 3, layers=2)(torch.zeros(1, 2, 3))),
        (ValueError, "sample must have the shape", lambda: zscore(X, X[:, :2])),
        (ValueError, "sample must have the shape", lambda: zscore(X, X[:0])),
        (TypeError, "x must have dtype", lambda: zscore(X.long())),
        (ValueError, r"documents\[1\] must have the dim", lambda: two_part_similarity(
            (X, X), (X, X[:, :2]))),
        (ValueError, "queries must have two parts", lambda: two_part_similarity(
            (X, X[:1]), (X, X))),
    ],
)  # fmt: skip
def test_bad_arguments(error, message, call):
    with pytest.raises(error, match=message):
        call()
