"""Every operator on every device, forward and backward: which kernel serves it, and does it run."""

from __future__ import annotations

import pytest
import torch
from contract import only_kernels, packed
from emblas import _op, info, use_backend
from emblas.attention import varlen_attention
from emblas.binary import hamming_topk, pack_sign
from emblas.pooling import (
    Matryoshka,
    attention_pool,
    lexical_weights,
    segment_pool,
    vocab_pool,
)
from emblas.tables import HashEmbedding, TableSpec, hash_keys

CU = packed((3, 5))
# One call through the public front door for each forward operator.
CALLS = {
    "segment_pool": lambda: segment_pool(torch.randn(8, 4, requires_grad=True), CU),
    "segment_max": lambda: segment_pool(torch.randn(8, 4, requires_grad=True), CU, "max"),
    "segment_gem": lambda: segment_pool(torch.randn(8, 4, requires_grad=True), CU, "gem"),
    "attention_pool": lambda: attention_pool(
        torch.randn(8, 4, requires_grad=True), torch.randn(2, 4), CU
    ),
    "vocab_max": lambda: vocab_pool(
        torch.randn(8, 4, requires_grad=True), torch.randn(9, 4), None, CU
    ),
    "lexical_index": lambda: lexical_weights(torch.arange(8), torch.rand(8), CU),
    "finish": lambda: Matryoshka([3, 4])(torch.randn(8, 4, requires_grad=True))[0],
    "varlen_attention": lambda: varlen_attention(*[torch.randn(8, 1, 16)] * 3, CU, CU, 5, 5),
    "pack_sign": lambda: pack_sign(torch.randn(2, 9)),
    "hamming_topk": lambda: hamming_topk(*[torch.zeros(2, 3, dtype=torch.uint8)] * 2, 1),
    "hash_bag": lambda: HashEmbedding(10, 4, seed=1)(torch.arange(5)),
    "hash_keys": lambda: hash_keys(torch.arange(5), TableSpec(10, seed=1)),
}
# Cells of the table that may be empty, and why.
NO_GRADIENT = {
    "pack_sign": "bits",
    "hamming_topk": "integers",
    "hash_keys": "integers",
    "lexical_index": "integers: values are picked, and differentiated, by torch",
    "varlen_attention": "forward only in this version",
}
NO_GPU_KERNEL = "GPU tensors take the reference in this version, with a warning"


def _forward_ops():
    ops = _op.ops()
    backwards = {op.backward for op in ops.values() if op.backward}
    return sorted(set(ops) - backwards)


def test_every_operator_is_listed():
    assert _forward_ops() == sorted(CALLS)


@pytest.mark.parametrize("name", sorted(CALLS))
def test_forward_on_cpu(name):
    assert _op.ops()[name].backend("cpu") == "cpu"
    with only_kernels(name):
        CALLS[name]()


@pytest.mark.parametrize("name", sorted(CALLS))
def test_backward_on_cpu(name):
    backward = _op.ops()[name].backward
    if backward is None:
        assert name in NO_GRADIENT
        return
    assert name not in NO_GRADIENT
    with only_kernels(name, backward):
        CALLS[name]().sum().backward()


@pytest.mark.parametrize("name", sorted(_op.ops()))
def test_gpu_cells(name):
    """No kernel for CUDA or Triton yet: the reference serves, and says so once."""
    op = _op.ops()[name]
    assert op.backend("cuda") == "reference", NO_GPU_KERNEL
    op._warned = False
    before, op.reference = op.reference, lambda *args: args
    try:
        with pytest.warns(UserWarning, match=f"emblas::{name} has no GPU kernel"):
            op._on_gpu(1)
        op._on_gpu(1)  # warns once only: a second warning would be an error here
    finally:
        op.reference = before


def test_unasked_reference_is_noticed():
    """The check that the tests above rely on does fail."""
    with pytest.raises(AssertionError, match="did not run"), only_kernels("segment_pool"):
        pass
    with pytest.raises(AssertionError, match="nobody asked"), only_kernels():
        _op.ops()["segment_pool"].reference()


def test_info():
    facts = info()
    assert set(facts["ops"]) == set(_op.ops())
    assert facts["isa"] in facts["isa_supported"]
    assert facts["threads"] == torch.get_num_threads()


def test_use_backend():
    with pytest.raises(ValueError, match="backend must be one of"), use_backend("gpu"):
        pass
    for name in ("cuda", "triton"):
        with pytest.raises(RuntimeError, match=f"backend '{name}' can't run"), use_backend(name):
            pass
    with use_backend("reference"):
        assert _op.use_reference()
    assert not _op.use_reference()
