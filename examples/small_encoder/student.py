"""A small encoder: hashed tables of word features, two layers of packed attention, a mean.

There is no vocabulary: every word becomes four hash ids (itself in lower case, its first letter,
its last three, its shape), each looked up in a table of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from emblas import packed
from emblas.attention import PackedSelfAttention
from emblas.pooling import segment_pool
from emblas.tables import MultiHashEmbedding, text_ids
from torch import Tensor, nn

FEATURES = ("norm", "prefix", "suffix", "shape")
MAX_WORDS = 48
_WORD = re.compile(r"[^\W_]+|[^\w\s]|_")


def word_ids(texts: Sequence[str]) -> list[Tensor]:
    """Hash ids ``(words, features)`` of each text."""
    words = [_WORD.findall(text)[:MAX_WORDS] for text in texts]
    flat = [word for text in words for word in text]
    ids = torch.stack([text_ids(flat, kind)[0] for kind in FEATURES], 1)
    return list(ids.split([len(text) for text in words]))


class Layer(nn.Module):
    """Attention and a feed-forward network, each on normalized input and added to it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), PackedSelfAttention(width, heads)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        x = x + self.attention(self.norm(x), cu_seqlens, longest)
        return x + self.mlp(x)


class Student(nn.Module):
    """Word ids to unit vectors of the teacher's length."""

    def __init__(self, dim: int, width: int = 192, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.tables = MultiHashEmbedding([8000, 500, 4000, 500], 64)
        self.mix = nn.Linear(self.tables.embedding_dim, width)
        self.positions = nn.Embedding(MAX_WORDS, width)
        self.layers = nn.ModuleList([Layer(width, heads) for _ in range(layers)])
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, dim)
        nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        longest = int(cu_seqlens.diff().max())
        x = self.mix(self.tables(ids)) + self.positions(packed.positions(cu_seqlens))
        for layer in self.layers:
            x = layer(x, cu_seqlens, longest)
        pooled = segment_pool(self.norm(x), cu_seqlens, "mean")
        return nn.functional.normalize(self.out(pooled))

    @torch.no_grad()
    def encode(self, texts: Sequence[str], budget: int = 8192) -> Tensor:
        """Unit vectors ``(texts, dim)``."""
        ids = word_ids(texts)
        out = torch.empty(len(ids), self.out.out_features)
        for batch in packed.token_budget_batches([len(text) for text in ids], budget):
            out[batch] = self(*packed.pack([ids[i] for i in batch]))
        return out
