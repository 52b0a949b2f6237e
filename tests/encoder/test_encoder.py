"""Encoders give what sentence-transformers gives, for whatever texts, in every form."""

from __future__ import annotations

import re
import warnings
from concurrent.futures import ThreadPoolExecutor

import emblas
import numpy as np
import pytest
import torch
from emblas.binary import Int8Quantizer, pack_sign

transformers = pytest.importorskip("transformers", reason="needs emblas[hf]")
st = pytest.importorskip("sentence_transformers", reason="needs emblas[hf]")

from emblas.encoder import Encoder, EncoderPair, TruncationWarning  # noqa: E402
from emblas.integrations.mteb import MtebEncoder  # noqa: E402
from emblas.integrations.optimize import UnsupportedModelError  # noqa: E402
from emblas.pooling import LexicalWeights  # noqa: E402
from integrations.models import (  # noqa: E402
    CONFIGS,
    REPLACED,
    TEXTS,
    make_tokenizer,
    tiny,
    tiny_replaced,
)

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def make(name="bert", **options):
    model = tiny_replaced(name) if name in REPLACED else tiny(name)
    return Encoder(model, make_tokenizer(), **{"token_budget": 24, **options})


def folder_of(path, name="bert", mode="mean", dense=False, default=None, prompts=None, **options):
    """Save a model of sentence-transformers."""
    modules = st.sentence_transformer.modules
    tiny(name).save_pretrained(path / "bare")
    make_tokenizer().save_pretrained(path / "bare")
    transformer = modules.Transformer(str(path / "bare"))
    parts = [transformer, modules.Pooling(32, mode, **options)]
    if dense:
        parts.append(st.base.modules.Dense(32, 12))
    parts.append(st.base.modules.Normalize())
    model = st.SentenceTransformer(
        modules=parts, device="cpu", prompts=prompts, default_prompt_name=default
    )
    model.save(str(path / "model"))
    return path / "model"


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("bert", {}),
        ("xlm-roberta", {"mode": "cls", "dense": True}),
        ("qwen3", {"mode": "lasttoken"}),
        ("modernbert", {"mode": ("mean", "max")}),
        ("bert", {"include_prompt": False, "prompts": {"query": "the old ", "document": "a "}}),
        ("bert", {"default": "topic", "prompts": {"topic": "rain ", "passage": "the "}}),
    ],
)
def test_equals_sentence_transformers(tmp_path, name, settings):
    folder = folder_of(tmp_path, name, **settings)
    peer = st.SentenceTransformer(str(folder), device="cpu")
    encoder = emblas.Encoder.load(folder, device="cpu", token_budget=24)
    assert encoder.dim == peer.get_embedding_dimension() == encoder.encode("rain").shape[0]
    np.testing.assert_allclose(encoder.encode(TEXTS), peer.encode(TEXTS), **CLOSE)
    for ours, theirs in (
        (encoder.encode_query, peer.encode_query),
        (encoder.encode_document, peer.encode_document),
    ):
        np.testing.assert_allclose(ours(TEXTS), theirs(TEXTS), **CLOSE)
    np.testing.assert_allclose(
        encoder.encode(TEXTS, prompt="red "), peer.encode(TEXTS, prompt="red "), **CLOSE
    )


@pytest.mark.parametrize("mode", ["mean", "cls"])
def test_truncated_sentence_transformers(tmp_path, mode):
    """Vectors that are cut, and therefore not of length 1."""
    peer = st.SentenceTransformer(str(folder_of(tmp_path, mode=mode)), device="cpu", truncate_dim=8)
    expected = peer.encode(TEXTS)
    encoder = Encoder.from_sentence_transformer(peer)
    assert encoder.dim == 8
    np.testing.assert_allclose(encoder.encode(TEXTS), expected, **CLOSE)


def test_prompts():
    encoder = make(prompts={"query": "", "topic": "rain "}, default_prompt="topic")
    plain = encoder.encode(TEXTS, prompt="")
    np.testing.assert_array_equal(encoder.encode(TEXTS), encoder.encode(TEXTS, prompt="rain "))
    np.testing.assert_array_equal(encoder.encode_document(TEXTS), encoder.encode(TEXTS))
    np.testing.assert_array_equal(encoder.encode_query(TEXTS), plain)
    np.testing.assert_array_equal(encoder.encode(TEXTS, prompt="query"), plain)
    assert not np.array_equal(encoder.encode(TEXTS), plain)


def test_bare_folder_of_transformers(tmp_path):
    folder_of(tmp_path)
    loaded = Encoder.load(tmp_path / "bare", token_budget=24)
    np.testing.assert_array_equal(loaded.encode(TEXTS), make().encode(TEXTS))
    assert loaded.fingerprint() == Encoder.load(tmp_path / "bare").fingerprint()
    assert loaded.fingerprint() != Encoder.load(tmp_path / "bare", pooling="cls").fingerprint()


def test_fingerprints():
    """Whatever changes a vector changes the fingerprint, in the same way in each process."""
    torch.manual_seed(0)
    weight = torch.randn(32, 32)

    def linear(width=8):
        torch.manual_seed(width)
        return torch.nn.Linear(32, width)

    lexical = [LexicalWeights(32), LexicalWeights(32), LexicalWeights(32, ignored_ids=(2,))]
    lexical[2].load_state_dict(lexical[1].state_dict())
    variants = [
        {},
        {"head": linear()},
        {"head": torch.nn.Sequential(linear())},
        {"head": torch.nn.Sequential(linear(), torch.nn.ReLU())},
        {"head": lambda x: x[:, :16]},
        {"head": lambda x: x @ weight},
        {"head": lambda x: x @ weight.T},
        {"token_head": linear()},
        {"token_head": lambda x: x[:, :16]},
        *({"lexical": part} for part in lexical),
    ]
    found = [make(**options).fingerprint() for options in variants]
    assert len(set(found)) == len(variants)
    assert found == [make(**options).fingerprint() for options in variants]
    assert make(pooling=("cls", "mean"), head=lambda x: x[:, :40]).fingerprint() not in found
    encoder = make(max_length=8)
    before = encoder.fingerprint()
    encoder.encode([" ".join(["rain"] * 30)], truncation="ignore")
    assert encoder.fingerprint() == before  # what the tokenizer did last is none of it
    encoder.tokenizer.add_tokens(["snowfall"])
    assert encoder.fingerprint() != before


def test_fingerprints_of_sentence_transformers(tmp_path):
    folder = folder_of(tmp_path, dense=True)
    models = [st.SentenceTransformer(str(folder), device="cpu", truncate_dim=k) for k in (8, 8, 4)]
    take_over = Encoder.from_sentence_transformer
    found = [take_over(model).fingerprint() for model in models]
    assert found[0] == found[1] != found[2]
    with torch.no_grad():
        models[0][2].linear.weight.mul_(2)
    assert take_over(models[0]).fingerprint() not in found


def test_forms_of_texts():
    encoder = make()
    expected = encoder.encode(TEXTS)
    assert expected.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1, rtol=1e-5)
    for texts in (tuple(TEXTS), iter(TEXTS), (text for text in TEXTS)):
        np.testing.assert_array_equal(encoder.encode(texts), expected)
    np.testing.assert_allclose(encoder.encode(TEXTS[2]), expected[2], **CLOSE)
    tensor = encoder.encode(TEXTS, as_numpy=False)
    assert isinstance(tensor, torch.Tensor)
    (tensor * torch.ones(32, requires_grad=True)).sum().backward()
    assert encoder.encode([]).shape == (0, 32)
    assert np.isfinite(encoder.encode(["", "rain", ""])).all()
    for window in (1, 4, 100):
        parts = list(encoder.stream(iter(TEXTS), window=window))
        assert max(map(len, parts)) <= window
        np.testing.assert_allclose(np.concatenate([p.dense for p in parts]), expected, **CLOSE)


def test_texts_without_a_token():
    """Zeros where the tokenizer adds nothing to an empty text."""
    encoder = make()
    encoder.tokenizer.backend_tokenizer.post_processor = None
    assert not encoder.encode(["", ""]).any()
    out = encoder.encode(["rain", ""])
    assert out[0].any()
    assert not out[1].any()
    ragged = encoder.embed(["", "rain", ""], ["tokens", "chunks"])
    assert ragged.tokens.offsets.tolist() == ragged.chunks.offsets.tolist() == [0, 0, 1, 1]


def test_batches_hold_no_more_than_the_budget():
    encoder = make(token_budget=20)
    sizes = []
    encoder.model.register_forward_pre_hook(
        lambda m, args, kwargs: sizes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    tokens = encoder.embed(TEXTS).num_tokens
    assert sum(sizes) == sum(tokens)
    assert all(size <= max(20, max(tokens)) for size in sizes)


def test_all_outputs_in_one_pass():
    torch.manual_seed(0)
    lexical = LexicalWeights(32, ignored_ids=(2, 3))
    encoder = make(lexical=lexical)
    passes = []
    encoder.model.register_forward_hook(lambda *_: passes.append(1))
    names = ["dense", "matryoshka", "int8", "bits", "lexical", "tokens", "chunks"]
    out = encoder.embed(TEXTS, names, dims=[8, 20], chunk_size=4, chunk_overlap=1)
    count = len(passes)
    dense = encoder.encode(TEXTS)
    assert len(passes) == 2 * count
    assert len(out) == len(TEXTS)
    np.testing.assert_array_equal(out.dense, dense)
    for k, prefix in out.matryoshka.items():
        cut = dense[:, :k] / np.linalg.norm(dense[:, :k], axis=1, keepdims=True)
        np.testing.assert_allclose(prefix, cut, rtol=1e-5, atol=1e-6)
    assert out.int8.dtype == np.int8
    step = float(out.quantizer.step.max())
    back = out.quantizer.dequantize(torch.from_numpy(out.int8)).numpy()
    assert np.abs(back - dense).max() <= 0.51 * step
    np.testing.assert_array_equal(out.bits, pack_sign(torch.from_numpy(dense)).numpy())
    ids = encoder.tokenizer(TEXTS)["input_ids"]
    assert out.num_tokens.tolist() == [len(text) for text in ids]
    assert not out.tokens_cut.any()
    for i, text in enumerate(ids):
        with torch.no_grad():
            hidden = encoder.model(torch.tensor([text])).last_hidden_state[0]
        unit = torch.nn.functional.normalize
        part = slice(*out.tokens.offsets[i : i + 2])
        np.testing.assert_allclose(out.tokens.values[part], unit(hidden), **CLOSE)
        weights = lexical.sparse_linear(hidden).squeeze(1).relu().tolist()
        expected = {}
        for token, weight in zip(text, weights, strict=True):
            if token not in (2, 3) and weight > 0:
                expected[token] = max(weight, expected.get(token, 0))
        part = slice(*out.lexical_ids.offsets[i : i + 2])
        found = dict(zip(out.lexical_ids.values[part].tolist(),
                         out.lexical_weights.values[part].tolist(), strict=True))  # fmt: skip
        found = {token: weight for token, weight in found.items() if weight > 0}
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
        part = slice(*out.chunks.offsets[i : i + 2])
        spans = out.chunk_spans.values[part].tolist()
        starts = range(0, max(len(text) - 1, 1), 3) if len(text) > 4 else [0]
        assert spans == [[s, min(s + 4, len(text))] for s in starts]
        pooled = torch.stack([hidden[a:b].mean(0) for a, b in spans])
        np.testing.assert_allclose(out.chunks.values[part], unit(pooled), **CLOSE)


def test_tensors_quantizer_and_heads():
    encoder = make(token_head=lambda x: x[:, :8], head=lambda x: x[:, :16], normalize=False)
    assert encoder.dim == 16
    quantizer = Int8Quantizer(torch.full((16,), -3.0), torch.full((16,), 6 / 255))
    out = encoder.embed(TEXTS, ["int8", "tokens"], quantizer=quantizer, as_numpy=False)
    assert out.dense is None
    assert out.tokens.values.shape[1] == 8
    dense = encoder.encode(TEXTS, as_numpy=False)
    assert torch.equal(out.int8, quantizer.quantize(dense))
    empty = encoder.embed([], ["int8", "bits", "tokens", "matryoshka"], dims=[4])
    assert empty.int8.shape == (0, 16)
    assert empty.bits.shape == (0, 2)
    assert empty.tokens.values.shape == (0, 8)
    assert empty.matryoshka[4].shape == (0, 4)


def test_truncation_is_reported():
    encoder = make(max_length=8)
    long = " ".join(["rain"] * 30)
    cut = " ".join(["rain"] * 6)  # and the two special tokens
    texts = ["the cat", long, "night falls", long + " cat"]
    message = re.escape("2 of 4 texts were cut to 8 tokens, the longest has 33")
    with pytest.warns(TruncationWarning, match=message):
        out = encoder.embed(texts)
    assert out.tokens_cut.tolist() == [0, 24, 0, 25]
    np.testing.assert_allclose(out.dense[1], encoder.encode(cut), **CLOSE)
    with pytest.raises(ValueError, match=r"texts\[1\] has 32 tokens, more than max_length = 8"):
        encoder.encode(texts, truncation="error")
    with pytest.raises(ValueError, match=r"texts\[3\] has 33 tokens, more than"):
        list(encoder.stream(texts[2:3] * 3 + texts[3:], window=2, truncation="error"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode(texts, truncation="ignore")
        encoder.encode(["the cat"])


def test_truncation_warnings_point_at_the_caller():
    """Python shows a warning once per line: not once for all callers, at a line of the library."""
    encoder = make(max_length=8)
    pair = EncoderPair(encoder, encoder)
    texts = [" ".join(["rain"] * 30)]
    calls = [
        lambda: encoder.encode(texts),
        lambda: encoder.encode(texts[0]),
        lambda: encoder.encode_query(texts),
        lambda: encoder.embed(texts),
        lambda: [part for part in encoder.stream(texts)],
        lambda: list(encoder.stream(texts)),
        lambda: pair.encode_document(texts),
        lambda: MtebEncoder(pair).encode(texts),
    ]
    for call in calls:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        (warning,) = caught
        assert (warning.category, warning.filename) == (TruncationWarning, __file__)
        assert warning.lineno == call.__code__.co_firstlineno


def test_chunks_without_the_prompt():
    """Chunks begin behind it, where it is not pooled; spans still count all tokens of a text."""
    encoder = make(include_prompt=False, max_length=12)
    prompt, size = "the old ", 4  # and [CLS]: three tokens
    texts = [*TEXTS, ""]
    options = {"chunk_size": size, "chunk_overlap": 1, "truncation": "ignore"}
    out = encoder.embed(texts, ["chunks"], prompt=prompt, **options)
    for i, length in enumerate(out.num_tokens.tolist()):
        part = slice(*out.chunks.offsets[i : i + 2])
        starts = range(3, max(length - 1, 4), 3)
        spans = [[s, min(s + size, length)] for s in starts]
        assert out.chunk_spans.values[part].tolist() == spans
        ids = encoder.tokenizer(prompt + texts[i], truncation=True, max_length=12)["input_ids"]
        with torch.no_grad():
            hidden = encoder.model(torch.tensor([ids])).last_hidden_state[0]
        pooled = torch.stack([hidden[a:b].mean(0) for a, b in spans])
        expected = torch.nn.functional.normalize(pooled)
        np.testing.assert_allclose(out.chunks.values[part], expected, **CLOSE)
    whole = encoder.embed(
        texts, ["dense", "chunks"], prompt=prompt, **{**options, "chunk_size": 99}
    )
    np.testing.assert_allclose(whole.chunks.values, whole.dense, **CLOSE)
    # A prompt that takes all of a text leaves no chunk of it.
    none = encoder.embed(["rain"], ["chunks"], prompt="rain " * 20, truncation="ignore")
    assert none.chunks.offsets.tolist() == [0, 0]
    assert none.chunks.values.shape == (0, 32)
    empty = encoder.embed([], ["chunks"], prompt=prompt)
    assert empty.chunks.values.shape == (0, 32)


def test_threads_share_a_tokenizer():
    """One thread's truncation, a state of the tokenizer, doesn't cut another's texts unseen."""
    encoder = make(max_length=6)
    long = [" ".join(["rain"] * 30)] * 3

    def cut(_):
        return encoder.embed(long, truncation="ignore").tokens_cut.tolist()

    with ThreadPoolExecutor(4) as pool:
        assert all(found == [26] * 3 for found in pool.map(cut, range(240)))


def test_pairs():
    pair = EncoderPair(make("bert", prompts={"query": "the "}), make("xlm-roberta"))
    np.testing.assert_array_equal(
        pair.encode_query(TEXTS), pair.query.encode(TEXTS, prompt="query")
    )
    np.testing.assert_array_equal(pair.encode_document(TEXTS), pair.document.encode(TEXTS))
    with pytest.raises(ValueError, match="got 32 for queries and 8 for documents"):
        EncoderPair(make(), make(head=lambda x: x[:, :8]))


def test_routes_of_sentence_transformers(tmp_path):
    """A model whose queries and documents go through different modules, or folders of their own."""
    (tmp_path / "q").mkdir()
    (tmp_path / "d").mkdir()
    query, document = folder_of(tmp_path / "q", mode="cls"), folder_of(tmp_path / "d")
    routes = [list(st.SentenceTransformer(str(x), device="cpu"))[:2] for x in (query, document)]
    router = st.base.modules.Router.for_query_document(*routes)
    peer = st.SentenceTransformer(
        modules=[router, st.base.modules.Normalize()], device="cpu", prompts={"query": "the "}
    )
    peer.save(str(tmp_path / "routes"))
    pair = EncoderPair.load(tmp_path / "routes", device="cpu")
    np.testing.assert_allclose(pair.encode_query(TEXTS), peer.encode_query(TEXTS), **CLOSE)
    np.testing.assert_allclose(pair.encode_document(TEXTS), peer.encode_document(TEXTS), **CLOSE)
    two = EncoderPair.load(query, document, device="cpu")
    np.testing.assert_array_equal(two.encode_document(TEXTS), pair.encode_document(TEXTS))
    with pytest.raises(ValueError, match=r"must have a route 'query', got \[\]"):
        EncoderPair.load(query, device="cpu")


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, r"texts\[1\] must be a str, got int", lambda e: e.encode(["a", 3])),
        (TypeError, "got a single str", lambda e: e.embed("rain")),
        (TypeError, "got a single NoneType", lambda e: e.encode(None)),
        (TypeError, "got a single str", lambda e: e.encode_distributed("rain")),
        (ValueError, r"texts\[2\] must hold whole characters", lambda e: list(e.stream(
            ["rain", "", "\ud83d rain"], window=2))),
        (ValueError, "window must be at least 1", lambda e: list(e.stream(TEXTS, window=0))),
        (ValueError, "outputs must be one of", lambda e: e.embed(TEXTS, ["sparse"])),
        (ValueError, "list of names", lambda e: e.embed(TEXTS, "dense")),
        (ValueError, "go together", lambda e: e.embed(TEXTS, ["matryoshka"])),
        (ValueError, "dims must lie between 1 and 32", lambda e: e.embed(
            TEXTS, ["matryoshka"], dims=[33])),
        (ValueError, r"dims must .* got \[4.5\]", lambda e: e.embed(
            TEXTS, ["matryoshka"], dims=[4.5])),
        (ValueError, "lexical head", lambda e: e.embed(TEXTS, ["lexical"])),
        (ValueError, "needs a quantizer", lambda e: list(e.stream(TEXTS, ["int8"]))),
        (ValueError, "chunk_overlap must", lambda e: e.embed(TEXTS, chunk_overlap=128)),
        (ValueError, "truncation must be one of", lambda e: e.encode(TEXTS, truncation="cut")),
        (ValueError, "quantizer must be of 32 dimensions", lambda e: e.embed(
            TEXTS, ["int8"], quantizer=Int8Quantizer(torch.zeros(8), torch.ones(8)))),
        (ValueError, "quantizer must be on device cpu, as model, got meta", lambda e: e.embed(
            TEXTS, ["int8"], quantizer=Int8Quantizer(*torch.ones(2, 32, device="meta")))),
        (ValueError, "lexical must be on device cpu, as model, got meta", lambda e: make(
            lexical=LexicalWeights(32).to("meta")).encode(TEXTS)),
        (TypeError, "got str; Encoder.load takes", lambda e: Encoder("model", e.tokenizer)),
        (TypeError, "tokenizer must be callable, got NoneType", lambda e: Encoder(e.model, None)),
        (ValueError, "max_length must be at least 3", lambda e: make(max_length=0)),
        (ValueError, "at most 511, for which .* got 512", lambda e: make(
            "xlm-roberta", max_length=512)),
        (ValueError, "token_budget must be", lambda e: make(token_budget=0)),
        (ValueError, "mode must be one of", lambda e: make(pooling="median")),
        (UnsupportedModelError, "attention_interface", lambda e: Encoder(
            transformers.DebertaModel(transformers.DebertaConfig(
                vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                intermediate_size=16)), make_tokenizer())),
    ],
)  # fmt: skip
def test_bad_arguments(error, message, call):
    with pytest.raises(error, match=message):
        call(make())


def test_failing_leaves_the_model_as_it_was():
    unlimited = make_tokenizer()
    unlimited.model_max_length = int(1e30)
    for tokenizer, options, message in (
        (unlimited, {}, "max_length must be given"),
        (make_tokenizer(), {"head": torch.nn.Linear(8, 4)}, "shapes cannot be multiplied"),
    ):
        model = tiny_replaced("t5").train()
        before = {path: type(module) for path, module in model.named_modules()}
        with pytest.raises((ValueError, RuntimeError), match=message):
            Encoder(model, tokenizer, **options)
        assert {path: type(module) for path, module in model.named_modules()} == before
        assert not any("forward" in vars(module) for module in model.modules())
        assert model.training
        assert Encoder(model, make_tokenizer()).dim == 64


def test_max_length_leaves_a_token_beside_special_ones():
    for length in (1, 2):
        with pytest.raises(ValueError, match=f"max_length must be at least 3 .*, got {length}"):
            make(max_length=length)
    long = make_tokenizer()
    long.model_max_length = 2  # what no argument says
    with pytest.raises(ValueError, match=r"max_length must be at least 3 tokens, .*, got 2"):
        Encoder(tiny("bert"), long)
    out = make(max_length=3).embed(TEXTS[:2], truncation="ignore")
    assert out.num_tokens.tolist() == [3, 3]
    assert out.tokens_cut.tolist() == [3, 13]
    bare = make_tokenizer()
    bare.backend_tokenizer.post_processor = None
    cut = Encoder(tiny("bert"), bare, max_length=1).embed(TEXTS[:1], truncation="ignore")
    assert cut.num_tokens.tolist() == [1]

    def words(texts, **options):
        return {"input_ids": [[len(word) for word in text.split()] for text in texts]}

    assert Encoder(tiny("bert"), words, max_length=1).encode("rain").shape == (32,)


def test_unfit_sentence_transformers(tmp_path):
    model = st.SentenceTransformer(str(folder_of(tmp_path)), device="cpu")
    with pytest.raises(ValueError, match="must start with Transformer and Pooling, got Pooling"):
        Encoder.from_sentence_transformer(st.SentenceTransformer(modules=[model[1]], device="cpu"))


def test_names_that_are_imported_on_demand():
    assert emblas.__getattr__("encoder").Encoder is emblas.__getattr__("Encoder") is Encoder
    for name in emblas.__all__:
        assert getattr(emblas, name)
    with pytest.raises(AttributeError, match="no attribute 'decoder'"):
        _ = emblas.decoder


def test_every_architecture_of_the_tests():
    for name in (*CONFIGS, *REPLACED):
        encoder = make(name)
        alone = np.stack([encoder.encode(text) for text in TEXTS])
        np.testing.assert_allclose(encoder.encode(TEXTS), alone, **CLOSE)
