"""Attention and vocabulary pooling, lexical weights, and the epilogue of pooling."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from costs.work import Work

_PART = 128  # tokens that one block of attention pooling sums up
_BF16, _F32 = torch.bfloat16, torch.float32


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- epilogue ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Finish:
    """Rows of pooled vectors, normalized."""

    rows: int
    dim: int
    dims: tuple[int, ...]
    kind: int = 0  # float32, int8, bits

    def __str__(self) -> str:
        kind = ("float32", "int8", "bits")[self.kind]
        return f"{self.rows} rows, dims {', '.join(map(str, self.dims))} of {self.dim}, {kind}"

    @property
    def x(self) -> int:
        return self.rows * max(self.dims) * 4

    @property
    def width(self) -> int:
        return sum(self.dims)

    @property
    def out(self) -> int:
        bytes_of = (lambda k: 4 * k, lambda k: k, lambda k: (k + 7) // 8)[self.kind]
        return self.rows * sum(map(bytes_of, self.dims))

    def arguments(self) -> tuple[Any, ...]:
        ranges = torch.stack([-torch.ones(self.width), torch.ones(self.width)])
        given = ranges if self.kind == 1 else None
        return torch.randn(self.rows, self.dim), self.dims, True, 0.0, 0, self.kind, _F32, given


@dataclasses.dataclass(frozen=True)
class FinishBackward(Finish):
    """Their gradient."""

    def arguments(self) -> tuple[Any, ...]:
        return torch.randn(self.rows, self.width), super().arguments()[0], self.dims, True


def _finish(kernel: str) -> Callable[[Finish], dict[str, Work]]:
    def works(p: Finish) -> dict[str, Work]:
        ranges = 2 * p.width * 4 if p.kind == 1 else 0
        return {kernel: Work(p.x + ranges, p.out, p.rows * p.width * (6 if p.kind == 1 else 3))}

    return works


def _finish_backward(kernel: str) -> Callable[[FinishBackward], dict[str, Work]]:
    def works(p: FinishBackward) -> dict[str, Work]:
        flops = p.rows * p.width * 8
        return {kernel: Work(p.x + p.rows * p.width * 4, p.rows * p.dim * 4, flops)}

    return works


# --- attention pooling ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Attention:
    """Attention pooling of sequences of these lengths, none of them empty."""

    lengths: tuple[int, ...]
    dim: int
    heads: int
    dtype: torch.dtype
    weights: bool = False

    def __str__(self) -> str:
        words = f"{len(self.lengths)} x {self.lengths[0]} tokens, dim {self.dim}, "
        words += f"{self.heads} quer{'y' if self.heads == 1 else 'ies'}, {_short(self.dtype)}"
        return words + ", weights" * self.weights

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def x(self) -> int:
        return self.tokens * self.dim * self.dtype.itemsize

    @property
    def queries(self) -> int:
        return self.heads * self.dim * 4

    @property
    def out(self) -> int:
        return self.batch * self.queries

    @property
    def parts(self) -> int:
        return sum(-(-length // _PART) for length in self.lengths)

    @property
    def sums(self) -> int:
        return self.parts * self.queries

    @property
    def tokens_read(self) -> int:
        """What says where tokens are."""
        return (self.batch + 1) * 4 + self.tokens * 4 * self.weights

    @property
    def slots(self) -> int:
        return (self.tokens // _PART + self.batch) * 4

    @property
    def per_query(self) -> int:
        return self.tokens * self.heads * 4

    def flops(self, each: int) -> int:
        return each * self.tokens * self.heads * self.dim

    def arguments(self) -> tuple[Any, ...]:
        x, queries = torch.randn(self.tokens, self.dim), torch.randn(self.heads, self.dim)
        offsets = torch.tensor([0, *self.lengths]).cumsum(0).int()
        weights = torch.ones(self.tokens) if self.weights else None
        return x.to(self.dtype), queries, offsets, 0.5, weights, None


@dataclasses.dataclass(frozen=True)
class AttentionBackward(Attention):
    """Its gradient."""

    def arguments(self) -> tuple[Any, ...]:
        x, queries, *others = super().arguments()
        out, lse = torch.ops.emblas.attention_pool(x, queries, *others)
        return torch.randn(out.shape), x, queries, out, lse, *others


def _attention_cuda(p: Attention) -> dict[str, Work]:
    numbers = p.parts * p.heads * 4
    offsets = (p.batch + 1) * 4
    return {
        "attend": Work(p.tokens_read + p.x + p.queries, p.sums + 2 * numbers, p.flops(4)),
        "merge_parts": Work(
            offsets + p.sums + 2 * numbers, p.out + p.batch * p.heads * 4 + numbers, p.sums // 2
        ),
    }


def _attention_triton(p: Attention) -> dict[str, Work]:
    numbers = p.parts * p.heads * 4
    offsets = (p.batch + 1) * 4
    return {
        "_pool_parts": Work(
            p.tokens_read + p.slots + p.x + p.queries, p.sums + 2 * numbers, p.flops(4)
        ),
        "_merge_parts": Work(
            offsets + p.sums + 2 * numbers, p.out + p.batch * p.heads * 4, p.sums // 2
        ),
    }


def _attention_backward(
    names: tuple[str, str, str], listed: bool
) -> Callable[[AttentionBackward], dict[str, Work]]:
    """``listed``: blocks find their segments in a list, instead of searching."""

    def works(p: AttentionBackward) -> dict[str, Work]:
        offsets = (p.batch + 1) * 4
        found = p.tokens_read + p.slots * listed
        slopes = Work(
            found + p.x + p.queries + 2 * p.out + p.batch * p.heads * 4,
            2 * p.per_query + p.sums,
            p.flops(6),
        )
        rows = Work(found + p.queries + p.out + 2 * p.per_query, p.x, p.flops(4))
        return dict(
            zip(names, (slopes, Work(offsets + p.sums, p.out, p.sums // 4), rows), strict=True)
        )

    return works


# --- vocabulary pooling --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Vocabulary pooling of sequences of these lengths, none of them empty."""

    lengths: tuple[int, ...]
    vocab: int
    dim: int
    dtype: torch.dtype

    def __str__(self) -> str:
        words = f"{len(self.lengths)} x {self.lengths[0]} tokens, {self.vocab} words, "
        return f"{words}dim {self.dim}, {_short(self.dtype)}"

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def x(self) -> int:
        return self.tokens * self.dim * self.dtype.itemsize

    @property
    def weight(self) -> int:
        return self.vocab * self.dim * self.dtype.itemsize

    @property
    def pairs(self) -> int:
        return len(self.lengths) * self.vocab

    @property
    def offsets(self) -> int:
        return (len(self.lengths) + 1) * 4

    def arguments(self) -> tuple[Any, ...]:
        x, weight = torch.randn(self.tokens, self.dim), torch.randn(self.vocab, self.dim)
        offsets = torch.tensor([0, *self.lengths]).cumsum(0).int()
        return x.to(self.dtype), weight.to(self.dtype), torch.randn(self.vocab), offsets, None, None


@dataclasses.dataclass(frozen=True)
class VocabularyBackward(Vocabulary):
    """Its gradient, in which every pair of a sequence and a word takes part."""

    def arguments(self) -> tuple[Any, ...]:
        x, weight, bias, offsets, *_ = super().arguments()
        out, argmax = torch.ops.emblas.vocab_max(x, weight, bias, offsets)
        return torch.rand(out.shape) + 1, x, weight, argmax, offsets, None, True, True


def _vocab_cuda(p: Vocabulary) -> dict[str, Work]:
    """Beside the products, which are torch's."""
    logits = p.tokens * p.vocab * p.dtype.itemsize
    return {"fold_tile": Work(p.offsets + logits + 4 * p.vocab, 8 * p.pairs)}


def _vocab_triton(p: Vocabulary) -> dict[str, Work]:
    rows = sum(-(-length // 64) * 64 for length in p.lengths)
    flops = 2 * rows * (-(-p.vocab // 64) * 64) * (-(-p.dim // 32) * 32)
    read = p.offsets + p.x + p.weight + 4 * p.vocab
    return {"_vocab_max": Work(read, 8 * p.pairs, tensor_flops=flops)}


def _gradients(p: VocabularyBackward, tokens: str, words: str) -> dict[str, Work]:
    flops = 2 * p.pairs * p.dim
    bounds = 8 * (p.tokens + 1)
    return {
        tokens: Work(bounds + 12 * p.pairs + p.weight, p.x, flops),
        words: Work(8 * p.pairs, p.weight, flops, slack=p.x),  # which tokens win?
    }


def _vocab_backward_cuda(p: VocabularyBackward) -> dict[str, Work]:
    return {
        "name_winners": Work(8 * p.pairs, 4 * p.pairs),
        # A binary search for each token.
        "token_bounds": Work(0, 8 * (p.tokens + 1), slack=4 * p.pairs),
        **_gradients(p, "token_gradients_of_words", "word_gradients"),
    }


def _vocab_backward_triton(p: VocabularyBackward) -> dict[str, Work]:
    return _gradients(p, "_gradients_of_tokens", "_gradients_of_words")


# --- lexical weights -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Lexical:
    """Sequences of these lengths, none of them empty, of distinct ids."""

    lengths: tuple[int, ...]

    def __str__(self) -> str:
        return f"{len(self.lengths)} x {self.lengths[0]} tokens"

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def batch(self) -> int:
        return len(self.lengths)

    def arguments(self) -> tuple[Any, ...]:
        offsets = torch.tensor([0, *self.lengths]).cumsum(0).int()
        return torch.arange(self.tokens), torch.rand(self.tokens) + 1, offsets, [-1]


def _lexical_cuda(p: Lexical) -> dict[str, Work]:
    offsets = (p.batch + 1) * 4
    written = 16 * p.tokens + 8 * (p.batch + 1)
    return {
        "choose_best": Work(12 * p.tokens + offsets, 8 * p.tokens),
        "place_chosen": Work(16 * p.tokens + offsets + 8 * p.batch, written),
    }


def _lexical_triton(p: Lexical) -> dict[str, Work]:
    offsets = (p.batch + 1) * 4
    return {
        "_choose": Work(21 * p.tokens + offsets, 8 * p.tokens),
        "_place": Work(24 * p.tokens + offsets + 8 * (p.batch - 1), 16 * p.tokens),
    }


MODELS: dict[tuple[str, str], Callable[[Any], dict[str, Work]]] = {
    ("finish", "CUDA C++"): _finish("finish_rows"),
    ("finish", "Triton"): _finish("_finish_rows"),
    ("finish_backward", "CUDA C++"): _finish_backward("finish_gradients"),
    ("finish_backward", "Triton"): _finish_backward("_finish_gradient"),
    ("attention_pool", "CUDA C++"): _attention_cuda,
    ("attention_pool", "Triton"): _attention_triton,
    ("attention_pool_backward", "CUDA C++"): _attention_backward(
        ("slopes", "add_parts", "row_gradients"), listed=False
    ),
    ("attention_pool_backward", "Triton"): _attention_backward(
        ("_slopes", "_merge_parts", "_attention_gradients"), listed=True
    ),
    ("vocab_max", "CUDA C++"): _vocab_cuda,
    ("vocab_max", "Triton"): _vocab_triton,
    ("vocab_max_backward", "CUDA C++"): _vocab_backward_cuda,
    ("vocab_max_backward", "Triton"): _vocab_backward_triton,
    ("lexical_index", "CUDA C++"): _lexical_cuda,
    ("lexical_index", "Triton"): _lexical_triton,
}
SMALL: dict[str, tuple[Any, ...]] = {
    "finish": (Finish(5, 40, (24,)), Finish(3, 21, (21,), 1), Finish(3, 300, (130,), 2)),
    "finish_backward": (FinishBackward(5, 40, (24,)),),
    "attention_pool": (
        Attention((130, 1, 300), 24, 1, _F32),
        Attention((40, 9), 16, 5, _BF16, weights=True),
    ),
    "attention_pool_backward": (
        AttentionBackward((130, 1, 300), 24, 1, _F32),
        AttentionBackward((40, 9), 16, 5, _BF16, weights=True),
    ),
    "vocab_max": (Vocabulary((70, 3), 75, 24, _F32),),
    "vocab_max_backward": (VocabularyBackward((70, 3), 75, 24, _BF16),),
    "lexical_index": (Lexical((70, 3, 12)),),
}
LARGE: dict[str, tuple[Any, ...]] = {
    "finish": (Finish(4096, 1024, (1024,)),),
    "finish_backward": (FinishBackward(4096, 1024, (1024,)),),
    "attention_pool": (Attention((512,) * 128, 1024, 1, _BF16),),
    "attention_pool_backward": (AttentionBackward((512,) * 128, 1024, 1, _BF16),),
    "vocab_max": (Vocabulary((256,) * 16, 30522, 384, _BF16),),
    "vocab_max_backward": (VocabularyBackward((256,) * 16, 30522, 384, _BF16),),
    "lexical_index": (Lexical((512,) * 128),),
}
