"""Biases beyond those of distance (disentangled, pairs) and dropout, forward and backward."""

from __future__ import annotations

from itertools import pairwise

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
from emblas.attention import deberta_buckets, reference, t5_buckets, varlen_attention

LENGTHS_Q, LENGTHS_K = (5, 0, 150, 33), (9, 3, 70, 130)
CU_Q, CU_K = packed(LENGTHS_Q), packed(LENGTHS_K)
PAIRS = sum(q * k for q, k in zip(LENGTHS_Q, LENGTHS_K, strict=True))
LOOKUP, SLOTS = deberta_buckets(8, 30), 16
SEEDS = torch.tensor([3, -5, 2**62, 1])
KERNELS = ("varlen_attention", "varlen_attention_biases_backward")


def oracle(q, k, v, pos_k=None, pos_q=None, attn_bias=None, right=-1):
    """One pair of tokens at a time in effect, in float64; 4 heads of q to 2 of k."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    q, k, v = q.double(), k.double(), v.double()
    radius, seen = len(LOOKUP) // 2, 0
    for b, ((qa, qb), (ka, kb)) in enumerate(
        zip(pairwise(CU_Q.tolist()), pairwise(CU_K.tolist()), strict=True)
    ):
        for i in range(qb - qa):
            position = i + (kb - ka) - (qb - qa)
            distance = torch.arange(kb - ka) - position
            slot = LOOKUP[distance.clamp(-radius, radius) + radius]
            hidden = distance > right if right >= 0 else torch.zeros_like(distance).bool()
            for h in range(q.shape[1]):
                score = k[ka:kb, h // 2] @ q[qa + i, h]
                if pos_k is not None:
                    score = score + pos_k.double()[slot, h // 2] @ q[qa + i, h]
                if pos_q is not None:
                    score = score + (pos_q.double()[slot, h] * k[ka:kb, h // 2]).sum(1)
                score = score * q.shape[2] ** -0.5
                if attn_bias is not None and attn_bias.dim() == 2:
                    at = seen + i * (kb - ka)
                    score = score + attn_bias[h, at : at + kb - ka]
                elif attn_bias is not None:
                    score = score + attn_bias.expand(4, 4, -1, -1)[b, h, i, : kb - ka]
                if not hidden.all():
                    out[qa + i, h] = (
                        score.masked_fill(hidden, -torch.inf).softmax(0) @ v[ka:kb, h // 2]
                    )
        seen += (qb - qa) * (kb - ka)
    return out


def inputs(dtype=torch.float32, dim=24):
    q = torch.randn(sum(LENGTHS_Q), 4, dim).to(dtype)
    return q, *(torch.randn(sum(LENGTHS_K), 2, dim).to(dtype) for _ in range(2))


def tables(dtype=torch.float32, dim=24):
    return torch.randn(SLOTS, 2, dim).to(dtype), torch.randn(SLOTS, 4, dim).to(dtype)


def pair_bias(kind):
    return {
        "ragged": lambda: torch.randn(4, PAIRS),
        "ragged, one head": lambda: torch.randn(1, PAIRS),
        "padded": lambda: torch.randn(4, 4, 152, 131),
        "padded, shared": lambda: torch.randn(1, 1, 150, 130),
        "padded, of sequences": lambda: torch.randn(4, 1, 150, 130),
    }[kind]()


PAIR_BIASES = ("ragged", "ragged, one head", "padded", "padded, shared", "padded, of sequences")


def attend(q, k, v, **options):
    return varlen_attention(q, k, v, CU_Q, CU_K, 150, 130, **options)


@pytest.mark.parametrize("kinds", ["c2p", "p2c", "c2p, p2c"])
def test_disentangled_equals_oracle(isa, kinds):
    (q, k, v), (pos_k, pos_q) = inputs(), tables()
    pos_k, pos_q = pos_k if "c2p" in kinds else None, pos_q if "p2c" in kinds else None
    for causal in (False, True):
        actual = attend(q, k, v, disentangled=(pos_k, pos_q, LOOKUP), causal=causal)
        expected = oracle(q, k, v, pos_k, pos_q, right=0 if causal else -1)
        torch.testing.assert_close(actual.double(), expected, **tolerance(torch.float32, 150))


@pytest.mark.parametrize("kind", PAIR_BIASES)
def test_pair_bias_equals_oracle(isa, kind):
    (q, k, v), bias = inputs(), pair_bias(kind)
    actual = attend(q, k, v, attn_bias=bias)
    expected = oracle(q, k, v, attn_bias=bias.expand(4, -1) if bias.dim() == 2 else bias)
    torch.testing.assert_close(actual.double(), expected, **tolerance(torch.float32, 150))


OPTIONS = {
    "disentangled": {"disentangled": True},
    "window, cap, distances": {
        "disentangled": True, "window_size": (40, 20), "softcap": 2.0,
        "relative_bias": (torch.randn(4, 32), t5_buckets(32, 40)),
    },
    "ragged pairs": {"attn_bias": "ragged", "window_size": (60, -1)},
    "padded pairs": {"attn_bias": "padded"},
    "pairs of all heads": {"attn_bias": "padded, shared"},
    "dropout": {"dropout_p": 0.3, "dropout_seeds": SEEDS, "window_size": (33, -1)},
    "all": {
        "disentangled": True, "attn_bias": "padded", "dropout_p": 0.3, "dropout_seeds": SEEDS,
        "softcap": 3.0, "causal": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_backward_equals_reference(isa, name, dtype):
    dim = 32 if name == "all" else 17
    options = dict(OPTIONS[name])
    leaves = [*inputs(dtype, dim)]
    if "disentangled" in options:
        leaves += tables(dtype, dim)
    if "attn_bias" in options:
        leaves.append(pair_bias(options["attn_bias"]))
    grad = torch.randn(leaves[0].shape).to(dtype)
    results = []
    for backend in ("auto", "reference"):
        leaves = [x.detach().clone().requires_grad_() for x in leaves]
        rest = iter(leaves[3:])
        if "disentangled" in options:
            options["disentangled"] = (next(rest), next(rest), LOOKUP)
        if "attn_bias" in options:
            options["attn_bias"] = next(rest)
        with use_backend(backend):
            out, lse = attend(*leaves[:3], **options, return_lse=True)
            loss = (out * grad).sum() + torch.where(lse == -torch.inf, 0, lse).sum()
            results.append([out.detach(), *torch.autograd.grad(loss, leaves)])
    limit = tolerance(dtype, 150)
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == expected.dtype
        scale = max(float(expected.abs().max()), 1)  # sums over pairs grow with their number
        torch.testing.assert_close(
            actual, expected, rtol=8 * limit["rtol"], atol=8 * limit["atol"] * scale
        )


def test_gradients():
    """float64, against finite differences; dropout has the same mask forward and backward."""
    cu_q, cu_k = packed((3, 0, 4)), packed((4, 2, 3))
    q, k, v = torch.randn(7, 4, 3), torch.randn(9, 2, 3), torch.randn(9, 2, 5)
    lookup = torch.tensor([0, 1, 1, 2, 0])
    tables = torch.randn(3, 2, 3), torch.randn(3, 4, 3)

    def run(q, k, v, pos_k, pos_q, bias):
        return varlen_attention(
            q, k, v, cu_q, cu_k, 4, 4, 0.4, disentangled=(pos_k, pos_q, lookup), attn_bias=bias,
            dropout_seeds=torch.arange(3), softcap=2.0,
        )  # fmt: skip

    for bias in (torch.randn(4, 24), torch.randn(1, 1, 4, 4)):
        check_gradients(run, [q, k, v, *tables, bias], KERNELS)


def test_hidden_by_infinite_bias():
    """-inf hides a pair; a query all of whose pairs are hidden gets zeros and no gradient."""
    q, k, v = (torch.randn(5, 1, 8, requires_grad=True) for _ in range(3))
    cu, bias = packed((5,)), torch.zeros(1, 1, 5, 5)
    bias[..., 3:] = -torch.inf
    bias[:, :, 2] = -torch.inf
    bias.requires_grad_()
    out = varlen_attention(q, k, v, cu, cu, 5, 5, attn_bias=bias)
    expected = varlen_attention(q, k[:3], v[:3], cu, packed((3,)), 5, 3)
    torch.testing.assert_close(out[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])
    assert torch.equal(out[2], torch.zeros(1, 8))
    for grad in torch.autograd.grad(out.sum(), [q, k, v, bias]):
        assert grad.isfinite().all()


def test_dropout():
    """So many values are dropped, others at other seeds, heads and places; the mean stays."""
    n = 400
    cu = packed((n,))
    q = torch.zeros(n, 2, 16)  # all keys have the same probability
    v = torch.ones(n, 2, 1)

    def run(seed):
        seeds = None if seed is None else torch.tensor([seed])
        return varlen_attention(q, q, v, cu, cu, n, n, 0.25, dropout_seeds=seeds).squeeze(2)

    first, second = run(1), run(2)
    assert abs(float(first.mean()) - 1) < 5 * (1 / 3) ** 0.5 / n / 2**0.5
    kept = (first * 0.75 * n).round()
    assert torch.allclose(kept / (0.75 * n), first, rtol=1e-5)
    assert 0.8 < float(kept.var() / (n * 0.25 * 0.75)) < 1.2
    for other in (second, first.flip(1), first.roll(1, 0), run(None)):
        assert (
            abs(float(torch.corrcoef(torch.stack([first.flatten(), other.flatten()]))[0, 1])) < 0.2
        )
    torch.manual_seed(5)
    a = run(None)
    torch.manual_seed(5)
    assert torch.equal(a, run(None))
    # Which keys: each of them is dropped alike.
    weights = varlen_attention(
        q, q, torch.eye(n)[:, None, :256].expand(-1, 2, -1), cu, cu, n, n, 0.25,
        dropout_seeds=torch.tensor([1]),
    )  # fmt: skip
    dropped = (weights == 0).double().mean((0, 1))
    assert dropped.min() > 0.15
    assert dropped.max() < 0.35


def test_no_neighbour_and_no_batch_in_the_bits(isa):
    """Outputs and gradients of a document, its dropout too, are those that it has alone."""
    cu = packed((50, 33, 80))
    q, k, v = torch.randn(163, 4, 32), torch.randn(163, 2, 32), torch.randn(163, 2, 32)
    grad, (pos_k, pos_q) = torch.randn(163, 4, 32), tables(dim=32)
    bias = torch.randn(3, 4, 80, 80)

    def run(cu, longest, bias, seeds, *args):
        leaves = [x.clone().requires_grad_() for x in (*args[:3], bias)]
        out = varlen_attention(
            *leaves[:3], cu, cu, longest, longest, 0.2, disentangled=(pos_k, pos_q, LOOKUP),
            attn_bias=leaves[3], dropout_seeds=seeds,
        )  # fmt: skip
        return out.detach(), *torch.autograd.grad(out, leaves, args[3])

    part = slice(50, 83)
    seeds = torch.tensor([1, 2, 3])
    args = (q, k, v, grad)
    alone = run(packed((33,)), 33, bias[1:2, :, :33, :33], seeds[1:2], *(x[part] for x in args))
    for x in (q, k, v):
        x[:50], x[83:] = torch.nan, torch.inf
    together = run(cu, 80, bias, seeds, *args)
    for a, b in zip(alone[:4], together[:4], strict=True):
        assert torch.equal(a, b[part])
    assert torch.equal(alone[4][0], together[4][1, :, :33, :33])


def test_same_bits_for_any_thread_count(isa):
    args, vectors = inputs(), tables()
    bias = pair_bias("padded, shared")

    def run():
        leaves = [x.clone().requires_grad_() for x in (*args, *vectors, bias)]
        out = attend(
            *leaves[:3], disentangled=(*leaves[3:5], LOOKUP), attn_bias=leaves[5], dropout_p=0.1,
            dropout_seeds=SEEDS,
        )  # fmt: skip
        return (out.detach(), *torch.autograd.grad(out.sum(), leaves))

    check_threads(run)


def test_memory_is_linear():
    """32k tokens with windows, and position vectors in both directions."""
    n = 32768
    cu, (q, k, v) = packed((n,)), (torch.randn(n, 1, 16, requires_grad=True) for _ in range(3))
    vectors = [torch.randn(512, 1, 16, requires_grad=True) for _ in range(2)]
    out = varlen_attention(
        q, k, v, cu, cu, n, n, 0.1, window_size=(8, 8), disentangled=(*vectors, deberta_buckets())
    )
    grads = torch.autograd.grad(out.sum(), [q, *vectors])
    assert all(grad.isfinite().all() for grad in grads)
    used = grads[1].abs().sum((1, 2)) > 0
    assert used.nonzero().flatten().tolist() == list(range(256 - 8, 256 + 9))


def test_compiled_and_contract():
    vectors = tables()

    def run(q, k, v, cu, pos_k, pos_q, bias, seeds):
        return varlen_attention(
            q, k, v, cu, cu, len(q), len(q), 0.2, disentangled=(pos_k, pos_q, LOOKUP),
            attn_bias=bias, dropout_seeds=seeds,
        )  # fmt: skip

    calls = [
        (torch.randn(sum(n), 4, 24), *(torch.randn(sum(n), 2, 24) for _ in range(2)), packed(n),
         *vectors, torch.randn(len(n), 4, sum(n), sum(n)), torch.arange(len(n)))
        for n in ((3, 4, 2, 7, 1), (5, 0, 9), (2, 2, 2, 40, 1, 3))
    ]  # fmt: skip
    check_compiled(run, calls, backward=True)

    q, k, cu = torch.randn(9, 4, 24), torch.randn(9, 2, 24), packed((4, 5))
    numbers = (5, 5, None, -1, -1)
    for bias in (torch.randn(2, 4, 5, 5), torch.randn(4, 41)):
        shaping = (0.0, None, None, None, None, None, *vectors, LOOKUP.int(), bias, 0.3, SEEDS[:2])
        out, lse = torch.ops.emblas.varlen_attention(q, k, k, cu, cu, *numbers, True, *shaping)
        check_op("varlen_attention", q, k, k, cu, cu, *numbers, True, *shaping)
        for needs in ((True, True, True), (False, False, False)):
            args = (out, None, q, k, k, out, lse, cu, cu, *numbers, *shaping, *needs)
            check_op("varlen_attention_biases_backward", *args)
            actual = torch.ops.emblas.varlen_attention_biases_backward(*args)
            expected = reference.varlen_attention_biases_backward(*args)
            for a, e in zip(actual, expected, strict=True):
                torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
    with only_kernels(*KERNELS):
        varlen_attention(q.requires_grad_(), k, k, cu, cu, 5, 5, 0.1).sum().backward()


def test_deberta_buckets():
    """Against the code that the models were trained with, as transformers has it."""
    modeling = pytest.importorskip("transformers.models.deberta_v2.modeling_deberta_v2")
    x = torch.zeros(1, 700, 1)
    for buckets, longest in ((256, 512), (8, 30), (-1, 20)):
        rows = buckets if buckets > 0 else longest
        expected = modeling.build_relative_position(x, x, buckets, longest)[0].add(rows)
        expected = expected.clamp(0, 2 * rows - 1)
        lookup = deberta_buckets(buckets, longest)
        distance = torch.arange(700) - torch.arange(700)[:, None]
        assert torch.equal(lookup[distance.clamp(-longest, longest) + longest], expected)
    for message, args in (("must be positive", (8, 0)), ("at least 4, or 0, got 3", (3, 9))):
        with pytest.raises(ValueError, match=message):
            deberta_buckets(*args)


POS_K, POS_Q = torch.zeros(3, 1, 8), torch.zeros(3, 2, 8)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "attn_bias must have the shape", {"attn_bias": torch.zeros(3, 2, 4, 4)}),
        (ValueError, "attn_bias must have room for 4", {"attn_bias": torch.zeros(1, 2, 4, 3)}),
        (ValueError, "a number for each pair", {"attn_bias": torch.zeros(2, 15)}),
        (TypeError, "attn_bias must have dtype", {"attn_bias": torch.zeros(2, 16).int()}),
        (ValueError, "odd length", {"disentangled": (POS_K, POS_Q, torch.arange(2))}),
        (ValueError, "heads of k", {"disentangled": (POS_Q, None, torch.arange(3))}),
        (ValueError, "heads of q", {"disentangled": (None, POS_K, torch.arange(3))}),
        (ValueError, "rows of its tables", {"disentangled": (POS_K, None, torch.arange(5))}),
        (ValueError, "rows of its tables", {"disentangled": (POS_K, None, -torch.arange(3))}),
        (ValueError, "dropout_p must be", {"dropout_p": -0.1}),
        (TypeError, "dropout_seeds must have dtype int64",
         {"dropout_p": 0.1, "dropout_seeds": torch.zeros(1)}),
        (ValueError, "one seed per sequence, 1, got 2",
         {"dropout_p": 0.1, "dropout_seeds": torch.arange(2)}),
    ],
)  # fmt: skip
def test_bad_arguments(error, message, options):
    q, k = torch.zeros(4, 2, 8), torch.zeros(4, 1, 8)
    with pytest.raises(error, match=message):
        varlen_attention(q, k, k, packed((4,)), packed((4,)), 4, 4, **options)
