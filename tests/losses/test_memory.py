"""Every loss takes memory linear in the batch: nothing of the size of its pairs is ever held."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from contract import peak_memory
from emblas import losses
from emblas.losses import blocks, op
from torch import nn

MEBIBYTE = 1 << 20
NO_PEAKS = 3  # an exit status
N, DIM = 4096, 32  # pairs of float32 take 64 MiB, vectors half a MiB
TRIPLETS = 256  # as many
LIST = 2048  # 4 lists, whose pairs take as many


def rows(n=N, dim=DIM):
    return torch.randn(n, dim, requires_grad=True)


def labelled(name, **options):
    function = getattr(losses, name)
    return lambda: function(rows(), torch.randn(N, DIM), torch.rand(N), **options)


def cached():
    """An encoder whose activations for the whole batch take 64 MiB, twice."""
    encoder = nn.Sequential(nn.Linear(DIM, N), nn.ReLU(), nn.Linear(N, DIM))
    loss = losses.CachedLoss(encoder, losses.InfoNCE(), mini_batch=128)
    return loss(torch.randn(N, DIM), torch.randn(N, DIM))


def vocabulary():
    return torch.randn(N, DIM), torch.randn(N, DIM)


CALLS = {
    "info_nce": lambda: losses.info_nce(rows(), rows()),
    "info_nce, both directions": lambda: losses.info_nce(rows(), rows(), symmetric=True),
    "InfoNCE, MatryoshkaLoss": lambda: losses.MatryoshkaLoss(losses.InfoNCE(), [8, 16, 32])(
        rows(), rows()),
    "CachedLoss": cached,
    "mix_negatives": lambda: losses.mix_negatives(
        torch.randn(N, DIM), rows(N * 2).view(N, 2, DIM), 2).sum(),
    "spread_out": lambda: losses.spread_out(rows()),
    "triplet_loss": lambda: losses.triplet_loss(rows(), rows(), rows()),
    "cosine_loss": labelled("cosine_loss"),
    "contrastive_loss": labelled("contrastive_loss"),
    "pearson_loss": labelled("pearson_loss"),
    "cosent_loss": labelled("cosent_loss"),
    "cosent_loss, weighted": labelled("cosent_loss", weighted=True),
    "preference_loss": labelled("preference_loss"),
    "rank_kl_loss": labelled("rank_kl_loss"),
    "listwise_rank, RankNet": lambda: losses.listwise_rank(rows(4, LIST), torch.rand(4, LIST)),
    "listwise_rank, ListMLE": lambda: losses.listwise_rank(
        rows(4, LIST), torch.rand(4, LIST), "listmle"),
    "listwise_rank, ListNet": lambda: losses.listwise_rank(
        rows(4, LIST), torch.rand(4, LIST), "listnet"),
    "distill": lambda: losses.distill(rows(), torch.randn(N, DIM)),
    "distill, euclidean": lambda: losses.distill(rows(), torch.randn(N, DIM), "euclidean"),
    "distill, similarity": lambda: losses.distill(rows(), torch.randn(N, DIM), "similarity"),
    "distill, relative": lambda: losses.distill(
        rows(TRIPLETS), torch.randn(TRIPLETS, DIM), "relative"),
    "distill, distributions over a vocabulary": lambda: losses.distill(
        rows(), torch.randn(N, DIM), "anchor", anchors=vocabulary(), temperature=1.0,
        similarity="dot"),
    "token_log_probs": lambda: losses.token_log_probs(
        rows(), rows(), torch.randint(N, (N,))).sum(),
    "information_bound": lambda: losses.information_bound(rows(), rows(), rows()),
    "likelihood_alignment": lambda: losses.likelihood_alignment(
        rows(dim=1)[:, 0], torch.randn(N), torch.randn(N, 4)),
    "self_distill": lambda: losses.self_distill([rows(64, N // 8) for _ in range(3)]),
}  # fmt: skip


@pytest.fixture(scope="module")
def peaks():
    """Bytes that each call adds, in a process whose allocator returns what is freed."""
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
    }
    result = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=False
    )
    if result.returncode == NO_PEAKS:
        pytest.skip("the kernel does not reset the peak of resident memory")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", CALLS)
def test_peak_memory(name, peaks):
    assert peaks[name] < 24 * MEBIBYTE


def test_none_is_left_out():
    measured = {part for name in CALLS for part in name.split(", ")}
    assert set(losses.__all__) - measured == {"gather_rows"}  # which is no loss


def main():
    op.BLOCK_BYTES = blocks.BLOCK_BYTES = MEBIBYTE
    op.LEAST_ROWS = 64
    losses.info_nce(rows(2), rows(2)).backward()  # starts autograd's threads
    print(json.dumps({
        name: peak_memory(lambda call=call: call().backward()) for name, call in CALLS.items()
    }))  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except pytest.skip.Exception:
        sys.exit(NO_PEAKS)
