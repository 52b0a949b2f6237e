"""Composed lookups: the definition in Python integers and loops, gradients, optimizers."""

from __future__ import annotations

import itertools

import executors
import pytest
import torch
from contract import check_compiled, check_gradients, check_op, check_threads, only_kernels, packed
from emblas import use_backend
from emblas._load import _C
from emblas.tables import Composition, Part, TableSpec, compose_bag, hash_bag, optim
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
KERNELS = ("compose_bag", "compose_bag_backward")
executor = executors.fixture(*KERNELS)

# Two features: a signed slot of two hashes and a slot of one digit; a slot of three unlike keys.
TWO_FEATURES = (
    Part(11, 16, a=1, b=0, signed=True),
    Part(11, 16, a=1, b=2, signed=True),
    Part(30, 7, "radix", a=3, base=176, column=16),
    Part(20, 5, "linear", a=77, b=3, p=2**61 - 1, base=386, column=23, feature=1),
    Part(9, 5, "splitmix64", a=5, b=1, base=486, column=23, feature=1),
    Part(9, 5, "splitmix64", a=5, b=7, base=486, column=23, feature=1),
)
QUOTIENT_REMAINDER = (
    Part(5, 6, "radix", a=8, limit=40),
    Part(8, 6, "radix", a=1, limit=40, base=30),
)
CHUNKS = tuple(  # of a memory array of 53 elements: they overlap
    Part(50, 4, "linear", a=634329019, b=5 + 1825252241 * c, p=2038074743, stride=1, column=4 * c)
    for c in range(3)
)


def random_ids(*shape):
    return torch.randint(-(2**63), 2**63 - 1, shape)


def key_of(part, one):
    """The key of an id, and the bit that may be its sign."""
    one %= 2**64
    if part.key == "radix":
        return one // part.a, 0
    if part.key == "linear":
        return (part.a * one + part.b) % part.p, 0
    if part.key == "murmur3":
        words = _C.murmur3_x64_128(one.to_bytes(8, "little"), part.a + part.b // 4)
    else:
        state = one ^ mix(part.a)
        group = part.b // 4 * 2
        words = [mix(state + (group + i) * 0x9E3779B97F4A7C15) for i in (1, 2)]
    word = words[part.b // 2 % 2]
    key = word >> 32 if part.b % 2 else word & 0xFFFFFFFF
    return key, key >> 31


def mix(x):
    x %= 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def oracle(bags, table, composition, mode="sum", padding_id=None):
    """bags[feature][bag] = list of (id, weights of its parts); differentiable in table, weights."""
    table = table.reshape(-1)
    columns = []
    for f, feature in enumerate(bags):
        parts = [part for part in composition.parts if part.feature == f]
        rows = []
        for bag in feature:
            vectors = []
            for one, weights in bag:
                if one == padding_id:
                    continue
                slots = {}
                for part, weight in zip(parts, weights, strict=True):
                    key, sign = key_of(part, one)
                    begin = part.base + key % part.rows * part.row_stride
                    row = table[begin : begin + part.width]
                    factor = -1 if part.signed and sign else 1
                    slots.setdefault(part.column, []).append(factor * row * weight)
                values = []
                for slot in slots.values():
                    total = slot[0]
                    for other in slot[1:]:
                        total = total * other if composition.combine == "product" else total + other
                    values.append(total / len(slot) if composition.combine == "mean" else total)
                vectors.append(torch.cat(values))
            width = sum({part.column: part.width for part in parts}.values())
            stacked = torch.stack(vectors) if vectors else table[:1].mul(0).expand(1, width)
            pool = {"sum": torch.sum, "mean": torch.mean, "max": torch.amax}[mode]
            rows.append(pool(stacked, 0))
        columns.append(torch.stack(rows) if rows else table.new_zeros(0, 0))
    return torch.cat(columns, 1)


def as_bags(ids, composition, cu, weights=None):
    """Cut ids (of several features one after the other) as offsets say."""
    count = composition.num_features
    bags = (len(cu) - 1) // count
    cu, result = cu.tolist(), []
    for f in range(count):
        parts = composition.parts_of(f)
        result.append([])
        for b in range(f * bags, (f + 1) * bags):
            own = []
            for i in range(cu[b], cu[b + 1]):
                if weights is None:
                    w = [1] * parts
                elif weights.dim() == 2:
                    w = list(weights[i])
                else:  # of the id: once, whatever its parts
                    w = [weights[i]] + [1] * (parts - 1)
                    if composition.combine != "product":
                        w = [weights[i]] * parts
                    else:
                        firsts = [p for p in composition.parts if p.feature == f]
                        w = [
                            weights[i] if j == 0 or p.column != firsts[j - 1].column else 1
                            for j, p in enumerate(firsts)
                        ]
                own.append((int(ids[i]), w))
            result[-1].append(own)
    return result


CU = packed((3, 0, 7, 20, 1, 1, 8, 5))  # four bags of each feature


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("combine", ["sum", "mean", "product"])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_equals_oracle(executor, dtype, combine, mode):
    composition, ids = Composition(TWO_FEATURES, combine), random_ids(45)
    ids[5], ids[31] = 77, 77
    table = torch.randn(composition.size).to(dtype)
    weights = torch.rand(45, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for w in (None, weights) if mode == "sum" else (None,):
        actual = compose_bag(ids, table, composition, CU, w, mode=mode, padding_id=77)
        bags = as_bags(ids, composition, CU, None if w is None else w.double())
        expected = oracle(bags, table.double(), composition, mode, padding_id=77)
        error = 20 * torch.finfo(dtype).eps
        torch.testing.assert_close(actual.double(), expected, rtol=error, atol=error)
    if mode == "sum" and combine != "product":
        weights = weights[:, None] * torch.rand(3, dtype=weights.dtype)
        actual = compose_bag(ids, table, composition, CU, weights, padding_id=77)
        expected = oracle(as_bags(ids, composition, CU, weights.double()), table.double(),
                          composition, padding_id=77)  # fmt: skip
        torch.testing.assert_close(actual.double(), expected, rtol=error, atol=error)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("combine", ["sum", "mean", "product"])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("parts", [TWO_FEATURES, CHUNKS], ids=["tables", "chunks"])
def test_backward_equals_oracle(isa, dtype, combine, mode, parts):
    composition = Composition(parts, combine)
    cu = CU if parts is TWO_FEATURES else packed((3, 0, 42))
    ids, grad = random_ids(45), torch.randn((len(cu) - 1) // composition.num_features,
                                            composition.dim).to(dtype)  # fmt: skip
    ids[5] = 77
    table = torch.randn(composition.size).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for w in (None, torch.rand(45, dtype=wide)) if mode == "sum" else (None,):
        ours = [table.clone().requires_grad_(), None if w is None else w.clone().requires_grad_()]
        out = compose_bag(ids, ours[0], composition, cu, ours[1], mode=mode, padding_id=77)
        out.backward(grad)
        exact = [None if x is None else x.double().clone().requires_grad_() for x in (table, w)]
        bags = as_bags(ids, composition, cu, exact[1])
        oracle(bags, exact[0], composition, mode, padding_id=77).backward(grad.double())
        error = 100 * torch.finfo(dtype).eps
        for mine, theirs in zip(ours, exact, strict=True):
            if mine is not None:
                torch.testing.assert_close(
                    mine.grad.double(), theirs.grad, rtol=error, atol=4 * error
                )


@given(
    lengths=st.lists(st.integers(0, 9), max_size=4),
    widths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    rows=st.integers(1, 90),
    count=st.integers(1, 5),
    seed=st.integers(0, 2**31),
    combine=st.sampled_from(["sum", "mean", "product"]),
    large=st.booleans(),
)
@settings(max_examples=25)
def test_any_composition(lengths, widths, rows, count, seed, combine, large):
    torch.manual_seed(seed)
    widths = [1 + width % 2 for width in widths[:2]] if large else widths
    parts, base, column = [], 0, 0
    for width in widths:
        for number in range(count):
            m = rows + 70_000 * large  # two digits to sort by
            parts.append(Part(m, width, a=seed % 7, b=number, base=base, column=column,
                              signed=bool(seed % 2)))  # fmt: skip
        base, column = base + m * width, column + width
    composition = Composition(tuple(parts), combine)
    assert Composition.from_json(composition.to_json()) == composition
    cu, ids = packed(lengths), random_ids(sum(lengths)) % 9
    table = torch.randn(composition.size, dtype=torch.float64)
    results = []
    for run in range(2):
        leaf = table.clone().requires_grad_()
        out = (
            oracle(as_bags(ids, composition, cu), leaf, composition)
            if run
            else compose_bag(ids, leaf, composition, cu)
        )
        results.append([out.detach(), torch.autograd.grad(out.sum(), leaf)[0] if lengths else leaf])
    if lengths:
        torch.testing.assert_close(results[0], results[1])


def test_features_without_offsets():
    """ids (..., features): the same as bags of one id, feature after feature."""
    composition, ids = Composition(TWO_FEATURES), random_ids(3, 5, 2)
    table, weights = torch.randn(composition.size), torch.rand(3, 5, 2)
    flat, w = ids.reshape(-1, 2).t().reshape(-1), weights.reshape(-1, 2).t().reshape(-1)
    expected = compose_bag(flat, table, composition, packed([1] * 30), w)
    actual = compose_bag(ids, table, composition, None, weights)
    assert actual.shape == (3, 5, 28)
    assert torch.equal(actual.view(15, 28), expected)
    by_part = weights[..., None].expand(3, 5, 2, 3)
    torch.testing.assert_close(compose_bag(ids, table, composition, None, by_part), actual)
    leaves = [table.clone().requires_grad_() for _ in range(2)]
    compose_bag(ids, leaves[0], composition, None, weights).sum().backward()
    compose_bag(flat, leaves[1], composition, packed([1] * 30), w).sum().backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)


@pytest.mark.parametrize("dim", [1, 16, 37, 100])
@pytest.mark.parametrize("hash", ["murmur3", "splitmix64"])
def test_is_hash_bag(isa, dim, hash):
    """A table of hashes as a composition: the same bits, and the options of hash_bag."""
    spec, ids = TableSpec(50, 6, hash, seed=3), random_ids(200)
    composition, cu = spec.composition(dim), packed((0, 199, 1))
    leaves = [torch.randn(50, dim, requires_grad=True)] * 2
    for offsets in (None, cu):
        ours = compose_bag(ids, leaves[0], composition, offsets, padding_id=int(ids[9]))
        theirs = hash_bag(ids, leaves[1], spec, offsets, padding_id=int(ids[9]))
        assert torch.equal(ours, theirs)
        grad = torch.randn(ours.shape)
        assert torch.equal(*[torch.autograd.grad(out, leaves[0], grad)[0]
                             for out in (ours, theirs)])  # fmt: skip
    parts = hash_bag(ids, leaves[0], spec, combine="concat").view(200, 6, dim)
    torch.testing.assert_close(parts.sum(1), hash_bag(ids, leaves[0], spec))
    torch.testing.assert_close(parts.mean(1), hash_bag(ids, leaves[0], spec, combine="mean"))
    torch.testing.assert_close(parts.prod(1), hash_bag(ids, leaves[0], spec, combine="product"))
    weights = torch.rand(200, 6)
    torch.testing.assert_close(
        (parts * weights[..., None]).sum(1), hash_bag(ids, leaves[0], spec, None, weights)
    )


def test_equals_embedding_bag():
    """One part with the id as its row is nn.EmbeddingBag, padding and empty bags included."""
    composition = Composition((Part(20, 9, "radix", a=1, limit=20),))
    ids, cu = torch.randint(0, 20, (30,)), packed((4, 0, 20, 1, 5))
    ids[:4] = 3  # a bag of nothing but padding
    for mode in ("sum", "mean", "max"):
        table = torch.randn(20, 9)
        leaves = [table.clone().requires_grad_() for _ in range(2)]
        ours = compose_bag(ids, leaves[0], composition, cu, mode=mode, padding_id=3)
        theirs = nn.functional.embedding_bag(
            ids, leaves[1], cu.long(), mode=mode, padding_idx=3, include_last_offset=True
        )
        torch.testing.assert_close(ours, theirs)
        grad = torch.randn(5, 9)
        ours.backward(grad)
        theirs.backward(grad)
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


def test_signs():
    """About half of the ids are negative, whatever their row; the sign is a bit of the hash."""
    spec, ids = TableSpec(8, 1, signed=True), torch.arange(4000)
    signs = hash_bag(ids, torch.ones(8, 1), spec)[:, 0]
    assert set(signs.tolist()) == {1.0, -1.0}
    rows = hash_bag(ids, torch.arange(8.0)[:, None], TableSpec(8, 1))[:, 0]
    for row in range(8):
        assert abs(float(signs[rows == row].mean())) < 0.15
    # Doubling the rows keeps the signs.
    assert torch.equal(hash_bag(ids, torch.ones(16, 1), TableSpec(16, 1, signed=True))[:, 0], signs)


def test_large_table():
    """Elements beyond 2^31, and rows sorted in two passes."""
    rows, width = 2**27 + 5, 17
    composition = Composition((Part(rows, width, "radix", a=1, limit=rows),))
    ids = torch.tensor([rows - 1, 0, rows - 1, 2**20])
    table = torch.empty(rows, width, dtype=torch.bfloat16)  # pages are touched where used only
    table[ids] = torch.arange(4.0, dtype=torch.bfloat16)[:, None]
    out = compose_bag(ids, table, composition)
    assert out[:, 0].tolist() == [2, 1, 2, 3]
    module = Table(table, composition)
    optim.SGD(module, lr=1.0)
    compose_bag(ids, module.weight, composition, optimizer=module.fused_optimizer).sum().backward()
    assert module.weight[ids, 16].tolist() == [0, 0, 0, 2]


@pytest.mark.parametrize("combine", ["sum", "mean", "product"])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_gradients(combine, mode):
    composition = Composition(TWO_FEATURES, combine)
    ids, cu = torch.arange(14), packed((3, 0, 4, 6, 1, 0))
    table, weights, by_part = torch.randn(composition.size), torch.rand(14), torch.rand(14, 3)

    def run(table, weights=None):
        return compose_bag(ids, table, composition, cu, weights, mode=mode, padding_id=4)

    check_gradients(run, [table], KERNELS)
    if mode == "sum":
        check_gradients(run, [table, weights], KERNELS)
        check_gradients(lambda w: run(table.double(), w), [weights], KERNELS)
        if combine != "product":
            check_gradients(run, [table, by_part], KERNELS)
    chunks = Composition(CHUNKS, combine)
    check_gradients(lambda t: compose_bag(ids, t, chunks), [torch.randn(chunks.size)], KERNELS)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_reference(mode):
    for combine, parts in itertools.product(("sum", "product"), (TWO_FEATURES, CHUNKS)):
        composition, ids = Composition(parts, combine), random_ids(30)
        cu = packed((3, 0, 7, 10, 4, 6))
        results = []
        for backend in ("auto", "reference"):
            leaf = torch.linspace(-1, 1, composition.size, dtype=torch.float64).requires_grad_()
            with use_backend(backend):
                out = compose_bag(ids, leaf, composition, cu, mode=mode, padding_id=int(ids[4]))
                out.sin().sum().backward()
            results.append([out.detach(), leaf.grad])
        torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_same_bits_for_any_thread_count(isa, dtype):
    spec = TableSpec(3000)
    composition = Composition(tuple(
        part for f in range(2)
        for part in (
            Part(3000, 48, a=1 + f, b=0, column=64 * f, feature=f),
            Part(3000, 48, a=1 + f, b=1, column=64 * f, feature=f, signed=True),
            Part(90_000, 16, a=1 + f, b=2, base=3000 * 48, column=64 * f + 48, feature=f),
        )
    ))  # fmt: skip
    ids = (torch.rand(5000, 2) * 8).exp().long()  # a few ids make most of the batch
    table = torch.randn(composition.size).to(dtype)
    weights, grad = torch.rand(5000, 2), torch.randn(5000, 128).to(dtype)
    chunks = Composition(CHUNKS)

    def run():
        leaf, w = table.clone().requires_grad_(), weights.clone().requires_grad_()
        out = compose_bag(ids, leaf, composition, None, w)
        out.backward(grad)
        memory = table[: chunks.size].clone().requires_grad_()
        compose_bag(ids, memory, chunks).square().sum().backward()
        module = Table(table.clone(), composition)
        optim.AdamW(module, lr=0.1)
        compose_bag(ids, module.weight, composition,
                    optimizer=module.fused_optimizer).backward(grad)  # fmt: skip
        rows = torch.ones(3000, 48, dtype=dtype, requires_grad=True)
        hash_bag(ids, rows, spec, sparse=True).backward(grad[:, None, :48].expand(-1, 2, -1))
        return (out.detach(), leaf.grad, w.grad, memory.grad, module.weight.detach(),
                rows.grad.to_dense())  # fmt: skip

    check_threads(run)


def test_both_ways_to_add_up_agree():
    """A small table in the order of the lookups, a large one sorted: the same bits."""
    ids, grad = (torch.rand(4000) * 8).exp().long(), torch.randn(4000, 24)
    grads = []
    for rows in (500, 90_000):  # more rows than lookups are sorted, in two passes
        composition = Composition(
            (Part(500, 24, "radix", a=2, base=0), Part(rows, 24, "radix", a=1, base=500 * 24))
        )
        table = torch.randn(composition.size, requires_grad=True)
        compose_bag(ids % 500, table, composition, packed([1] * 4000)).backward(grad)
        grads.append(table.grad[: 1000 * 24])
    assert torch.equal(*grads)


class Table(nn.Module):
    def __init__(self, table, composition):
        super().__init__()
        self.weight = nn.Parameter(table)
        self.composition = composition
        self.fused_optimizer = None


@pytest.mark.parametrize("rows", [40, 100_000], ids=["in order", "sorted"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sparse_gradient(dtype, rows):
    spec, ids = TableSpec(rows, 2), random_ids(60) % 20
    dense, sparse = (torch.randn(rows, 6).to(dtype).requires_grad_() for _ in range(2))
    grad = torch.randn(60, 6).to(dtype)
    with only_kernels("compose_bag_backward_rows"):
        hash_bag(ids, sparse, spec, sparse=True, padding_id=3).backward(grad)
    hash_bag(ids, dense, spec, padding_id=3).backward(grad)
    assert sparse.grad.is_sparse
    assert sparse.grad.is_coalesced()
    index = sparse.grad.indices()[0]
    assert torch.equal(index, index.unique())
    assert torch.equal(sparse.grad.to_dense(), dense.grad)
    with use_backend("reference"):
        again = sparse.detach().requires_grad_()
        hash_bag(ids, again, spec, sparse=True, padding_id=3).backward(grad)
    torch.testing.assert_close(again.grad.to_dense(), dense.grad, rtol=0.02, atol=0.02)
    nothing = torch.randn(rows, 6, requires_grad=True)
    hash_bag(ids[:0], nothing, spec, sparse=True).sum().backward()
    assert nothing.grad.indices().numel() == 0


def test_operator_contract():
    composition = Composition(QUOTIENT_REMAINDER, "product")
    ids, table = torch.arange(10), torch.randn(composition.size)
    cu, weights, grad = packed((3, 0, 7)), torch.rand(10), torch.randn(3, 6)
    one_table = TableSpec(13, 2, seed=1).composition(6).fields
    for fields, combine, mode, w in (
        (composition.fields, 2, 0, weights), (composition.fields, 2, 2, None),
        (one_table, 0, 1, None), (one_table, 1, 0, torch.rand(10, 2)),
    ):  # fmt: skip
        how = (fields, combine, mode, 3)
        check_op("compose_bag", ids, table, cu, w, *how)
        argmax = torch.ops.emblas.compose_bag(ids, table, cu, w, *how)[1]
        call = (grad, ids, table, cu, w, argmax, *how)
        check_op("compose_bag_backward", *call, True, w is not None)
        states = (torch.zeros(13), torch.zeros(0), *torch.zeros(2, 1, dtype=torch.int64).unbind())
        check_op("compose_bag_update_", *call, states[0], states[1], states[2][:0], states[3],
                 1, 0.1, 1e-8, 0.0, 0.0, 0.0)  # fmt: skip
    # As many rows in use as there are lookups: what lies past them is not initialized.
    fields, table = Composition((Part(20, 6, "radix", a=1),)).fields, torch.randn(120)
    check_op("compose_bag_backward_rows", grad, ids, table, cu, None, None, fields, 0, 0, None)


def test_compiled():
    composition = Composition(TWO_FEATURES, "product")
    calls = [
        (torch.arange(sum(lengths)) * 77, torch.randn(composition.size), packed(lengths),
         torch.rand(sum(lengths)))
        for lengths in ((3, 4, 1, 2), (5, 0, 9, 3, 2, 2), (2, 2, 2, 40), (8, 30, 11, 9))
    ]  # fmt: skip

    def bags(ids, table, offsets, weights):
        return compose_bag(ids, table * 2, composition, offsets, weights, padding_id=77).relu()

    def maxima(ids, table, offsets, weights):
        return compose_bag(ids, table, composition, offsets, mode="max") * weights[0]

    for function in (bags, maxima):
        check_compiled(function, calls, backward=False)
        check_compiled(function, calls, backward=True)


def test_empty():
    composition = Composition(TWO_FEATURES)
    table = torch.randn(composition.size, requires_grad=True)
    ids = torch.zeros(0, dtype=torch.int64)
    for mode in ("sum", "mean", "max"):
        out = compose_bag(ids, table, composition, packed((0, 0, 0, 0)), mode=mode)
        assert torch.equal(out, torch.zeros(2, 28))
        assert not torch.autograd.grad(out.sum(), table)[0].any()
    assert compose_bag(ids, table, composition, packed(())).shape == (0, 28)
    assert compose_bag(ids.view(0, 2), table, composition).shape == (0, 28)


COMPOSITION = Composition(TWO_FEATURES)
TABLE, IDS = torch.zeros(COMPOSITION.size), torch.arange(8)
QR, QR_TABLE = Composition(QUOTIENT_REMAINDER, "product"), torch.zeros(78)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "composition must be a Composition, got tuple",
         lambda: compose_bag(IDS, TABLE, TWO_FEATURES)),
        (TypeError, "ids must have dtype", lambda: compose_bag(IDS.int(), TABLE, COMPOSITION)),
        (ValueError, r"table must have composition.size = 531 elements, got shape \(530,\)",
         lambda: compose_bag(IDS.view(4, 2), TABLE[:-1], COMPOSITION)),
        (ValueError, "table must be contiguous",
         lambda: compose_bag(IDS, torch.zeros(6, 13).t(), QR)),
        (ValueError, r"ids must have shape \(\.\.\., 2\)",
         lambda: compose_bag(IDS, TABLE, COMPOSITION)),
        (ValueError, r"offsets must have features \* bags \+ 1 elements for 2 features, got 4",
         lambda: compose_bag(IDS, TABLE, COMPOSITION, packed((3, 3, 2)))),
        (ValueError, "offsets must start at 0",
         lambda: compose_bag(IDS, QR_TABLE, QR, packed((3, 3)))),
        (ValueError, "mode must be one of", lambda: compose_bag(IDS, QR_TABLE, QR, mode="min")),
        (ValueError, "mode 'max' needs offsets",
         lambda: compose_bag(IDS, QR_TABLE, QR, mode="max")),
        (ValueError, "ids of feature 0 must be 0 to 39, got 40",
         lambda: compose_bag(IDS + 33, QR_TABLE, QR)),
        (ValueError, "ids of feature 0 must be 0 to 39, got -1",
         lambda: compose_bag(IDS - 1, QR_TABLE, QR)),
        (ValueError, "per_sample_weights need mode 'sum'",
         lambda: compose_bag(IDS, QR_TABLE, QR, packed((8,)), torch.ones(8), mode="mean")),
        (ValueError, r"per_sample_weights must have the shape of ids, \(8,\) or \(8, 2\)",
         lambda: compose_bag(IDS, QR_TABLE, QR, None, torch.ones(8, 3))),
        (ValueError, "of parts need parts that are summed",
         lambda: compose_bag(IDS, QR_TABLE, QR, None, torch.ones(8, 2))),
        (ValueError, "table must have 2 dimensions if sparse",
         lambda: compose_bag(IDS, QR_TABLE, QR, sparse=True)),
        (ValueError, "a signed table must have at most",
         lambda: TableSpec(2**32, 1, signed=True)),
        (TypeError, "parts must be a tuple of at least one Part", lambda: Composition(())),
        (ValueError, "combine must be one of sum, mean, product, got 'max'",
         lambda: Composition(TWO_FEATURES, "max")),
        (ValueError, r"parts\[0\].key must be one of", lambda: Composition((Part(2, 2, "md5"),))),
        (ValueError, r"parts\[0\].rows must be 1 to", lambda: Composition((Part(2**31, 2),))),
        (TypeError, r"parts\[0\].rows must be an int", lambda: Composition((Part(2.5, 2),))),
        (ValueError, r"parts\[0\].row_stride must be 1 to 2, got 3",
         lambda: Composition((Part(2, 2, stride=3),))),
        (ValueError, r"parts\[0\].a must be 1 to", lambda: Composition((Part(2, 2, "radix"),))),
        (ValueError, r"parts\[0\] can't be signed",
         lambda: Composition((Part(2, 2, "radix", a=1, signed=True),))),
        (ValueError, r"parts\[1\].column must be 2",
         lambda: Composition((Part(2, 2), Part(2, 2, column=3)))),
        (ValueError, r"parts\[1\].width must be 2",
         lambda: Composition((Part(2, 2), Part(2, 3)))),
        (ValueError, r"parts\[1\].feature must be 1",
         lambda: Composition((Part(2, 2), Part(2, 2, column=2, feature=2)))),
        (ValueError, "at most 256 parts, got 257", lambda: Composition((Part(2, 2),) * 257)),
        (ValueError, "composition must have format 1", lambda: Composition.from_json("{}")),
    ],
)  # fmt: skip
def test_bad_arguments(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_direct_call_is_guarded():
    """C++ guards memory whatever Python lets through."""
    fields = QR.fields
    overrun = Composition((Part(14, 6, a=1),)).fields
    twice = Composition((Part(5, 6, a=1), Part(5, 6, a=1, base=7))).fields
    for args in (
        (IDS.int(), QR_TABLE, None, None, fields, 0, 0, None),
        (IDS, QR_TABLE.view(13, 6), None, None, fields, 0, 0, None),
        (IDS, QR_TABLE.long(), None, None, fields, 0, 0, None),
        (IDS, QR_TABLE, packed((9,)), None, fields, 0, 0, None),
        (IDS, QR_TABLE, None, torch.ones(3), fields, 0, 0, None),
        (IDS, QR_TABLE, None, torch.ones(8, 2), fields, 2, 0, None),
        (IDS, QR_TABLE, None, None, fields[:-1], 0, 0, None),
        (IDS, QR_TABLE, None, None, [], 0, 0, None),
        (IDS, QR_TABLE, None, None, overrun, 0, 0, None),
        (IDS, QR_TABLE, None, None, fields, 3, 0, None),
        (IDS, QR_TABLE, None, None, fields, 0, 3, None),
        (IDS, QR_TABLE, None, None, fields, 0, 1, None),
        (IDS + 40, QR_TABLE, None, None, fields, 0, 0, None),
    ):
        with pytest.raises(RuntimeError, match="emblas: "):
            torch.ops.emblas.compose_bag(*args)
        with pytest.raises(RuntimeError, match="emblas: "):
            torch.ops.emblas.compose_bag_backward(
                torch.zeros(8, 6), *args[:4], None, *args[4:], True, False
            )
    with pytest.raises(RuntimeError, match="must not share elements"):
        torch.ops.emblas.compose_bag_backward(
            torch.zeros(8, 6), IDS, QR_TABLE, None, None, None, twice, 0, 0, None, True, False
        )
    with pytest.raises(RuntimeError, match="parts of one table"):
        torch.ops.emblas.compose_bag_backward_rows(
            torch.zeros(8, 6), IDS, QR_TABLE, None, None, None, fields, 0, 0, None
        )
    states = (torch.zeros(2), torch.zeros(0), IDS[:0], IDS[:1].clone())
    with pytest.raises(RuntimeError, match="optimizer state"):
        torch.ops.emblas.compose_bag_update_(
            torch.zeros(8, 6), IDS, QR_TABLE, None, None, None, fields, 0, 0, None, *states,
            1, 0.1, 0.0, 0.0, 0.0, 0.0,
        )  # fmt: skip
