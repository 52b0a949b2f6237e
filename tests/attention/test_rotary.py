from __future__ import annotations

from functools import partial
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
from emblas._op import FLOATS
from emblas.attention import frequencies, rotary, rotary_, rotary_tables, self_extend

LAYOUTS = ("contiguous", "fused", "head-major", "unaligned")


def oracle(x, cos, sin, position_ids=None, interleaved=False):
    """The definition, one pair at a time, in float64."""
    out = x.double().clone()
    pairs = cos.shape[1]
    for t in range(len(x)):
        row = t if position_ids is None else position_ids[t]
        for i in range(pairs):
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, pairs + i)
            c, s = cos[row, i].double(), sin[row, i].double()
            out[t, :, a] = c * x[t, :, a].double() - s * x[t, :, b].double()
            out[t, :, b] = c * x[t, :, b].double() + s * x[t, :, a].double()
    return out


def tables(rows, pairs):
    return rotary_tables(frequencies.plain(max(2 * pairs, 2))[:pairs], rows)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("dim", "pairs"), [(1, 0), (2, 1), (24, 12), (64, 32), (80, 17), (40, 5)])
def test_equals_oracle(isa, dim, pairs, dtype, interleaved):
    x = torch.randn(7, 3, dim).to(dtype)
    cos, sin = tables(50, pairs)
    position_ids = torch.tensor([0, 49, 3, 3, 17, 1, 2])
    expected = oracle(x, cos, sin, position_ids, interleaved)
    actual = rotary(x, cos, sin, position_ids, interleaved=interleaved)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, **tolerance(dtype, 2))
    assert rotary_(x, cos, sin, position_ids.int(), interleaved=interleaved) is x
    assert torch.equal(x, actual)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(isa, layout, interleaved):
    x, (cos, sin) = torch.randn(9, 4, 48), tables(9, 16)
    wide = torch.zeros(9, 4, 100)
    views = {
        "contiguous": x.clone(),
        "fused": x.repeat(1, 3, 1).view(9, 3, 4, 48)[:, 1],
        "head-major": x.transpose(0, 1).contiguous().transpose(0, 1),
        "unaligned": wide[:, :, 3:51],
    }
    view = views[layout]
    view.copy_(x)
    expected = rotary(x, cos, sin, interleaved=interleaved)
    assert torch.equal(rotary(view, cos, sin, interleaved=interleaved), expected)
    rotary_(view, cos, sin, interleaved=interleaved)
    assert torch.equal(view, expected)
    assert torch.count_nonzero(wide[:, :, :3]) == torch.count_nonzero(wide[:, :, 51:]) == 0


def test_queries_and_keys_in_one_call(isa):
    qkv, (cos, sin) = torch.randn(9, 3, 4, 32), tables(9, 16)
    q, k, v = qkv.clone().unbind(1)
    rotary_(qkv[:, :2].flatten(1, 2), cos, sin)
    assert torch.equal(qkv, torch.stack([rotary(q, cos, sin), rotary(k, cos, sin), v], 1))


def test_products_depend_on_distance():
    q, k = torch.randn(2, 1, 2, 32, dtype=torch.float64)
    cos, sin = rotary_tables(frequencies.plain(32), 100, dtype=torch.float64)

    def product(i, j):
        turned = (rotary(x, cos, sin, torch.tensor([p])) for x, p in ((q, i), (k, j)))
        a, b = turned
        return (a * b).sum()

    torch.testing.assert_close(product(7, 3), product(99, 95))


def test_reference():
    x, (cos, sin) = torch.randn(7, 3, 40), tables(50, 12)
    position_ids = torch.arange(7) * 7
    for interleaved in (False, True):
        expected = oracle(x, cos, sin, position_ids, interleaved)
        with use_backend("reference"):
            actual = rotary(x, cos, sin, position_ids, interleaved=interleaved)
            again = rotary_(x.clone(), cos, sin, position_ids, interleaved=interleaved)
        torch.testing.assert_close(actual.double(), expected, **tolerance(torch.float32, 2))
        assert torch.equal(again, actual)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients(isa, interleaved):
    cos, sin = rotary_tables(frequencies.plain(12), 20, dtype=torch.float64)
    ids, x = torch.tensor([3, 19, 0]), torch.randn(3, 2, 15)

    def turn(x):
        return rotary(x, cos, sin, ids, interleaved=interleaved)

    def in_place(x):
        return rotary_(x.clone(), cos, sin, ids, interleaved=interleaved)

    check_gradients(turn, [x], ("rotary", "rotary_backward"))
    check_gradients(in_place, [x], ("rotary_", "rotary_backward"))


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients_of_tables(interleaved):
    """Of tokens that share a row, and of rows that no token has."""
    cos, sin, x = torch.randn(4, 3), torch.randn(4, 3), torch.randn(3, 2, 8)

    def turn(x, cos, sin, ids=None):
        return rotary(x, cos, sin, ids, interleaved=interleaved)

    def in_place(x, cos, sin):
        return rotary_(x * 1, cos, sin, torch.tensor([1, 3, 1]), interleaved=interleaved)

    names = ("rotary", "rotary_backward")
    check_gradients(partial(turn, ids=torch.tensor([1, 3, 1])), [x, cos, sin], names)
    check_gradients(turn, [x, cos[:3], sin[:3]], names)
    check_gradients(in_place, [x, cos, sin], ("rotary_", "rotary_backward"))
    check_gradients(lambda sin: turn(x.double(), cos[:3].double(), sin), [sin[:3]], names[:1])
    with pytest.raises(ValueError, match="position_ids must be rows"):
        turn(x, cos.requires_grad_(), sin, torch.tensor([0, 4, 1]))
    calls = [(torch.randn(n, 2, 8), cos, sin, torch.arange(n) % 4) for n in (5, 7)]
    check_compiled(turn, calls, backward=True)
    x = torch.randn(3, 2, 8).bfloat16()
    turn(x, cos, sin, torch.tensor([1, 3, 1])).float().sum().backward()
    assert cos.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_backward_turns_back(isa, dtype):
    cos, sin = tables(33, 20)
    x = torch.randn(33, 2, 48, dtype=dtype, requires_grad=True)
    grad = torch.randn(33, 2, 48).to(dtype)
    (actual,) = torch.autograd.grad(rotary(x, cos, sin), x, grad)
    assert torch.equal(actual, rotary(grad, cos, -sin))


def test_no_neighbour_in_the_bits(isa):
    x, (cos, sin) = torch.randn(40, 2, 32), tables(40, 16)
    before = rotary(x, cos, sin)[10:20]
    assert torch.equal(rotary(x[10:20], cos[10:20], sin[10:20]), before)
    x[:10], x[20:] = torch.nan, torch.inf
    assert torch.equal(rotary(x, cos, sin)[10:20], before)


def test_same_bits_for_any_thread_count(isa):
    x, (cos, sin) = torch.randn(2000, 4, 64), tables(2000, 32)
    check_threads(lambda: rotary(x, cos, sin))
    check_threads(lambda: rotary(x, cos, sin, interleaved=True))


def test_empty():
    cos, sin = tables(5, 8)
    x = torch.empty(0, 2, 16)
    assert rotary(x, cos, sin, torch.empty(0, dtype=torch.long)).shape == (0, 2, 16)
    assert rotary(torch.empty(5, 0, 16), cos, sin).shape == (5, 0, 16)


def test_operator_contract():
    x, (cos, sin) = torch.randn(7, 3, 40), tables(7, 12)
    for ids in (None, torch.arange(7)):
        for interleaved in (False, True):
            for name in ("rotary", "rotary_backward", "rotary_"):
                check_op(name, x.clone(), cos, sin, ids, interleaved)
    with only_kernels("rotary", "rotary_backward"):
        rotary(x.requires_grad_(), cos, sin).sum().backward()


def test_compiled():
    cos, sin = tables(64, 12)

    def turn(x, ids):
        return rotary(x * 2, cos, sin, ids).relu()

    def in_place(x, ids):
        return rotary_(x * 2, cos, sin, ids).relu()

    calls = [(torch.randn(n, 3, 40), torch.arange(n)) for n in (7, 12, 30, 64)]
    check_compiled(turn, calls, backward=False)
    check_compiled(turn, calls, backward=True)
    check_compiled(in_place, calls, backward=False)


X = torch.zeros(4, 2, 8)
COS = torch.zeros(4, 4)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "x must be a torch.Tensor", ([1.0], COS, COS)),
        (TypeError, "x must have dtype float32", (X.long(), COS, COS)),
        (ValueError, "x must have 3 dimensions", (X[0], COS, COS)),
        (TypeError, "cos must have dtype", (X, COS.int(), COS)),
        (ValueError, "sin must be on device cpu", (X, COS, COS.to("meta"))),
        (ValueError, "cos and sin must have one shape", (X, COS, COS[:, :3])),
        (ValueError, "at most head_dim / 2 = 4 columns, got 5", (X, *[torch.zeros(4, 5)] * 2)),
        (ValueError, "a row for each of 4 tokens, got 3", (X, COS[:3], COS[:3])),
        (TypeError, "position_ids must have dtype", (X, COS, COS, torch.zeros(4))),
        (ValueError, "each of 4 tokens, got 3", (X, COS, COS, torch.arange(3))),
        (ValueError, "position_ids must be rows", (X, COS, COS, torch.tensor([0, 1, 2, 4]))),
        (ValueError, "position_ids must be rows", (X, COS, COS, torch.tensor([0, 1, 2, -1]))),
    ],
)
def test_bad_arguments(error, message, arguments):
    for turn in (rotary, rotary_):
        with pytest.raises(error, match=message):
            turn(*arguments)


def test_in_place_needs_vectors():
    with pytest.raises(ValueError, match="x must have a contiguous last dimension"):
        rotary_(torch.zeros(4, 8, 2).transpose(1, 2), COS, COS)


def test_direct_call_is_guarded():
    op = torch.ops.emblas.rotary
    for args in ((X, COS.half(), COS, None), (X, COS[:3], COS[:3], None), (X[0], COS, COS, None),
                 (X, COS, COS, torch.arange(4).int()), (X.half(), COS.half(), COS.half(), None),
                 (X, *[torch.zeros(4, 5)] * 2, None)):  # fmt: skip
        with pytest.raises(RuntimeError, match="emblas: "):
            op(*args, False)


# --- frequencies ---------------------------------------------------------------------------------


def test_several_tables():
    """A sequence of its own frequencies takes the rows of its table."""
    steps = torch.stack([frequencies.plain(16), frequencies.ntk(16, 4.0)])
    cos, sin = rotary_tables(steps, 30)
    x, cu = torch.randn(40, 2, 16), packed((10, 30))
    table, position = torch.tensor([1, 0]), torch.cat([torch.arange(10), torch.arange(30)])
    actual = rotary(x, cos, sin, table.repeat_interleave(cu.diff()) * 30 + position)
    for b, (begin, end) in enumerate(pairwise(cu.tolist())):
        own = rotary_tables(steps[table[b]], end - begin)
        assert torch.equal(actual[begin:end], rotary(x[begin:end], *own))


def _transformers(kind, dim=64, **scaling):
    modeling = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    parameters = {"rope_type": kind, "rope_theta": 10000.0, **scaling}
    config = LlamaConfig(
        hidden_size=4 * dim, num_attention_heads=4, max_position_embeddings=2048,
        rope_parameters=parameters,
    )  # fmt: skip
    return modeling.ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))


@pytest.mark.parametrize("factor", [1.0, 4.0, 16.0])
def test_position_interpolation_equals_transformers(factor):
    expected, _ = _transformers("linear", factor=factor)
    actual = frequencies.position_interpolation(64, factor)
    torch.testing.assert_close(actual, expected.double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("factor", [1.0, 4.0, 16.0])
def test_yarn_equals_transformers(factor):
    expected, scale = _transformers(
        "yarn", factor=factor, original_max_position_embeddings=2048, beta_fast=32, beta_slow=1
    )
    actual = frequencies.yarn(64, factor, 2048)
    torch.testing.assert_close(actual.inverse_frequencies, expected.double(), rtol=1e-5, atol=1e-9)
    assert actual.scale == pytest.approx(scale)
    cos, sin = rotary_tables(*actual[:1], 5, scale=actual.scale)
    torch.testing.assert_close(cos**2 + sin**2, torch.full((5, 32), scale**2))


def test_ntk_slows_down_the_last_pair_alone():
    plain, slow = frequencies.plain(64), frequencies.ntk(64, 8.0)
    torch.testing.assert_close(slow[0], plain[0])
    torch.testing.assert_close(slow[-1], plain[-1] / 8)
    assert (slow[1:] < plain[1:]).all()


def test_clex_follows_a_curve_with_a_closed_form():
    """With log-frequencies that fall by log t, position interpolation comes out."""
    actual = frequencies.clex(32, lambda t, log: -torch.ones_like(log) / t, 5, step=0.1)
    expected = torch.stack([frequencies.position_interpolation(32, t) for t in range(1, 6)])
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    weight = torch.zeros(16, dtype=torch.float64, requires_grad=True)
    frequencies.clex(32, lambda t, log: weight * log, 2, step=0.5).sum().backward()
    assert weight.grad is not None
    assert torch.isfinite(weight.grad).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: frequencies.plain(7), "dim must be even and positive, got 7"),
        (lambda: frequencies.plain(8, base=0), "base must be positive"),
        (lambda: frequencies.position_interpolation(8, 0.5), "factor must be at least 1, got 0.5"),
        (lambda: frequencies.ntk(2, 2.0), "dim must be at least 4"),
        (lambda: frequencies.yarn(8, 2.0, 0), "original_length must be positive"),
        (lambda: frequencies.yarn(8, 2.0, 5, beta_fast=1, beta_slow=2), "beta_fast must pass"),
        (lambda: frequencies.clex(8, lambda t, x: x, 0), "max_factor must be at least 1"),
        (lambda: frequencies.clex(8, lambda t, x: x, 2, step=0), "step must be positive"),
        (lambda: rotary_tables(torch.zeros(1, 1, 2), 3), "inverse_frequencies must have the shape"),
    ],
)
def test_bad_frequencies(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- SelfExtend ----------------------------------------------------------------------------------


def _self_extend_oracle(q, k, v, cu, steps, group, window, causal):
    """All pairs of each sequence by their own distance, in float64."""
    out = torch.zeros(*q.shape[:2], v.shape[2], dtype=torch.float64)
    for begin, end in pairwise(cu.tolist()):
        for i in range(end - begin):
            last = i + 1 if causal else end - begin
            scores = torch.zeros(q.shape[1], last, dtype=torch.float64)
            for j in range(last):
                at_q, at_k = i, j
                if i - j >= window:
                    at_q, at_k = i // group + window - window // group, j // group
                if j - i >= window:
                    at_q, at_k = i // group, j // group + window - window // group
                cos, sin = rotary_tables(steps, end - begin + window, dtype=torch.float64)
                a, b = (
                    oracle(x[begin + p : begin + p + 1], cos, sin, [at])
                    for x, p, at in ((q, i, at_q), (k, j, at_k))
                )
                b = b.repeat_interleave(q.shape[1] // k.shape[1], 1)
                scores[:, j] = (a * b).sum(2)[0] * q.shape[2] ** -0.5
            values = v[begin : begin + last].double().repeat_interleave(q.shape[1] // k.shape[1], 1)
            out[begin + i] = torch.einsum("hj,jhd->hd", scores.softmax(1), values)
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("group", "window"), [(3, 4), (4, 10), (1, 3), (5, 40)])
def test_self_extend_equals_oracle(causal, group, window):
    cu, steps = packed((0, 17, 3, 1)), frequencies.plain(8)
    q, k, v = (torch.randn(21, n, 8) * 2 for n in (2, 1, 1))
    actual = self_extend(
        q, k, v, cu, 17, *rotary_tables(steps, 17), group=group, window=window, causal=causal
    )
    expected = _self_extend_oracle(q, k, v, cu, steps, group, window, causal)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


def test_self_extend_gradients():
    cu, tables = packed((7, 0, 2)), rotary_tables(frequencies.plain(4), 7, dtype=torch.float64)
    inputs = [torch.randn(9, n, 4) for n in (2, 1, 1)]

    def attend(q, k, v):
        return self_extend(q, k, v, cu, 7, *tables, group=2, window=3)

    check_gradients(attend, inputs, ("rotary_backward", "varlen_attention_backward"))


def test_self_extend_compiled():
    cos, sin = rotary_tables(frequencies.plain(8), 64)

    def attend(q, k, v, cu):
        return self_extend(q, k, v, cu, len(q), cos, sin, group=2, window=3)

    calls = [
        (*(torch.randn(sum(lengths), 2, 8) for _ in range(3)), packed(lengths))
        for lengths in ((3, 4), (5, 0, 9), (2, 2, 2, 40))
    ]
    check_compiled(attend, calls, backward=True)


def test_self_extend_bad_arguments():
    x, cu, (cos, sin) = torch.zeros(4, 1, 8), packed((4,)), tables(4, 4)
    for options in ({"group": 0, "window": 3}, {"group": 2, "window": 0}):
        with pytest.raises(ValueError, match="group and window must be at least 1"):
            self_extend(x, x, x, cu, 4, cos, sin, **options)
    with pytest.raises(ValueError, match="position_ids must be rows"):
        self_extend(x, x, x, cu, 4, cos[:2], sin[:2], group=2, window=2)
