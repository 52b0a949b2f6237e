"""Batches of ids that repeat: the gradients of an id are added up before its rows are looked up."""

from __future__ import annotations

import pytest
import torch
from contract import packed
from emblas.tables import Composition, HashEmbedding, Part, compose_bag, hash_bag, optim

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
EACH = packed([1] * 1500)  # as bags, ids are not looked through for repetitions


def batch(dtype, dim):
    distinct = torch.randint(-(2**63), 2**63 - 1, (150,))
    return distinct[torch.randint(0, 150, (1500,))], torch.randn(1500, dim).to(dtype)


def close(dtype):
    return {"rtol": 100 * torch.finfo(dtype).eps, "atol": 100 * torch.finfo(dtype).eps}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("combine", ["sum", "mean", "product"])
def test_equals_bags_of_one(dtype, combine):
    parts = (Part(70, 37, a=3, b=0), Part(70, 37, a=3, b=1, base=70 * 37, signed=True))
    composition = Composition(parts, combine)
    (ids, grad), grads = batch(dtype, 37), []
    for offsets in (None, EACH):
        table = torch.arange(composition.size).sin().to(dtype).requires_grad_()
        compose_bag(ids, table, composition, offsets, padding_id=int(ids[7])).backward(grad)
        grads.append(table.grad)
    torch.testing.assert_close(*grads, **close(dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_all_gradients_agree(dtype):
    """Dense, sparse and in a fused step: the same bits."""
    (ids, grad), grads = batch(dtype, 37), {}
    fused = HashEmbedding(70, 37, num_hashes=2, padding_id=int(ids[7]), dtype=dtype)
    fused.weight.data.zero_()
    spec = fused.spec
    for name, offsets in (("dense", None), ("sparse", None), ("bags", EACH)):
        table = torch.ones(70, 37, dtype=dtype, requires_grad=True)
        hash_bag(ids, table, spec, offsets, padding_id=fused.padding_id,
                 sparse=name == "sparse").backward(grad)  # fmt: skip
        grads[name] = table.grad.to_dense()
    optim.SGD(fused, lr=1.0)
    fused(ids).backward(grad)
    torch.testing.assert_close(grads["dense"], grads["bags"], **close(dtype))
    assert torch.equal(grads["dense"], grads["sparse"])
    assert torch.equal(grads["dense"], -fused.weight)
