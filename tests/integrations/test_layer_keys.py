"""Keys added to layers of whole models: those of attention in plain torch to all keys together."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from emblas import optimize, packed
from emblas.evaluation import two_nn
from emblas.pooling import segment_pool

transformers = pytest.importorskip("transformers", reason="needs emblas[hf]")

from emblas.encoder import Encoder  # noqa: E402
from emblas.integrations import last_layer  # noqa: E402
from emblas.integrations import transformers as hf  # noqa: E402
from emblas.integrations.layer_keys import (  # noqa: E402
    LayerMemory,
    choose_layers,
    intrinsic_dimensions,
    reroute,
)
from integrations.models import TEXTS, make_tokenizer, sharpen  # noqa: E402
from transformers.masking_utils import eager_mask  # noqa: E402

LENGTHS = (7, 1, 30, 12)
MASK = torch.arange(30) < torch.tensor(LENGTHS)[:, None]
SIZES = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 48, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
DECODER = {**SIZES, "num_key_value_heads": 2}
GEMMA = {**DECODER, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 6}
# Windows are shorter than the texts.
CONFIGS = {
    "qwen2": lambda: transformers.Qwen2Config(**DECODER),
    "qwen3": lambda: transformers.Qwen3Config(**DECODER, head_dim=16),
    "llama": lambda: transformers.LlamaConfig(**DECODER),
    "mistral": lambda: transformers.MistralConfig(**DECODER, sliding_window=6),
    "gemma2": lambda: transformers.Gemma2Config(**GEMMA, attn_logit_softcapping=2.0),
    "gemma3": lambda: transformers.Gemma3TextConfig(**GEMMA),
    "bert": lambda: transformers.BertConfig(**SIZES),
    "modernbert": lambda: transformers.ModernBertConfig(
        **SIZES, local_attention=8, cls_token_id=2, sep_token_id=3
    ),
}
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
# What plain_attention adds, by number of the layer: bias of the last key; keys, values and bias.
REROUTED: dict[int, float] = {}
MEMORY: dict[int, tuple] = {}


def plain_attention(module, query, key, value, attention_mask, scaling, softcap=None, **_):
    """All keys of a padded batch, those that were added first, in one matrix of scores."""
    batch, heads = query.shape[:2]

    def scores(keys):
        s = query @ keys.repeat_interleave(heads // keys.shape[1], 1).transpose(2, 3) * scaling
        return s if softcap is None else softcap * torch.tanh(s / softcap)

    columns, values = [scores(key) + attention_mask], [value]
    if module.layer_idx in REROUTED:
        last = torch.arange(batch), slice(None), torch.tensor(LENGTHS) - 1
        columns.insert(0, scores(key[last][:, :, None]) + REROUTED[module.layer_idx])
        values.insert(0, value[last][:, :, None])
    if module.layer_idx in MEMORY:
        keys, more, bias = MEMORY[module.layer_idx]
        columns.insert(0, scores(keys.transpose(0, 1)[None]) + bias)
        values.insert(0, more.transpose(0, 1)[None].expand(batch, -1, -1, -1))
    probabilities = torch.cat(columns, 3).softmax(3)
    out = probabilities @ torch.cat(values, 2).repeat_interleave(heads // value.shape[1], 1)
    return out.transpose(1, 2).contiguous(), None


transformers.AttentionInterface.register("plain", plain_attention)
transformers.AttentionMaskInterface.register("plain", eager_mask)


@pytest.fixture(autouse=True)
def nothing_added():
    yield
    REROUTED.clear()
    MEMORY.clear()


def make(name):
    hf.register()
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(CONFIGS[name]()).eval()
    sharpen(model)
    # Layers of BERT don't all know their number.
    for i, attention in enumerate(hf.attentions(model)):
        attention.layer_idx = i
    model.set_attn_implementation("emblas")
    return model


@pytest.fixture
def texts():
    return [torch.randint(5, 99, (length,)) for length in LENGTHS]


def padded(texts):
    ids = torch.zeros(MASK.shape, dtype=torch.long)
    ids[MASK] = torch.cat(texts)
    return {"input_ids": ids, "attention_mask": MASK.long()}


def by_plain_attention(model, texts):
    """Run before anything is added: the layers themselves refuse other attention then."""
    model.set_attn_implementation("plain")
    hidden = model(**padded(texts)).last_hidden_state[MASK]
    model.set_attn_implementation("emblas")
    return hidden


def with_gradients(hidden, parameters):
    grad = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(5))
    gradients = torch.autograd.grad(hidden, parameters, grad, materialize_grads=True)
    return hidden.detach(), gradients


def check(actual, expected):
    torch.testing.assert_close(actual[0], expected[0], **CLOSE)
    scale = max(float(gradient.abs().max()) for gradient in expected[1])
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-3, atol=2e-5 * scale)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama", "mistral", "gemma2", "gemma3"])
def test_reroute(name, texts):
    """Packed and padded, forward and gradients of all parameters."""
    model = make(name)
    parameters = list(model.parameters())
    with torch.no_grad():
        before = hf.forward_packed(model, *packed.pack(texts))
    REROUTED.update({0: 1.0, 2: 1.0})
    expected = with_gradients(by_plain_attention(model, texts), parameters)
    assert (before - expected[0]).abs().max() > 0.1
    with reroute(model, (2, 0)):
        hidden = hf.forward_packed(model, *packed.pack(texts))
        check(with_gradients(hidden, parameters), expected)
        hidden = model(**padded(texts)).last_hidden_state[MASK]
        check(with_gradients(hidden, parameters), expected)
    after = hf.forward_packed(model, *packed.pack(texts))
    assert torch.equal(before, after)


@pytest.mark.parametrize("name", ["qwen2", "gemma3", "bert", "modernbert"])
def test_memory(name, texts):
    """With gradients of the memory; beside the last key where there is causal attention."""
    model = make(name)
    with torch.no_grad():
        before = hf.forward_packed(model, *packed.pack(texts))
    saved = model.state_dict().keys()
    memory = LayerMemory(model, 5, [2, 1], bias=0.5, std=1.0)
    MEMORY.update({2: (memory.keys[0], memory.values[0], 0.5)})
    MEMORY.update({1: (memory.keys[1], memory.values[1], 0.5)})
    if hf.is_causal(model):
        REROUTED[1] = -0.5
    parameters = [*memory.parameters(), *model.parameters()]
    expected = with_gradients(by_plain_attention(model, texts), parameters)
    assert (before - expected[0]).abs().max() > 0.1
    added = [memory.attach(model)]
    if hf.is_causal(model):
        added.append(reroute(model, [1], bias=-0.5))
    hidden = hf.forward_packed(model, *packed.pack(texts))
    check(with_gradients(hidden, parameters), expected)
    assert model.state_dict().keys() == saved
    for each in added:  # in the order they came, and twice
        each.undo()
        each.undo()
    assert torch.equal(hf.forward_packed(model, *packed.pack(texts)), before)


@pytest.mark.parametrize("modes", ["last", ("last", "mean")])
def test_encoder(modes):
    """Vectors of whole texts; pooled by the last token, the last layer may not be cut short."""
    model = make("qwen3")

    def head(pooled):
        return pooled.unflatten(1, (-1, 32)).mean(1)

    encoder = Encoder(model, make_tokenizer(), pooling=modes, head=head, token_budget=40)
    ids = [torch.tensor(ids) for ids in encoder.tokenizer(TEXTS)["input_ids"]]
    before, fingerprint = encoder.encode(TEXTS), encoder.fingerprint()
    model.set_attn_implementation("sdpa")
    optimized = optimize(model)
    rerouted, memory = reroute(model, [1, 2]), LayerMemory(model, 2, std=1.0)
    attached = memory.attach(model)
    assert last_layer.is_patched(model)
    hidden = [hf.forward_packed(model, *packed.pack([text])) for text in ids]
    expected = head(segment_pool(*packed.pack(hidden), modes))
    expected = torch.nn.functional.normalize(expected).detach()
    np.testing.assert_allclose(encoder.encode(TEXTS), expected, **CLOSE)
    assert np.abs(expected.numpy() - before).max() > 0.1

    prints = {fingerprint, encoder.fingerprint()}
    attached.undo()
    prints.add(encoder.fingerprint())
    assert len(prints) == 3
    if modes == "last":
        with pytest.raises(ValueError, match="'branches' needs a model without a re-routed"):
            encoder.embed(TEXTS, ["branches"], branches=["rain"])
    rerouted.undo()
    assert encoder.fingerprint() == fingerprint
    np.testing.assert_allclose(encoder.encode(TEXTS), before, **CLOSE)
    optimized.undo()


def test_other_attention_is_refused(texts):
    """At once, and when it comes later."""
    model = make("llama")
    with reroute(model, [1]):
        model.set_attn_implementation("sdpa")
        with pytest.raises(ValueError, match=r"must use attn_implementation='emblas'.*got 'sdpa'"):
            model(**padded(texts))
    model(**padded(texts))
    for add in (reroute, lambda model, layers: LayerMemory(model, 3, layers).attach(model)):
        with pytest.raises(ValueError, match=r"must use attn_implementation='emblas'.*got 'sdpa'"):
            add(model, [1])
    assert not any(hasattr(module, hf.KEYS) for module in model.modules())


def test_half_precision_and_copies(texts):
    """A memory in float32 for activations in bfloat16; a copy has what its model had."""
    model = make("qwen2")
    memory = LayerMemory(model, 3, std=1.0)
    with memory.attach(model), reroute(model, [1], torch.full((4,), 0.5)):
        twin = copy.deepcopy(model)
        expected = hf.forward_packed(model, *packed.pack(texts))
    actual = hf.forward_packed(twin, *packed.pack(texts))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    with memory.attach(model), torch.autocast("cpu", torch.bfloat16):
        hf.forward_packed(model, *packed.pack(texts)).sum().backward()
    with memory.attach(model.bfloat16()):
        hf.forward_packed(model, *packed.pack(texts)).float().sum().backward()
    for parameter in memory.parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.any()


def test_compiled(texts):
    model = make("qwen2")
    ids, offsets = packed.pack(texts)

    def run(ids, positions, offsets):
        return model(
            input_ids=ids, position_ids=positions, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets,
            max_length_q=30, max_length_k=30,
        ).last_hidden_state  # fmt: skip

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    inputs = ids[None], packed.positions(offsets)[None], offsets
    memory = LayerMemory(model, 2, std=1.0)
    with torch.no_grad():
        before = compiled(*inputs)
        with reroute(model, [0]), memory.attach(model):
            actual = compiled(*inputs)
            torch.testing.assert_close(actual, run(*inputs), rtol=0, atol=0)
        assert (actual - before).abs().max() > 0.1
        assert torch.equal(compiled(*inputs), before)


@pytest.mark.parametrize(
    ("error", "message", "name", "add"),
    [
        (ValueError, "layers must be different numbers from 0 to 2.*-1", "qwen2",
         lambda model: reroute(model, [0, -1])),
        (ValueError, "layers must be different numbers from 0 to 2.*3", "qwen2",
         lambda model: LayerMemory(model, 1, [3])),
        (ValueError, r"layers must be different numbers.*\[1, 1\]", "qwen2",
         lambda model: reroute(model, [1, 1])),
        (ValueError, "layers must be .* at least one", "qwen2", lambda model: reroute(model, [])),
        (TypeError, "integer", "qwen2", lambda model: reroute(model, [0.5])),
        (TypeError, "model must be a model of transformers, got Linear", "qwen2",
         lambda model: reroute(torch.nn.Linear(1, 1), [0])),
        (ValueError, "model must be causal.*BertModel", "bert", lambda model: reroute(model, [0])),
        (ValueError, "layer 1 has", "qwen2",
         lambda model: (reroute(model, [1]), reroute(model, [0, 1]))),
        (ValueError, "layer 0 has", "bert",
         lambda model: [LayerMemory(model, 2).attach(model) for _ in range(2)]),
        (ValueError, "length must be at least 1", "bert", lambda model: LayerMemory(model, 0)),
    ],
)  # fmt: skip
def test_bad_arguments(error, message, name, add):
    with pytest.raises(error, match=message):
        add(make(name))


def test_models_that_see_ahead_are_refused():
    """A decoder that its configuration makes an encoder, and one that doesn't say what it is."""
    model = make("llama")
    model.config.is_causal = False
    with pytest.raises(ValueError, match="model must be causal"):
        reroute(model, [0])
    sizes = {**SIZES, "num_hidden_layers": 1}
    with pytest.raises(ValueError, match=r"one attention module with is_causal.*MPNet"):
        reroute(transformers.MPNetModel(transformers.MPNetConfig(**sizes)), [0])


def test_intrinsic_dimensions(texts):
    model = make("gemma3")
    texts = [*texts, texts[2][:20], torch.zeros(0, dtype=torch.long)]  # the start of another text
    expected = [[], [], []]
    with torch.no_grad():
        for text in texts[:4]:
            states = model(input_ids=text[None], output_hidden_states=True).hidden_states[1:]
            for layer, state in zip(expected, states, strict=True):
                layer.append(state[0])
    expected = [two_nn(torch.cat(layer)) for layer in expected]
    actual = intrinsic_dimensions(model, texts, token_budget=32)
    # Distances of near neighbours have fewer digits than the states.
    assert actual == pytest.approx(expected, rel=1e-3)
    few = [intrinsic_dimensions(model, texts, tokens=20, seed=seed) for seed in (0, 0, 1)]
    assert few[0] == few[1] != few[2]
    with pytest.raises(ValueError, match="texts must hold at least 3 different tokens, got 2"):
        intrinsic_dimensions(model, [texts[0][:2]] * 5)
    with pytest.raises(TypeError, match="model must be a model of transformers"):
        intrinsic_dimensions(torch.nn.Linear(1, 1), texts)


@pytest.mark.parametrize(
    ("dimensions", "layers"),
    [
        ([abs(i - 13) for i in range(32)], [13, 14, 15, 16]),  # falls and rises
        (list(range(32)), [6, 7, 8, 9]),  # rises
        ([-i for i in range(32)], [28, 29, 30, 31]),  # falls
        ([0, 0, 5, 1, 5, 5, 0, 5, 2, 5], [3, 6]),  # lowest in the first fifth, and scattered
        ([3.0], [0]),
        ([3.0, 2.0], [1]),
    ],
)
def test_choose_layers(dimensions, layers):
    assert choose_layers(dimensions) == layers


@pytest.mark.parametrize("dimensions", [[], [1.0, float("nan")]])
def test_choose_layers_bad_arguments(dimensions):
    with pytest.raises(ValueError, match="dimensions must be numbers, at least one"):
        choose_layers(dimensions)
