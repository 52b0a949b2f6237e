"""Small random models: packed by emblas == padded by emblas == one text at a time, eager."""

from __future__ import annotations

import pytest
import torch
from emblas import packed
from torch._dynamo.testing import CompileCounterWithBackend

transformers = pytest.importorskip("transformers", reason="needs emblas[hf]")

from emblas.integrations import transformers as hf  # noqa: E402

SIZES = {
    "vocab_size": 99,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
CONFIGS = {
    "bert": lambda: transformers.BertConfig(**SIZES),
    "xlm-roberta": lambda: transformers.XLMRobertaConfig(**SIZES, pad_token_id=1),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=99, dim=64, n_layers=2, n_heads=2, hidden_dim=48
    ),
}
DECODER = {**SIZES, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0}
GEMMA = {**DECODER, "sliding_window": 6, "query_pre_attn_scalar": 16}
# Windows are shorter than the texts, so that one off by one fails.
TRAINED = {
    "bert": CONFIGS["bert"],
    "modernbert": lambda: transformers.ModernBertConfig(
        **SIZES, local_attention=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        cls_token_id=1, sep_token_id=2,
    ),
    "qwen2": lambda: transformers.Qwen2Config(**DECODER),
    "qwen3": lambda: transformers.Qwen3Config(**DECODER),
    "mistral": lambda: transformers.MistralConfig(**DECODER, sliding_window=6),
    "llama": lambda: transformers.LlamaConfig(**DECODER),
    "gemma2": lambda: transformers.Gemma2Config(**GEMMA, attn_logit_softcapping=2.0),
    "gemma3": lambda: transformers.Gemma3TextConfig(**GEMMA),
    "gemma3, bidirectional": lambda: transformers.Gemma3TextConfig(
        **GEMMA, use_bidirectional_attention=True
    ),
}  # fmt: skip
LENGTHS = (7, 1, 30, 12)


@pytest.fixture(params=CONFIGS)
def model(request):
    hf.register()
    torch.manual_seed(0)
    return transformers.AutoModel.from_config(CONFIGS[request.param]()).eval()


@pytest.fixture
def texts():
    return [torch.randint(5, 99, (length,)) for length in LENGTHS]


def one_by_one(model, texts):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = [model(input_ids=text[None]).last_hidden_state[0] for text in texts]
    model.set_attn_implementation("emblas")
    return torch.cat(out)


def test_packed(model, texts):
    expected = one_by_one(model, texts)
    with torch.no_grad():
        actual = hf.forward_packed(model, *packed.pack(texts))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6)


def test_soft_tokens(model, texts):
    """Vectors in place of ids, with a gradient that stays within the text."""
    model.set_attn_implementation("emblas")
    ids, cu = packed.pack(texts)
    vectors = model.get_input_embeddings()(ids).detach().requires_grad_()
    out = hf.forward_packed(model, None, cu, inputs_embeds=vectors)
    torch.testing.assert_close(out, hf.forward_packed(model, ids, cu), rtol=1e-5, atol=1e-5)
    begin, end = int(cu[1]), int(cu[2])
    (grad,) = torch.autograd.grad(out[begin:end].square().sum(), vectors)
    assert (grad[begin:end] != 0).any()
    assert torch.count_nonzero(grad[:begin]) == torch.count_nonzero(grad[end:]) == 0
    for both in ({"inputs_embeds": vectors, "input_ids": ids}, {"input_ids": None}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            hf.forward_packed(model, cu_seqlens=cu, **both)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded(model, texts, side):
    expected = one_by_one(model, texts)
    longest = max(LENGTHS)
    pad = model.config.pad_token_id
    input_ids = torch.full((len(texts), longest), 0 if pad is None else pad)
    mask = torch.zeros(len(texts), longest, dtype=torch.long)
    positions = torch.zeros(len(texts), longest, dtype=torch.long)
    for b, text in enumerate(texts):
        at = slice(longest - len(text), None) if side == "left" else slice(len(text))
        input_ids[b, at], mask[b, at] = text, 1
        positions[b, at] = torch.arange(len(text)) + hf.position_start(model)
    kwargs = {} if side == "right" else {"position_ids": positions}
    if side == "left" and model.config.model_type == "distilbert":
        pytest.skip("DistilBERT counts positions over the padding on the left, with any attention")
    with torch.no_grad():
        hidden = model(input_ids=input_ids, attention_mask=mask, **kwargs).last_hidden_state
    torch.testing.assert_close(hidden[mask.bool()], expected, rtol=1e-5, atol=2e-6)


def test_no_leak(model, texts):
    """What stands in one text never reaches another, to the bit."""
    with torch.no_grad():
        model.set_attn_implementation("emblas")
        before = hf.forward_packed(model, *packed.pack(texts))
        texts[0][3] = (texts[0][3] + 1) % 90 + 5
        after = hf.forward_packed(model, *packed.pack(texts))
    assert not torch.equal(before[:7], after[:7])
    assert torch.equal(before[7:], after[7:])


def test_other_attention_is_refused(model, texts):
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="packed sequences attend to each other"):
        hf.forward_packed(model, *packed.pack(texts))


def test_compiled(model):
    """One graph for every batch, whatever its lengths."""
    model.set_attn_implementation("emblas")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")

    def run(input_ids, positions, cu_seqlens, longest):
        return model(
            input_ids=input_ids, position_ids=positions, cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens, max_length_q=longest, max_length_k=longest,
        ).last_hidden_state  # fmt: skip

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for lengths in ((3, 4), (9, 2, 6), (5, 5, 5, 5), (20, 31)):
            ids, cu_seqlens = packed.pack([torch.randint(5, 99, (n,)) for n in lengths])
            args = (ids[None], packed.positions(cu_seqlens)[None] + 2, cu_seqlens, max(lengths))
            torch.testing.assert_close(compiled(*args), run(*args), rtol=0, atol=0)
    assert counter.frame_count == 1


def sharpen(model):
    """Larger queries and keys: a softmax of low entropy shows a wrong mask."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and any(x in name for x in ("q_proj", "query", "Wqkv")):
                weight.mul_(12)


@pytest.mark.parametrize("name", TRAINED)
def test_training(name, texts):
    """Outputs and parameter gradients of a packed batch are those of eager, padded."""
    hf.register()
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(TRAINED[name]()).eval()
    sharpen(model)
    grad = torch.randn(sum(LENGTHS), 64)
    mask = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]
    padded = torch.zeros(mask.shape, dtype=torch.long)
    padded[mask] = torch.cat(texts)

    def eager():
        return model(input_ids=padded, attention_mask=mask.long()).last_hidden_state[mask]

    results = []
    for implementation, run in (
        ("eager", eager),
        ("emblas", lambda: hf.forward_packed(model, *packed.pack(texts))),
    ):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        out = run()
        out.backward(grad)
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((out.detach(), grads))
    (expected, expected_grads), (actual, actual_grads) = results
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)
    assert actual_grads.keys() == expected_grads.keys()
    scale = max(float(g.abs().max()) for g in expected_grads.values())
    for parameter, gradient in expected_grads.items():
        torch.testing.assert_close(
            actual_grads[parameter], gradient, rtol=1e-3, atol=2e-5 * scale, msg=parameter
        )


@pytest.mark.parametrize("name", ["bert", "qwen2", "gemma3"])
def test_autocast(name, texts):
    """Rotary embedding leaves queries and keys in float32 where values are bfloat16."""
    hf.register()
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(TRAINED[name]()).eval()
    model.set_attn_implementation("emblas")
    expected = hf.forward_packed(model, *packed.pack(texts)).detach()
    with torch.autocast("cpu", torch.bfloat16):
        actual = hf.forward_packed(model, *packed.pack(texts))
    torch.testing.assert_close(actual.float(), expected, rtol=0, atol=0.1)
    actual.float().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_verify(texts, monkeypatch):
    hf.register()
    model = transformers.AutoModel.from_config(CONFIGS["bert"]()).eval()
    model.set_attn_implementation("emblas")
    sharpen(model)
    assert hf.verify(model, texts) < 2e-5
    attend = hf.varlen_attention

    def leak(q, k, v, cu_q, cu_k, *rest, **biases):
        return attend(q, k, v, cu_q[[0, -1]], cu_k[[0, -1]], len(q), len(k), *rest[2:], **biases)

    monkeypatch.setattr(hf, "varlen_attention", leak)
    assert hf.verify(model, texts) > 1e-2
    with pytest.raises(ValueError, match="none that is empty"):
        hf.verify(model, [])


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_dropout(causal, window):
    """Dropout of the weights leaves the mean as it is, and the bounds of every text."""
    q, k, v = (torch.randn(1, heads, sum(LENGTHS), 8) for heads in (4, 2, 2))
    cu_seqlens = packed.offsets(LENGTHS)

    def attend(dropout, v=v):
        return hf.attend(
            torch.nn.Module(), q, k, v, None, dropout, is_causal=causal, sliding_window=window,
            cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=cu_seqlens, max_length_q=30, max_length_k=30,
        )[0]  # fmt: skip

    torch.testing.assert_close(attend(1e-9), attend(0.0), rtol=1e-4, atol=1e-5)
    draws = torch.stack([attend(0.3) for _ in range(200)])
    spread = draws.std(0) / 200**0.5
    assert spread.max() > 1e-2
    assert ((draws.mean(0) - attend(0.0)).abs() <= 6 * spread + 1e-4).all()
    other = v.clone()
    other[:, :, 3] += 1
    torch.manual_seed(1)
    before = attend(0.3)
    torch.manual_seed(1)
    assert torch.equal(attend(0.3, other)[:, 7:], before[:, 7:])
