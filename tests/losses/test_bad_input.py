"""Every loss names the argument that holds a NaN or lies on another device."""

from __future__ import annotations

import pytest
import torch
from emblas import losses

X, Y, Z = torch.randn(4, 3), torch.randn(4, 3), torch.randn(4, 3)
LABELS = torch.rand(4)
CALLS = {
    "info_nce": (losses.info_nce, (X, Y)),
    "info_nce, negatives": (lambda x, y, n: losses.info_nce(x, y, negatives=n), (X, Y, Z[:, None])),
    "info_nce, weights": (lambda x, y, w: losses.info_nce(x, y, weights=w), (X, Y, LABELS)),
    "mix_negatives": (lambda x, n: losses.mix_negatives(x, n, 2), (X, torch.randn(4, 3, 3))),
    "spread_out": (losses.spread_out, (X,)),
    "triplet": (losses.triplet_loss, (X, Y, Z)),
    "contrastive": (losses.contrastive_loss, (X, Y, LABELS)),
    "cosine": (losses.cosine_loss, (X, Y, LABELS)),
    "pearson": (losses.pearson_loss, (X, Y, LABELS)),
    "cosent": (losses.cosent_loss, (X, Y, LABELS)),
    "preference": (losses.preference_loss, (X, Y, LABELS)),
    "rank_kl": (losses.rank_kl_loss, (X, Y, LABELS)),
    "listwise, RankNet": (lambda s, r: losses.listwise_rank(s, r, "ranknet"), (X, Y.abs())),
    "listwise, ListMLE": (lambda s, r: losses.listwise_rank(s, r, "listmle"), (X, Y.abs())),
    "distill": (losses.distill, (X, Y)),
    "distill, euclidean": (lambda s, t: losses.distill(s, t, "euclidean"), (X, Y)),
    "distill, similarity": (lambda s, t: losses.distill(s, t, "similarity"), (X, Y)),
    "distill, relative": (lambda s, t: losses.distill(s, t, "relative"), (X, Y)),
    "distill, anchor": (
        lambda s, t, a, b: losses.distill(s, t, "anchor", anchors=(a, b)), (X, Y, Z, -Z)),
    "token_log_probs": (
        lambda x, v: losses.token_log_probs(x, v, torch.tensor([0, 1, 2, -1])), (X, Y)),
    "likelihood_alignment": (losses.likelihood_alignment, (LABELS, LABELS / 2, -Y)),
    "likelihood_alignment, reference": (
        lambda p, i, n, a, b: losses.likelihood_alignment(p, i, n, reference=(a, b)),
        (LABELS, LABELS / 2, -Y, -LABELS, Z)),
    "information_bound": (losses.information_bound, (X, Y, Z)),
    "self_distill": (lambda a, b: losses.self_distill([a, b]), (X, Y)),
    "InfoNCE": (losses.InfoNCE(0.1, symmetric=True), (X, Y)),
    "MatryoshkaLoss": (losses.MatryoshkaLoss(losses.InfoNCE(), [2, 3]), (X, Y)),
    "CachedLoss": (losses.CachedLoss(torch.nn.Identity(), losses.InfoNCE(), mini_batch=3), (X, Y)),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_nan(name):
    call, arguments = CALLS[name]
    call(*arguments)
    for i, argument in enumerate(arguments):
        bad = argument.clone()
        bad.view(-1)[-1] = torch.nan
        with pytest.raises(ValueError, match="must be finite, got nan at"):
            call(*arguments[:i], bad, *arguments[i + 1 :])


@pytest.mark.parametrize("name", [name for name in CALLS if len(CALLS[name][1]) > 1])
def test_mixed_devices(name):
    call, arguments = CALLS[name]
    for i in range(len(arguments)):
        # Seen from the other ones, it is the first that lies elsewhere.
        moved = (*arguments[:i], arguments[i].to("meta"), *arguments[i + 1 :])
        with pytest.raises(ValueError, match="must be on device"):
            call(*moved)


def test_negative_weights():
    with pytest.raises(ValueError, match="weights must not be negative, got"):
        losses.info_nce(X, Y, weights=torch.tensor([1.0, -1.0, 0.0, 1.0]))
