"""What tests/test_executors.py doesn't ask of the Triton kernels: gradients, offsets, bits, limits.

Run by tests/test_interpreted.py in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import pytest
import torch
from contract import packed
from emblas import _op, use_backend
from emblas.attention import attend_rows, rotary_, varlen_attention
from emblas.attention.op import Shaping
from emblas.binary import pack_sign
from emblas.pooling import segment_pool
from emblas.tables import Composition, Part, TableSpec, compose_bag, hash_bag
from emblas.tables.codes import CODES
from executors import executors
from triton_check import checked_interpreter

CU = packed((3, 0, 70))


def interpreted(function, *args, seed=0):
    with checked_interpreter(seed), use_backend("triton"):
        return function(*args)


def run(name, *args):
    return executors(name)["triton-interpreted"](*args)


def test_gradients_through_the_front_door():
    """The public functions reach the kernels, forward and backward."""
    x, w = torch.randn(73, 9), torch.rand(73) + 0.1

    def pooled(x, w):
        return segment_pool(x, CU, weights=w, normalize=True)

    def embedded(x, w):
        table, ids = x[:20, :5].contiguous(), torch.arange(73)
        return hash_bag(ids, table, TableSpec(20, seed=1), CU, w)

    def attended(x, w):
        heads, rows = x[:, :8].unflatten(1, (2, 4)), torch.tensor([0, 72, -1, 30])
        turned = rotary_(heads[rows] * 1, *torch.full((2, 4, 2), 0.5))
        return attend_rows(turned, heads, heads * w[:, None, None], CU, 70, rows)

    for function in (pooled, embedded, attended):
        results = []
        for triton in (True, False):
            leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
            out = interpreted(function, *leaves) if triton else function(*leaves)
            loss = out.square().sum()
            interpreted(loss.backward) if triton else loss.backward()
            results.append([leaf.grad for leaf in leaves])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "offsets", [[5, 900, -3, 2], [-7, 2**31 - 1, 2**31 - 1, -(2**31)], [80, 70, 60, 3]]
)
def test_wrong_offsets_stay_in_bounds(offsets):
    """The interpreter would notice; results are whatever they are. No two segments overlap."""
    cu = torch.tensor(offsets, dtype=torch.int32)
    x, q, ids = torch.randn(73, 9), torch.randn(73, 1, 16), torch.arange(73)
    grad, norm = torch.randn(3, 9), torch.rand(3)
    run("segment_pool", x, cu, None, True)
    run("segment_pool_backward", grad, x, grad, norm, cu, None, True, True, True)
    modes = (5, 6, 3)
    run("segment_pool_modes", x, cu, None, modes)
    wide = torch.randn(3, 27)
    args = (wide, x, wide, cu[1:, None].repeat(1, 9), cu, None, modes, True, True)
    run("segment_pool_modes_backward", *args)
    run("segment_max", x, cu, None, None, None, None)
    run("segment_max", x, cu[1:], torch.ones(4), cu[:-1], cu[1:], cu)
    run("segment_max_backward", grad, cu[1:, None].repeat(1, 9), 73)
    run("varlen_attention", q, q, q, cu, cu, 73, 73, None, -1, -1, True)
    rows, s = torch.tensor([72, -1, 0, 73, 2**40]), torch.randn(5, 1, 60)
    run("row_dots", q[:5], q, rows, cu, 60)
    run("row_sums", s, q, rows, cu)
    run("row_outer", s, q[:5], rows, cu, 73, 1)
    run("hash_bag", ids, x, cu, None, 0, 0, 4, None)
    run("maxsim", x, cu, x, cu, 9, False)
    wrong = torch.randint(-99, 99, (73, 3), dtype=torch.int32)
    wrong[:2, 0] = torch.tensor([-1, 73])
    run("maxsim_backward", torch.randn(3, 3), x, cu, x, cu, wrong)
    codes, scale = torch.zeros(73, 9, dtype=torch.uint8), torch.ones(73)
    for mode in range(3):
        run("quantized_bag", ids, codes, scale, cu, None, 8, 9, mode, None, None)
    run("quantized_bag_backward", grad, ids, codes, scale, cu, 8, 9, None, None)
    run("hash_bag_backward", grad, ids, x, cu, torch.rand(73), 0, 0, 4, None, True, True)
    parts = Composition((Part(5, 9, a=1), Part(20, 9, "radix", a=3, base=45))).fields
    table, weights = x.flatten(), torch.rand(73)
    for mode in range(3):
        run("compose_bag", ids, table, cu, None, parts, 0, mode, None)
        winners = torch.full((3, 9), 2**31 - 1, dtype=torch.int32)
        run("compose_bag_backward", grad, ids, table, cu, None, winners, parts, 2, mode, None, True,
            False)  # fmt: skip
        one_table = Composition((Part(5, 9, a=1),)).fields
        lookups = (grad, ids, table, cu, None, winners)
        run("compose_bag_backward_rows", *lookups, one_table, 0, mode, None)
        moments = torch.rand(2, table.numel())
        steps = torch.zeros(25).long(), torch.tensor([0])
        settings = (3, 0.1, 0.1, 0.9, 0.9, 0.1)
        run("compose_bag_update_", *lookups, parts, 2, mode, None, *moments, *steps, *settings)
    run("compose_bag_backward", grad, ids, table, cu, weights, None, parts, 2, 0, None, True, True)


def test_wrong_ids_stay_in_bounds():
    """Rows that don't exist are not found."""
    check_wrong_ids()


def check_wrong_ids():
    x, codes = torch.randn(20, 8), torch.randint(0, 256, (20, 1), dtype=torch.uint8)
    ids = torch.tensor([-(2**40), -1, 3, 19, 20, 2**40])
    for name, args in (
        ("hamming_topk", (codes, codes, 4, ids)),
        ("range_search", (codes, codes, 8, 4, ids, False)),
        ("asymmetric_topk", (x, codes, 4, ids, None)),
        ("dense_topk", (x, x, 4, 0, ids)),
    ):
        found = run(name, *args)[-1].sort(1).values
        assert torch.equal(found, torch.tensor([[-1, -1, 3, 19]]).expand(20, -1))
    table, ones = torch.zeros(20, 8, dtype=torch.uint8), torch.ones(20)
    expected = torch.tensor([0.0, 0, -128, -128, 0, 0])[:, None].expand(-1, 8)
    assert torch.equal(
        run("quantized_bag", ids, table, ones, None, None, 8, 8, 0, None, None), expected
    )
    bag = run("quantized_bag", ids, table, ones, packed((6,)), None, 8, 8, 1, None, None)
    assert torch.equal(bag, expected[2:3])
    along = run("quantized_bag_backward", x[:6], ids, table, ones, None, 8, 8, None, None)
    assert not along[[0, 1, 4, 5]].any()
    scores = run("gather_scores", x, x, ids.expand(20, -1).contiguous(), 0)
    expected = (x @ x[[3, 19]].T).double()
    torch.testing.assert_close(scores[:, 2:4].double(), expected, rtol=1e-5, atol=1e-5)
    assert (scores[:, [0, 1, 4, 5]] == -torch.inf).all()


def test_bits_depend_on_the_own_sequence_only():
    x = torch.randn(73, 9)
    run_pool = executors("segment_pool")["triton-interpreted"]
    whole, _ = run_pool(x, CU, None, True)
    again, _ = run_pool(x, CU, None, True)  # programs in another order
    alone, _ = run_pool(x[3:], packed((70,)), None, True)
    assert torch.equal(whole, again)
    assert torch.equal(whole[2:], alone)
    q = torch.randn(73, 1, 16)
    run_attention = executors("varlen_attention")["triton-interpreted"]
    whole, _ = run_attention(q, q, q, CU, CU, 73, 73, None, 9, 9, False)
    alone, _ = run_attention(*[q[3:]] * 3, packed((70,)), packed((70,)), 70, 70, None, 9, 9, False)
    assert torch.equal(whole[3:], alone)


def test_softcap_to_the_last_bits():
    """A lone key's log-sum-exp is its score: by the series near 0, by exponentials beyond."""
    count, cap = 501, 1.5
    scores, unit = torch.linspace(-1.5, 1.5, count), torch.zeros(count, 1, 4)
    unit[..., 0] = 1
    cu = torch.arange(count + 1, dtype=torch.int32)
    numbers = (cu, cu, 1, 1, 1.0, -1, -1, True)
    options = Shaping(softcap=cap)
    q = scores[:, None, None] * unit
    _, lse = executors("varlen_attention")["triton-interpreted"](q, unit, unit, *numbers, *options)
    expected = cap * (scores.double() / cap).tanh()
    torch.testing.assert_close(lse[0].double(), expected, rtol=2**-20, atol=0)


@pytest.mark.parametrize("kind", range(3))
def test_codes_to_the_last_bit(kind):
    ids = torch.tensor([0, 12345, -1, 2**62 + 9, -(2**63)])
    for dim, sequence in ((1, ids[:1]), (31, torch.arange(5)), (260, ids[2:3] & 2**32 - 1)):
        args = (ids, sequence, dim, kind, -5, 3, 1)
        assert torch.equal(run("random_codes", *args), _op.ops()["random_codes"].reference(*args))


def test_edges_of_sparse_codes():
    """tests/tables/test_codes.py: the word of the second column is 15552, an edge of both."""
    sparse, ids, sequence = CODES.index("sparse"), torch.tensor([44418]), torch.zeros(1).long()
    for part in (15553, 15552, 7777, 7776):
        args = (ids, sequence, 2, sparse, 5, round(2**31 / part), 1)
        assert torch.equal(run("random_codes", *args), _op.ops()["random_codes"].reference(*args))


def test_what_is_not_supported_is_said():
    double = torch.randn(73, 9, dtype=torch.float64)
    codes = torch.zeros(3, 4, dtype=torch.uint8)
    overlapping = Composition((Part(73, 9, stride=1),)).fields
    for call in (
        lambda: segment_pool(double, CU),
        lambda: varlen_attention(*[torch.zeros(73, 1, 16).double()] * 3, CU, CU, 70, 70),
        lambda: hash_bag(torch.arange(3), double, TableSpec(73)),
        lambda: compose_bag(torch.arange(3), double, Composition((Part(73, 9),))),
        lambda: run(
            "compose_bag_backward",
            double.float(),
            torch.arange(73),
            torch.zeros(81),
            None,
            None,
            None,
            overlapping,
            0,
            0,
            None,
            True,
            False,
        ),
    ):
        with pytest.raises(RuntimeError, match=r"'triton' can't run this call of emblas::"):
            interpreted(call)
    assert _op.ops()["hamming_topk"].serves("triton", codes, codes, 2**20)


@pytest.mark.parametrize("nearest", ["first", "last"])
@pytest.mark.parametrize("programs", [1, 2, 2048])
@pytest.mark.parametrize("k", [1, 16, 17])
def test_hamming_topk_over_many_tiles(monkeypatch, k, programs, nearest):
    """One program or several walk through the tiles; all of them change the list, or one."""
    check_hamming_topk(monkeypatch, k, programs, nearest)


def test_hamming_topk_with_the_longest_list(monkeypatch):
    check_hamming_topk(monkeypatch, 256, 1, "last")


def check_hamming_topk(monkeypatch, k, programs, nearest):
    monkeypatch.setattr("emblas.binary.triton.select._PROGRAMS", programs)
    rows = 600
    bits = torch.arange(rows)[:, None] * 32 // rows
    codes = pack_sign((torch.arange(32) < bits).float())
    codes = codes if nearest == "first" else codes.flip(0)
    queries = torch.zeros(2 if k <= 64 else 1, 4, dtype=torch.uint8)
    expected = _op.ops()["hamming_topk"].reference(queries, codes, k)
    for actual, e in zip(run("hamming_topk", queries, codes, k), expected, strict=True):
        assert torch.equal(actual, e)


@pytest.mark.parametrize("later_only", [False, True])
@pytest.mark.parametrize(("rows", "programs"), [(28, 1), (28, 2048), (72, 54)])
def test_range_search_over_many_tiles(monkeypatch, rows, programs, later_only):
    """Results and ties begin and end in the middle of tiles and chunks; the last has three each."""
    monkeypatch.setattr("emblas.binary.triton.select._PROGRAMS", programs)
    monkeypatch.setattr("emblas.binary.triton.hamming._BLOCK_CODES", 8)
    codes = torch.randint(0, 8, (rows, 1), dtype=torch.uint8)
    for name, args in (
        ("range_search", (codes, codes, 2, 9, None, later_only)),
        ("range_search_csr", (codes, codes, 1, None, later_only)),
    ):
        expected = _op.ops()[name].reference(*args)
        for actual, e in zip(run(name, *args), expected, strict=True):
            assert torch.equal(actual, e)


@pytest.mark.parametrize("k", [3, 70])
def test_dense_topk_over_many_tiles(monkeypatch, k):
    """One program walks through all of the tiles, with a list and without."""
    monkeypatch.setattr("emblas.binary.triton.select._PROGRAMS", 1)
    queries, documents = (torch.randint(-8, 9, (rows, 5)).float() for rows in (2, 300))
    expected = _op.ops()["dense_topk"].reference(queries, documents, k, 0, None)
    for actual, e in zip(run("dense_topk", queries, documents, k, 0, None), expected, strict=True):
        assert torch.equal(actual, e)


def test_segment_max_backward_ignores_rows_that_do_not_exist():
    argmax = torch.tensor([0, 2, 0, -1, 2, 4], dtype=torch.int32)[:, None].repeat(1, 5)
    args = (torch.randn(6, 5), argmax, 4)
    expected = _op.ops()["segment_max_backward"].reference(*args)
    torch.testing.assert_close(run("segment_max_backward", *args), expected)
