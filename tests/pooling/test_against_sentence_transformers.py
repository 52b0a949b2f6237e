"""Same results as the Pooling of sentence-transformers, in all its modes, but for empty sets."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from contract import packed
from emblas.pooling import segment_pool

peer = pytest.importorskip("sentence_transformers.sentence_transformer.modules")

twins = pytest.importorskip("emblas.integrations.sentence_transformers_pooling")

MODES = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted_mean",
    "lasttoken": "last",
}
LENGTHS = (4, 9, 7, 5)  # all longer than the prompt: on empty sets the peer fails silently


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prompt", [None, 3])
@pytest.mark.parametrize("theirs", [*MODES, tuple(MODES)], ids=str)
def test_all_modes(theirs, prompt, dtype):
    mode = MODES[theirs] if isinstance(theirs, str) else [MODES[name] for name in theirs]
    pooling = peer.Pooling(12, theirs, include_prompt=prompt is None)
    features = {} if prompt is None else {"prompt_length": prompt}
    cu_seqlens, limit = packed(LENGTHS), {"rtol": 1e-5, "atol": 1e-6}
    if dtype == torch.bfloat16:  # the peer rounds its weighted sums on the way
        limit = {"rtol": 2e-2, "atol": 2e-2}
    tokens = torch.randn(sum(LENGTHS), 12).to(dtype)
    flat = {"token_embeddings": tokens[None], "cu_seq_lens_q": cu_seqlens, **features}
    expected = pooling(flat)["sentence_embedding"]
    actual = segment_pool(tokens, cu_seqlens, mode, skip_prefix=prompt)
    torch.testing.assert_close(actual, expected, **limit)
    for side in ("left", "right"):
        x, mask = torch.zeros(4, 9, 12, dtype=dtype), torch.zeros(4, 9, dtype=torch.long)
        for b, n in enumerate(LENGTHS):
            at = slice(9 - n, 9) if side == "left" else slice(0, n)
            x[b, at], mask[b, at] = tokens[cu_seqlens[b] : cu_seqlens[b + 1]], 1
        padded = {"token_embeddings": x, "attention_mask": mask, **features}
        expected = pooling(padded)["sentence_embedding"]
        actual = segment_pool(x, mask=mask, mode=mode, skip_prefix=prompt)
        torch.testing.assert_close(actual, expected, **limit)


def test_twins_share_folders(tmp_path):
    splade = pytest.importorskip("sentence_transformers.sparse_encoder.modules").SpladePooling
    x, mask = torch.randn(3, 7, 6), torch.tensor([[1] * 7, [0] * 4 + [1] * 3, [1] * 5 + [0] * 2])
    for module, features in (
        (peer.Pooling(6, ("mean", "max"), include_prompt=False), {"prompt_length": 2}),
        (peer.Normalize(), {"sentence_embedding": torch.randn(3, 6)}),
        (splade("max", "log1p_relu"), {}),
        (splade("sum"), {}),
    ):
        theirs, ours = tmp_path / "theirs", tmp_path / "ours"
        for folder in (theirs, ours):
            folder.mkdir(exist_ok=True)
        module.save(str(theirs))
        twin = getattr(twins, type(module).__name__).load(str(theirs))
        twin.save(str(ours))
        back = type(module).load(str(ours))
        assert back.get_config_dict() == module.get_config_dict()
        batch = {"token_embeddings": x, "attention_mask": mask, **features}
        actual = twin(dict(batch))["sentence_embedding"]
        batch["token_embeddings"] = x.clone()  # the peer works in place
        expected = module(dict(batch))["sentence_embedding"]
        torch.testing.assert_close(actual, expected)


def test_twins_in_a_model_folder(tmp_path):
    """A model with twins in it saves, loads and encodes as one without."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    library = pytest.importorskip("sentence_transformers")
    words = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "a", "b", "c"))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    base = str(tmp_path / "base")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(base)
    transformers.BertModel(
        transformers.BertConfig(
            vocab_size=5, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=8,
        )
    ).save_pretrained(base)  # fmt: skip
    texts, embeddings = ["a b c", "c", "a b b b a"], []
    for source in (peer, twins):
        model = library.SentenceTransformer(
            modules=[peer.Transformer(base), source.Pooling(8, "mean"), source.Normalize()],
            device="cpu",
        )
        embeddings.append(model.encode(texts, convert_to_tensor=True))
    torch.testing.assert_close(embeddings[1], embeddings[0])
    model.save(str(tmp_path / "saved"))
    again = library.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert [type(module) for module in list(again)[1:]] == [peer.Pooling, peer.Normalize]
    again = pickle.loads(pickle.dumps(twins.use_twins(again)))
    for module, twin in zip(list(again)[1:], (twins.Pooling, twins.Normalize), strict=True):
        assert type(module) is type(copy.deepcopy(module)) is twin
    assert torch.equal(again.encode(texts, convert_to_tensor=True), embeddings[1])
