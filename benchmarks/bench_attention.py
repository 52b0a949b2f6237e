"""Packed attention beside torch: padded SDPA with a mask, and SDPA one sequence at a time.

Biases stand beside the models' own ways: SDPA with the bias of all pairs (ALiBi, T5), and products
with all position vectors of which each pair gathers its own (DeBERTa). Rotary embedding stands
beside what transformers' models do, chosen and received attention beside the whole matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from conftest import rotate
from emblas.attention import (
    alibi_slopes,
    attend_rows,
    deberta_buckets,
    frequencies,
    received_attention,
    rotary,
    rotary_,
    rotary_tables,
    t5_buckets,
    varlen_attention,
)
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

SHAPES = {"short": (128, 16), "mixed": (32, 64), "long": (8, 256)}  # sequences, mean length
HEADS = {"12 x 32": (12, 32), "12 x 64": (12, 64), "8 x 128": (8, 128)}


def _batch(shape: str, heads: int, dim: int, seed: int) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)
    sequences, mean = SHAPES[shape]
    lengths = torch.randint(mean // 4, mean * 7 // 4, (sequences,), generator=generator)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int()
    qkv = torch.randn(int(cu_seqlens[-1]), 3, heads, dim, generator=generator)
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    padded = qkv.new_zeros(*mask.shape, 3, heads, dim)
    padded[mask] = qkv
    return (*qkv.unbind(1), cu_seqlens, int(lengths.max()), padded, mask)


def _emblas(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, padded: Tensor, mask: Tensor
) -> Tensor:
    return varlen_attention(q, k, v, cu_seqlens, cu_seqlens, longest, longest)


def _padded(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, padded: Tensor, mask: Tensor
) -> Tensor:
    queries, keys, values = padded.permute(2, 0, 3, 1, 4).unbind(0)
    return scaled_dot_product_attention(queries, keys, values, attn_mask=mask[:, None, None])


def _heads_first(q: Tensor, k: Tensor, v: Tensor, a: int, b: int) -> tuple[Tensor, ...]:
    return tuple(x[a:b].transpose(0, 1)[None] for x in (q, k, v))


def _loop(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, padded: Tensor, mask: Tensor
) -> Tensor:
    outs = [
        scaled_dot_product_attention(*_heads_first(q, k, v, a, b))  # type: ignore[arg-type]
        for a, b in pairwise(cu_seqlens.tolist())
    ]
    return torch.cat([out[0].transpose(0, 1) for out in outs])


CONTENDERS: dict[str, Callable[..., Tensor]] = {
    "emblas": _emblas,
    "torch SDPA, padded": _padded,
    "torch SDPA, loop": _loop,
}


@pytest.mark.parametrize("who", CONTENDERS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("shape", SHAPES)
def bench_varlen_attention(row: Any, shape: str, heads: str, who: str) -> None:
    count, dim = HEADS[heads]
    sequences, mean = SHAPES[shape]
    inputs = rotate(
        lambda seed: _batch(shape, count, dim, seed), sequences * mean * count * dim * 16
    )
    pairs = sum(int(i[3].diff().square().sum()) for i in inputs) / len(inputs)
    row(
        "attention", "varlen_attention", who,
        shape=f"{shape}: {sequences} x ~{mean} tokens, {heads}", dtype="float32",
        call=CONTENDERS[who], inputs=inputs, flops=4 * pairs * count * dim, seconds=0.7,
    )  # fmt: skip


# (sequences, heads, length, head_dim), of one length each, as torch takes them without padding.
UNIFORM = [
    (16, 12, 64, 32), (16, 12, 128, 32), (8, 12, 256, 32), (4, 12, 512, 32), (8, 12, 128, 64),
    (4, 12, 512, 64), (1, 12, 2048, 64),
]  # fmt: skip


def _name(shape: tuple[int, int, int, int]) -> str:
    batch, heads, length, dim = shape
    return f"{batch} x {length} tokens, {heads} x {dim}"


def _forward(shape: tuple[int, int, int, int], who: str, leaves: Sequence[Tensor]) -> Tensor:
    """Attend within sequences of one length; torch's result comes heads first."""
    batch, _, length, _ = shape
    if who.startswith("emblas"):
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32) * length
        q, k, v = leaves
        return varlen_attention(q, k, v, cu_seqlens, cu_seqlens, length, length)
    return scaled_dot_product_attention(
        *(x.unflatten(0, (batch, length)).transpose(1, 2) for x in leaves)
    )


def _projection(shape: tuple[int, int, int, int], seed: int) -> tuple[Tensor, ...]:
    """Queries, keys and values as one projection makes them."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads, length, dim = shape
    return torch.randn(batch * length, 3, heads, dim, generator=generator).unbind(1)


@pytest.mark.parametrize("who", ["emblas", "torch SDPA"])
@pytest.mark.parametrize("shape", UNIFORM, ids=str)
def bench_uniform(row: Any, shape: tuple[int, int, int, int], who: str) -> None:
    batch, heads, length, dim = shape
    row(
        "attention", "varlen_attention, one length", who, shape=_name(shape), dtype="float32",
        call=lambda *leaves: _forward(shape, who, leaves),
        inputs=rotate(lambda seed: _projection(shape, seed), batch * heads * length * dim * 16),
        flops=4 * batch * heads * length**2 * dim, seconds=0.7,
    )  # fmt: skip


@pytest.mark.parametrize("who", ["emblas", "emblas, float32", "torch SDPA"])
@pytest.mark.parametrize("shape", [(8, 12, 128, 64), (4, 12, 512, 64)], ids=str)
def bench_bfloat16(row: Any, shape: tuple[int, int, int, int], who: str) -> None:
    batch, heads, length, dim = shape
    dtype = torch.float32 if who == "emblas, float32" else torch.bfloat16

    def inputs(seed: int) -> tuple[Tensor, ...]:
        return tuple(x.to(dtype) for x in _projection(shape, seed))

    row(
        "attention", "varlen_attention, one length", who, shape=_name(shape), dtype="bfloat16",
        call=lambda *leaves: _forward(shape, who, leaves),
        inputs=rotate(inputs, batch * heads * length * dim * 4 * dtype.itemsize),
        flops=4 * batch * heads * length**2 * dim, seconds=0.7,
    )  # fmt: skip


WINDOW, DOCUMENT = 64, 4096


@pytest.mark.parametrize("who", ["emblas", "emblas, all keys", "torch SDPA, mask"])
def bench_window(row: Any, who: str) -> None:
    shape = (1, 12, DOCUMENT, 64)
    cu_seqlens = torch.tensor([0, DOCUMENT], dtype=torch.int32)
    positions = torch.arange(DOCUMENT)
    mask = (positions - positions[:, None]).abs() <= WINDOW

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if who == "torch SDPA, mask":
            queries, keys, values = _heads_first(q, k, v, 0, DOCUMENT)
            return scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        window = (WINDOW, WINDOW) if who == "emblas" else (-1, -1)
        return varlen_attention(
            q, k, v, cu_seqlens, cu_seqlens, DOCUMENT, DOCUMENT, window_size=window
        )

    row(
        "attention", f"varlen_attention, window of {WINDOW}", who, shape=_name(shape),
        dtype="float32", call=call, inputs=[_projection(shape, 0)],
        flops=4 * 12 * int(mask.sum()) * 64, seconds=0.7,
    )  # fmt: skip


def _graph(out: Callable[..., Tensor], tensors: Sequence[Tensor], grad: Tensor) -> Any:
    """Results with their graph, the leaves and the gradient that comes in."""
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [x.clone().requires_grad_() for x in tensors]
        return out(leaves), leaves, grad


def _gradients(out: Tensor, leaves: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    with torch.inference_mode(False):
        return torch.autograd.grad(out, leaves, grad, retain_graph=True)


@pytest.mark.parametrize("who", ["emblas", "torch SDPA"])
@pytest.mark.parametrize("shape", UNIFORM, ids=str)
def bench_varlen_attention_backward(row: Any, shape: tuple[int, int, int, int], who: str) -> None:
    batch, heads, length, dim = shape

    def step(seed: int) -> Any:
        leaves = _projection(shape, seed)
        grad = torch.randn(batch * length, heads, dim)
        if who != "emblas":
            grad = grad.unflatten(0, (batch, length)).transpose(1, 2)
        return _graph(lambda leaves: _forward(shape, who, leaves), leaves, grad)

    row(
        "attention", "varlen_attention backward", who, shape=_name(shape), dtype="float32",
        call=_gradients, inputs=rotate(step, batch * heads * length * dim * 32),
        flops=10 * batch * heads * length**2 * dim, seconds=0.7,
    )  # fmt: skip


@pytest.mark.parametrize("who", ["emblas", "torch SDPA, padded"])
@pytest.mark.parametrize("heads", ["12 x 32", "12 x 64"])
@pytest.mark.parametrize("shape", ["mixed", "long"])
def bench_ragged_backward(row: Any, shape: str, heads: str, who: str) -> None:
    count, dim = HEADS[heads]
    sequences, mean = SHAPES[shape]
    pairs: list[int] = []

    def step(seed: int) -> Any:
        q, k, v, cu_seqlens, longest, padded, mask = _batch(shape, count, dim, seed)
        pairs.append(int(cu_seqlens.diff().square().sum()))
        grad = torch.randn_like(q)
        if who == "emblas":
            return _graph(
                lambda x: _emblas(x[0], x[1], x[2], cu_seqlens, longest, padded, mask), [q, k, v],
                grad,
            )  # fmt: skip
        padded_grad = padded.new_zeros(*mask.shape, count, dim)
        padded_grad[mask] = grad
        return _graph(
            lambda x: _padded(q, k, v, cu_seqlens, longest, x[0], mask), [padded],
            padded_grad.transpose(1, 2),
        )  # fmt: skip

    inputs = rotate(step, sequences * mean * count * dim * 32)
    row(
        "attention", "varlen_attention backward", who,
        shape=f"{shape}: {sequences} x ~{mean} tokens, {heads}", dtype="float32", call=_gradients,
        inputs=inputs, flops=10 * sum(pairs) // len(pairs) * count * dim, seconds=0.7,
    )  # fmt: skip


LONG, BIASED_HEADS, BIASED_DIM = 2048, 4, 64
BIASES = ("ALiBi", "T5", "DeBERTa")


def _distances() -> Tensor:
    return torch.arange(LONG) - torch.arange(LONG)[:, None]


def _deberta_eager(q: Tensor, k: Tensor, v: Tensor, pos_k: Tensor, pos_q: Tensor) -> Tensor:
    lookup, radius = deberta_buckets(), 512
    slot = lookup[_distances().clamp(-radius, radius) + radius].expand(BIASED_HEADS, -1, -1)
    q, k, v, pos_k, pos_q = (x.transpose(0, 1) for x in (q, k, v, pos_k, pos_q))
    scores = q @ k.mT + (q @ pos_k.mT).gather(2, slot) + (k @ pos_q.mT).mT.gather(1, slot)
    weights = (scores * (3 * BIASED_DIM) ** -0.5).softmax(2)
    return (weights @ v).transpose(0, 1)


def _biased(bias: str, who: str, leaves: list[Tensor]) -> Tensor:
    q, k, v, *tables = leaves
    if who == "emblas":
        cu_seqlens = torch.tensor([0, LONG], dtype=torch.int32)
        options: dict[str, Any] = {}
        if bias == "ALiBi":
            options["alibi_slopes"] = alibi_slopes(BIASED_HEADS)
        elif bias == "T5":
            options["relative_bias"] = (tables[0], t5_buckets())
        else:
            options["disentangled"] = (*tables, deberta_buckets())
            options["softmax_scale"] = (3 * BIASED_DIM) ** -0.5
        return varlen_attention(q, k, v, cu_seqlens, cu_seqlens, LONG, LONG, **options)
    if bias == "DeBERTa":
        return _deberta_eager(q, k, v, *tables)
    if bias == "ALiBi":
        mask = -alibi_slopes(BIASED_HEADS)[:, None, None] * _distances().abs()
    else:
        mask = tables[0][:, t5_buckets()[_distances().clamp(-128, 128) + 128]]
    queries, keys, values = _heads_first(q, k, v, 0, LONG)
    out = scaled_dot_product_attention(queries, keys, values, attn_mask=mask[None])
    return out[0].transpose(0, 1)


def _biased_inputs(bias: str, seed: int) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes: list[tuple[int, ...]] = [(LONG, BIASED_HEADS, BIASED_DIM)] * 3
    if bias == "T5":
        shapes.append((BIASED_HEADS, 32))
    if bias == "DeBERTa":
        shapes += [(512, BIASED_HEADS, BIASED_DIM)] * 2
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


@pytest.mark.parametrize("who", ["emblas", "torch, all pairs"])
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("training", [False, True], ids=["forward", "forward and backward"])
def bench_biases(row: Any, bias: str, who: str, training: bool) -> None:
    def forward(*leaves: Tensor) -> Tensor:
        return _biased(bias, who, list(leaves))

    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        with torch.inference_mode(False), torch.enable_grad():
            leaves = [x.clone().requires_grad_() for x in tensors]
            return torch.autograd.grad(_biased(bias, who, leaves).sum(), leaves)

    pairs = BIASED_HEADS * LONG**2
    row(
        "attention", f"varlen_attention, {bias}{', with backward' if training else ''}", who,
        shape=f"1 x {LONG} tokens, {BIASED_HEADS} x {BIASED_DIM}", dtype="float32",
        call=step if training else forward, inputs=[_biased_inputs(bias, 0)],
        flops=(14 if training else 4) * pairs * BIASED_DIM, seconds=0.7,
    )  # fmt: skip


def _rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As transformers' models do, with each cosine and sine held twice."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


ROTARY: dict[str, Callable[..., Tensor]] = {
    "emblas": lambda x, cos, sin, cos2, sin2: rotary(x, cos, sin),
    "emblas, in place": lambda x, cos, sin, cos2, sin2: rotary_(x, cos, sin),
    "torch, rotate_half": lambda x, cos, sin, cos2, sin2: _rotate_half(x, cos2, sin2),
}


@pytest.mark.parametrize("who", ROTARY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def bench_rotary(row: Any, dtype: torch.dtype, who: str) -> None:
    tokens, heads, dim = 4096, 12, 64

    def batch(seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(tokens, heads, dim, generator=generator).to(dtype)
        cos, sin = rotary_tables(frequencies.plain(dim), tokens)
        twice = (table.repeat(1, 2)[:, None].to(dtype) for table in (cos, sin))
        return x, cos, sin, *twice

    size = tokens * heads * dim * dtype.itemsize
    row(
        "attention", "rotary", who, shape=f"{tokens} tokens, {heads} x {dim}",
        dtype=str(dtype).removeprefix("torch."), call=ROTARY[who], inputs=rotate(batch, size),
        bytes=2 * size, seconds=0.5,
    )  # fmt: skip


def _matrix(q: Tensor, k: Tensor) -> Tensor:
    """All probabilities (heads, queries, keys) of one sequence."""
    scores = q.transpose(0, 1) @ k.permute(1, 2, 0)
    return (scores * q.shape[2] ** -0.5).softmax(2)


def _attend_first(who: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    offsets = torch.tensor([0, LONG], dtype=torch.int32)
    if who == "emblas":
        return attend_rows(q[:1], k, v, offsets, LONG, torch.zeros(1, dtype=torch.int64))
    return varlen_attention(q, k, v, offsets, offsets, LONG, LONG)[:1]


def _receive(who: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if who == "emblas":
        offsets = torch.tensor([0, LONG], dtype=torch.int32)
        return received_attention(q, k, offsets, offsets, LONG, LONG)
    return _matrix(q, k).sum(1).t()


@pytest.mark.parametrize("who", ["emblas", "emblas, all rows"])
def bench_attend_rows(row: Any, who: str) -> None:
    row(
        "attention", "attend_rows", who,
        shape=f"1 of {LONG} tokens, {BIASED_HEADS} x {BIASED_DIM}", dtype="float32",
        call=lambda *qkv: _attend_first(who, *qkv), inputs=[_biased_inputs("ALiBi", 0)],
        flops=4 * BIASED_HEADS * LONG * BIASED_DIM, seconds=0.5,
    )  # fmt: skip


@pytest.mark.parametrize("who", ["emblas", "torch, all pairs"])
def bench_received_attention(row: Any, who: str) -> None:
    row(
        "attention", "received_attention", who,
        shape=f"1 x {LONG} tokens, {BIASED_HEADS} x {BIASED_DIM}", dtype="float32",
        call=lambda *qkv: _receive(who, *qkv), inputs=[_biased_inputs("ALiBi", 0)],
        flops=2 * BIASED_HEADS * LONG**2 * BIASED_DIM, seconds=0.5,
    )  # fmt: skip
