"""Linear layers on emblas' kernel: where it runs, where torch's product does, equal results."""

from __future__ import annotations

import emblas
import pytest
import torch
from contract import only_kernels

transformers = pytest.importorskip("transformers", reason="needs emblas[hf]")

from emblas.integrations import linear_layers  # noqa: E402
from integrations.models import REPLACED, SIZES, tiny  # noqa: E402

IDS = torch.arange(5, 41)[None]
MASK = torch.ones_like(IDS)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(linear_layers, "is_wide", lambda: True)
    monkeypatch.setattr(linear_layers, "LEAST_ROWS", 8)
    monkeypatch.setattr(linear_layers, "LEAST_ROWS_BETWEEN", 8)


@pytest.fixture(autouse=True, params=[True, False], ids=["everywhere", "between products"])
def quicker(request, monkeypatch):
    """Whether products are quicker than torch's, too."""
    monkeypatch.setattr(linear_layers, "is_quicker", lambda: request.param)
    return request.param


def run(model):
    return model(input_ids=IDS, attention_mask=MASK).last_hidden_state


def calls(function):
    """How often the operator runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = function()
    return result, sum(e.count for e in profile.key_averages() if e.key == "emblas::linear")


# Blocks of a model: linear layer and activation; linear layer, residual connection, normalization.
@pytest.mark.parametrize(
    ("name", "activated", "added"),
    [("bert", 2, 4), ("xlm-roberta", 2, 4), ("modernbert", 0, 0), ("qwen3", 0, 0)],
)
def test_same_hidden_states(name, activated, added, quicker):
    model = tiny(name)
    layers = sum(type(module) is torch.nn.Linear for module in model.modules())
    patched = layers + activated + added if quicker else activated
    with torch.no_grad():
        expected = run(model)
        with emblas.optimize(model) as optimized:
            assert (f"{patched} modules are one linear kernel" in repr(optimized)) == (patched > 0)
            with only_kernels("varlen_attention", *(["linear"] if patched else [])):
                torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)
            _, count = calls(lambda: run(model))
            # A pooler has one row.
            assert layers - 1 <= count <= layers if quicker else count == activated
        _, count = calls(lambda: run(model))
        assert count == 0


@pytest.mark.parametrize("name", ["deberta-v3", "mpnet"])
def test_replaced_models(name):
    model = REPLACED[name]().eval()
    with torch.no_grad():
        expected = run(model)
        with emblas.optimize(model):
            actual, count = calls(lambda: run(model))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert count > 0


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "relu", "silu", "gelu_new"])
def test_activations(activation, quicker):
    config = transformers.BertConfig(**SIZES, hidden_act=activation)
    model = transformers.BertModel(config).eval()
    with torch.no_grad():
        expected = run(model)
        with emblas.optimize(model):
            actual, count = calls(lambda: run(model))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert (count > 0) == (quicker or activation != "gelu_new")


class Intermediate(torch.nn.Module):
    """Has the parts of transformers' block and does something else with them."""

    def __init__(self):
        super().__init__()
        self.dense = torch.nn.Linear(32, 48)
        self.intermediate_act_fn = torch.nn.GELU()

    def forward(self, hidden_states):
        return self.intermediate_act_fn(self.dense(hidden_states) + 1)


@torch.no_grad()
def test_blocks_of_others_run_as_they_are(quicker):
    model = tiny("bert")
    model.encoder.layer[0].intermediate = Intermediate()
    expected = run(model)
    with emblas.optimize(model):
        torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)
        assert "forward" not in vars(model.encoder.layer[0].intermediate)


@torch.no_grad()
def test_hooks_are_heard():
    model = tiny("bert")
    layer = model.encoder.layer[0]
    parts = [layer.intermediate.dense, layer.intermediate.intermediate_act_fn, layer.output.dense]
    parts += [layer.output.dropout, layer.output.LayerNorm]
    expected = run(model)
    with emblas.optimize(model):
        heard = []
        for part in parts:
            part.register_forward_hook(lambda part, *_: heard.append(part))
        torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)
    assert [id(part) for part in heard] == [id(part) for part in parts]


@torch.no_grad()
def test_dropout_is_kept():
    model = tiny("bert")
    with emblas.optimize(model):
        expected = run(model)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.5
        model.train()
        model.encoder.layer[0].attention.self.dropout_prob = 0.0
        assert not torch.allclose(run(model), expected)
        model.eval()
        assert torch.equal(run(model), expected)


def test_torch_serves_the_rest():
    model = tiny("bert")
    with emblas.optimize(model):
        with torch.no_grad():
            assert calls(lambda: run(model))[1] > 0
            assert calls(lambda: model(input_ids=IDS[:, :7], attention_mask=MASK[:, :7]))[1] == 0
            with torch.autocast("cpu", torch.bfloat16):
                assert calls(lambda: run(model))[1] == 0
            assert calls(lambda: torch.nn.Linear(3, 2)(torch.ones(9, 3)))[1] == 0
            assert calls(lambda: run(model.double()))[1] == 0
        hidden, count = calls(lambda: run(model.float()))
        assert count == 0
        hidden.sum().backward()
        assert model.encoder.layer[0].attention.self.query.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_changed_weights_are_used():
    model = tiny("bert")
    with emblas.optimize(model):
        run(model)
        for parameter in model.parameters():
            parameter.data.mul_(0.9)  # which no version counts
        actual = run(model)
    torch.testing.assert_close(actual, run(model), rtol=1e-4, atol=1e-5)


def test_replaced_forwards_stay():
    model = tiny("bert")
    dense = model.encoder.layer[0].intermediate.dense
    own = dense.forward = lambda x: torch.nn.functional.linear(x, dense.weight, dense.bias)
    with emblas.optimize(model):
        assert dense.forward is own
    assert dense.forward is own


@torch.no_grad()
@pytest.mark.parametrize("part", ["dense", "intermediate_act_fn"])
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_replaced_forwards_run(part, before):
    """As adapters replace them, before the model is optimized or afterwards."""

    def adapt(model):
        for layer in model.encoder.layer:
            module = getattr(layer.intermediate, part)
            module.forward = lambda x, module=module: 3 * type(module).forward(module, x)
        return model

    expected = run(adapt(tiny("bert")))
    model = tiny("bert")
    if before:
        adapt(model)
    with emblas.optimize(model):
        if not before:
            adapt(model)
        torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_replaced_parts_run():
    model = tiny("bert")
    with emblas.optimize(model):
        for layer in model.encoder.layer:
            layer.intermediate.dense = torch.nn.Sequential(
                torch.nn.Linear(32, 4), torch.nn.Linear(4, 48)
            )
            layer.intermediate.intermediate_act_fn = torch.nn.GELU("tanh")
        actual = run(model)
    torch.testing.assert_close(actual, run(model), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_settings_of_gelu_count():
    model = tiny("bert")
    for layer in model.encoder.layer:
        layer.intermediate.dense.weight.mul_(50)
        layer.intermediate.intermediate_act_fn = torch.nn.GELU("tanh")
    expected = run(model)
    with emblas.optimize(model):
        actual, count = calls(lambda: run(model))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert count > 0


@torch.no_grad()
def test_models_with_the_same_parts_run_as_they_are(quicker):
    """X-MOD's blocks have those of BERT, and leave the normalization to others."""
    config = transformers.XmodConfig(
        **SIZES, pad_token_id=0, languages=["en_XX"], default_language="en_XX"
    )
    model = transformers.XmodModel(config).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.weight.uniform_(0.2, 2)
    expected = run(model)
    with emblas.optimize(model):
        torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)


def test_models_are_tried_on_the_kernel(monkeypatch):
    """However small the texts are that they are tried on."""
    monkeypatch.setattr(linear_layers, "LEAST_ROWS", 10**9)
    monkeypatch.setattr(linear_layers, "LEAST_ROWS_BETWEEN", 10**9)
    monkeypatch.setitem(
        linear_layers.ACTIVATIONS,
        type(tiny("bert").encoder.layer[0].intermediate.intermediate_act_fn),
        "relu",
    )
    with pytest.raises(ValueError, match="hidden states of BertModel differ by"):
        emblas.optimize(tiny("bert"))
