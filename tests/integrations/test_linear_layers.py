"""Linear layers on emblas' kernel: where it runs, where torch's product does, equal results."""

from __future__ import annotations

import emblas
import pytest
import torch
from contract import only_kernels

transformers = pytest.importorskip("transformers", reason="needs emblas[hf]")

from emblas.integrations import linear_layers  # noqa: E402
from integrations.models import tiny  # noqa: E402

IDS = torch.arange(5, 41)[None]
MASK = torch.ones_like(IDS)


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    monkeypatch.setattr(linear_layers, "is_quicker", lambda: True)
    monkeypatch.setattr(linear_layers, "LEAST_ROWS", 8)


def run(model):
    return model(input_ids=IDS, attention_mask=MASK).last_hidden_state


def calls(function):
    """How often the operator runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = function()
    return result, sum(e.count for e in profile.key_averages() if e.key == "emblas::linear")


@pytest.mark.parametrize("name", ["bert", "modernbert", "qwen3"])
def test_same_hidden_states(name):
    model = tiny(name)
    layers = sum(type(module) is torch.nn.Linear for module in model.modules())
    with torch.no_grad():
        expected = run(model)
        with emblas.optimize(model) as optimized:
            assert f"{layers} linear layers" in repr(optimized)
            with only_kernels("linear", "varlen_attention"):
                torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)
        _, count = calls(lambda: run(model))
        assert count == 0


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
