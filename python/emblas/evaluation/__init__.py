"""Measures of embeddings: small, plain, in float64."""

from emblas.evaluation.correlation import pearson, spearman
from emblas.evaluation.geometry import alignment, isoscore, two_nn, uniformity
from emblas.evaluation.maps import csls, least_squares_map, procrustes, three_cos_add
from emblas.evaluation.neighbors import kmeans_score, knn_score, v_measure
from emblas.evaluation.retrieval import mean_average_precision, ndcg, recall

__all__ = [
    "alignment",
    "csls",
    "isoscore",
    "kmeans_score",
    "knn_score",
    "least_squares_map",
    "mean_average_precision",
    "ndcg",
    "pearson",
    "procrustes",
    "recall",
    "spearman",
    "three_cos_add",
    "two_nn",
    "uniformity",
    "v_measure",
]
