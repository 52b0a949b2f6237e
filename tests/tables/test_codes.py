"""Codes from Philox, and the modules on top of them."""

from __future__ import annotations

import math

import executors
import pytest
import torch
from contract import check_compiled, check_op, check_threads, packed
from emblas import use_backend
from emblas._philox import philox4x32
from emblas.tables import (
    CodeSpec,
    DeepHashEmbedding,
    LexinvariantEmbedding,
    random_codes,
)

executor = executors.fixture("random_codes")


def philox_by_hand(counter, key):
    """The paper's definition in Python's integers."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [p1 >> 32 ^ c[1] ^ k0, p1 % 2**32, p0 >> 32 ^ c[3] ^ k1, p0 % 2**32]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c


def test_philox_known_answers():
    """Vectors of Random123."""
    for counter, key, expected in (
        ([0] * 4, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([2**32 - 1] * 4, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], 0x299F31D0A4093822,
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ):  # fmt: skip
        words = [int(w) for w in philox4x32([torch.tensor(c) for c in counter], key)]
        assert words == [int(w, 16) for w in expected.split()]
        assert words == philox_by_hand(counter, (key % 2**32, key >> 32))


@pytest.mark.parametrize("kind", ["normal", "uniform", "sparse"])
def test_codes_by_hand(kind):
    spec = CodeSpec(kind, seed=2**63 + 5, sparsity=3)
    ids, sequences = [0, 12345, -1, 2**62 + 9], [0, 1, 2**32 - 1, 7]
    out = random_codes(
        torch.tensor(ids), 7, spec, sequence=torch.tensor(sequences), dtype=torch.float64
    )
    for row, i, s in zip(out.tolist(), ids, sequences, strict=True):
        numbers = []
        for block in range(2):
            pattern = i % 2**64
            w = philox_by_hand([block, pattern % 2**32, pattern >> 32, s], (5, 2**31))
            if kind == "normal":
                for a, b in (w[:2], w[2:]):
                    radius = math.sqrt(-2 * math.log((a + 1) / 2**32))
                    angle = 2 * math.pi * b / 2**32
                    numbers += [radius * math.cos(angle), radius * math.sin(angle)]
            elif kind == "uniform":
                numbers += [(x + 0.5) / 2**31 - 1 for x in w]
            else:
                third = round(2**31 / 3)
                numbers += [
                    (-1 if x < third else 1 if x < 2 * third else 0) * math.sqrt(3) for x in w
                ]
        assert row == pytest.approx(numbers[:7], rel=1e-13, abs=1e-13)


def test_bits_of_codes():
    """A change of these numbers would change the meaning of every stored model."""
    ids = torch.tensor([0, 12345])
    normal = random_codes(ids, 3)
    assert [x.hex() for x in normal.flatten().tolist()] == [
        "0x1.fb76660000000p-1", "-0x1.d96d600000000p-1", "-0x1.3c373e0000000p-1",
        "-0x1.1202d40000000p-4", "0x1.4f2cd00000000p+1", "0x1.85d0760000000p+0",
    ]  # fmt: skip
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        exact = random_codes(ids, 3, dtype=torch.float64)
        assert torch.equal(random_codes(ids, 3, dtype=dtype), exact.to(dtype))
    # Neither dim, nor shape, nor neighbours, nor strides, nor uint64 make a difference.
    assert torch.equal(random_codes(ids, 9)[:, :3], normal)
    assert torch.equal(random_codes(ids[1], 3), normal[1])
    assert torch.equal(random_codes(ids.repeat_interleave(2)[::2], 3), normal)
    assert torch.equal(random_codes(ids.view(torch.uint64), 3), normal)
    assert random_codes(ids[:0], 3).shape == (0, 3)
    many = torch.arange(2**17 + 9)  # more than fit into one block
    last = many[-20:]
    assert torch.equal(
        random_codes(many, 5, CodeSpec("uniform"))[-20:], random_codes(last, 5, CodeSpec("uniform"))
    )


@pytest.mark.parametrize("kind", ["normal", "uniform", "sparse"])
def test_same_bits_as_the_reference(executor, kind):
    """By every executor, to the last bit of float64."""
    ids = torch.randint(-(2**63), 2**63 - 1, (3, 5))
    ids[0, 0] = 0
    sequences = torch.tensor([[0], [2**32 - 1], [3]])
    for seed, sparsity in ((0, 1), (2**64 - 1, 3), (5, 2**31)):
        spec = CodeSpec(kind, seed, sparsity)
        for dim in (1, 4, 31, 67):
            for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
                got = random_codes(ids, dim, spec, sequence=sequences, dtype=dtype)
                with use_backend("reference"):  # also where the executor replaces the kernel
                    plain = random_codes(ids, dim, spec, sequence=sequences, dtype=dtype)
                assert got.dtype == dtype
                assert torch.equal(got, plain)


def test_edges_of_sparse_codes(executor):
    """A word that is p is above zero, one that is 2 p is zero."""
    word, seed, ids = 15552, 5, torch.tensor([44418])
    assert philox_by_hand([0, int(ids), 0, 0], (seed, 0))[1] == word
    for part, expected in ((word + 1, -1), (word, 1), (word // 2 + 1, 1), (word // 2, 0)):
        sparsity = round(2**31 / part)
        assert round(2**31 / sparsity) == part
        spec = CodeSpec("sparse", seed, sparsity)
        got = random_codes(ids, 2, spec, dtype=torch.float64)[0, 1]
        assert float(got) == expected * math.sqrt(sparsity)


def test_extreme_words():
    """Where normal numbers end: no infinity, no NaN, and the tails of 2^32 numbers."""
    codes = random_codes(torch.arange(2**12), 2**10, dtype=torch.float64)
    assert bool(codes.isfinite().all())
    assert 4.5 < float(codes.abs().max()) < math.sqrt(64 * math.log(2))


def test_operator_contract():
    ids, sequence = torch.arange(6), torch.arange(6)
    for kind in range(3):
        check_op("random_codes", ids, sequence, 7, kind, 3, 2, kind)
    check_op("random_codes", ids, sequence[:1], 7, 0, -1, 1, 3)
    check_threads(lambda: random_codes(torch.arange(3000), 96))
    check_compiled(lambda x: random_codes(x, 5), [(torch.arange(n),) for n in (3, 9, 5)],
                   backward=False)  # fmt: skip
    op = torch.ops.emblas.random_codes.default
    good = [ids, sequence, 7, 0, 3, 2, 0]
    for position, value in (
        (0, ids.int()), (0, ids[None]), (1, sequence[:2]), (1, sequence - 1), (1, sequence.int()),
        (2, 0), (3, 3), (5, 0), (6, 4),
    ):  # fmt: skip
        bad = [*good]
        bad[position] = value
        with pytest.raises(RuntimeError, match="emblas: "):
            op(*bad)


@pytest.mark.parametrize(("sparsity", "kind"), [(1, "normal"), (1, "sparse"), (30, "sparse")])
def test_distribution(sparsity, kind):
    codes = random_codes(torch.arange(2000), 200, CodeSpec(kind, 3, sparsity)).double()
    error = 5 / math.sqrt(codes.numel())
    assert abs(float(codes.mean())) < error
    fourth = 3 if kind == "normal" else sparsity
    assert abs(float((codes**2).mean()) - 1) < error * math.sqrt(fourth)
    assert float((codes**4).mean()) == pytest.approx(fourth, rel=0.1)
    if kind == "sparse":
        assert float((codes != 0).double().mean()) == pytest.approx(1 / sparsity, rel=0.05)
    # Columns and rows don't depend on each other, nor do seeds.
    other = random_codes(torch.arange(2000), 200, CodeSpec(kind, 4, sparsity)).double()
    for a, b in ((codes[:, 0], codes[:, 1]), (codes[0], codes[1]), (codes[:, 0], other[:, 0])):
        assert abs(float((a * b).mean())) < 6 / math.sqrt(len(a))


def test_inner_products_are_kept():
    """What random projections are for (Johnson and Lindenstrauss)."""
    x = torch.nn.functional.normalize(torch.randn(2, 500, dtype=torch.float64), dim=1)
    for spec in (CodeSpec("normal"), CodeSpec("sparse", sparsity=3)):
        projection = random_codes(torch.arange(500), 4000, spec, dtype=torch.float64)
        y = x @ projection / math.sqrt(4000)
        torch.testing.assert_close(y @ y.t(), x @ x.t(), rtol=0, atol=0.1)


def test_bad_codes():
    ids = torch.arange(3)
    for error, message, call in (
        (ValueError, "dim must be at least 1", lambda: random_codes(ids, 0)),
        (TypeError, "ids must have dtype", lambda: random_codes(ids.float(), 3)),
        (TypeError, "spec must be a CodeSpec", lambda: random_codes(ids, 3, "normal")),
        (TypeError, "dtype must be", lambda: random_codes(ids, 3, dtype=torch.int32)),
        (ValueError, "sequence must be 0 to", lambda: random_codes(ids, 3, sequence=-1)),
        (ValueError, "sequence must be 0 to",
         lambda: random_codes(ids, 3, sequence=torch.tensor(2**32))),
        (ValueError, "kind must be one of", lambda: CodeSpec("gamma")),
        (ValueError, "seed must be 0 to", lambda: CodeSpec(seed=-1)),
        (ValueError, "sparsity must be 1 to", lambda: CodeSpec(sparsity=0)),
        (TypeError, "seed must be an int", lambda: CodeSpec(seed=0.5)),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_deep_hash(kind):
    module = DeepHashEmbedding(
        5, 12, code_dim=30, num_layers=2, kind=kind, seed=3, padding_id=4, dtype=torch.float64
    )
    ids = torch.tensor([[9, 4, -7], [9, 2**62, 0]])
    x = random_codes(ids, 30, CodeSpec(kind, 3), dtype=torch.float64)
    for k in (0, 2):
        x = torch.nn.functional.mish(x @ module.layers[k].weight.t() + module.layers[k].bias)
    expected = x @ module.layers[4].weight.t() + module.layers[4].bias
    expected = torch.where((ids == 4)[..., None], 0, expected)
    torch.testing.assert_close(module(ids), expected)
    grad = torch.randn_like(expected)
    for mine, theirs in zip(
        torch.autograd.grad(module(ids), module.parameters(), grad),
        torch.autograd.grad(expected, module.parameters(), grad), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(mine, theirs)
    assert module.num_parameters == 31 * 12 + 13 * 12 + 13 * 5
    bags = module(ids.flatten(), packed((2, 0, 4)), mode="mean")
    wanted = torch.stack([expected[0, 0], expected[0, 0] * 0, expected.flatten(0, 1)[2:].mean(0)])
    torch.testing.assert_close(bags, wanted)
    assert module(ids[:0]).shape == (0, 3, 5)
    assert module(ids.flatten()[:0], packed((0, 0))).tolist() == [[0.0] * 5] * 2


def test_deep_hash_state_and_size():
    module = DeepHashEmbedding(8, 6, code_dim=16)
    twin = DeepHashEmbedding(8, 6, code_dim=16)
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin(torch.arange(9)), module(torch.arange(9)))
    with pytest.raises(ValueError, match="the state dict holds a table of"):
        DeepHashEmbedding(8, 6, code_dim=16, seed=1).load_state_dict(module.state_dict())
    fitted = DeepHashEmbedding.from_budget(20_000, 8, code_dim=16)
    assert fitted.num_bytes <= 20_000
    assert DeepHashEmbedding(8, fitted.width + 1, code_dim=16).num_bytes > 20_000
    with pytest.raises(ValueError, match="width must be at least 1"):
        DeepHashEmbedding(8, 0)
    with pytest.raises(ValueError, match="activation must be one of"):
        DeepHashEmbedding(8, activation="swish")
    with pytest.raises(TypeError, match="has no vocabulary"):
        module.table()


def test_lexinvariant():
    module = LexinvariantEmbedding(64, seed=5)
    ids = torch.tensor([[1, 2, 1], [1, 2, 3]])
    sequences = torch.tensor([10, 11])
    out = module(ids, sequences[:, None])
    assert torch.equal(out[0, 0], out[0, 2])
    assert not torch.equal(out[0, 0], out[1, 0])
    assert torch.equal(out[1, 0], module(torch.tensor(1), torch.tensor(11)))
    assert not list(module.parameters())
    scores = module.scores(out, torch.tensor([3, 2, 1]), sequences)
    assert scores.argmax(2).tolist() == [[2, 1, 2], [2, 1, 0]]
