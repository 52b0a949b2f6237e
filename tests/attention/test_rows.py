from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from contract import check_compiled, check_gradients, check_op, check_threads, packed, tolerance
from emblas import use_backend
from emblas._op import FLOATS
from emblas.attention import (
    attend_rows,
    attention_columns,
    attention_rows,
    pooled_tokens,
    received_attention,
    t5_buckets,
    varlen_attention,
)

LENGTHS = (5, 0, 1, 30, 12, 0)
TOKENS = sum(LENGTHS)
CU = packed(LENGTHS)


def heads(tokens, count, dim, dtype=torch.float32):
    return torch.randn(tokens, count, dim).to(dtype)


def probabilities(q, k, cu, **options):
    """All of them, (heads, tokens, tokens): what attention makes of unit vectors, in float64."""
    q, k = q.double(), k.double()
    values = torch.eye(len(k), dtype=torch.float64)[:, None].expand(-1, k.shape[1], -1)
    with use_backend("reference"):
        out = varlen_attention(q, k, values, cu, cu, len(q), len(k), **options)
    return out.transpose(0, 1)


def expected_rows(matrix, rows, cu, longest, *, of_keys=False):
    """Rows (or columns) of the matrix by position in their sequence."""
    out = matrix.new_zeros(len(rows), matrix.shape[0], longest)
    for r, row in enumerate(rows.tolist()):
        for begin, end in pairwise(cu.tolist()):
            if begin <= row < end:
                chosen = matrix[:, begin:end, row] if of_keys else matrix[:, row, begin:end]
                out[r, :, : end - begin] = chosen
    return out


OPTIONS = {
    "all pairs": {},
    "scale": {"softmax_scale": 0.7},
    "causal": {"causal": True},
    "window": {"window_size": (3, 1)},
    "softcap": {"softcap": 1.5},
    "ALiBi": {"alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4])},
    "ALiBi of sequences": {"alibi_slopes": torch.rand(6, 4)},
    "T5": {"relative_bias": (torch.randn(4, 32), t5_buckets(32, 16))},
    "prefix": {"causal": True, "prefix_len": torch.tensor([2, 0, 1, 5, 3, 0])},
    "branches": {"branch": torch.randint(-1, 2, (TOKENS,))},
    "blocks": {"window_size": (9, 0), "block_ids": torch.randint(-1, 3, (TOKENS,))},
}
ROWS = torch.tensor([0, 4, 5, -1, 6, 35, 47, 6, 36])


@pytest.mark.parametrize("name", OPTIONS)
def test_rows_and_columns_with_options(name):
    options, (q, k) = OPTIONS[name], (heads(TOKENS, n, 24) * 1.5 for n in (4, 2))
    matrix = probabilities(q, k, CU, **options)
    limit = tolerance(torch.float32, 30)
    rows = attention_rows(q[ROWS.clamp_min(0)], k, CU, 33, ROWS, **options)
    torch.testing.assert_close(rows.double(), expected_rows(matrix, ROWS, CU, 33), **limit)
    columns = attention_columns(q, k, CU, 33, ROWS.int(), **options)
    expected = expected_rows(matrix, ROWS, CU, 33, of_keys=True)
    torch.testing.assert_close(columns.double(), expected, **limit)
    received = received_attention(q, k, CU, CU, 30, 30, **options)
    torch.testing.assert_close(received.double(), matrix.sum(1).t(), **limit)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dim", [1, 24, 80])
def test_equals_oracle(isa, dtype, dim):
    q, k, v = (
        heads(TOKENS, 4, dim, dtype),
        heads(TOKENS, 2, dim, dtype),
        heads(TOKENS, 2, 17, dtype),
    )
    matrix = probabilities(q, k, CU)
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    rows = attention_rows(q[ROWS.clamp_min(0)], k, CU, 30, ROWS)
    columns = attention_columns(q, k, CU, 30, ROWS)
    for actual, of_keys in ((rows, False), (columns, True)):
        assert actual.dtype == accumulator
        expected = expected_rows(matrix, ROWS, CU, 30, of_keys=of_keys)
        torch.testing.assert_close(actual.double(), expected, **tolerance(accumulator, 30))
    attended = attend_rows(q[ROWS.clamp_min(0)], k, v, CU, 30, ROWS)
    expected = varlen_attention(q, k, v, CU, CU, 30, 30)[ROWS.clamp_min(0)]
    assert attended.dtype == dtype
    torch.testing.assert_close(attended[ROWS >= 0], expected[ROWS >= 0], **tolerance(dtype, 30))
    assert torch.equal(attended[3], torch.zeros(4, 17, dtype=dtype))
    received = received_attention(q, k, CU, CU, 30, 30)
    torch.testing.assert_close(received.double(), matrix.sum(1).t(), **tolerance(dtype, 30))


def test_received_options():
    """Biases that only received attention takes, other queries than keys, and weights."""
    cu_q, cu_k = packed((3, 2, 0, 4)), packed((5, 0, 2, 4))
    q, k, weights = heads(9, 4, 8).double(), heads(11, 2, 8).double(), torch.rand(9, 4).double()
    position = [torch.randn(9, n, 8, dtype=torch.float64) for n in (2, 4)]
    options = {
        "disentangled": (*position, torch.arange(9)),
        "attn_bias": torch.randn(4, 4, 4, 5, dtype=torch.float64),
    }
    values = torch.eye(11, dtype=torch.float64)[:, None].expand(-1, 2, -1)
    with use_backend("reference"):
        matrix = varlen_attention(q, k, values, cu_q, cu_k, 4, 5, **options)
    expected = torch.einsum("ihj,ih->jh", matrix, weights)
    actual = received_attention(q, k, cu_q, cu_k, 4, 5, weights=weights, **options)
    torch.testing.assert_close(actual, expected)
    with use_backend("reference"):
        actual = received_attention(q, k, cu_q, cu_k, 4, 5, weights=weights, **options)
    torch.testing.assert_close(actual, expected)
    actual = received_attention(q, k, cu_q, cu_k, 4, 5, weights=weights[:, 0], **options)
    torch.testing.assert_close(actual, torch.einsum("ihj,i->jh", matrix, weights[:, 0]))


def test_received_sums_to_the_queries():
    q, k = heads(TOKENS, 2, 16), heads(TOKENS, 2, 16)
    received = received_attention(q, k, CU, CU, 30, 30)
    for begin, end in pairwise(CU.tolist()):
        total = received[begin:end].sum(0)
        torch.testing.assert_close(total, torch.full((2,), float(end - begin)))


def test_gradients(isa):
    cu, rows = packed((3, 0, 4, 1)), torch.tensor([4, -1, 0, 4, 7])
    q, k, v, table = heads(8, 4, 5), heads(8, 2, 5), heads(8, 2, 3), torch.randn(4, 7)
    lookup = torch.arange(7)
    forward = ("row_dots", "row_sums", "row_outer")

    def attend(q, k, v, table):
        return attend_rows(
            q[rows.clamp_min(0)], k, v, cu, 4, rows, causal=True, relative_bias=(table, lookup),
            softcap=2.0,
        )  # fmt: skip

    def give(q, k, table):
        return attention_rows(
            q[rows.clamp_min(0)], k, cu, 5, rows, relative_bias=(table, lookup), window_size=(1, 1)
        )

    def take(q, k, table):
        return attention_columns(
            q, k, cu, 4, rows, causal=True, relative_bias=(table, lookup), softcap=2.0
        )

    check_gradients(attend, [q, k, v, table], forward)
    check_gradients(give, [q, k, table], forward)
    check_gradients(take, [q, k, table], ("row_dots", "varlen_attention_backward"))


def test_gradients_of_received(isa):
    cu_q, cu_k = packed((3, 0, 2)), packed((4, 2, 0))
    inputs = [heads(5, 4, 5), heads(6, 2, 5), torch.rand(5, 4), torch.randn(4, 5)]
    lookup = torch.arange(5)

    def receive(q, k, weights, table):
        return received_attention(
            q, k, cu_q, cu_k, 3, 4, weights=weights, relative_bias=(table, lookup), causal=True
        )

    names = ("varlen_attention", "varlen_attention_backward")
    check_gradients(receive, inputs, names)
    position = [torch.randn(5, n, 5) for n in (2, 4)]
    bias = torch.randn(4, 3 * 4)

    def receive_biased(q, k, keys, queries, bias):
        return received_attention(
            q, k, cu_q, cu_k, 3, 4, disentangled=(keys, queries, lookup), attn_bias=bias
        )

    inputs = [*inputs[:2], *position, bias]
    check_gradients(receive_biased, inputs, ("varlen_attention_biases_backward",))


def test_columns_with_a_given_lse():
    cu, (q, k, v) = packed((9, 20)), (heads(29, 2, 16).requires_grad_() for _ in range(3))
    columns = torch.tensor([3, 28])
    _, lse = varlen_attention(q, k, v, cu, cu, 20, 20, causal=True, return_lse=True)
    given = attention_columns(q, k, cu, 20, columns, causal=True, lse=lse)
    own = attention_columns(q, k, cu, 20, columns, causal=True)
    torch.testing.assert_close(given, own)
    grad = torch.randn(given.shape)
    pairs = zip(*(torch.autograd.grad(x, (q, k), grad) for x in (given, own)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_pooled_tokens():
    cu = packed((3, 0, 1, 2), torch.int64)
    assert pooled_tokens(cu, "cls").tolist() == [0, -1, 3, 4]
    assert pooled_tokens(cu, "last").tolist() == [2, -1, 3, 5]
    with pytest.raises(ValueError, match="pooling must be one of"):
        pooled_tokens(cu, "mean")


@pytest.mark.parametrize("pooling", ["cls", "last"])
def test_last_layer_of_a_pooled_encoder(pooling):
    """The chosen rows, and their gradients, are those of all rows with no gradient elsewhere."""
    rows = pooled_tokens(CU, pooling)
    inputs = [heads(TOKENS, n, 32) for n in (4, 2, 2)]
    grad = torch.randn(len(rows), 4, 32)
    results = []
    for chosen in (True, False):
        q, k, v = leaves = [x.clone().requires_grad_() for x in inputs]
        if chosen:
            own = q[rows.clamp_min(0)]
            out = attend_rows(own, k, v, CU, 30, rows, window_size=(8, 8))
        else:
            every = varlen_attention(q, k, v, CU, CU, 30, 30, window_size=(8, 8))
            out = every[rows.clamp_min(0)] * (rows >= 0)[:, None, None]
        results.append((out, *torch.autograd.grad(out, leaves, grad)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **tolerance(torch.float32, 30))


def test_no_neighbour_and_no_batch_in_the_bits(isa):
    cu, part = packed((20, 33, 5)), slice(20, 53)
    rows, alone = torch.tensor([25, 0, 52]), torch.tensor([5, 32])
    inputs = [heads(58, n, 32) for n in (4, 2, 2)]

    def run(cu, part, rows):
        leaves = [x[part].clone().requires_grad_() for x in inputs]
        q, k, v = leaves
        longest = 33 if len(cu) == 2 else 50
        out = attend_rows(q[rows], k, v, cu, longest, rows)
        columns = attention_columns(q, k, cu, longest, rows)[:, :, :33]
        received = received_attention(q, k, cu, cu, longest, longest)
        chosen = [0, 2] if len(rows) == 3 else [0, 1]
        loss = out[chosen].sum() + columns[chosen].square().sum()
        own = slice(None) if len(rows) == 2 else slice(20, 53)
        loss = loss + received[own].square().sum()
        return out[chosen], columns[chosen], received[own], torch.autograd.grad(loss, leaves)

    expected = run(packed((33,)), part, alone)
    actual = run(cu, slice(None), rows)
    for a, b in zip(actual[:3], expected[:3], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(actual[3], expected[3], strict=True):
        assert torch.equal(a[part], b)
    for x in inputs:
        x[:20], x[53:] = torch.nan, torch.inf
    rows = torch.tensor([25, 21, 52])
    for a, b in zip(run(cu, slice(None), rows)[:3], expected[:3], strict=True):
        assert torch.equal(a, b)


def test_same_bits_for_any_thread_count(isa):
    cu, rows = packed((300, 0, 3, 120)), torch.randint(0, 423, (90,))
    inputs = [heads(423, n, 32) for n in (4, 2, 2)]

    def run():
        q, k, v = leaves = [x.clone().requires_grad_() for x in inputs]
        out = attend_rows(q[rows], k, v, cu, 300, rows)
        return out.detach(), *torch.autograd.grad(out.square().sum(), leaves[1:])

    check_threads(run)
    check_threads(lambda: received_attention(*inputs[:2], cu, cu, 300, 300))


def test_memory_is_linear():
    """32k tokens in one sequence: all probabilities would be 4 GiB."""
    cu, (q, k) = packed((32768,)), (heads(32768, 1, 16) for _ in range(2))
    rows = torch.tensor([0, 32767])
    options = {"window_size": (8, 8)}
    weights = attention_rows(q[rows], k, cu, 32768, rows, **options)
    assert (weights > 0).sum(2).flatten().tolist() == [9, 9]
    columns = attention_columns(q, k, cu, 32768, rows, **options)
    assert (columns > 0).sum(2).flatten().tolist() == [9, 9]
    received = received_attention(q, k, cu, cu, 32768, 32768, **options)
    torch.testing.assert_close(received.sum(), torch.tensor(32768.0), rtol=1e-4, atol=0)


def test_reference():
    q, k, v = (heads(TOKENS, n, 24) for n in (4, 2, 2))
    calls = (
        lambda: attend_rows(q[ROWS.clamp_min(0)], k, v, CU, 30, ROWS, causal=True),
        lambda: attention_columns(q, k, CU, 30, ROWS, causal=True),
        lambda: received_attention(q, k, CU, CU, 30, 30, causal=True),
    )
    for call in calls:
        expected = call()
        with use_backend("reference"):
            torch.testing.assert_close(call(), expected, **tolerance(torch.float32, 30))


def test_empty():
    none, rows = torch.zeros(0, 2, 8), torch.tensor([-1, -1])
    for lengths in ((), (0,), (0, 0)):
        cu = packed(lengths)
        zeros = torch.zeros(2, 2, 3)
        assert torch.equal(attention_rows(torch.randn(2, 2, 8), none, cu, 3, rows), zeros)
        assert torch.equal(attention_columns(none, none, cu, 3, rows), zeros)
        assert received_attention(none, none, cu, cu, 0, 0).shape == (0, 2)
        out = attend_rows(torch.randn(2, 2, 8), none, none, cu, 0, rows)
        assert torch.equal(out, torch.zeros(2, 2, 8))
    nobody = torch.zeros(0, dtype=torch.long)
    k = torch.randn(TOKENS, 2, 8)
    assert attention_rows(none, k, CU, 30, nobody).shape == (0, 2, 30)


def test_operator_contract():
    x, y, s = heads(9, 4, 24), heads(TOKENS, 2, 24), torch.randn(9, 4, 30)
    check_op("row_dots", x, y, ROWS, CU, 30)
    check_op("row_sums", s, y, ROWS, CU)
    check_op("row_outer", s, x, ROWS, CU, TOKENS, 2)


def test_compiled():
    def attend(q, k, v, cu):
        rows = pooled_tokens(cu, "last")
        out = attend_rows(q[rows.clamp_min(0)], k * 2, v, cu, len(q), rows, causal=True)
        columns = attention_columns(q, k, cu, len(q), rows)
        return out.relu(), columns, received_attention(q, k, cu, cu, len(q), len(q))

    calls = [
        (*(heads(sum(lengths), 2, 32) for _ in range(3)), packed(lengths))
        for lengths in ((3, 4), (5, 0, 9), (2, 2, 2, 40))
    ]
    check_compiled(attend, calls, backward=False)
    check_compiled(attend, calls, backward=True)


Q, ONE, ROW = torch.zeros(4, 2, 8), packed((4,)), torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "q must be a torch.Tensor", {"q": [1.0]}),
        (TypeError, "k must have the dtype of q", {"k": Q.double()}),
        (ValueError, "heads of q must be a multiple", {"q": Q[:, :1]}),
        (TypeError, "(rows|columns) must have dtype int32", {"rows": ROW.float()}),
        (ValueError, "(rows|columns) must have 1 dimensions", {"rows": ROW[None]}),
        (ValueError, "rows must be less than the number of tokens", {"rows": ROW + 1}),
        (ValueError, "cu_seqlens(_q)? must start at 0", {"cu_seqlens": packed((3,))}),
        (ValueError, "max_seqlen must be at least", {"max_seqlen": 3}),
        (ValueError, "window_size must hold radii", {"window_size": (-2, 0)}),
        (ValueError, "softcap must not be negative", {"softcap": -1.0}),
        (ValueError, "branch must have 4 elements", {"branch": ROW[:3]}),
    ],
)
def test_bad_arguments(error, message, options):
    arguments = {"q": Q, "k": Q, "cu_seqlens": ONE, "max_seqlen": 4} | options
    rows = arguments.pop("rows", ROW)
    with pytest.raises(error, match=message):
        attention_rows(rows=rows, **arguments)
    with pytest.raises(error, match=message):
        attention_columns(columns=rows, **arguments)


def test_other_bad_arguments():
    with pytest.raises(ValueError, match="q must have a query per row, 3, got 4"):
        attention_rows(Q, Q, ONE, 4, ROW[:3])
    with pytest.raises(ValueError, match="q must have the tokens of k, 4, got 3"):
        attention_columns(Q[:3], Q, ONE, 4, ROW)
    with pytest.raises(ValueError, match="lse must have the shape"):
        attention_columns(Q, Q, ONE, 4, ROW, lse=torch.zeros(4, 2))
    with pytest.raises(ValueError, match="k and v must have the same tokens"):
        attend_rows(Q, Q, Q[:3], ONE, 4, ROW)
    with pytest.raises(ValueError, match="weights must have the shape"):
        received_attention(Q, Q, ONE, ONE, 4, 4, weights=torch.ones(3))


def test_direct_call_is_guarded():
    op = torch.ops.emblas.row_dots
    for arguments in (
        (Q, Q.half(), ROW, ONE, 4), (Q, Q, ROW[:3], ONE, 4), (Q, Q, ROW, ONE, 3),
        (Q, Q, ROW + 1, ONE, 4), (Q, Q, ROW, packed((5,)), 4), (Q, Q, ROW.int(), ONE, 4),
        (Q.transpose(1, 2), Q, ROW, ONE, 4),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="emblas: "):
            op(*arguments)
    with pytest.raises(RuntimeError, match="emblas: "):
        torch.ops.emblas.row_sums(torch.zeros(4, 2, 4).double(), Q, ROW, ONE)
    with pytest.raises(RuntimeError, match="emblas: "):
        torch.ops.emblas.row_outer(torch.zeros(4, 2, 4), Q, ROW, ONE, 3, 2)
