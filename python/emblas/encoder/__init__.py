"""Texts in, embeddings out: tokenizer, packed batches, model, pooling and codes in one pass."""

from emblas.encoder.files import encode_file, load_embeddings, read_texts
from emblas.encoder.model import Encoder
from emblas.encoder.outputs import Embeddings, Ragged, TruncationWarning
from emblas.encoder.pair import EncoderPair
from emblas.encoder.prefixes import ParallelPrefixes

__all__ = [
    "Embeddings",
    "Encoder",
    "EncoderPair",
    "ParallelPrefixes",
    "Ragged",
    "TruncationWarning",
    "encode_file",
    "load_embeddings",
    "read_texts",
]
