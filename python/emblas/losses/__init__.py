"""Losses that train embeddings; those over all pairs of a batch take memory linear in it."""

from emblas.losses.distillation import distill, self_distill
from emblas.losses.functions import info_nce, mix_negatives, spread_out
from emblas.losses.gather import gather_rows
from emblas.losses.generative import likelihood_alignment, token_log_probs
from emblas.losses.information import information_bound
from emblas.losses.modules import CachedLoss, InfoNCE, MatryoshkaLoss
from emblas.losses.pairs import (
    contrastive_loss,
    cosent_loss,
    cosine_loss,
    pearson_loss,
    preference_loss,
    rank_kl_loss,
    triplet_loss,
)
from emblas.losses.ranking import listwise_rank

__all__ = [
    "CachedLoss",
    "InfoNCE",
    "MatryoshkaLoss",
    "contrastive_loss",
    "cosent_loss",
    "cosine_loss",
    "distill",
    "gather_rows",
    "info_nce",
    "information_bound",
    "likelihood_alignment",
    "listwise_rank",
    "mix_negatives",
    "pearson_loss",
    "preference_loss",
    "rank_kl_loss",
    "self_distill",
    "spread_out",
    "token_log_probs",
    "triplet_loss",
]
