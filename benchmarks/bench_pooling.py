"""Pooling beside torch: padded as sentence-transformers does it, and packed with index_add."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import rotate
from emblas.pooling import Epilogue, segment_pool
from torch import Tensor

SHAPES = {
    "short": (256, 16),  # sequences, mean length
    "mixed": (64, 64),
    "long": (16, 512),
}


def _batch(shape: str, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Packed tokens and offsets, and the same tokens padded with their mask."""
    generator = torch.Generator().manual_seed(seed)
    sequences, mean = SHAPES[shape]
    lengths = torch.randint(mean // 2, mean * 3 // 2, (sequences,), generator=generator)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int()
    x = torch.randn(int(cu_seqlens[-1]), 384, generator=generator).to(dtype)
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    padded = x.new_zeros(*mask.shape, 384)
    padded[mask] = x
    return x, cu_seqlens, padded, mask


def _padded(x: Tensor, cu_seqlens: Tensor, padded: Tensor, mask: Tensor) -> Tensor:
    """Mean over the mask and normalize, in the steps of sentence-transformers' Pooling."""
    expanded = mask.unsqueeze(-1).expand(padded.size()).to(padded.dtype)
    summed = torch.sum(padded * expanded, 1)
    mean = summed / torch.clamp(expanded.sum(1), min=1e-9)
    return torch.nn.functional.normalize(mean)


def _index_add(x: Tensor, cu_seqlens: Tensor, padded: Tensor, mask: Tensor) -> Tensor:
    lengths = cu_seqlens.diff().long()
    segment = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    summed = torch.zeros(len(lengths), x.shape[1]).index_add_(0, segment, x.float())
    return torch.nn.functional.normalize(summed / lengths[:, None]).to(x.dtype)


CONTENDERS: dict[str, Callable[..., Tensor]] = {
    "emblas": lambda x, cu_seqlens, padded, mask: segment_pool(x, cu_seqlens, normalize=True),
    "torch, padded": _padded,
    "torch, index_add": _index_add,
}


@pytest.mark.parametrize("who", CONTENDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def bench_segment_pool(row: Any, shape: str, dtype: torch.dtype, who: str) -> None:
    sequences, mean = SHAPES[shape]
    tokens = sequences * mean
    size = tokens * 384 * dtype.itemsize
    row(
        "pooling", "mean + normalize", who,
        shape=f"{shape}: {sequences} x ~{mean} tokens x 384",
        dtype=str(dtype).removeprefix("torch."),
        call=CONTENDERS[who], inputs=rotate(lambda seed: _batch(shape, dtype, seed), size),
        bytes=size + sequences * 384 * dtype.itemsize,
    )  # fmt: skip


def _backward(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*batch: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            x, cu_seqlens, padded, mask = batch
            x, padded = x.requires_grad_(), padded.requires_grad_()
            x.grad = padded.grad = None
            out = function(x, cu_seqlens, padded, mask)
            out.backward(torch.ones_like(out))
        return out

    return run


@pytest.mark.parametrize("who", CONTENDERS)
@pytest.mark.parametrize("shape", SHAPES)
def bench_segment_pool_training(row: Any, shape: str, who: str) -> None:
    sequences, mean = SHAPES[shape]
    size = sequences * mean * 384 * 4
    row(
        "pooling", "mean + normalize, forward and backward", who,
        shape=f"{shape}: {sequences} x ~{mean} tokens x 384", dtype="float32",
        call=_backward(CONTENDERS[who]),
        inputs=rotate(lambda seed: _batch(shape, torch.float32, seed), size),
        bytes=2 * size,
    )  # fmt: skip


def _large(dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """65,536 tokens in sequences of 64 to 448, and padded to 512: half of that is padding."""
    more = torch.randint(193, (128,), generator=torch.Generator().manual_seed(0))
    lengths = torch.cat([256 - more, 256 + more])
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int()
    x = torch.randn(65_536, dim).to(dtype)
    mask = torch.arange(512)[None] < lengths[:, None]
    padded = x.new_zeros(256, 512, dim)
    padded[mask] = x
    return x, cu_seqlens, padded, mask


def _peers(
    dim: int, mode: str | tuple[str, ...] = "mean", *, normalize: bool = True
) -> dict[str, Callable[..., Tensor]]:
    """The modules of sentence-transformers on packed and on padded input."""
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    pooling = modules.Pooling(dim, mode)
    last = modules.Normalize() if normalize else lambda features: features

    def flat(x: Tensor, cu_seqlens: Tensor, padded: Tensor, mask: Tensor) -> Tensor:
        features = {"token_embeddings": x[None], "cu_seq_lens_q": cu_seqlens}
        result: Tensor = last(pooling(features))["sentence_embedding"]
        return result

    def filled(x: Tensor, cu_seqlens: Tensor, padded: Tensor, mask: Tensor) -> Tensor:
        features = {"token_embeddings": padded, "attention_mask": mask}
        result: Tensor = last(pooling(features))["sentence_embedding"]
        return result

    return {"sentence-transformers, packed": flat, "sentence-transformers, padded": filled}


LARGE = ("emblas", "sentence-transformers, packed", "sentence-transformers, padded")


@pytest.mark.parametrize("who", LARGE)
@pytest.mark.parametrize("train", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("dim", [384, 768, 1024])
def bench_pooling_large(row: Any, dim: int, dtype: torch.dtype, train: bool, who: str) -> None:
    contender = CONTENDERS["emblas"] if who == "emblas" else _peers(dim)[who]
    size = 65_536 * dim * dtype.itemsize
    row(
        "pooling", "mean + normalize" + ", forward and backward" * train, who,
        shape=f"65536 tokens in 256 sequences x {dim}",
        dtype=str(dtype).removeprefix("torch."),
        call=_backward(contender) if train else contender,
        inputs=[_large(dim, dtype)], bytes=(1 + train) * size,
    )  # fmt: skip


MODES = ("cls", "mean", "max")


def _one_by_one(x: Tensor, cu_seqlens: Tensor, padded: Tensor, mask: Tensor) -> Tensor:
    return torch.cat([segment_pool(x, cu_seqlens, mode) for mode in MODES], 1)


def _together(x: Tensor, cu_seqlens: Tensor, padded: Tensor, mask: Tensor) -> Tensor:
    result: Tensor = segment_pool(x, cu_seqlens, MODES)
    return result


SEVERAL = {"emblas": _together, "emblas, one by one": _one_by_one}


@pytest.mark.parametrize("who", [*SEVERAL, *LARGE[1:]])
@pytest.mark.parametrize("train", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def bench_pooling_modes(row: Any, dtype: torch.dtype, train: bool, who: str) -> None:
    dim = 768
    contender = SEVERAL[who] if who in SEVERAL else _peers(dim, MODES, normalize=False)[who]
    size = 65_536 * dim * dtype.itemsize
    row(
        "pooling", "cls, mean and max" + ", forward and backward" * train, who,
        shape=f"65536 tokens in 256 sequences x {dim}",
        dtype=str(dtype).removeprefix("torch."),
        call=_backward(contender) if train else contender,
        inputs=[_large(dim, dtype)], bytes=(1 + train) * size,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("dim", [384, 768, 1024])
def bench_pooling_bits(row: Any, dim: int, dtype: torch.dtype) -> None:
    epilogue = Epilogue(quantize="binary")
    row(
        "pooling", "mean + bits", "emblas",
        shape=f"65536 tokens in 256 sequences x {dim}",
        dtype=str(dtype).removeprefix("torch."),
        call=lambda x, cu_seqlens, *_: segment_pool(x, cu_seqlens, epilogue=epilogue),
        inputs=[_large(dim, dtype)], bytes=65_536 * dim * dtype.itemsize,
    )  # fmt: skip
