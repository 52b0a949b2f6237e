"""Hashed embeddings beside thinc's HashEmbed, and beside torch with the row numbers given.

The ids are words by a Zipf law, hashed as spaCy hashes strings. thinc and emblas hash them in the
measured call; the rows of torch leave that out, so they are ahead by it. Bytes for the bound: ids,
results and each row of the table in use once (and in training the gradients of all three, the
table's in full).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import rotate
from emblas.tables import (
    HashEmbedding,
    QuantizedEmbedding,
    QuotientRemainderEmbedding,
    TableSpec,
    hash_bag,
    hash_keys,
    optim,
    quantized_bag,
)
from torch import Tensor

SHAPES = {  # rows, dim, ids
    "5000 x 96, 32768 ids": (5000, 96, 32768),
    "5000 x 256, 32768 ids": (5000, 256, 32768),
    "50000 x 300, 8192 ids": (50000, 300, 8192),
}


def _ids(count: int, seed: int) -> Tensor:
    words = np.random.default_rng(seed).zipf(1.2, count) % 200_000
    return torch.from_numpy(words.astype(np.int64) * 0x1E3779B97F4A7C15)


CONTENDERS: dict[str, Callable[..., Tensor]] = {
    "emblas": lambda table, spec, ids, keys: hash_bag(ids, table, spec),
    "torch embedding_bag, rows given": lambda table, spec, ids, keys: (
        torch.nn.functional.embedding_bag(keys, table, mode="sum")
    ),
    "torch gather and sum, rows given": lambda table, spec, ids, keys: table[keys].sum(1),
}


def _torch_call(who: str, rows: int, dim: int, training: bool) -> Callable[..., Tensor]:
    table, spec = torch.randn(rows, dim), TableSpec(rows)

    def forward(ids: Tensor, keys: Tensor) -> Tensor:
        return CONTENDERS[who](table, spec, ids, keys)

    def train(ids: Tensor, keys: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            out = forward(ids, keys)
            return torch.autograd.grad(out, table, gradient[: len(ids)])[0]

    if not training:
        return forward
    table.requires_grad_()
    gradient = torch.ones(max(count for _, _, count in SHAPES.values()), dim)
    return train


def _thinc_call(rows: int, dim: int, training: bool) -> Callable[..., Any]:
    thinc = pytest.importorskip("thinc.api", reason="thinc is not installed")
    model = thinc.HashEmbed(dim, rows, seed=0)
    model.initialize(X=np.zeros(1, np.uint64))
    gradient = np.ones((max(count for _, _, count in SHAPES.values()), dim), np.float32)

    def forward(ids: Tensor, keys: Tensor) -> Any:
        return model.predict(ids.numpy().view(np.uint64))

    def train(ids: Tensor, keys: Tensor) -> Any:
        _, backward = model(ids.numpy().view(np.uint64), is_train=True)
        return backward(gradient[: len(ids)])

    return train if training else forward


@pytest.mark.parametrize("who", [*CONTENDERS, "thinc HashEmbed"])
@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("shape", SHAPES)
def bench_hash_bag(row: Any, shape: str, training: bool, who: str) -> None:
    rows, dim, count = SHAPES[shape]
    size = count * (8 + dim * 4)
    spec = TableSpec(rows)

    def make(seed: int) -> tuple[Tensor, Tensor]:
        ids = _ids(count, seed)
        return ids, hash_keys(ids, spec)

    inputs = rotate(make, size)
    call = (_torch_call(who, rows, dim, training) if who in CONTENDERS
            else _thinc_call(rows, dim, training))  # fmt: skip
    used = len(inputs[0][1].unique())
    row(
        "tables", "4 hashes, sum" + (", forward and backward" if training else ""), who,
        shape=shape, dtype="float32", call=call, inputs=inputs,
        bytes=size + used * dim * 4 + (count * dim * 4 + rows * dim * 4 if training else 0),
        single_thread=who.startswith("thinc"),
    )  # fmt: skip


@pytest.mark.parametrize("who", ["emblas", "torch embedding_bag, rows given"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def bench_bags(row: Any, dtype: torch.dtype, who: str) -> None:
    """Bags of about 20 ids: the words of a sentence, summed."""
    rows, dim, bags = 5000, 96, 2048
    spec = TableSpec(rows)
    table = torch.randn(rows, dim).to(dtype)

    def make(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        lengths = torch.randint(10, 31, (bags,), generator=torch.Generator().manual_seed(seed))
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int()
        ids = _ids(int(offsets[-1]), seed)
        return ids, offsets, hash_keys(ids, spec).flatten()

    def ours(ids: Tensor, offsets: Tensor, keys: Tensor) -> Tensor:
        return hash_bag(ids, table, spec, offsets)

    def torchs(ids: Tensor, offsets: Tensor, keys: Tensor) -> Tensor:
        return torch.nn.functional.embedding_bag(
            keys, table, offsets.long() * 4, mode="sum", include_last_offset=True
        )

    size = bags * 20 * 8 + bags * dim * dtype.itemsize
    row(
        "tables", "bags, 4 hashes, sum", who, shape=f"{rows} x {dim}, {bags} bags of ~20 ids",
        dtype=str(dtype).removeprefix("torch."), call=ours if who == "emblas" else torchs,
        inputs=rotate(make, size), bytes=size + rows * dim * dtype.itemsize,
    )  # fmt: skip


def _fbgemm_table(rows: int, dim: int, features: int = 1) -> Any:
    tbe = pytest.importorskip(
        "fbgemm_gpu.split_table_batched_embeddings_ops_training", reason="fbgemm-gpu-cpu is missing"
    )
    common = pytest.importorskip("fbgemm_gpu.split_table_batched_embeddings_ops_common")
    return tbe.SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, dim, common.EmbeddingLocation.HOST, tbe.ComputeDevice.CPU)],
        optimizer=tbe.OptimType.EXACT_ROWWISE_ADAGRAD, learning_rate=0.01,
        pooling_mode=common.PoolingMode.SUM, feature_table_map=[0] * features,
    )  # fmt: skip


def _fbgemm_call(rows: int, dim: int) -> Callable[..., Any]:
    table = _fbgemm_table(rows, dim)
    gradient = torch.ones(max(count for _, _, count in SHAPES.values()), dim)

    def train(ids: Tensor, keys: Tensor) -> Any:
        with torch.inference_mode(False), torch.enable_grad():
            offsets = torch.arange(0, keys.numel() + 1, keys.shape[1])
            table(keys.reshape(-1).clone(), offsets).backward(gradient[: len(ids)])

    return train


def _fbgemm_features_call(rows: int, dim: int) -> Callable[..., Any]:
    """Each hash as a feature of its own, all on one table: how one writes it without bags."""
    table = _fbgemm_table(rows, dim, 4)
    gradient = torch.ones(max(count for _, _, count in SHAPES.values()), dim)

    def train(ids: Tensor, keys: Tensor) -> Any:
        with torch.inference_mode(False), torch.enable_grad():
            out = table(keys.T.reshape(-1).clone(), torch.arange(keys.numel() + 1))
            out.view(len(ids), 4, dim).sum(1).backward(gradient[: len(ids)])

    return train


def _fused_call(rows: int, dim: int) -> Callable[..., Any]:
    with torch.inference_mode(False):
        module = HashEmbedding(rows, dim)
        optim.RowWiseAdagrad(module, lr=0.01)
    gradient = torch.ones(max(count for _, _, count in SHAPES.values()), dim)

    def train(ids: Tensor, keys: Tensor) -> Any:
        with torch.inference_mode(False), torch.enable_grad():
            module(ids).backward(gradient[: len(ids)])

    return train


OPTIMIZERS = {
    "emblas": _fused_call,
    "fbgemm, rows given": _fbgemm_call,
    "fbgemm, rows given, 4 features": _fbgemm_features_call,
}


@pytest.mark.parametrize("who", OPTIMIZERS)
@pytest.mark.parametrize("shape", SHAPES)
def bench_fused_optimizer(row: Any, shape: str, who: str) -> None:
    """Forward, backward and a step of row-wise Adagrad on the rows in use."""
    rows, dim, count = SHAPES[shape]
    spec = TableSpec(rows)

    def make(seed: int) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False):
            ids = _ids(count, seed)
            return ids, hash_keys(ids, spec)

    inputs = rotate(make, count * (8 + dim * 4))
    used = len(inputs[0][1].unique())
    row(
        "tables", "4 hashes, sum, backward with row-wise Adagrad", who, shape=shape,
        dtype="float32", call=OPTIMIZERS[who](rows, dim),
        inputs=inputs, bytes=count * (8 + 2 * dim * 4) + used * (3 * dim * 4 + 8),
    )  # fmt: skip


@pytest.mark.parametrize("who", ["emblas", "fbgemm", "torch EmbeddingBag"])
@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
def bench_large_table(row: Any, training: bool, who: str) -> None:
    """Bags of plain ids on a table far larger than any cache; training: a step of the rows in use.

    The step is row-wise Adagrad's; torch has none, and gives a sparse gradient.
    """
    rows, dim, bags, per_bag = 1_000_000, 128, 2048, 20
    offsets = torch.arange(0, bags * per_bag + 1, per_bag)
    gradient = torch.ones(bags, dim)
    module: Any
    with torch.inference_mode(False):
        if who == "emblas":
            module = QuotientRemainderEmbedding(rows, dim, (rows,), combine="sum")
            if training:
                optim.RowWiseAdagrad(module, lr=0.01)
        elif who == "fbgemm":
            module = _fbgemm_table(rows, dim)
        else:
            module = torch.nn.EmbeddingBag(
                rows, dim, mode="sum", include_last_offset=True, sparse=True
            )

    def make(seed: int) -> tuple[Tensor]:
        with torch.inference_mode(False):
            generator = torch.Generator().manual_seed(seed)
            return (torch.randint(0, rows, (bags * per_bag,), generator=generator),)

    def forward(ids: Tensor) -> Any:
        # fbgemm has no CPU kernel under inference mode.
        with torch.inference_mode(False), torch.no_grad():
            return module(ids, offsets)

    def train(ids: Tensor) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            module(ids, offsets).backward(gradient)
            if who.startswith("torch"):
                module.zero_grad()

    per_id = 8 + dim * 4 * (3 if training else 1)
    row(
        "tables", "bags of ids" + (", backward with row-wise Adagrad" if training else ""), who,
        shape=f"{rows} x {dim}, {bags} bags of {per_bag}", dtype="float32",
        call=train if training else forward, inputs=rotate(make, bags * per_bag * 8),
        bytes=bags * (per_bag * per_id + dim * 4 * (2 if training else 1)),
    )  # fmt: skip


@pytest.mark.parametrize("who", ["emblas", "torch gather and product"])
@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
def bench_quotient_remainder(row: Any, training: bool, who: str) -> None:
    vocabulary, dim, count = 1_000_000, 64, 32768
    with torch.inference_mode(False):
        module = QuotientRemainderEmbedding(vocabulary, dim)
    first, second = module.tables()
    radix = module.moduli[1]

    def plain(ids: Tensor) -> Tensor:
        return first[ids // radix] * second[ids % radix]

    call = module if who == "emblas" else plain
    gradient = torch.ones(count, dim)

    def train(ids: Tensor) -> Any:
        with torch.inference_mode(False), torch.enable_grad():
            quotients, remainders = module.tables()
            out = (
                module(ids)
                if who == "emblas"
                else quotients[ids // radix] * remainders[ids % radix]
            )
            return torch.autograd.grad(out, module.weight, gradient)

    def make(seed: int) -> tuple[Tensor]:
        with torch.inference_mode(False):
            generator = np.random.default_rng(seed)
            return (torch.from_numpy(generator.zipf(1.2, count) % vocabulary),)

    row(
        "tables", "quotient-remainder" + (", forward and backward" if training else ""), who,
        shape=f"{vocabulary} ids x {dim}, {count} lookups", dtype="float32",
        call=train if training else call, inputs=rotate(make, count * (8 + dim * 4)),
        bytes=count * (8 + dim * 4 * (2 if training else 1)),
    )  # fmt: skip


@pytest.mark.parametrize("who", ["emblas", "torch quantized", "torch gather, scale and sum"])
@pytest.mark.parametrize("bits", [8, 4], ids=["int8", "int4"])
@pytest.mark.parametrize("rows", [1_000_000, 5000])
def bench_quantized_bag(row: Any, rows: int, bits: int, who: str) -> None:
    """Bags of ids on a table of integers with a scale for each row, in memory and in cache.

    torch's own rows carry an offset beside the scale; its kernels are FBGEMM's.
    """
    dim, bags, per_bag = 128, 2048, 20
    offsets = torch.arange(0, bags * per_bag + 1, per_bag, dtype=torch.int32)
    with torch.inference_mode(False), torch.no_grad():
        table = torch.empty(rows, dim).uniform_(-1, 1)
        module = QuantizedEmbedding.from_table(table[:5000], bits)
        packed, scale = (x.repeat(rows // 5000, 1) for x in (module.packed, module.scale))
        prepack = {8: "embedding_bag_byte_prepack", 4: "embedding_bag_4bit_prepack"}[bits]
        theirs = getattr(torch.ops.quantized, prepack)(table)
    lookup = {8: "byte", 4: "4bit"}[bits]
    bag = getattr(torch.ops.quantized, f"embedding_bag_{lookup}_rowwise_offsets")
    half = 2 ** (bits - 1)

    def gather(ids: Tensor) -> Tensor:
        chosen = packed[ids]
        if bits == 4:
            chosen = torch.stack([chosen & 15, chosen >> 4], 2).flatten(1)
        return ((chosen.float() - half) * scale[ids]).view(bags, per_bag, dim).sum(1)

    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "emblas": lambda ids: quantized_bag(ids, packed, scale, bits, dim, offsets),
        "torch quantized": lambda ids: bag(theirs, ids, offsets.long(), include_last_offset=True),
        "torch gather, scale and sum": gather,
    }

    def make(seed: int) -> tuple[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return (torch.randint(0, rows, (bags * per_bag,), generator=generator),)

    row(
        "tables", f"bags of ids, int{bits}", who, call=calls[who],
        shape=f"{rows} x {dim}, {bags} bags of {per_bag}", dtype="float32",
        inputs=rotate(make, bags * per_bag * 8),
        bytes=bags * (per_bag * (8 + dim * bits // 8 + 4) + dim * 4),
    )  # fmt: skip
