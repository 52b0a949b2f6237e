from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from contract import check_compiled, check_gradients, check_threads, packed, tolerance
from emblas import use_backend
from emblas._op import FLOATS
from emblas.attention import merge_attention, varlen_attention

LENGTHS = (3, 0, 1, 40, 7)
EMPTY = torch.zeros(0, 2, 24)


def heads(tokens, count, dim, dtype=torch.float32):
    return torch.randn(tokens, count, dim).to(dtype)


def oracle(q, k, v, cu_q, cu_k, extras, causal=False, softcap=0.0):
    """Eager attention to the concatenation; extras: keys and values of each sequence, bias."""
    outs, lses = [], []
    bounds = zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True)
    for b, ((qa, qb), (ka, kb)) in enumerate(bounds):
        groups = q.shape[1] // k.shape[1]

        def scores(keys, b=b, qa=qa, qb=qb, groups=groups):
            s = torch.einsum("ihd,jhd->hij", q[qa:qb], keys.repeat_interleave(groups, 1))
            s = s * q.shape[2] ** -0.5
            return softcap * torch.tanh(s / softcap) if softcap else s

        own = scores(k[ka:kb])
        if causal:
            position = torch.arange(qb - qa)[:, None] + (kb - ka) - (qb - qa)
            own = own.masked_fill(torch.arange(kb - ka) > position, -torch.inf)
        columns, values = [own], [v[ka:kb]]
        for keys, extra_values, bias in extras:
            columns.append(scores(keys[b]) + torch.as_tensor(bias, dtype=q.dtype).reshape(-1, 1, 1))
            values.append(extra_values[b])
        s = torch.cat(columns, 2)
        if s.shape[2] == 0:
            outs.append(torch.zeros(qb - qa, q.shape[1], v.shape[2], dtype=q.dtype))
            lses.append(torch.full((q.shape[1], qb - qa), -torch.inf, dtype=q.dtype))
            continue
        weights = torch.cat(values).repeat_interleave(groups, 1)
        outs.append(torch.einsum("hij,jhd->ihd", s.softmax(2), weights))
        lses.append(s.logsumexp(2))
    return torch.cat(outs), torch.cat(lses, 1)


def last_keys(k, v, cu_k, bias):
    """Last key and value of each sequence, none of an empty one."""
    slices = [slice(max(b - 1, a), b) for a, b in pairwise(cu_k.tolist())]
    return [k[s] for s in slices], [v[s] for s in slices], bias


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("own", [False, True], ids=["shared", "of each sequence"])
def test_prefix(isa, dtype, own):
    cu, batch = packed(LENGTHS), len(LENGTHS)
    q, k, v = heads(51, 4, 24, dtype), heads(51, 2, 24, dtype), heads(51, 2, 16, dtype)
    shape = (batch, 5) if own else (5,)
    k_prefix, v_prefix = (torch.randn(*shape, 2, d).to(dtype) for d in (24, 16))
    out, lse = varlen_attention(
        q, k, v, cu, cu, 40, 40, causal=True, softcap=3.0, k_prefix=k_prefix, v_prefix=v_prefix,
        prefix_bias=0.7, return_lse=True,
    )  # fmt: skip
    keys, values = (
        list(x.double().expand(batch, *x.shape[-3:]).unbind()) for x in (k_prefix, v_prefix)
    )
    expected, expected_lse = oracle(
        *(x.double() for x in (q, k, v)), cu, cu, [(keys, values, 0.7)], True, 3.0
    )
    limit = tolerance(dtype, 50)
    torch.testing.assert_close(
        out.double(), expected, rtol=4 * limit["rtol"], atol=4 * limit["atol"]
    )
    limit = tolerance(lse.dtype, 50)
    torch.testing.assert_close(lse.double(), expected_lse, **limit)


def test_last_key(isa):
    cu_q, cu_k = packed((3, 2, 1, 40, 4)), packed((5, 0, 1, 40, 2))
    q, k, v = heads(50, 4, 24), heads(48, 2, 24), heads(48, 2, 24)
    for causal in (False, True):
        out, lse = varlen_attention(
            q, k, v, cu_q, cu_k, 40, 40, causal=causal, reroute_last=True, reroute_bias=1.0,
            return_lse=True,
        )  # fmt: skip
        extras = [last_keys(k.double(), v.double(), cu_k, 1.0)]
        expected, expected_lse = oracle(
            *(x.double() for x in (q, k, v)), cu_q, cu_k, extras, causal
        )
        torch.testing.assert_close(out.double(), expected, **tolerance(torch.float32, 50))
        torch.testing.assert_close(lse.double(), expected_lse, **tolerance(torch.float32, 50))
    assert torch.equal(out[3:5], torch.zeros(2, 4, 24))  # without keys there is no last one


def test_both_with_the_options_of_own_keys(isa):
    """Windows and biases are those of a sequence's own keys."""
    cu = packed((9, 20))
    q, k, v = (heads(29, 2, 16) for _ in range(3))
    extra = {"k_prefix": heads(3, 2, 16), "v_prefix": heads(3, 2, 16), "reroute_last": True}
    options = {"window_size": (4, 2), "alibi_slopes": torch.tensor([0.2, 0.5])}
    actual, lse = varlen_attention(q, k, v, cu, cu, 20, 20, **options, **extra, return_lse=True)
    parts = [varlen_attention(q, k, v, cu, cu, 20, 20, **options, return_lse=True)]
    last = cu[1:].long() - 1
    offsets = torch.arange(3, dtype=torch.int32)
    for keys, values, count in (
        (extra["k_prefix"].repeat(2, 1, 1), extra["v_prefix"].repeat(2, 1, 1), 3),
        (k[last], v[last], 1),
    ):
        parts.append(
            varlen_attention(q, keys, values, cu, offsets * count, 20, count, return_lse=True)
        )
    total = torch.stack([lse for _, lse in parts]).logsumexp(0)
    expected = sum((lse - total).exp().t()[..., None] * out for out, lse in parts)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(lse, total)


def test_biases_of_heads_and_gradients(isa):
    cu_q, cu_k = packed((3, 0, 2, 1)), packed((4, 2, 0, 1))
    inputs = [
        heads(6, 4, 8), heads(7, 2, 8), heads(7, 2, 5), heads(3, 2, 8), heads(3, 2, 5),
        torch.randn(4), torch.randn(4),
    ]  # fmt: skip

    def attend(q, k, v, k_prefix, v_prefix, prefix_bias, reroute_bias):
        out, lse = varlen_attention(
            q, k, v, cu_q, cu_k, 3, 4, causal=True, k_prefix=k_prefix, v_prefix=v_prefix,
            prefix_bias=prefix_bias, reroute_last=True, reroute_bias=reroute_bias, return_lse=True,
        )  # fmt: skip
        return out, lse

    check_gradients(attend, inputs, ("varlen_attention", "varlen_attention_backward"))
    doubles = [x.double() for x in inputs]
    q, k, v, k_prefix, v_prefix, prefix_bias, reroute_bias = doubles
    extras = [
        ([k_prefix] * 4, [v_prefix] * 4, prefix_bias), last_keys(k, v, cu_k, reroute_bias),
    ]  # fmt: skip
    expected = oracle(q, k, v, cu_q, cu_k, extras, True)
    for a, e in zip(attend(*doubles), expected, strict=True):
        torch.testing.assert_close(a, e)


def test_own_prefix_gradients():
    cu = packed((3, 0, 2))
    inputs = [*(heads(5, 1, 4) for _ in range(3)), torch.randn(3, 2, 1, 4), torch.randn(3, 2, 1, 4)]

    def attend(q, k, v, k_prefix, v_prefix):
        return varlen_attention(q, k, v, cu, cu, 3, 3, k_prefix=k_prefix, v_prefix=v_prefix)

    check_gradients(attend, inputs, ("varlen_attention_backward",))


def test_no_key_at_all():
    """Zero, and zero gradients, where neither the sequence nor a prefix has a key."""
    leaves = [heads(3, 2, 24).requires_grad_(), *[EMPTY.clone().requires_grad_() for _ in range(4)]]
    q, k, v, k_prefix, v_prefix = leaves
    out = varlen_attention(
        q, k, v, packed((3,)), packed((0,)), 3, 0, k_prefix=k_prefix, v_prefix=v_prefix,
        reroute_last=True,
    )  # fmt: skip
    assert torch.equal(out, torch.zeros(3, 2, 24))
    out.sum().backward()
    assert torch.equal(q.grad, torch.zeros(3, 2, 24))
    for x in (k, v, k_prefix, v_prefix):
        assert x.grad is None or x.grad.shape == EMPTY.shape
    none = varlen_attention(EMPTY, EMPTY, EMPTY, packed(()), packed(()), 0, 0, reroute_last=True)
    assert none.shape == (0, 2, 24)


def test_no_neighbour_and_no_batch_in_the_bits(isa):
    cu = packed((20, 33, 5))
    inputs = [heads(58, n, 32) for n in (4, 2, 2)]
    prefix = {"k_prefix": heads(6, 2, 32), "v_prefix": heads(6, 2, 32), "reroute_last": True}
    grad = torch.randn(58, 4, 32)
    middle = slice(20, 53)

    def run(cu, part):
        leaves = [x[part].clone().requires_grad_() for x in inputs]
        out = varlen_attention(*leaves, cu, cu, 33, 33, **prefix)
        return out, *torch.autograd.grad(out, leaves, grad[part])

    alone = run(packed((33,)), middle)
    for x in inputs:
        x[:20], x[53:] = torch.nan, torch.inf
    for a, b in zip(alone, run(cu, slice(None)), strict=True):
        assert torch.equal(a, b[middle])


def test_same_bits_for_any_thread_count(isa):
    cu, inputs = packed((200, 0, 3, 90)), [heads(293, n, 32) for n in (4, 2, 2)]
    k_prefix, v_prefix = heads(7, 2, 32), heads(7, 2, 32)
    grad = torch.randn(293, 4, 32)

    def run():
        leaves = [x.clone().requires_grad_() for x in (*inputs, k_prefix, v_prefix)]
        out = varlen_attention(
            *leaves[:3], cu, cu, 200, 200, k_prefix=leaves[3], v_prefix=leaves[4], reroute_last=True
        )
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    check_threads(run)


def test_dropout_of_extra_keys():
    """By the sequence's seed, and not as its own keys drop."""
    cu, v = packed((8, 8)), torch.zeros(16, 1, 8)
    q, k, k_prefix = torch.zeros(16, 1, 8), torch.zeros(16, 1, 8), torch.zeros(8, 1, 8)
    seeds = torch.tensor([3, 4])

    def run(cu, rows, seeds, **values):
        return varlen_attention(
            q[rows], k[rows], values.get("v", v)[rows], cu, cu, 8, 8, 0.5, dropout_seeds=seeds,
            k_prefix=k_prefix, v_prefix=values.get("v_prefix", v[:8]),
        )  # fmt: skip

    eye = torch.eye(8)[:, None]
    everything = slice(None)
    of_own = run(cu, everything, seeds, v=eye.repeat(2, 1, 1))
    of_prefix = run(cu, everything, seeds, v_prefix=eye)
    for out in (of_own, of_prefix):
        kept = out.unique()
        torch.testing.assert_close(kept, torch.tensor([0, 2 / 16]))
    assert not torch.equal(of_own, of_prefix)
    alone = run(packed((8,)), slice(8, 16), seeds[1:], v_prefix=eye)
    assert torch.equal(alone, of_prefix[8:])


def test_reference():
    cu, (q, k, v) = packed((9, 0, 20)), (heads(29, n, 24) for n in (4, 2, 2))
    extra = {"k_prefix": heads(3, 2, 24), "v_prefix": heads(3, 2, 24), "reroute_last": True}
    expected = varlen_attention(q, k, v, cu, cu, 20, 20, **extra)
    with use_backend("reference"):
        actual = varlen_attention(q, k, v, cu, cu, 20, 20, **extra)
    torch.testing.assert_close(actual, expected)


def test_compiled():
    def attend(q, k, v, k_prefix, v_prefix, cu):
        return varlen_attention(
            q * 2, k, v, cu, cu, len(q), len(q), causal=True, k_prefix=k_prefix, v_prefix=v_prefix,
            prefix_bias=0.5, reroute_last=True, reroute_bias=1.0,
        ).relu()  # fmt: skip

    calls = [
        (*(heads(sum(lengths), 2, 32) for _ in range(3)), heads(6, 2, 32), heads(6, 2, 32),
         packed(lengths))
        for lengths in ((3, 4), (5, 0, 9), (2, 2, 2, 40))
    ]  # fmt: skip
    check_compiled(attend, calls, backward=False)
    check_compiled(attend, calls, backward=True)


def test_merge_attention():
    cu, (q, k, v) = packed((20, 0, 13)), (heads(33, 2, 16) for _ in range(3))
    half = packed((10, 0, 6))
    first = torch.cat([torch.arange(10), torch.arange(20, 26)])
    second = torch.tensor([i for i in range(33) if i not in first.tolist()])
    parts = [
        varlen_attention(q, k[i], v[i], cu, c, 20, 20, return_lse=True)
        for i, c in ((first, half), (second, cu - half))
    ]
    expected = varlen_attention(q, k, v, cu, cu, 20, 20, return_lse=True)
    for a, e in zip(merge_attention(*parts[0], *parts[1]), expected, strict=True):
        torch.testing.assert_close(a, e)

    def merge(out_a, lse_a, out_b, lse_b):
        hidden = torch.zeros(2, 3, dtype=torch.bool)
        hidden[0, 1], hidden[1, 2] = True, True
        lse_a = lse_a.masked_fill(hidden, -torch.inf)
        out, lse = merge_attention(
            out_a, lse_a, out_b, lse_b.masked_fill(hidden.flip(0), -torch.inf)
        )
        return out, lse

    sizes = ((3, 2, 4), (2, 3), (3, 2, 4), (2, 3))
    check_gradients(merge, [torch.randn(size) for size in sizes], ())
    nothing = torch.full((2, 3), -torch.inf)
    leaves = [torch.randn(3, 2, 4, requires_grad=True), nothing.clone().requires_grad_()]
    out, lse = merge_attention(*leaves, *leaves)
    assert torch.equal(out, torch.zeros(3, 2, 4))
    assert torch.equal(lse, nothing)
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert torch.equal(grad, torch.zeros_like(grad))


Q, CU = torch.zeros(4, 4, 8), packed((4,))
K = torch.zeros(4, 2, 8)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "v_prefix must be a torch.Tensor, got NoneType", {"k_prefix": K}),
        (TypeError, "k_prefix must have dtype float32", {"k_prefix": K.double(), "v_prefix": K}),
        (ValueError, "k_prefix must be on device", {"k_prefix": K.to("meta"), "v_prefix": K}),
        (ValueError, "k_prefix must have the shape", {"k_prefix": K[0], "v_prefix": K}),
        (ValueError, r"\(prefix, 2, 8\)", {"k_prefix": K, "v_prefix": K[:, :, :7]}),
        (ValueError, "for 1 sequences, got 2", {"k_prefix": K.expand(2, 4, 2, 8), "v_prefix": K}),
        (ValueError, "as long, got 3 and 4", {"k_prefix": K[:3], "v_prefix": K}),
        (ValueError, "prefix_bias must have one element per head of q, 4, got 3",
         {"k_prefix": K, "v_prefix": K, "prefix_bias": torch.zeros(3)}),
        (ValueError, "reroute_bias must have 1 dimensions",
         {"reroute_last": True, "reroute_bias": torch.zeros(())}),
        (ValueError, "cu_seqlens_k must start at 0", {"reroute_last": True, "cu": packed((9,))}),
    ],
)  # fmt: skip
def test_bad_arguments(error, message, options):
    cu = options.pop("cu", CU)
    with pytest.raises(error, match=message):
        varlen_attention(Q, K, K, CU, cu, 4, 4, **options)


def test_merge_bad_arguments():
    out, lse = torch.zeros(3, 2, 4), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"lse_a must have the shape \(2, 3\), got \(3, 2\)"):
        merge_attention(out, lse.t(), out, lse)
    with pytest.raises(ValueError, match=r"out_b must have the shape \(3, 2, 4\)"):
        merge_attention(out, lse, out[:2], lse)
