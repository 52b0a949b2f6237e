"""Tables: embeddings of an unbounded vocabulary in a small table, by hashing."""

from emblas.tables import arrays
from emblas.tables.functions import hash_bag, hash_keys
from emblas.tables.modules import HashEmbedding
from emblas.tables.spec import TableSpec

__all__ = ["HashEmbedding", "TableSpec", "arrays", "hash_bag", "hash_keys"]
