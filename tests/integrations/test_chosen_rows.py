"""Hidden states of chosen tokens alone: those of the whole packed model."""

from __future__ import annotations

import pytest
import torch
from contract import packed
from emblas.attention import pooled_tokens

transformers = pytest.importorskip("transformers")

from emblas.integrations import transformers as hf  # noqa: E402
from emblas.integrations.last_layer import forward_rows  # noqa: E402
from integrations.models import DECODER, SIZES, SPECIAL_IDS, sharpen  # noqa: E402

hf.register()
CONFIGS = {
    "bert": lambda: transformers.BertConfig(**SIZES),
    "roberta": lambda: transformers.RobertaConfig(**SIZES, pad_token_id=0),
    "xlm-roberta": lambda: transformers.XLMRobertaConfig(**SIZES, pad_token_id=0),
    "nomic": lambda: transformers.NomicBertConfig(**SIZES, **SPECIAL_IDS),
    "llama": lambda: transformers.LlamaConfig(**DECODER),
    "mistral": lambda: transformers.MistralConfig(**DECODER, sliding_window=6),
    "qwen2": lambda: transformers.Qwen2Config(
        **DECODER, use_sliding_window=True, sliding_window=5, max_window_layers=0
    ),
    "qwen3": lambda: transformers.Qwen3Config(**DECODER),
}
LENGTHS = (4, 1, 17, 9)


@pytest.fixture(params=CONFIGS)
def model(request):
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(CONFIGS[request.param]()).eval()
    sharpen(model)
    model.set_attn_implementation("emblas")
    return model


def gradients(model, out, grad):
    model.zero_grad()
    (out * grad).sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("pooling", ["cls", "last"])
def test_rows_of_the_packed_model(model, pooling):
    ids, cu = torch.randint(5, 99, (sum(LENGTHS),)), packed(LENGTHS)
    rows = pooled_tokens(cu, pooling)
    grad = torch.randn(len(rows), 32)
    chosen = forward_rows(model, ids, cu, rows)
    actual = gradients(model, chosen, grad)
    every = hf.forward_packed(model, ids, cu)[rows]
    expected = gradients(model, every, grad)
    torch.testing.assert_close(chosen, every, rtol=1e-5, atol=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-3, atol=1e-4, msg=name)
    assert set(actual) == set(expected)


def test_any_rows(model):
    """In any order, more than one of a text, and nobody's; the layer is put back."""
    ids, cu = torch.randint(5, 99, (sum(LENGTHS),)), packed(LENGTHS)
    rows = torch.tensor([30, -1, 6, 6, 4, 13])
    with torch.no_grad():
        before = hf.forward_packed(model, ids, cu)
        actual = forward_rows(model, ids, cu, rows)
        after = hf.forward_packed(model, ids, cu)
    expected = torch.where((rows >= 0)[:, None], before[rows.clamp_min(0)], 0)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(before, after)


def test_bidirectional_decoder():
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(CONFIGS["qwen3"]()).eval()
    model.set_attn_implementation("emblas")
    ids, cu = torch.randint(5, 99, (sum(LENGTHS),)), packed(LENGTHS)
    rows = pooled_tokens(cu, "cls")
    with torch.no_grad():
        expected = hf.forward_packed(model, ids, cu, is_causal=False)[rows]
        actual = forward_rows(model, ids, cu, rows, is_causal=False)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_refusals():
    rows = torch.tensor([0])
    ids, cu = torch.tensor([7, 8]), packed((2,))
    other = transformers.AutoModel.from_config(
        transformers.DistilBertConfig(vocab_size=99, dim=32, n_layers=2, n_heads=2, hidden_dim=48)
    )
    with pytest.raises(ValueError, match="DistilBertModel has none"):
        forward_rows(other, ids, cu, rows)
    model = transformers.AutoModel.from_config(CONFIGS["bert"]())
    with pytest.raises(ValueError, match="must use attn_implementation='emblas'"):
        forward_rows(model.eval(), ids, cu, rows)
