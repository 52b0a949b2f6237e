"""The bit-code operators: tracing, gradient, routing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emblas._op import Op, use_reference
from emblas.binary import reference


def _pack_sign_fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], (x.shape[1] + 7) // 8, dtype=torch.uint8)


def _hamming_topk_fake(queries: Tensor, codes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.int32), queries.new_empty(shape, dtype=torch.int64)


_pack_sign = Op(
    "pack_sign",
    reference=reference.pack_sign,
    fake=_pack_sign_fake,
    triton="emblas.binary.triton",
)
_hamming_topk = Op(
    "hamming_topk",
    reference=reference.hamming_topk,
    fake=_hamming_topk_fake,
    triton="emblas.binary.triton",
)


class _SignSTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.where(x > 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.where(x.abs() <= 1, grad_out, 0)


def sign_ste(x: Tensor) -> Tensor:
    """Binarize a checked argument; see :func:`emblas.binary.sign_ste`."""
    return _SignSTE.apply(x)


def pack_sign(x: Tensor) -> Tensor:
    """Pack checked arguments; see :func:`emblas.binary.pack_sign`."""
    return reference.pack_sign(x) if use_reference() else _pack_sign(x)


def hamming_topk(queries: Tensor, codes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Search with checked arguments; see :func:`emblas.binary.hamming_topk`."""
    if use_reference():
        return reference.hamming_topk(queries, codes, k)
    return _hamming_topk(queries, codes, k)
