"""Several texts behind one text that is read once: the vectors of separate passes."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from emblas import __main__ as command

transformers = pytest.importorskip("transformers", reason="needs emblas[hf]")

from emblas.encoder import Encoder, load_embeddings  # noqa: E402
from emblas.encoder.branches import pack_branches  # noqa: E402
from emblas.encoder.files import encode_file  # noqa: E402
from emblas.encoder.tokens import branch_tokens  # noqa: E402
from integrations.models import TEXTS, make_tokenizer, tiny  # noqa: E402

BRANCHES = ["the moon", "a quick red bird", "rain"]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def make(name="qwen3", **options):
    return Encoder(
        tiny(name), make_tokenizer(), **{"pooling": "last", "token_budget": 40, **options}
    )


def test_layout():
    tails = branch_tokens(make_tokenizer(), ["rain", "the moon"])
    assert [len(ids) for ids in tails.ids] == [2, 3]
    assert tails.end == 1
    at = pack_branches([[2, 7, 8, 3], [2, 3]], tails)
    assert at.positions.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2, 1, 2, 3]
    assert at.branch.tolist() == [-1, -1, -1, 0, 0, 1, 1, 1, -1, 0, 0, 1, 1, 1]
    assert at.cu_seqlens.tolist() == [0, 8, 14]
    assert at.last.tolist() == [[4, 7], [10, 13]]
    assert at.token_ids[at.last].eq(3).all()


def test_equal_separate_passes():
    encoder = make(head=lambda x: x[:, :16])
    texts = [*TEXTS, ""]
    out = encoder.embed(texts, ["branches", "dense"], branches=BRANCHES)
    assert out.branches.shape == (len(texts), len(BRANCHES), 16)
    for j, branch in enumerate(BRANCHES):
        alone = np.stack([encoder.encode(f"{text} {branch}") for text in texts])
        np.testing.assert_allclose(out.branches[:, j], alone, **CLOSE)
    np.testing.assert_allclose(out.dense, encoder.encode(texts), **CLOSE)
    # The text goes through the model once.
    tokens = []
    encoder.model.register_forward_pre_hook(
        lambda m, args, kwargs: tokens.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    encoder.embed(texts, ["branches"], branches=BRANCHES)
    ids = encoder.tokenizer(texts)["input_ids"]
    tails = encoder.tokenizer(BRANCHES, add_special_tokens=False)["input_ids"]
    assert sum(tokens) == sum(len(t) - 1 + sum(len(b) + 1 for b in tails) for t in ids)


def test_prompts_order_and_none():
    encoder = make()
    out = encoder.embed(TEXTS, ["branches"], branches=BRANCHES, prompt="the ")
    assert out.dense is None
    swapped = encoder.embed(TEXTS, ["branches"], branches=BRANCHES[::-1], prompt="the ")
    np.testing.assert_allclose(swapped.branches[:, ::-1], out.branches, **CLOSE)
    alone = encoder.encode([f"the {text} {BRANCHES[0]}" for text in TEXTS])
    np.testing.assert_allclose(out.branches[:, 0], alone, **CLOSE)
    assert encoder.embed([], ["branches"], branches=BRANCHES).branches.shape == (0, 3, 32)


def test_the_longest_branch_fits():
    encoder = make(max_length=8)
    out = encoder.embed(
        [" ".join(["rain"] * 9)], ["branches"], branches=BRANCHES, truncation="ignore"
    )
    assert out.num_tokens.tolist() == [4]
    np.testing.assert_allclose(
        out.branches[0, 1], encoder.encode("rain rain a quick red bird"), **CLOSE
    )
    with pytest.raises(ValueError, match="leave no token to a text of max_length = 4"):
        make(max_length=4).embed(TEXTS, ["branches"], branches=BRANCHES)


def test_files(tmp_path):
    encoder = make()
    options = {"outputs": ["branches"], "branches": BRANCHES, "shard_size": 4}
    encode_file(encoder, TEXTS, tmp_path, **options)
    expected = encoder.embed(TEXTS, ["branches"], branches=BRANCHES).branches
    np.testing.assert_allclose(load_embeddings(tmp_path, "branches"), expected, **CLOSE)
    with pytest.raises(ValueError, match="holds embeddings with branches"):
        encode_file(encoder, TEXTS, tmp_path, **{**options, "branches": BRANCHES[:1]})


@pytest.mark.parametrize(
    ("message", "name", "settings", "options"),
    [
        ("go together", "qwen3", {}, {"branches": None}),
        ("go together", "qwen3", {}, {"outputs": ["dense"]}),
        ("needs pooling='last', got", "qwen3", {"pooling": "mean"}, {}),
        ("layers all have causal attention, got BertModel", "bert", {}, {}),
        ("layers all have causal attention, got Gemma3TextModel", "gemma3", {}, {}),
        ("list of at least one text, got 'rain'", "qwen3", {}, {"branches": "rain"}),
        ("list of at least one text", "qwen3", {}, {"branches": []}),
        ("branches must have tokens, got ''", "qwen3", {}, {"branches": ["rain", ""]}),
    ],
)
def test_refusals(message, name, settings, options):
    encoder = make(name, **settings)
    arguments = {"outputs": ["branches"], "branches": BRANCHES, **options}
    with pytest.raises(ValueError, match=message):
        encoder.embed(TEXTS, **arguments)


def test_windows_are_refused():
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=16, sliding_window=8, pad_token_id=0,
    )  # fmt: skip
    encoder = Encoder(transformers.MistralModel(config), make_tokenizer(), pooling="last")
    with pytest.raises(ValueError, match="without sliding windows"):
        encoder.embed(TEXTS, ["branches"], branches=BRANCHES)


def test_command(tmp_path, monkeypatch):
    st = pytest.importorskip("sentence_transformers", reason="needs emblas[hf]")
    modules = st.sentence_transformer.modules
    tiny("qwen3").save_pretrained(tmp_path / "bare")
    make_tokenizer().save_pretrained(tmp_path / "bare")
    parts = [modules.Transformer(str(tmp_path / "bare")), modules.Pooling(32, "lasttoken")]
    st.SentenceTransformer(modules=parts, device="cpu").save(str(tmp_path / "model"))
    (tmp_path / "texts").write_text("\n".join(TEXTS))
    line = f"emblas encode {tmp_path}/texts {tmp_path}/out --model {tmp_path}/model --quiet"
    words = [*line.split(), "--outputs", "branches", "--branches", *BRANCHES]
    monkeypatch.setattr(sys, "argv", words)
    command.main()
    expected = make(normalize=False).embed(TEXTS, ["branches"], branches=BRANCHES).branches
    np.testing.assert_allclose(load_embeddings(tmp_path / "out", "branches"), expected, **CLOSE)
