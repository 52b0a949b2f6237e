"""A contrastive training step of an encoder as large as all-MiniLM-L6-v2, packed and padded."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import emblas
import pytest
import torch
from emblas import packed
from emblas.losses import info_nce
from emblas.pooling import segment_pool
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from torch.nn.utils.rnn import pad_sequence

transformers = pytest.importorskip("transformers", reason="needs emblas[hf]")

from emblas.integrations import transformers as hf  # noqa: E402

PAIRS = 16
Loss = Callable[[Any, Sequence[Tensor]], Tensor]


def _texts() -> list[Tensor]:
    """Queries and documents, as ids, of lengths that come in no order."""
    dice = random.Random(0)
    generator = torch.Generator().manual_seed(0)
    lengths = [dice.choice([8, 12, 20, 40, 80, 160, 238]) for _ in range(2 * PAIRS)]
    return [torch.randint(1000, 30000, (length,), generator=generator) for length in lengths]


def _packed(model: Any, texts: Sequence[Tensor]) -> Tensor:
    tokens, cu_seqlens = packed.pack(texts)
    vectors = segment_pool(hf.forward_packed(model, tokens, cu_seqlens), cu_seqlens, "mean")
    return info_nce(*vectors.chunk(2))


def _padded(model: Any, texts: Sequence[Tensor]) -> Tensor:
    """Return the loss in the steps of sentence-transformers."""
    mask = pad_sequence([torch.ones(len(text)) for text in texts], batch_first=True)
    ids = pad_sequence(list(texts), batch_first=True)
    hidden = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    vectors = normalize((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
    queries, documents = vectors.chunk(2)
    return cross_entropy(queries @ documents.t() * 20.0, torch.arange(PAIRS))


@cache
def _step(who: str) -> Callable[[Sequence[Tensor]], Tensor]:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.BertModel(config, add_pooling_layer=False)
    if who != "torch, padded":
        emblas.optimize(model)
    loss: Loss = _packed if who == "emblas" else _padded
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)  # the same step every time

    def step(texts: Sequence[Tensor]) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            value = loss(model, texts)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        return value.detach()

    return step


@pytest.mark.parametrize("who", ["emblas", "emblas.optimize", "torch, padded"])
def bench_training_step(row: Any, who: str) -> None:
    texts = _texts()
    torch.testing.assert_close(_step(who)(texts), _step("emblas")(texts), rtol=1e-4, atol=1e-4)
    row(
        "encode", "training step, 6 layers of 384", who,
        shape=f"{len(texts)} texts, mixed, forward, backward and AdamW", dtype="float32",
        call=_step(who), inputs=[(texts,)],
    )  # fmt: skip
