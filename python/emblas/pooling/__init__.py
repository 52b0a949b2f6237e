"""Pooling: the token vectors of a batch to one vector per sequence, in one pass."""

from emblas.pooling import arrays
from emblas.pooling.functions import segment_pool
from emblas.pooling.modules import Pooling

__all__ = ["Pooling", "arrays", "segment_pool"]
