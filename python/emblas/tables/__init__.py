"""Tables: embeddings of large or unbounded vocabularies in small tables."""

from emblas.tables import arrays, diagnostics, optim
from emblas.tables.adaptive import AdaptiveEmbedding, DeduplicatedEmbedding
from emblas.tables.clustered import ClusteredCompositionalEmbedding
from emblas.tables.codes import CodeSpec, random_codes
from emblas.tables.compose import compose_bag
from emblas.tables.composition import Composition, Part
from emblas.tables.deep_hash import DeepHashEmbedding, LexinvariantEmbedding
from emblas.tables.disentangled import GradientDisentangledEmbedding
from emblas.tables.fasttext import floret_ids, word_ngram_ids
from emblas.tables.functions import hash_bag, hash_keys
from emblas.tables.mixed_dimension import AutoDimEmbedding, MixedDimensionEmbedding, popularity_dims
from emblas.tables.modules import (
    HashEmbedding,
    MultiHashEmbedding,
    RobeEmbedding,
    UnifiedEmbedding,
    WeightedHashEmbedding,
)
from emblas.tables.opt_embedding import OptEmbedding
from emblas.tables.partitioned import PartitionedEmbedding, bucket_order
from emblas.tables.partitions import (
    MemComEmbedding,
    QuotientRemainderEmbedding,
    TensorTrainEmbedding,
)
from emblas.tables.product_quantized import (
    MultiGranularQuantizedEmbedding,
    ProductQuantizedEmbedding,
)
from emblas.tables.pruned import AutoSrhEmbedding, DeepLightEmbedding, PepEmbedding
from emblas.tables.quantized import ALPT, LearnedStepEmbedding, QuantizedEmbedding
from emblas.tables.quantized_lookup import quantized_bag
from emblas.tables.sharded import ShardedEmbedding
from emblas.tables.sparse import SparseEmbedding
from emblas.tables.spec import TableSpec
from emblas.tables.subspace import SubspaceEmbedding
from emblas.tables.subword_store import SubwordStore
from emblas.tables.text import text_ids
from emblas.tables.transfer import fit_rows, match_tokens, matching_pursuit, transfer_rows

__all__ = [
    "ALPT",
    "AdaptiveEmbedding",
    "AutoDimEmbedding",
    "AutoSrhEmbedding",
    "ClusteredCompositionalEmbedding",
    "CodeSpec",
    "Composition",
    "DeduplicatedEmbedding",
    "DeepHashEmbedding",
    "DeepLightEmbedding",
    "GradientDisentangledEmbedding",
    "HashEmbedding",
    "LearnedStepEmbedding",
    "LexinvariantEmbedding",
    "MemComEmbedding",
    "MixedDimensionEmbedding",
    "MultiGranularQuantizedEmbedding",
    "MultiHashEmbedding",
    "OptEmbedding",
    "Part",
    "PartitionedEmbedding",
    "PepEmbedding",
    "ProductQuantizedEmbedding",
    "QuantizedEmbedding",
    "QuotientRemainderEmbedding",
    "RobeEmbedding",
    "ShardedEmbedding",
    "SparseEmbedding",
    "SubspaceEmbedding",
    "SubwordStore",
    "TableSpec",
    "TensorTrainEmbedding",
    "UnifiedEmbedding",
    "WeightedHashEmbedding",
    "arrays",
    "bucket_order",
    "compose_bag",
    "diagnostics",
    "fit_rows",
    "floret_ids",
    "hash_bag",
    "hash_keys",
    "match_tokens",
    "matching_pursuit",
    "optim",
    "popularity_dims",
    "quantized_bag",
    "random_codes",
    "text_ids",
    "transfer_rows",
    "word_ngram_ids",
]
