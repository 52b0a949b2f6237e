from __future__ import annotations

import io
from itertools import pairwise

import executors
import numpy as np
import pytest
import torch
from contract import (
    check_compiled,
    check_gradients,
    check_op,
    check_threads,
    layouts,
    only_kernels,
    packed,
    tolerance,
)
from emblas import use_backend
from emblas.tables import HashEmbedding, TableSpec, arrays, hash_bag, hash_keys
from hypothesis import given
from hypothesis import strategies as st

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
KERNELS = ("hash_bag", "hash_bag_backward")
SPEC = TableSpec(50, seed=3)

executor = executors.fixture(*KERNELS)
kernel_executor = executors.fixture(*KERNELS, without=("reference",))


def random_ids(*shape, generator=None):
    return torch.randint(-(2**63), 2**63 - 1, shape, generator=generator)


def oracle(ids, table, spec, cu=None, weights=None, padding_id=None):
    """The definition, one row at a time, in float64."""
    cu = range(len(ids) + 1) if cu is None else cu.tolist()
    keys = arrays.hash_keys(ids.numpy(), spec)
    out = torch.zeros(len(cu) - 1, table.shape[1], dtype=torch.float64)
    for b, (begin, end) in enumerate(pairwise(cu)):
        for i in range(begin, end):
            if int(ids[i]) == padding_id:
                continue
            for row in keys[i]:
                out[b] += table[row].double() * (1 if weights is None else float(weights[i]))
    return out


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("num_hashes", [1, 2, 3, 4, 5, 16])
def test_equals_oracle(isa, dtype, num_hashes):
    spec = TableSpec(50, num_hashes, seed=3)
    ids = random_ids(150)
    ids[7] = ids[70] = 5
    cu, weights = packed((0, 70, 1, 0, 3, 76, 0)), torch.randn(150)
    limit = tolerance(dtype, 76 * num_hashes)
    limit["atol"] *= 10  # sums of up to 1216 terms of order one
    for dim in (1, 7, 16, 37, 70, 130):
        for name, table in layouts(torch.randn(50, dim).to(dtype)).items():
            for offsets, w in ((None, None), (cu, None), (None, weights), (cu, weights)):
                actual = hash_bag(ids, table, spec, offsets, w, padding_id=5)
                assert actual.dtype == dtype
                expected = oracle(ids, table, spec, offsets, w, padding_id=5)
                torch.testing.assert_close(actual.double(), expected, **limit, msg=name)


@given(
    lengths=st.lists(st.integers(0, 30), max_size=7),
    dim=st.integers(1, 70),
    rows=st.integers(1, 300),
    num_hashes=st.integers(1, 9),
    hash=st.sampled_from(["murmur3", "splitmix64"]),
    seed=st.integers(0, 2**31),
    wide_offsets=st.booleans(),
)
def test_any_shape(lengths, dim, rows, num_hashes, hash, seed, wide_offsets):
    generator = torch.Generator().manual_seed(seed)
    spec = TableSpec(rows, num_hashes, hash, seed % 2**32, allow_degenerate_seed=True)
    offsets = packed(lengths, torch.int64 if wide_offsets else torch.int32)
    ids = random_ids(sum(lengths), generator=generator)
    table = torch.randn(rows, dim, generator=generator)
    limit = tolerance(table.dtype, 30 * num_hashes)
    for cu in (None, offsets):
        actual = hash_bag(ids, table, spec, cu)
        torch.testing.assert_close(actual.double(), oracle(ids, table, spec, cu), **limit)
        strided = torch.stack([ids, ids + 1], 1)[:, 0]
        assert torch.equal(hash_bag(strided, table, spec, cu), actual)


def test_worked_example(executor):
    spec, table = TableSpec(10, seed=1), torch.arange(40.0).reshape(10, 4).requires_grad_()
    ids = torch.tensor([0, 1, 12345])
    assert hash_keys(ids, spec).tolist() == [[8, 7, 2, 4], [4, 0, 3, 5], [0, 4, 6, 2]]
    out = hash_bag(ids, table, spec)
    assert out.tolist() == [[84, 88, 92, 96], [48, 52, 56, 60], [48, 52, 56, 60]]
    out.sum().backward()
    expected = torch.tensor([2.0, 0, 2, 1, 3, 1, 1, 1, 1, 0])
    assert torch.equal(table.grad, expected[:, None].expand(10, 4))


def test_shapes():
    ids, table = random_ids(2, 3, 4), torch.randn(50, 6)
    out = hash_bag(ids, table, SPEC)
    assert out.shape == (2, 3, 4, 6)
    assert torch.equal(out[1, 2], hash_bag(ids[1, 2], table, SPEC))
    assert torch.equal(hash_bag(ids.transpose(0, 2), table, SPEC), out.transpose(0, 2))
    weights = torch.rand(2, 3, 4)
    weighted = hash_bag(ids, table, SPEC, per_sample_weights=weights)
    torch.testing.assert_close(weighted, out * weights[..., None])
    assert torch.equal(hash_bag(ids[0, 0, 0], table, SPEC), out[0, 0, 0])
    assert hash_bag(ids[:0], table, SPEC).shape == (0, 3, 4, 6)
    assert hash_bag(ids, torch.empty(50, 0), SPEC).shape == (2, 3, 4, 0)
    assert hash_bag(ids[0, 0, :0], table, SPEC, packed(())).shape == (0, 6)


def test_unsigned_ids(executor):
    big = np.array([0, 2**63, 2**64 - 1, 12345], np.uint64)
    unsigned, signed = torch.from_numpy(big), torch.from_numpy(big.view(np.int64))
    table = torch.randn(50, 8)
    assert torch.equal(hash_bag(unsigned, table, SPEC), hash_bag(signed, table, SPEC))
    hidden = hash_bag(unsigned, table, SPEC, padding_id=2**64 - 1)
    assert torch.equal(hidden, hash_bag(signed, table, SPEC, padding_id=-1))
    assert hidden.any(1).tolist() == [True, True, False, True]


@pytest.mark.parametrize("num_hashes", [1, 4, 6])
def test_gradients(kernel_executor, num_hashes):
    spec = TableSpec(7, num_hashes)  # 7 rows: ids collide, and rows of one id coincide
    ids, offsets = torch.arange(12), packed((3, 0, 1, 8))
    table, weights = torch.randn(7, 5), torch.randn(12)
    keys = hash_keys(ids, spec)
    assert num_hashes == 1 or any(len(set(row)) < num_hashes for row in keys.tolist())
    for cu in (None, offsets):
        for padding_id in (None, 4):

            def run(table, weights=None, cu=cu, padding_id=padding_id):
                return hash_bag(ids, table, spec, cu, weights, padding_id=padding_id)

            check_gradients(run, [table], KERNELS)
            check_gradients(run, [table, weights], KERNELS)
            check_gradients(lambda w, run=run: run(table.double(), w), [weights], KERNELS)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 37), (600, 16), (40, 300)], ids=str)
def test_backward_equals_reference(executor, dtype, shape):
    spec = TableSpec(shape[0])
    lengths = (0, 5, 1, 0, 64, 130, 0)
    ids, grad = random_ids(200), torch.randn(len(lengths), shape[1]).to(dtype)
    ids[3] = ids[90] = 11
    table, w = torch.randn(shape).to(dtype), torch.rand(200)
    results = []
    for backend in ("auto", "reference"):
        leaves = table.clone().requires_grad_(), w.clone().requires_grad_()
        with use_backend(backend):
            out = hash_bag(ids, leaves[0], spec, packed(lengths), leaves[1], padding_id=11)
        out.backward(grad)
        results.append([out.detach(), leaves[0].grad, leaves[1].grad])
    limit = tolerance(dtype, 800)
    for actual, expected in zip(*results, strict=True):
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(actual, expected, rtol=limit["rtol"], atol=scale * limit["atol"])


def test_wide_half_gradient():
    """A 16-bit gradient is added up in pieces when the table is larger than the scratch."""
    spec, ids = TableSpec(3000, 2), torch.arange(500)
    exact = torch.zeros(3000, 800, dtype=torch.float64, requires_grad=True)
    grad = torch.randint(-4, 5, (500, 800))
    hash_bag(ids, exact, spec).backward(grad.double())
    half = torch.zeros(3000, 800, dtype=torch.bfloat16, requires_grad=True)
    hash_bag(ids, half, spec).backward(grad.bfloat16())
    assert torch.equal(half.grad.double(), exact.grad)


def test_padding_is_an_id_not_a_row(executor):
    spec, table = TableSpec(2, 1), torch.ones(2, 3, requires_grad=True)
    ids = torch.arange(20)
    out = hash_bag(ids, table, spec, padding_id=4)
    out.sum().backward()
    assert out[:, 0].tolist() == [float(i != 4) for i in range(20)]
    assert int(table.grad[:, 0].sum()) == 19


def test_empty_means_zero(executor):
    table = torch.full((50, 6), 2.0, requires_grad=True)
    ids, weights = torch.tensor([7, 7]), torch.rand(2, requires_grad=True)
    out = hash_bag(ids, table, SPEC, packed((0, 2, 0)), weights, padding_id=7)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(3, 6))
    assert torch.equal(table.grad, torch.zeros(50, 6))
    assert torch.equal(weights.grad, torch.zeros(2))
    no_ids = torch.empty(0, dtype=torch.long)
    table.grad = None
    hash_bag(no_ids, table, SPEC).sum().backward()
    assert torch.equal(table.grad, torch.zeros(50, 6))


def test_no_neighbour_in_the_bits(executor):
    ids, table = random_ids(300), torch.randn(50, 48)
    offsets = packed((10, 0, 200, 90))
    whole = hash_bag(ids, table, SPEC, offsets)
    alone = hash_bag(ids[10:210], table, SPEC, packed((200,)))
    assert torch.equal(whole[2], alone[0])
    assert torch.equal(hash_bag(ids, table, SPEC)[137], hash_bag(ids[137], table, SPEC))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_same_bits_for_any_thread_count(isa, dtype):
    spec = TableSpec(3000)
    ids = (torch.rand(20000) * 8).exp().long()  # a few ids make most of the batch
    table = torch.randn(3000, 48).to(dtype).requires_grad_()
    weights = torch.rand(20000, requires_grad=True)
    grad = torch.randn(20000, 48).to(dtype)
    offsets = packed((1, 0, 9000, 10999))

    def run():
        table.grad = weights.grad = None
        out = hash_bag(ids, table, spec, per_sample_weights=weights)
        out.backward(grad)
        hash_bag(ids, table, spec).backward(grad)  # gradients of an id are added up first
        bags = hash_bag(ids, table.detach(), spec, offsets)
        return out.detach(), bags, table.grad, weights.grad, hash_keys(ids, spec)

    check_threads(run)


def test_operator_contract():
    ids, table = torch.arange(10), torch.randn(50, 5)
    offsets, weights = packed((3, 0, 7)), torch.rand(10)
    check_op("hash_keys", ids, 0, 1, 4, 50)
    for cu, w, padding_id in ((None, None, None), (offsets, weights, 3)):
        arguments = (ids, table, cu, w, 0, 1, 4, padding_id)
        check_op("hash_bag", *arguments)
        grad = torch.ones(10 if cu is None else 3, 5)
        check_op("hash_bag_backward", grad, *arguments, True, True)
        check_op("hash_bag_backward", grad, *arguments, True, False)


def test_compiled():
    calls = [
        (
            torch.arange(sum(lengths)) * 77,
            torch.randn(50, 24),
            packed(lengths),
            torch.rand(sum(lengths)),
        )
        for lengths in ((3, 4), (5, 0, 9), (2, 2, 2, 40), (8, 30, 11))
    ]

    def bags(ids, table, offsets, weights):
        return hash_bag(ids, table * 2, SPEC, offsets, weights, padding_id=77).relu()

    def lookups(ids, table, offsets, weights):
        return hash_bag(ids, table, SPEC).relu() * weights[:, None]

    for function in (bags, lookups):
        check_compiled(function, calls, backward=False)
        check_compiled(function, calls, backward=True)


def test_equals_thinc():
    thinc = pytest.importorskip("thinc.api", reason="thinc is not installed")
    ids = random_ids(500)
    for seed, rows, dim in ((0, 1000, 96), (8, 5000, 64), (11, 10, 7)):
        model = thinc.HashEmbed(dim, rows, seed=seed)
        unsigned = ids.numpy().view(np.uint64)
        model.initialize(X=unsigned)
        expected, backward = model(unsigned, is_train=True)
        ours = HashEmbedding(rows, dim, seed=seed, allow_degenerate_seed=True)
        with torch.no_grad():
            ours.weight.copy_(torch.from_numpy(model.get_param("E")))
        out = ours(ids)
        np.testing.assert_array_equal(out.detach().numpy(), expected)
        grad = torch.randn(500, dim)
        out.backward(grad)
        backward(grad.numpy())
        limit = tolerance(torch.float32, 2000 // rows + 1)
        torch.testing.assert_close(ours.weight.grad, torch.from_numpy(model.get_grad("E")),
                                   rtol=limit["rtol"], atol=32 * limit["atol"])  # fmt: skip


def test_module():
    module = HashEmbedding(50, 6, num_hashes=2, hash="splitmix64", seed=5, padding_id=0)
    assert repr(module) == (
        "HashEmbedding(50, 6, num_hashes=2, hash='splitmix64', seed=5, padding_id=0)"
    )
    assert module.weight.abs().max() <= 0.1
    assert module.weight.std() > 0.04
    ids, weights = torch.tensor([0, 1, 2]), torch.rand(3)
    expected = hash_bag(ids, module.weight, module.spec, packed((3,)), weights, padding_id=0)
    assert torch.equal(module(ids, packed((3,)), weights), expected)
    assert HashEmbedding(4, 3, device="meta", dtype=torch.bfloat16).weight.is_meta


def test_state_dict_carries_the_specification():
    module = HashEmbedding(50, 6, seed=5)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    twin = HashEmbedding(50, 6, seed=5)
    twin.load_state_dict(state)
    assert torch.equal(twin(torch.arange(9)), module(torch.arange(9)))
    for other in (
        HashEmbedding(50, 6, seed=6),
        HashEmbedding(50, 6, seed=5, num_hashes=3),
        HashEmbedding(50, 6, seed=5, hash="splitmix64"),
    ):
        with pytest.raises(ValueError, match=r"holds a table of TableSpec\(.*this module is"):
            other.load_state_dict(state)
    with pytest.raises(RuntimeError, match="_extra_state"):
        twin.load_state_dict({"weight": module.weight})


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numpy_door(isa, dtype):
    generator = np.random.default_rng(0)
    ids = generator.integers(0, 2**64, 12, np.uint64)
    table = generator.normal(size=(50, 19)).astype(dtype)
    weights = np.linspace(0, 1, 12, dtype=dtype)
    cu = np.array([0, 5, 5, 12], np.int32)
    for offsets in (None, cu):
        for w in (None, weights):
            actual = arrays.hash_bag(ids, table, SPEC, offsets, w, padding_id=int(ids[3]))
            expected = hash_bag(
                torch.from_numpy(ids),
                torch.from_numpy(table),
                SPEC,
                None if offsets is None else torch.from_numpy(offsets),
                None if w is None else torch.from_numpy(w),
                padding_id=int(ids[3]),
            )
            np.testing.assert_array_equal(actual, expected.numpy())
    square = ids.reshape(3, 4)
    assert arrays.hash_bag(square, table, SPEC).shape == (3, 4, 19)
    with pytest.raises(TypeError, match="ids must be a C-contiguous array of int64 or uint64"):
        arrays.hash_bag(ids[::2], table, SPEC)
    with pytest.raises(TypeError, match="table must be a C-contiguous array"):
        arrays.hash_bag(ids, table.astype(np.float16), SPEC)
    with pytest.raises(ValueError, match=r"table must have spec.num_embeddings = 50 rows"):
        arrays.hash_bag(ids, table[:49], SPEC)
    with pytest.raises(ValueError, match="offsets must start at 0"):
        arrays.hash_bag(ids, table, SPEC, np.array([0, 13], np.int32))
    with pytest.raises(ValueError, match="ids must have 1 dimensions"):
        arrays.hash_bag(square, table, SPEC, cu)
    with pytest.raises(ValueError, match="per_sample_weights must have the shape of ids"):
        arrays.hash_bag(ids, table, SPEC, None, weights[:3])


IDS, TABLE, CU = torch.arange(4), torch.zeros(50, 3), packed((4,))


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "ids must be a torch.Tensor, got list", lambda: hash_bag([1], TABLE, SPEC)),
        (TypeError, "ids must have dtype int64, uint64, got int32",
         lambda: hash_bag(IDS.int(), TABLE, SPEC)),
        (TypeError, "spec must be a TableSpec, got int", lambda: hash_bag(IDS, TABLE, 50)),
        (TypeError, "spec must be a TableSpec, got str", lambda: hash_keys(IDS, "murmur3")),
        (TypeError, "table must have dtype .* got int64",
         lambda: hash_bag(IDS, TABLE.long(), SPEC)),
        (ValueError, "table must have 2 dimensions", lambda: hash_bag(IDS, TABLE[0], SPEC)),
        (ValueError, "table must be on device", lambda: hash_bag(IDS, TABLE.to("meta"), SPEC)),
        (ValueError, "table must have spec.num_embeddings = 50 rows, got shape",
         lambda: hash_bag(IDS, TABLE[:49], SPEC)),
        (ValueError, "mode must be one of 'sum', 'mean', 'max', got 'min'",
         lambda: hash_bag(IDS, TABLE, SPEC, mode="min")),
        (ValueError, "combine must be one of 'sum', 'mean', 'product', 'concat', got 'add'",
         lambda: hash_bag(IDS, TABLE, SPEC, combine="add")),
        (ValueError, "ids must have 1 dimensions", lambda: hash_bag(IDS[None], TABLE, SPEC, CU)),
        (ValueError, "offsets must have at least one", lambda: hash_bag(IDS, TABLE, SPEC, CU[:0])),
        (ValueError, "offsets must start at 0", lambda: hash_bag(IDS, TABLE, SPEC, CU + 1)),
        (ValueError, "offsets must start at 0",
         lambda: hash_bag(IDS, TABLE, SPEC, packed((5, -1)))),
        (ValueError, "per_sample_weights must have the shape of ids",
         lambda: hash_bag(IDS, TABLE, SPEC, CU, torch.ones(3))),
        (ValueError, "padding_id must fit 64 bits",
         lambda: hash_bag(IDS, TABLE, SPEC, padding_id=2**64)),
    ],
)  # fmt: skip
def test_bad_arguments(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_direct_call_is_guarded():
    """C++ guards memory whatever Python lets through."""
    hashing = (0, 0, 4, None)
    for args in (
        (IDS.int(), TABLE, None, None, *hashing),
        (IDS[None], TABLE, None, None, *hashing),
        (IDS, TABLE.t(), None, None, *hashing),
        (IDS, TABLE.long(), None, None, *hashing),
        (IDS, TABLE[:0], None, None, *hashing),
        (IDS, TABLE, CU.long(), None, *hashing),
        (IDS, TABLE, packed((2**30,)), None, *hashing),
        (IDS, TABLE, None, torch.ones(3), *hashing),
        (IDS, TABLE, None, torch.ones(4).double(), *hashing),
        (IDS, TABLE, None, None, 2, 0, 4, None),
        (IDS, TABLE, None, None, 0, 2**32, 4, None),
        (IDS, TABLE, None, None, 0, 0, 17, None),
        (IDS, TABLE, None, None, 0, 0, 0, None),
    ):
        with pytest.raises(RuntimeError, match="emblas: "):
            torch.ops.emblas.hash_bag(*args)
        with pytest.raises(RuntimeError, match="emblas: "):
            torch.ops.emblas.hash_bag_backward(torch.zeros(4, 3), *args, True, True)
    for grad in (torch.zeros(4, 2), torch.zeros(3, 3), torch.zeros(4, 3).double()):
        with pytest.raises(RuntimeError, match="emblas: "):
            torch.ops.emblas.hash_bag_backward(grad, IDS, TABLE, None, None, *hashing, True, True)
    for spec in ((0, 0, 4, 0), (0, 0, 4, 2**32 + 1), (0, -1, 4, 5)):
        with pytest.raises(RuntimeError, match="emblas: "):
            torch.ops.emblas.hash_keys(IDS, *spec)


def test_kernels_run():
    with only_kernels("hash_keys", *KERNELS):
        hash_keys(IDS, SPEC)
        hash_bag(IDS, TABLE.clone().requires_grad_(), SPEC).sum().backward()
