"""Learned prefixes: as many vectors of a text, those of the texts behind each prefix alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emblas import packed

transformers = pytest.importorskip("transformers", reason="needs emblas[hf]")

from emblas.encoder import Encoder, ParallelPrefixes, encode_file, load_embeddings  # noqa: E402
from emblas.integrations import transformers as hf  # noqa: E402
from emblas.losses import InfoNCE  # noqa: E402
from emblas.pooling import segment_pool  # noqa: E402
from integrations.models import TEXTS, make_tokenizer, tiny  # noqa: E402

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
IDS = [
    torch.tensor(ids, dtype=torch.int64)
    for ids in ([2, 9, 30, 3], [], [2, 3], [2, *range(20, 40), 3])
]


def make(name="qwen3", count=3, length=2, **options):
    torch.manual_seed(1)
    prefixes = ParallelPrefixes(count, 32, length, std=1.0)
    settings = {"pooling": "last", "token_budget": 60, "prefixes": prefixes, **options}
    return Encoder(tiny(name), make_tokenizer(), **settings)


@pytest.mark.parametrize("name", ["bert", "xlm-roberta", "qwen3"])
def test_hidden_states(name):
    """Each sequence by itself, through the untouched model, and its gradients."""
    model, prefixes = tiny(name), ParallelPrefixes(3, 32, 2, std=1.0)
    results = []
    for together in (False, True):
        if together:
            hf.register()
            model.set_attn_implementation(hf.NAME)
            hidden, offsets = prefixes(model, *packed.pack(IDS))
        else:
            words = model.get_input_embeddings()
            rows = [
                torch.cat([prefix, words(ids)])[None] for ids in IDS for prefix in prefixes.vectors
            ]
            start = hf.position_start(model)
            hidden = torch.cat([
                model(inputs_embeds=row, position_ids=torch.arange(row.shape[1])[None] + start)
                .last_hidden_state[0] for row in rows
            ])  # fmt: skip
        prefixes.vectors.grad = None
        hidden.sin().sum().backward()
        results.append((hidden.detach(), prefixes.vectors.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)
    assert offsets.tolist() == [0, *np.cumsum([len(i) + 2 for i in IDS for _ in range(3)])]


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
@pytest.mark.parametrize("include_prompt", [True, False])
def test_output(pooling, include_prompt):
    encoder = make(pooling=pooling, include_prompt=include_prompt)
    texts = [*TEXTS, ""]
    out = encoder.embed(texts, ["prefixes", "dense"])
    assert out.prefixes.shape == (len(texts), 3, 32)
    np.testing.assert_allclose(out.dense, encoder.encode(texts), **CLOSE)
    ids = [torch.tensor(row) for row in encoder.tokenizer(texts)["input_ids"]]
    with torch.no_grad():
        hidden, offsets = encoder.prefixes(encoder.model, *packed.pack(ids))
        skip = None if include_prompt else 2
        expected = segment_pool(hidden, offsets, pooling, skip_prefix=skip, normalize=True)
    np.testing.assert_allclose(out.prefixes.reshape(-1, 32), expected, **CLOSE)
    assert encoder.embed([], ["prefixes"]).prefixes.shape == (0, 3, 32)
    assert encoder.embed(texts, ["prefixes"]).dense is None


def test_training_of_prefixes_alone():
    """They learn to tell pairs apart that a frozen model does not."""
    model = tiny("qwen3").requires_grad_(False)
    hf.register()
    model.set_attn_implementation(hf.NAME)
    prefixes = ParallelPrefixes(2, 32, 4)
    generator = torch.Generator().manual_seed(0)
    pairs = [torch.randint(5, 90, (12,), generator=generator) for _ in range(16)]
    batch = packed.pack([*pairs, *(text.flip(0) for text in pairs)])
    optimizer, loss, losses = torch.optim.Adam(prefixes.parameters(), 0.05), InfoNCE(0.1), []
    for _ in range(15):
        vectors = segment_pool(*prefixes(model, *batch), "mean").unflatten(0, (-1, 2))
        queries, documents = vectors.flatten(1).chunk(2)
        value = loss(queries, documents)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is None for p in model.parameters())


def test_files_and_fingerprint(tmp_path):
    encoder = make()
    encode_file(encoder, TEXTS, tmp_path, outputs=["prefixes"], shard_size=4)
    expected = encoder.embed(TEXTS, ["prefixes"]).prefixes
    np.testing.assert_allclose(load_embeddings(tmp_path, "prefixes"), expected, **CLOSE)
    before = encoder.fingerprint()
    with torch.no_grad():
        encoder.prefixes.vectors.mul_(2)
    assert encoder.fingerprint() != before


def test_texts_are_cut_for_the_prefix():
    encoder = make(max_length=8)
    with pytest.warns(UserWarning, match="were cut"):
        out = encoder.embed([" ".join(["rain"] * 9)], ["prefixes"])
    assert out.num_tokens.tolist() == [6]


def test_refusals():
    assert repr(ParallelPrefixes(3, 32, 2)) == "ParallelPrefixes(3, 32, length=2)"
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        ParallelPrefixes(0, 4)
    with pytest.raises(ValueError, match="needs an Encoder with prefixes"):
        make(prefixes=None).embed(TEXTS, ["prefixes"])
    with pytest.raises(ValueError, match="leave no token"):
        make(max_length=4).embed(TEXTS, ["prefixes"])
    with pytest.raises(ValueError, match="prefixes have vectors of dimension 8, model of 32"):
        make(prefixes=ParallelPrefixes(2, 8)).embed(TEXTS, ["prefixes"])
