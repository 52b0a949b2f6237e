"""InfoNCE beside the version that holds the matrix of scores, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import rotate
from emblas.losses import info_nce
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

DIM = 768


def _batch(queries: int, documents: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(queries, DIM, generator=generator, requires_grad=True)
    return q, torch.randn(documents, DIM, generator=generator, requires_grad=True)


def _materializing(queries: Tensor, documents: Tensor, symmetric: bool) -> Tensor:
    """Return the loss in the steps of sentence-transformers' MultipleNegativesRankingLoss."""
    scores = normalize(queries) @ normalize(documents).t() * 20.0
    targets = torch.arange(len(queries))
    loss = cross_entropy(scores, targets)
    if symmetric:
        loss = (loss + cross_entropy(scores[:, : len(queries)].t(), targets)) / 2
    return loss


def _train(
    loss: Callable[..., Tensor], symmetric: bool, queries: Tensor, documents: Tensor
) -> None:
    with torch.inference_mode(False), torch.enable_grad():
        queries.grad = documents.grad = None
        loss(queries, documents, symmetric=symmetric).backward()


CONTENDERS: dict[str, Callable[..., Tensor]] = {
    "emblas": info_nce,
    "torch, whole matrix": _materializing,
}


@pytest.mark.parametrize("who", CONTENDERS)
@pytest.mark.parametrize(
    ("queries", "documents", "symmetric"),
    [(512, 512, False), (2048, 2048, False), (2048, 2048, True), (8192, 8192, False)],
)
def bench_info_nce(row: Any, queries: int, documents: int, symmetric: bool, who: str) -> None:
    products = 2 * queries * documents * DIM
    row(
        "losses", "InfoNCE, both directions" if symmetric else "InfoNCE", who,
        shape=f"{queries} x {documents} x {DIM}, forward and backward", dtype="float32",
        call=partial(_train, CONTENDERS[who], symmetric),
        inputs=rotate(partial(_batch, queries, documents), (queries + documents) * DIM * 4),
        flops=3 * products,
    )  # fmt: skip


def bench_info_nce_many_negatives(row: Any) -> None:
    """Documents whose scores for as many queries would take 24 GiB."""
    row(
        "losses", "InfoNCE", "emblas",
        shape=f"1024 x 80000 x {DIM}, forward and backward", dtype="float32",
        call=partial(_train, info_nce, False), inputs=[_batch(1024, 80_000, 0)],
        flops=3 * 2 * 1024 * 80_000 * DIM,
    )  # fmt: skip
