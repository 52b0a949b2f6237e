"""Vectors of first and last tokens are the same whether all tokens leave the last layer or not."""

from __future__ import annotations

import emblas
import pytest
import torch
from emblas import packed

transformers = pytest.importorskip("transformers", reason="needs emblas[hf]")
st = pytest.importorskip("sentence_transformers", reason="needs emblas[hf]")

from emblas.encoder import Encoder  # noqa: E402
from emblas.integrations import last_layer  # noqa: E402
from emblas.integrations import transformers as hf  # noqa: E402
from integrations.models import SIZES, TEXTS, make_tokenizer, tiny  # noqa: E402

FAMILY = ["Bert", "Camembert", "Electra", "Roberta", "XLMRoberta"]
MODES = [("cls",), ("last",), ("cls", "last"), ("last", "cls")]
LENGTHS = (7, 0, 1, 30, 2)


def build(family):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, pad_token_id=0)
    return transformers.AutoModel.from_config(config).eval()


@pytest.fixture
def ffn_rows():
    """Numbers of tokens that go through the feed-forward network of a model's last layer."""
    seen = []

    def watch(model):
        model.base_model.encoder.layer[-1].intermediate.register_forward_hook(
            lambda _, inputs, __: seen.append(inputs[0].shape[:-1].numel())
        )
        return seen

    return watch


@pytest.mark.parametrize("modes", MODES)
def test_rows(modes):
    cu_seqlens = packed.offsets(LENGTHS)
    rows, offsets = last_layer.pooled_rows(cu_seqlens, modes)
    expected = []
    for begin, length in zip(cu_seqlens.tolist(), LENGTHS, strict=False):
        found = {begin} if "cls" in modes else set()
        found |= {begin + length - 1} if "last" in modes else set()
        expected.append(sorted(found) if length else [])
    assert [part.tolist() for part in packed.split(rows, offsets)] == expected


@pytest.mark.parametrize("modes", MODES)
@pytest.mark.parametrize("family", FAMILY)
def test_forward_and_gradients(family, modes):
    """The rows, and the gradients of all parameters through them, are those of the whole layer."""
    model = build(family)
    cu_seqlens = packed.offsets(LENGTHS)
    ids = torch.randint(5, 90, (sum(LENGTHS),))
    pooled = last_layer.pooled_rows(cu_seqlens, modes)
    results = []
    with emblas.optimize(model) as optimized:
        assert any("single tokens" in change for change in optimized.changes)
        assert last_layer.is_patched(model)
        for options in ({}, {last_layer.KEY: pooled}):
            model.zero_grad()
            out = hf.forward_packed(model, ids, cu_seqlens, **options)
            out = out if options else out[pooled.rows]
            out.sin().sum().backward()
            grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            results.append((out.detach(), grads))
    assert not last_layer.is_patched(model)
    (expected, expected_grads), (actual, grads) = results
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6)
    assert grads.keys() == expected_grads.keys()
    for name, value in expected_grads.items():
        torch.testing.assert_close(grads[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_models_whose_layer_is_not_known():
    assert last_layer.last_layer(tiny("distilbert")) is None
    config = transformers.BertConfig(**SIZES, is_decoder=True)
    assert last_layer.last_layer(transformers.BertModel(config)) is None


@pytest.mark.parametrize("pooling", ["cls", "last", ("last", "cls")])
def test_encoder(pooling, ffn_rows):
    encoder = Encoder(tiny("bert"), make_tokenizer(), pooling=pooling, token_budget=24)
    seen = ffn_rows(encoder.model)
    texts = [*TEXTS, ""]
    everything = encoder.embed(texts, ["dense", "tokens"])
    assert sum(seen) == sum(everything.num_tokens)
    seen.clear()
    out = encoder.embed(texts, ["dense", "bits", "matryoshka", "int8"], dims=[8])
    assert sum(seen) == len(texts) * (2 if len(encoder.modes) == 2 else 1)
    torch.testing.assert_close(out.dense, everything.dense, rtol=1e-5, atol=2e-6)
    encoder.tokenizer.backend_tokenizer.post_processor = None
    out = encoder.embed(["", "rain", ""])
    torch.testing.assert_close(
        out.dense, encoder.embed(["", "rain", ""], ["dense", "tokens"]).dense, rtol=1e-5, atol=2e-6
    )
    assert not out.dense[0].any()
    assert out.dense[1].any()


def test_encoder_leaves_out_the_prompt(ffn_rows):
    """What is pooled then is another token than the first."""
    encoder = Encoder(tiny("bert"), make_tokenizer(), pooling="cls", include_prompt=False)
    seen = ffn_rows(encoder.model)
    encoder.encode(TEXTS, prompt="the old ")
    assert sum(seen) > 2 * len(TEXTS)


@pytest.mark.parametrize("mode", ["cls", ("lasttoken", "cls"), "mean"])
def test_sentence_transformers(tmp_path, mode, ffn_rows):
    modules = st.sentence_transformer.modules
    tiny("bert").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    transformer = modules.Transformer(str(tmp_path))
    parts = [transformer, modules.Pooling(32, mode), st.base.modules.Normalize()]
    model = st.SentenceTransformer(modules=parts, device="cpu").eval()
    expected = model.encode(TEXTS)
    tokens = model.encode(TEXTS, output_value="token_embeddings")
    seen = ffn_rows(transformer.model)
    with emblas.optimize(model):
        seen.clear()
        torch.testing.assert_close(model.encode(TEXTS), expected, rtol=1e-5, atol=2e-6)
        one_each = len(TEXTS) * (1 if isinstance(mode, str) else 2)
        assert (sum(seen) == one_each) == (mode != "mean")
        # Whoever wants tokens, or might want them, gets them all.
        for kind in ("token_embeddings", None):
            seen.clear()
            actual = model.encode(TEXTS, output_value=kind)
            if kind:
                torch.testing.assert_close(
                    torch.cat(actual), torch.cat(tokens), rtol=1e-4, atol=1e-5
                )
            assert sum(seen) == sum(map(len, tokens))
        seen.clear()
        model(model.preprocess(TEXTS))
        assert sum(seen) == sum(map(len, tokens))
    assert "encode" not in vars(model)
    assert "forward" not in vars(transformer.model.encoder.layer[-1])
