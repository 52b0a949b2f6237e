"""Summed vocabulary pooling."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from costs.pooling_heads import Vocabulary
from costs.work import Work

_TILE_TOKENS, _TILE_WORDS = 4096, 2048
_LOGARITHM = 20  # flops, about
_BF16, _F32 = torch.bfloat16, torch.float32


def _up(number: int, block: int) -> int:
    return -(-number // block) * block


@dataclasses.dataclass(frozen=True)
class VocabularySum(Vocabulary):
    """Summed vocabulary pooling, log(1 + relu), of sequences of these lengths, none empty."""

    @property
    def logits(self) -> int:
        return self.tokens * self.vocab

    @property
    def tiles_of_tokens(self) -> int:
        return -(-self.tokens // _TILE_TOKENS)

    @property
    def tiles_of_words(self) -> int:
        return -(-self.vocab // _TILE_WORDS)

    @property
    def chunks(self) -> int:
        """Bytes of the sums of chunks of segments."""
        return sum(-(-length // 128) for length in self.lengths) * self.vocab * 4

    def arguments(self) -> tuple[Any, ...]:
        x, weight, bias, offsets, *others = super().arguments()
        return x, weight, bias, offsets, 2, *others


@dataclasses.dataclass(frozen=True)
class VocabularySumBackward(VocabularySum):
    """Its gradient."""

    def arguments(self) -> tuple[Any, ...]:
        grad = torch.randn(len(self.lengths), self.vocab)
        return grad, *super().arguments(), True, True, True


def _cuda(p: VocabularySum) -> dict[str, Work]:
    """Beside the products, which are torch's."""
    logits = p.logits * p.dtype.itemsize
    flops = p.logits * (3 + _LOGARITHM)
    return {
        "sum_chunk_of_tile": Work(p.offsets + logits + 4 * p.vocab, p.chunks, flops),
        "add_chunks_of_words": Work(p.offsets + p.chunks, 4 * p.pairs, p.chunks // 4),
    }


def _triton(p: VocabularySum) -> dict[str, Work]:
    rows = sum(_up(length, 64) for length in p.lengths)
    products = 2 * rows * _up(p.vocab, 64) * _up(p.dim, 32)
    read = p.offsets + p.x + p.weight + 4 * p.vocab
    flops = p.logits * (3 + _LOGARITHM)
    return {"_vocab_sum": Work(read, 4 * p.pairs, flops, tensor_flops=products)}


def _backward_cuda(p: VocabularySumBackward) -> dict[str, Work]:
    """Beside the products, which are torch's."""
    owners, logits = 4 * p.tokens, p.logits * p.dtype.itemsize
    bias = -(-p.tokens // 128) * p.vocab * 4

    def added(gradient: int, elements: int, products: int) -> Work:
        """Sum so many products, one after the other, which have the bytes of the gradient."""
        between = (products - 1) * elements * 4
        return Work(products * gradient + between, between + gradient, products * elements)

    return {
        "write_owners": Work(p.offsets, owners),
        "copy_owned": Work(owners + p.x, p.x),
        "tile_slopes": Work(
            owners + logits + 4 * p.vocab + 4 * p.pairs, logits + bias, p.logits * (4 + 2)
        ),
        "add_to_sum (tokens)": added(p.x, p.tokens * p.dim, p.tiles_of_words),
        "add_to_sum (words)": added(p.weight, p.vocab * p.dim, p.tiles_of_tokens),
        "add_bias_chunks": Work(bias, 4 * p.vocab, bias // 4),
    }


def _backward_triton(p: VocabularySumBackward) -> dict[str, Work]:
    owners, slopes = 4 * p.tokens, p.logits * p.dtype.itemsize
    bias = -(-p.tokens // 64) * p.vocab * 4
    x, weight = p.x * p.tiles_of_words, p.weight * p.tiles_of_tokens
    of_tokens = 4 * p.tokens * p.dim * p.tiles_of_words
    of_words = 4 * p.vocab * p.dim * p.tiles_of_tokens
    products = 2 * _up(p.tokens, 64) * _up(p.vocab, 64) * _up(p.dim, 32)
    return {
        "_logit_slopes": Work(
            owners * p.tiles_of_words + x + weight + 4 * p.vocab + 4 * p.pairs,
            slopes + bias,
            p.logits * (4 + 2),
            tensor_flops=products,
        ),
        "_add_to_tokens": Work(
            slopes + weight + of_tokens,
            of_tokens,
            tensor_flops=2 * _up(p.tokens, 64) * _up(p.dim, 64) * _up(p.vocab, 32),
        ),
        "_add_to_words": Work(
            owners * p.tiles_of_words + slopes + x + of_words,
            of_words,
            tensor_flops=2 * _up(p.vocab, 64) * _up(p.dim, 64) * _up(p.tokens, 32),
        ),
    }


MODELS: dict[tuple[str, str], Callable[[Any], dict[str, Work]]] = {
    ("vocab_sum", "CUDA C++"): _cuda,
    ("vocab_sum", "Triton"): _triton,
    ("vocab_sum_backward", "CUDA C++"): _backward_cuda,
    ("vocab_sum_backward", "Triton"): _backward_triton,
}
SMALL: dict[str, tuple[Any, ...]] = {
    "vocab_sum": (VocabularySum((70, 3), 75, 24, _F32), VocabularySum((130, 3), 72, 24, _BF16)),
    "vocab_sum_backward": (VocabularySumBackward((70, 3), 75, 24, _BF16),),
}
LARGE: dict[str, tuple[Any, ...]] = {
    "vocab_sum": (VocabularySum((256,) * 16, 30522, 384, _BF16),),
    "vocab_sum_backward": (VocabularySumBackward((256,) * 16, 30522, 384, _BF16),),
}
