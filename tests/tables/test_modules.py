"""The table modules: each against its definition in plain torch or its reference implementation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from contract import packed
from emblas.tables import (
    HashEmbedding,
    MemComEmbedding,
    MultiHashEmbedding,
    QuotientRemainderEmbedding,
    RobeEmbedding,
    TableSpec,
    TensorTrainEmbedding,
    UnifiedEmbedding,
    WeightedHashEmbedding,
    hash_bag,
    hash_keys,
    optim,
)


def test_multi_hash_equals_thinc():
    """spaCy's first layer: four HashEmbed layers with seeds 8 to 11, side by side."""
    thinc = pytest.importorskip("thinc.api", reason="thinc is not installed")
    ids = np.random.default_rng(0).integers(0, 2**64, (70, 4), np.uint64)
    layers, expected = [], []
    for column, rows in enumerate((500, 100, 250, 250)):
        layer = thinc.HashEmbed(24, rows, seed=8 + column)
        layer.initialize(X=ids[:, column])
        layers.append(layer)
        expected.append(layer.predict(ids[:, column]))
    module = MultiHashEmbedding.from_thinc([layer.get_param("E") for layer in layers])
    out = module(torch.from_numpy(ids))
    np.testing.assert_array_equal(out.detach().numpy(), np.concatenate(expected, 1))
    assert module.num_parameters == 1100 * 24
    assert module.embedding_dim == 96
    with pytest.raises(ValueError, match="seed 8 is degenerate"):
        MultiHashEmbedding([10], 4, seed=8)
    with pytest.raises(ValueError, match="must all have one width"):
        MultiHashEmbedding.from_thinc([np.zeros((2, 3)), np.zeros((2, 4))])


@pytest.mark.parametrize("append", [False, True])
def test_weighted_hash(append):
    module = WeightedHashEmbedding(40, 6, 300, num_hashes=3, append_weights=append, padding_id=7)
    ids = torch.arange(20)
    rows = hash_keys(ids, module.spec)
    p = module.importance[hash_keys(ids, module.importance_spec)[:, 0]]
    expected = (p[..., None] * module.weight[rows]).sum(1)
    expected = torch.cat([expected, p], 1) if append else expected
    expected = torch.where((ids == 7)[:, None], 0, expected)
    torch.testing.assert_close(module(ids), expected)
    grad = torch.randn(expected.shape)
    for mine, theirs in zip(
        torch.autograd.grad(module(ids), module.parameters(), grad),
        torch.autograd.grad(expected, module.parameters(), grad), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(
        module(ids, packed((4, 0, 16)))[0], expected[:4].sum(0), rtol=1e-5, atol=1e-5
    )
    twin = WeightedHashEmbedding(40, 6, 300, num_hashes=3, append_weights=append)
    twin.load_state_dict(module.state_dict())
    other = WeightedHashEmbedding(40, 6, 300, num_hashes=3, append_weights=append, seed=1)
    with pytest.raises(ValueError, match="holds tables of"):
        other.load_state_dict(module.state_dict())


@pytest.mark.parametrize("combine", ["product", "sum", "concat"])
@pytest.mark.parametrize(
    ("moduli", "coprime"), [(None, False), (7, False), ((5, 4, 6), False), ((3, 5, 7), True)]
)
def test_quotient_remainder(combine, moduli, coprime):
    module = QuotientRemainderEmbedding(100, 12, moduli, combine=combine, coprime=coprime)
    ids, tables = torch.arange(100), module.tables()
    digits = []
    for k, m in enumerate(module.moduli):
        digits.append(ids % m if coprime else ids // math.prod(module.moduli[k + 1 :]) % m)
    rows = torch.stack(digits, 1)
    assert len(rows.unique(dim=0)) == 100
    vectors = [table[digit] for table, digit in zip(tables, digits, strict=True)]
    join = {"concat": lambda v: torch.cat(v, 1), "sum": sum, "product": math.prod}[combine]
    torch.testing.assert_close(module(ids), join(vectors))
    assert module.num_parameters == sum(module.moduli) * (
        12 // len(module.moduli) if combine == "concat" else 12
    )


def test_quotient_is_exact():
    """A float division gives 33333334 here."""
    module = QuotientRemainderEmbedding(100_000_002, 1, 3, device="meta")
    assert module.moduli == (33333334, 3)
    small = QuotientRemainderEmbedding(100_000_002, 2, (10_001, 10_001), combine="sum")
    with torch.no_grad():
        small.tables()[0].copy_(torch.arange(10_001.0)[:, None].expand(-1, 2))
        small.tables()[1].zero_()
    assert small(torch.tensor([100_000_001]))[0, 0] == 100_000_001 // 10_001


def test_unified():
    module = UnifiedEmbedding(97, 4, [3, 1], seed=5)
    ids = torch.arange(30).view(5, 3, 2)
    out = module(ids)
    assert out.shape == (5, 3, 16)
    rows = [[p.b for p in module.composition.parts if p.feature == feature] for feature in range(2)]
    assert rows == [[0, 1, 2], [0]]
    first = module.weight[hash_keys(ids[..., 0], TableSpec(97, 3, "splitmix64", 5))].flatten(-2)
    second = module.weight[hash_keys(ids[..., 1], TableSpec(97, 1, "splitmix64", 6))].flatten(-2)
    torch.testing.assert_close(out, torch.cat([first, second], -1))
    with pytest.raises(ValueError, match="chunks must hold numbers of 1 to 64"):
        UnifiedEmbedding(9, 4, [0])


def test_robe_vectors():
    """Indices that the authors' code gives for 1000 numbers, chunks of 2."""
    module = RobeEmbedding(1000, 8, 2)
    with torch.no_grad():
        module.weight.copy_(torch.arange(1000.0))
    assert module(torch.tensor([0, 1, 12345])).tolist() == [
        [982, 983, 445, 446, 907, 908, 228, 229],
        [416, 417, 878, 879, 341, 342, 803, 804],
        [802, 803, 265, 266, 727, 728, 190, 191],
    ]
    shifted = RobeEmbedding(1000, 8, 2, offset=12345)
    shifted.weight = module.weight
    assert torch.equal(shifted(torch.tensor(0)), module(torch.tensor(12345)))
    with pytest.raises(ValueError, match="embedding_dim must be a multiple of chunk_size"):
        RobeEmbedding(1000, 7, 2)
    with pytest.raises(ValueError, match="memory_size must be at least chunk_size"):
        RobeEmbedding(1, 8, 2)


def test_mem_com():
    module = MemComEmbedding(50, 6, 7, bias=True)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    ids = torch.arange(50).view(5, 10)
    expected = module.weight[ids % 7] * module.scale[ids] + module.bias[ids]
    torch.testing.assert_close(module(ids), expected)
    grad = torch.randn(5, 10, 6)
    for mine, theirs in zip(
        torch.autograd.grad(module(ids), module.parameters(), grad),
        torch.autograd.grad(expected, module.parameters(), grad), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(mine, theirs)
    with pytest.raises(ValueError, match="ids of feature 0 must be 0 to 49, got 50"):
        module(torch.tensor([50]))


def test_tensor_train():
    module = TensorTrainEmbedding((3, 4, 5), (2, 3, 2), rank=4)
    a, b, c = (core.view(p, r, q, -1) for core, p, r, q in
               zip(module.cores, (3, 4, 5), (1, 4, 4), (2, 3, 2), strict=True))  # fmt: skip
    table = torch.einsum("ixay,jybz,kzcw->ijkabcxw", a, b, c).reshape(60, 12)
    ids = torch.tensor([[0, 59, 7], [7, 21, 20]])
    torch.testing.assert_close(module(ids), table[ids])
    assert module.num_parameters == 3 * 2 * 4 + 4 * 4 * 3 * 4 + 5 * 4 * 2
    large = TensorTrainEmbedding((50, 50, 50), (4, 4, 4), rank=16)
    std = float(large(torch.randint(0, 125_000, (4000,))).detach().std())
    assert 0.7 < std / (1 / math.sqrt(3 * 125_000)) < 1.4
    with pytest.raises(ValueError, match="ids must be 0 to 59, got 0 to 60"):
        module(torch.tensor([0, 60]))
    with pytest.raises(ValueError, match="must have the same length"):
        TensorTrainEmbedding((3, 4), (2, 3, 2), rank=4)


def test_budgets():
    """The largest module that fits: one step more would not."""
    for cls, name, arguments in (
        (HashEmbedding, "num_embeddings", {"embedding_dim": 16}),
        (UnifiedEmbedding, "num_embeddings", {"chunk_dim": 8, "chunks": [2, 3]}),
        (RobeEmbedding, "memory_size", {"embedding_dim": 16, "chunk_size": 4}),
    ):
        module = cls.from_budget(10_001, **arguments)
        assert module.num_bytes <= 10_001
        assert cls(**{name: len(module.weight) + 1, **arguments}).num_bytes > 10_001
    train = TensorTrainEmbedding.from_budget(10_000, (10, 10, 10), (2, 4, 2))
    rank = train.cores[1].shape[1]
    assert (
        train.num_bytes <= 10_000 < TensorTrainEmbedding((10,) * 3, (2, 4, 2), rank + 1).num_bytes
    )
    with pytest.raises(ValueError, match="num_bytes must be at least 16, the size of one chunk"):
        RobeEmbedding.from_budget(15, 16, 4)
    with pytest.raises(ValueError, match="num_bytes must be at least 64, the size of Hash"):
        HashEmbedding.from_budget(63, embedding_dim=16)
    module = QuotientRemainderEmbedding.from_budget(20_000, 10_000, 16)
    assert 19_000 < module.num_bytes <= 20_000
    with pytest.raises(ValueError, match="num_bytes must be at least 12800"):
        QuotientRemainderEmbedding.from_budget(12_000, 10_000, 16)
    with pytest.raises(TypeError, match="has no size to choose"):
        MultiHashEmbedding.from_budget(1000, 5)
    small = MemComEmbedding.from_budget(3000, num_embeddings=500, embedding_dim=8)
    assert small.weight.shape == (31, 8)
    assert small.num_bytes == (500 + 31 * 8) * 4


def test_impossible_partitions():
    for message, arguments in (
        ("moduli must have a product of at least num_embeddings = 100", (100, 12, (5, 5))),
        ("moduli must be at least 1", (100, 12, 0)),
        ("num_embeddings must be at least 1", (0, 12)),
    ):
        with pytest.raises(ValueError, match=message):
            QuotientRemainderEmbedding(*arguments)
    with pytest.raises(ValueError, match="no common factors, got 10 and 15"):
        QuotientRemainderEmbedding(100, 12, (10, 15), coprime=True)
    with pytest.raises(ValueError, match="multiple of the 2 digits"):
        QuotientRemainderEmbedding(100, 13, combine="concat")
    with pytest.raises(ValueError, match="combine must be"):
        QuotientRemainderEmbedding(100, 12, combine="max")


def test_state_dict_carries_the_composition():
    module = QuotientRemainderEmbedding(100, 6, 10)
    twin = QuotientRemainderEmbedding(100, 6, 10)
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin(torch.arange(9)), module(torch.arange(9)))
    with pytest.raises(ValueError, match="the state dict holds tables of Composition"):
        QuotientRemainderEmbedding(100, 6, 10, combine="sum").load_state_dict(module.state_dict())


@pytest.mark.parametrize("signed", [False, True])
def test_resize_is_exact(signed):
    module = HashEmbedding(50, 6, num_hashes=3, seed=2, signed=signed, padding_id=4)
    ids = torch.arange(300)
    grown = module.resize(2)
    assert grown.spec.num_embeddings == 100
    assert torch.equal(grown(ids), module(ids))
    assert torch.equal(module.resize(3)(ids), module(ids))
    with pytest.raises(ValueError, match="factor must be at least 1"):
        module.resize(0)


def test_fused_optimizer_and_sparse_gradient_of_modules():
    ids = torch.arange(5)
    for module in (HashEmbedding(20, 4), QuotientRemainderEmbedding(30, 4)):
        before = module(ids).detach()
        optim.SGD(module, lr=1.0)
        module(ids).sum().backward()
        assert module.weight.grad is None
        assert not torch.equal(module(ids), before)
    sparse = HashEmbedding(20, 4, sparse=True)
    sparse(ids).sum().backward()
    assert sparse.weight.grad.is_sparse
    mean = sparse(ids, packed((2, 3)), mode="mean")
    expected = hash_bag(ids, sparse.weight, sparse.spec)
    torch.testing.assert_close(mean, torch.stack([expected[:2].mean(0), expected[2:].mean(0)]))
