"""What shapes the scores of packed attention: softcap, biases, masks, forward and backward."""

from __future__ import annotations

import pytest
import torch
from contract import (
    check_compiled,
    check_gradients,
    check_op,
    check_threads,
    only_kernels,
    packed,
    tolerance,
)
from emblas import use_backend
from emblas.attention import alibi_slopes, reference, t5_buckets, varlen_attention

CU, TOKENS = packed((0, 5, 1, 150, 40)), 196
BRANCHES = torch.tensor([-1] * 9 + [0] * 50 + [1] * 30 + [2] * 107)
BLOCKS = torch.arange(TOKENS).div(20, rounding_mode="floor") % 3 - 1
OPTIONS = {
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.1])},
    "alibi of sequences": {"alibi_slopes": torch.rand(5, 2), "window_size": (90, 70)},
    "relative bias": {"relative_bias": (torch.randn(2, 32), t5_buckets(32, 40))},
    "prefix": {"prefix_len": torch.tensor([3, 2, 9, 100, 70]), "causal": True},
    "branches": {"branch": BRANCHES, "causal": True},
    "branches, all pairs": {"branch": BRANCHES},
    "blocks": {"block_ids": BLOCKS, "window_size": (60, 0)},
    "all": {
        "softcap": 3.0,
        "alibi_slopes": torch.tensor([0.2, 0.3]),
        "relative_bias": (torch.randn(2, 9), torch.arange(9)),
        "prefix_len": torch.tensor([3, 2, 9, 20, 10]),
        "branch": BRANCHES,
        "block_ids": BLOCKS,
        "window_size": (70, 3),
    },
}


def oracle(q, k, v, cu, **options):
    """One pair of tokens at a time, in float64."""
    softcap = options.get("softcap", 0.0)
    slopes = options.get("alibi_slopes")
    table, lookup = options.get("relative_bias", (None, None))
    prefix, branch = options.get("prefix_len"), options.get("branch")
    block = options.get("block_ids")
    left, right = options.get("window_size", (-1, -1))
    right = 0 if options.get("causal") else right
    out = torch.zeros(*q.shape[:2], v.shape[2], dtype=torch.float64)
    for b, (begin, end) in enumerate(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)):
        keys = torch.arange(begin, end)
        for i in range(begin, end):
            sees = torch.ones(end - begin, dtype=torch.bool)
            if right >= 0:
                sees = keys <= i + right
                if prefix is not None:
                    sees |= keys < begin + prefix[b]
                if block is not None:
                    sees |= (block[keys] == block[i]) & (block[keys] >= 0)
            if left >= 0:
                sees &= keys >= i - left
            if branch is not None:
                sees &= (branch[keys] == -1) | (branch[keys] == branch[i])
            for h in range(q.shape[1]):
                score = k[keys, h].double() @ q[i, h].double() * q.shape[2] ** -0.5
                if softcap:
                    score = softcap * torch.tanh(score / softcap)
                if slopes is not None:
                    score = score - slopes.expand(len(cu) - 1, -1)[b, h].double() * (keys - i).abs()
                if table is not None:
                    radius = len(lookup) // 2
                    distance = (keys - i).clamp(-radius, radius)
                    score = score + table[h, lookup[distance + radius]].double()
                weights = score.masked_fill(~sees, -torch.inf).softmax(0)
                if sees.any():
                    out[i, h] = weights @ v[keys, h].double()
    return out


def attend(q, k, v, cu=CU, **options):
    return varlen_attention(q, k, v, cu, cu, 150, 150, **options)


@pytest.mark.parametrize("name", OPTIONS)
def test_equals_oracle(isa, name):
    q, k, v = (torch.randn(TOKENS, 2, 32) for _ in range(3))
    actual = attend(q, k, v, **OPTIONS[name])
    expected = oracle(q, k, v, CU, **OPTIONS[name])
    torch.testing.assert_close(actual.double(), expected, **tolerance(torch.float32, 150))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_backward_equals_reference(isa, name, dtype):
    q, k, v = (torch.randn(TOKENS, 2, 32).to(dtype) for _ in range(3))
    grad, options = torch.randn(TOKENS, 2, 32).to(dtype), dict(OPTIONS[name])
    results = []
    for backend in ("auto", "reference"):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        if "relative_bias" in options:
            table, lookup = options["relative_bias"]
            leaves.append(table.detach().clone().to(torch.promote_types(dtype, torch.float32)))
            options["relative_bias"] = (leaves[-1].requires_grad_(), lookup)
        with use_backend(backend):
            out = attend(*leaves[:3], **options)
            results.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
    limit = tolerance(dtype, 150)
    for actual, expected in zip(*results, strict=True):
        scale = float(expected.abs().max())  # sums over all pairs grow with their number
        torch.testing.assert_close(
            actual, expected, rtol=4 * limit["rtol"], atol=8 * limit["atol"] * max(scale, 1)
        )


@pytest.mark.parametrize("options", [
    {"softcap": 1.5, "alibi_slopes": torch.tensor([0.3, 0.1]).double()},
    {"prefix_len": torch.tensor([2, 0, 1]), "branch": torch.tensor([-1, 0, 1, 0, -1, 2, 2, 3]),
     "block_ids": torch.tensor([-1, 0, 0, 0, 1, 1, 2, 1]), "causal": True},
], ids=["scores", "masks"])  # fmt: skip
def test_gradients(options):
    cu = packed((5, 0, 3))
    q, k, v, table = (torch.randn(8, 2, 4), torch.randn(8, 1, 4), torch.randn(8, 1, 3),
                      torch.randn(2, 3))  # fmt: skip
    lookup = torch.tensor([0, 2, 1, 0, 0])

    def run(q, k, v, table):
        return attend(q, k, v, cu, relative_bias=(table, lookup), **options)

    names = ("varlen_attention", "varlen_attention_backward")
    check_gradients(run, [q, k, v, table], names)


def test_queries_that_stand_for_the_last_tokens():
    """A chunk of queries gives the rows that the whole sequence gives."""
    cu, cu_q = packed((60,)), packed((7,))
    q, k, v = (torch.randn(60, 2, 32) for _ in range(3))
    for options in (
        {"alibi_slopes": torch.rand(2), "softcap": 2.0},
        {"relative_bias": (torch.randn(2, 32), t5_buckets())},
        {"branch": torch.arange(60) % 3, "causal": True},
        {"block_ids": torch.arange(60) // 20, "causal": True},
    ):
        whole = attend(q, k, v, cu, **options)
        last = varlen_attention(q[-7:], k, v, cu_q, cu, 7, 60, **options)
        torch.testing.assert_close(last, whole[-7:], rtol=1e-5, atol=1e-5)


def test_same_bits_for_any_thread_count_and_neighbours():
    q, k, v = (torch.randn(TOKENS, 2, 32) for _ in range(3))
    table, lookup = torch.randn(2, 32, requires_grad=True), t5_buckets()

    def run():
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attend(*leaves, relative_bias=(table, lookup), softcap=2.0)
        return (out.detach(), *torch.autograd.grad(out.sum(), [*leaves, table]))

    check_threads(run)
    whole = attend(q, k, v, branch=BRANCHES, alibi_slopes=torch.ones(2))
    q[:6], k[:6], v[:6], k[156:], v[156:] = (torch.nan,) * 5
    part = attend(q, k, v, branch=BRANCHES, alibi_slopes=torch.ones(2))
    assert torch.equal(part[6:156], whole[6:156])


def test_branches_are_separate_sequences():
    """Branches over a shared context give what context and branch give alone."""
    q, k, v = (torch.randn(30, 2, 32) for _ in range(3))
    branch = torch.tensor([-1] * 10 + [0] * 12 + [1] * 8)
    together = attend(q, k, v, packed((30,)), branch=branch)
    second = torch.cat([torch.arange(10), torch.arange(22, 30)])
    alone = attend(q[second], k[second], v[second], packed((18,)))
    torch.testing.assert_close(together[22:], alone[10:], rtol=1e-5, atol=1e-5)


def test_compiled_and_contract():
    table, lookup = torch.randn(2, 32), t5_buckets()

    def run(q, k, v, cu, prefix, table):
        return varlen_attention(
            q, k, v, cu, cu, len(q), len(q), causal=True, softcap=2.0, prefix_len=prefix,
            relative_bias=(table, lookup),
        )  # fmt: skip

    calls = [
        (
            *(torch.randn(sum(n), 2, 32) for _ in range(3)),
            packed(n),
            torch.full((len(n),), 2),
            table,
        )
        for n in ((5, 0, 9), (3, 4, 2, 7, 1), (2, 2, 2, 40))
    ]
    check_compiled(run, calls, backward=True)

    q, cu, ids = torch.randn(9, 2, 32), packed((4, 5)), torch.zeros(9, dtype=torch.int32)
    shaping = (2.0, torch.rand(1, 2), torch.randn(2, 7), ids[:2], ids, ids)
    with only_kernels("varlen_attention"):
        out, lse = torch.ops.emblas.varlen_attention(
            q, q, q, cu, cu, 5, 5, None, -1, 0, True, *shaping
        )
    check_op("varlen_attention", q, q, q, cu, cu, 5, 5, None, -1, 0, True, *shaping)
    check_op("varlen_attention_backward", out, None, q, q, q, out, lse, cu, cu, 5, 5, None, -1, 0,
             *shaping, True)  # fmt: skip


def test_backward_operator_equals_its_reference():
    """Also in the gradient of the distances' bias, and where it isn't wanted."""
    q, cu, ids = torch.randn(9, 2, 32), packed((4, 5)), torch.arange(9, dtype=torch.int32) % 3
    shaping = (2.0, torch.rand(1, 2), torch.randn(2, 7), ids[:2], ids - 1, ids)
    numbers = (5, 5, None, -1, 0)
    out, lse = torch.ops.emblas.varlen_attention(q, q, q, cu, cu, *numbers, True, *shaping)
    for grad_lse, need in ((None, True), (torch.randn_like(lse), False)):
        args = (out, grad_lse, q, q, q, out, lse, cu, cu, *numbers, *shaping, need)
        actual = torch.ops.emblas.varlen_attention_backward(*args)
        for a, e in zip(actual, reference.varlen_attention_backward(*args), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_t5_buckets():
    """Against the formula of the paper's code, one distance at a time."""
    transformers = pytest.importorskip("transformers.models.t5.modeling_t5")
    for buckets, distance, both in ((32, 128, True), (32, 128, False), (16, 20, True)):
        relative = torch.arange(-distance, distance + 1)
        expected = transformers.T5Attention._relative_position_bucket(
            relative, both, buckets, distance
        )
        actual = t5_buckets(buckets, distance, bidirectional=both)
        assert torch.equal(actual, expected)


def test_alibi_slopes():
    torch.testing.assert_close(alibi_slopes(8), torch.tensor([2.0**-k for k in range(1, 9)]))
    expected = torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3])
    torch.testing.assert_close(alibi_slopes(6), expected)
    with pytest.raises(ValueError, match="heads must be at least 1"):
        alibi_slopes(0)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "alibi_slopes must have the shape", {"alibi_slopes": torch.ones(3)}),
        (TypeError, "alibi_slopes must be a torch.Tensor", {"alibi_slopes": 1.0}),
        (ValueError, "one row per head", {"relative_bias": (torch.ones(3, 2), torch.arange(1))}),
        (ValueError, "odd length", {"relative_bias": (torch.ones(2, 2), torch.arange(2))}),
        (ValueError, "prefix_len must have 1 elements", {"prefix_len": torch.arange(2)}),
        (TypeError, "branch must have dtype int32, int64", {"branch": torch.ones(4)}),
        (ValueError, "block_ids must have 4 elements", {"block_ids": torch.arange(5)}),
    ],
)
def test_bad_arguments(error, message, options):
    q = torch.zeros(4, 2, 32)
    with pytest.raises(error, match=message):
        varlen_attention(q, q, q, packed((4,)), packed((4,)), 4, 4, **options)
