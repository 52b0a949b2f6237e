"""Texts in, embeddings out: tokenizer, packed batches, model, pooling and codes in one pass."""

from emblas.encoder.files import encode_file, load_embeddings, read_texts
from emblas.encoder.model import Encoder, EncoderPair
from emblas.encoder.outputs import Embeddings, Ragged, TruncationWarning

__all__ = [
    "Embeddings",
    "Encoder",
    "EncoderPair",
    "Ragged",
    "TruncationWarning",
    "encode_file",
    "load_embeddings",
    "read_texts",
]
