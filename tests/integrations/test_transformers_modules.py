"""Small random models with replaced modules: packed == padded == eager, and their gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from emblas import packed

transformers = pytest.importorskip("transformers", reason="needs emblas[hf]")

from emblas.integrations import transformers as hf  # noqa: E402
from emblas.integrations.transformers_modules import replace_modules  # noqa: E402
from integrations.models import REPLACED, tiny_replaced  # noqa: E402

LENGTHS = (7, 1, 45, 12)


@pytest.fixture(params=REPLACED)
def models(request):
    """A model as transformers made it, and the same with emblas inside."""
    hf.register()
    eager = tiny_replaced(request.param)
    return eager, replace_modules(copy.deepcopy(eager))


@pytest.fixture
def texts():
    return [torch.randint(5, 99, (length,)) for length in LENGTHS]


def pad(texts, side):
    longest = max(len(text) for text in texts)
    input_ids = torch.ones(len(texts), longest, dtype=torch.long)
    mask = torch.zeros(len(texts), longest, dtype=torch.long)
    for b, text in enumerate(texts):
        at = slice(longest - len(text), None) if side == "left" else slice(len(text))
        input_ids[b, at], mask[b, at] = text, 1
    return input_ids, mask


def test_outputs_and_gradients(models, texts):
    """A packed batch gives what transformers gives for the padded one."""
    input_ids, mask = pad(texts, "right")
    grad = torch.randn(sum(LENGTHS), 64)
    results = []
    for model, run in zip(
        models,
        (
            lambda m: m(input_ids=input_ids, attention_mask=mask).last_hidden_state[mask.bool()],
            lambda m: hf.forward_packed(m, *packed.pack(texts)),
        ),
        strict=True,
    ):
        out = run(model)
        out.backward(grad)
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((out.detach(), grads))
    (expected, expected_grads), (actual, actual_grads) = results
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)
    assert actual_grads.keys() == expected_grads.keys()
    scale = max(float(g.abs().max()) for g in expected_grads.values())
    for name, gradient in expected_grads.items():
        torch.testing.assert_close(
            actual_grads[name], gradient, rtol=1e-3, atol=2e-5 * scale, msg=name
        )


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded(models, texts, side):
    input_ids, mask = pad(texts, side)
    model = models[1]
    if side == "left" and getattr(model.config, "position_biased_input", False):
        pytest.skip("DeBERTa counts absolute positions over the padding on the left")
    with torch.no_grad():
        hidden = model(input_ids=input_ids, attention_mask=mask).last_hidden_state
        expected = hf.forward_packed(model, *packed.pack(texts))
    torch.testing.assert_close(hidden[mask.bool()], expected, rtol=1e-4, atol=2e-5)


def test_no_leak(models, texts):
    model = models[1]
    assert hf.verify(model, texts) < 2e-5
    with torch.no_grad():
        before = hf.forward_packed(model, *packed.pack(texts))
        texts[0][3] = (texts[0][3] + 1) % 90 + 5
        after = hf.forward_packed(model, *packed.pack(texts))
    assert not torch.equal(before[:7], after[:7])
    assert torch.equal(before[7:], after[7:])


def test_dropout_in_training(models, texts):
    """Probabilities are dropped as torch's generator is seeded, and gradients exist."""
    model = models[1].train()
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(hf.forward_packed(model, *packed.pack(texts)))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    outs[0].sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_refusals(models):
    model = models[1]
    assert (
        replace_modules(copy.deepcopy(models[0])).state_dict().keys() == model.state_dict().keys()
    )
    with pytest.raises(ValueError, match="model must be"):
        replace_modules(torch.nn.Linear(2, 2))
    decoder = transformers.T5Model(
        transformers.T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    with pytest.raises(ValueError, match="without a decoder, got T5Model"):
        replace_modules(decoder)
    decoder.set_attn_implementation("emblas")
    ids = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(NotImplementedError, match="takes no position_bias for each pair"):
        decoder(input_ids=ids, decoder_input_ids=ids)
