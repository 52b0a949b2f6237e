"""Tables: embeddings of large or unbounded vocabularies in small tables."""

from emblas.tables import arrays, diagnostics, optim
from emblas.tables.compose import compose_bag
from emblas.tables.composition import Composition, Part
from emblas.tables.functions import hash_bag, hash_keys
from emblas.tables.modules import (
    HashEmbedding,
    MultiHashEmbedding,
    RobeEmbedding,
    UnifiedEmbedding,
    WeightedHashEmbedding,
)
from emblas.tables.partitions import (
    MemComEmbedding,
    QuotientRemainderEmbedding,
    TensorTrainEmbedding,
)
from emblas.tables.spec import TableSpec
from emblas.tables.text import text_ids

__all__ = [
    "Composition",
    "HashEmbedding",
    "MemComEmbedding",
    "MultiHashEmbedding",
    "Part",
    "QuotientRemainderEmbedding",
    "RobeEmbedding",
    "TableSpec",
    "TensorTrainEmbedding",
    "UnifiedEmbedding",
    "WeightedHashEmbedding",
    "arrays",
    "compose_bag",
    "diagnostics",
    "hash_bag",
    "hash_keys",
    "optim",
    "text_ids",
]
