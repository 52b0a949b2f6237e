"""Every operator on every device, forward and backward: which kernel serves it, and does it run."""

from __future__ import annotations

import pytest
import torch
from cases import CASES
from contract import only_kernels, packed
from emblas import _op, info, use_backend
from emblas.attention import attend_rows, attention_rows, rotary, rotary_, varlen_attention
from emblas.binary import (
    HadamardRotation,
    asymmetric_topk,
    dense_topk,
    hamming_distance,
    hamming_topk,
    maxsim,
    pack_sign,
    range_search,
    range_search_csr,
    rescore,
    unpack_sign,
)
from emblas.linear import linear
from emblas.pooling import (
    Matryoshka,
    attention_pool,
    lexical_weights,
    segment_pool,
    vocab_pool,
)
from emblas.tables import (
    HashEmbedding,
    TableSpec,
    hash_bag,
    hash_keys,
    optim,
    quantized_bag,
    random_codes,
)

CU = packed((3, 5))
CODES = torch.zeros(2, 3, dtype=torch.uint8)


def mean_bags(**options):
    return hash_bag(
        torch.arange(8), torch.randn(9, 4, requires_grad=True), TableSpec(9, seed=1), CU,
        mode="mean", **options,
    )  # fmt: skip


def fused_step():
    module = HashEmbedding(10, 4, seed=1)
    optim.SGD(module, lr=1.0)
    return module(torch.arange(5)).sum().backward()


# One call through the public front door for each forward operator.
CALLS = {
    "segment_pool": lambda: segment_pool(torch.randn(8, 4, requires_grad=True), CU),
    "segment_pool_modes": lambda: segment_pool(
        torch.randn(8, 4, requires_grad=True), CU, ("mean", "max")
    ),
    "segment_max": lambda: segment_pool(torch.randn(8, 4, requires_grad=True), CU, "max"),
    "segment_gem": lambda: segment_pool(torch.randn(8, 4, requires_grad=True), CU, "gem"),
    "attention_pool": lambda: attention_pool(
        torch.randn(8, 4, requires_grad=True), torch.randn(2, 4), CU
    ),
    "vocab_max": lambda: vocab_pool(
        torch.randn(8, 4, requires_grad=True), torch.randn(9, 4), None, CU
    ),
    "vocab_sum": lambda: vocab_pool(
        torch.randn(8, 4, requires_grad=True), torch.randn(9, 4), None, CU, mode="sum"
    ),
    "lexical_index": lambda: lexical_weights(torch.arange(8), torch.rand(8), CU),
    "finish": lambda: Matryoshka([3, 4])(torch.randn(8, 4, requires_grad=True))[0],
    "varlen_attention": lambda: varlen_attention(
        *[torch.randn(8, 1, 16, requires_grad=True)] * 3, CU, CU, 5, 5
    ),
    "varlen_attention_biases_backward": lambda: (
        varlen_attention(*[torch.randn(8, 1, 16, requires_grad=True)] * 3, CU, CU, 5, 5, 0.1)
        .sum()
        .backward()
    ),
    "rotary": lambda: rotary(torch.randn(2, 1, 8, requires_grad=True), *[torch.randn(2, 4)] * 2),
    "rotary_": lambda: rotary_(torch.randn(2, 1, 8, requires_grad=True) * 1, *[torch.eye(2)] * 2),
    "row_dots": lambda: attention_rows(
        *[torch.randn(8, 1, 16, requires_grad=True)] * 2, CU, 5, torch.arange(8)
    ),
    "row_sums": lambda: attend_rows(
        *[torch.randn(8, 1, 16, requires_grad=True)] * 3, CU, 5, torch.arange(8)
    ),
    "linear": lambda: linear(torch.randn(8, 4), torch.randn(3, 4)),
    "maxsim": lambda: maxsim(*[torch.randn(8, 4, requires_grad=True)] * 2, CU, CU),
    "pack_sign": lambda: pack_sign(torch.randn(2, 9)),
    "unpack_planes": lambda: unpack_sign(CODES, 20),
    "hadamard_rotate": lambda: HadamardRotation(9)(torch.randn(2, 9, requires_grad=True)),
    "asymmetric_topk": lambda: asymmetric_topk(torch.randn(2, 20), CODES, 1),
    "dense_topk": lambda: dense_topk(torch.randn(2, 5), torch.randn(3, 5), 1),
    "gather_scores": lambda: rescore(*[torch.randn(2, 5)] * 2, torch.zeros(2, 1).long(), 1),
    "hamming_distance": lambda: hamming_distance(CODES, CODES),
    "hamming_topk": lambda: hamming_topk(CODES, CODES, 1),
    "range_search": lambda: range_search(CODES, CODES, 1),
    "range_search_csr": lambda: range_search_csr(CODES, CODES, 1),
    "compose_bag": mean_bags,
    "compose_bag_backward_rows": lambda: mean_bags(sparse=True).sum().backward(),
    "compose_bag_update_": fused_step,
    "hash_bag": lambda: HashEmbedding(10, 4, seed=1)(torch.arange(5)),
    "hash_keys": lambda: hash_keys(torch.arange(5), TableSpec(10, seed=1)),
    "random_codes": lambda: random_codes(torch.arange(5), 7),
    "quantized_bag": lambda: quantized_bag(
        torch.arange(2), CODES, torch.ones(2), 8, 3, None, torch.ones(2, requires_grad=True)
    ),
}
# Cells of the table that may be empty, and why.
NO_GRADIENT = {
    "pack_sign": "bits",
    "unpack_planes": "of bits",
    "asymmetric_topk": "ids, and scores that serve for ranking",
    "dense_topk": "ids, and scores that serve for ranking",
    "gather_scores": "ids, and scores that serve for ranking",
    "hamming_distance": "integers",
    "hamming_topk": "integers",
    "range_search": "integers",
    "range_search_csr": "integers",
    "hash_keys": "integers",
    "compose_bag_backward_rows": "a gradient itself",
    "compose_bag_update_": "a gradient's use",
    "varlen_attention_biases_backward": "a gradient itself",
    "linear": "torch's own product, where a gradient is wanted",
    "random_codes": "functions of integers",
    "lexical_index": "integers: values are picked, and differentiated, by torch",
}
# Operators whose GPU tensors take the reference, with a warning: no GPU kernels yet.
NO_TRITON = ("linear",)


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
    """Without CUDA C++ kernels in the binary, Triton serves; its kernels run on listed calls."""
    if not _op.has_triton():
        pytest.skip("triton is not installed")
    assert _op.ops()[name].backend("cuda") == ("reference" if name in NO_TRITON else "triton")
    assert name in NO_TRITON or CASES[name], "no calls for tests/test_executors.py"


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
    for name, reason in (
        ("cuda", "this installation has no"),
        ("triton", "(there is no|triton is)"),
    ):
        with pytest.raises(RuntimeError, match=f"'{name}' can't run: {reason}"), use_backend(name):
            pass
    with use_backend("reference"):
        assert _op.use_reference()
    assert not _op.use_reference()
