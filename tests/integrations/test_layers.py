"""Pooling inside transformers models: what the hooks see is what the models would hand out."""

from __future__ import annotations

import pytest
import torch
from emblas.pooling import pooled_outputs, segment_pool, two_part_similarity, zscore

transformers = pytest.importorskip("transformers", reason="needs emblas[hf]")

from emblas.integrations import transformers as hf  # noqa: E402

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
CONFIGS = {
    "bert": lambda: transformers.BertConfig(**SIZES),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=99, dim=32, n_layers=3, n_heads=2, hidden_dim=48
    ),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, num_key_value_heads=1, head_dim=16),
    "olmoe": lambda: transformers.OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2),
}
MASK = torch.tensor([[1] * 7, [0] * 3 + [1] * 4, [0] * 6 + [1]])


def last(x):
    return segment_pool(x.reshape(*MASK.shape, -1), mask=MASK, mode="last")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("head", [False, True])
def test_layers(name, head):
    torch.manual_seed(0)
    if head and name in ("distilbert", "olmoe"):
        pytest.skip("two of each kind will do")
    auto = transformers.AutoModel
    if head:
        auto = transformers.AutoModelForMaskedLM if name == "bert" else (
            transformers.AutoModelForCausalLM)  # fmt: skip
    model, ids = auto.from_config(CONFIGS[name]()).eval(), torch.randint(5, 99, (3, 7))
    with torch.no_grad():
        outputs = model(ids, attention_mask=MASK, output_hidden_states=True)
        expected = [last(x) for x in outputs.hidden_states[1:]]
        for start in (1, 3):
            with pooled_outputs(hf.layers(model, start), last) as vectors:
                model(ids, attention_mask=MASK)
            assert len(vectors) == 4 - start
            for actual, x in zip(vectors, expected[start - 1 :], strict=True):
                torch.testing.assert_close(actual, x)
    with pytest.raises(ValueError, match="start must be between 1 and 3"):
        hf.layers(model, 0)


def test_routers():
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS["olmoe"]()).eval()
    ids = torch.randint(5, 99, (3, 7))
    with torch.no_grad():
        outputs = model(ids, attention_mask=MASK, output_router_logits=True)
        expected = torch.cat([last(x) for x in outputs.router_logits], 1)
        with (
            pooled_outputs(hf.routers(model), last) as routing,
            pooled_outputs(hf.layers(model, 3), last) as hidden,
        ):
            model(ids, attention_mask=MASK)
    routing = torch.cat(routing, 1)
    assert routing.shape == (3, 3 * 4)
    torch.testing.assert_close(routing, expected)
    texts = zscore(hidden[0]), zscore(routing)
    scores = two_part_similarity(texts, texts)
    torch.testing.assert_close(scores.diagonal(), torch.full((3,), 2.0))
    with pytest.raises(ValueError, match="model must be a mixture of experts"):
        hf.routers(torch.nn.Linear(1, 1))
