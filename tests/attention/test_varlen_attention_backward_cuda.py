"""What only the CUDA kernels of attention's gradients have: teams of warps, tiles of keys, stages.

That they compute the right thing is in test_executors.py too.
"""

from __future__ import annotations

import pytest
import torch
from contract import packed
from emblas import _op
from emblas.attention import reference
from simt import emulator

pytestmark = pytest.mark.skipif(bool(emulator.why_not()), reason=emulator.why_not() or "")

ROWS = 64  # of a tile that a block owns
# Keys, and queries, of a tile that it walks through, by the widest vectors.
STEPS = {32: (64, 32), 64: (64, 32), 128: (32, 32), 256: (16, 16)}
HALF = torch.float16


@pytest.fixture(scope="module")
def backward():
    emulator.library()
    return torch.ops.emblas_simt.varlen_attention_backward_cuda


def wide(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def arguments(
    lengths_q,
    lengths_k=None,
    *,
    dim=32,
    value_dim=None,
    heads=1,
    key_heads=1,
    dtype=HALF,
    scale=None,
    window=(-1, -1),
    shaping=(0.0, None),
    grad_lse=True,
):
    """The maximum lengths are wrong: nobody plans by them."""
    lengths_k = lengths_q if lengths_k is None else lengths_k
    q = torch.randn(sum(lengths_q), heads, dim).to(dtype)
    k = torch.randn(sum(lengths_k), key_heads, dim).to(dtype)
    v = torch.randn(sum(lengths_k), key_heads, value_dim or dim).to(dtype)
    others = packed(lengths_q), packed(lengths_k), 1, 1, scale, *window
    return with_results(q, k, v, *others, *shaping, grad_lse=grad_lse)


def with_results(q, k, v, *others, grad_lse=True):
    softcap, slopes = others[-2:]
    out, lse = reference.varlen_attention(
        *map(wide, (q, k, v, *others[:-2])), True, softcap, wide(slopes)
    )
    grad_out = torch.randn_like(out).to(q.dtype)
    above = torch.randn_like(lse).float() if grad_lse else None
    return grad_out, above, q, k, v, out.to(q.dtype), lse.float(), *others


def check(backward, args):
    found = backward(*args)
    expected = reference.varlen_attention_backward(*map(wide, args))
    assert found[3].shape == (0, 0)
    for x, y in zip(found[:3], expected, strict=False):
        assert x.dtype == args[2].dtype
        # Weights, slopes and results of forward are rounded to 16 bits, and the gradient.
        error = 2 * torch.finfo(x.dtype).eps
        largest = y.abs().amax().item() if y.numel() else 0
        torch.testing.assert_close(x.double(), y, rtol=error, atol=error * max(1, largest))


@pytest.mark.parametrize("dim", STEPS)
def test_edges_of_tiles(backward, dim):
    keys, queries = STEPS[dim]
    check(backward, arguments((1, 2), (keys - 1, keys + 1), dim=dim))
    check(backward, arguments((queries - 1, queries + 1), (2, 1), dim=dim, grad_lse=False))
    check(backward, arguments((2 * queries,), (2 * keys,), dim=dim, dtype=torch.bfloat16))


def test_edges_of_own_tiles(backward):
    lengths, others = (ROWS - 1, 0, ROWS, ROWS + 1, 0, 0, 1), (9, 3, 0, 17, 1, 0, 2)
    check(backward, arguments(lengths, others))
    check(backward, arguments(others, lengths))
    check(backward, arguments((2 * ROWS + 1, 0), (5, 0), dim=24, heads=2))
    check(backward, arguments((5, 0), (2 * ROWS + 1, 0), dim=72))
    check(backward, arguments((0, 0, 1, 0), (0, 2, 3, 0)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, HALF], ids=str)
@pytest.mark.parametrize(
    ("dim", "value_dim"),
    [(1, 1), (16, 33), (33, 7), (8, 64), (65, 8), (24, 100), (129, 24), (17, 255), (256, 256)],
)
def test_widths(backward, dim, value_dim, dtype):
    check(backward, arguments((9, 20), dim=dim, value_dim=value_dim, dtype=dtype))


WINDOWS = ((-1, 0), (0, 0), (5, 3), (70, -1), (-1, 70), (0, -1), (66, 1), (2**40, 2**31))


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_windows(backward, window):
    """With queries before the first key, and keys before the first query."""
    check(backward, arguments((70, 5, 90), (70, 99, 20), window=window))


@pytest.mark.parametrize("window", [(0, 0), (3, 20), (-1, 15), (16, -1)], ids=str)
def test_windows_over_small_tiles(backward, window):
    check(backward, arguments((40, 3), (40, 50), dim=130, window=window, dtype=torch.bfloat16))
    check(backward, arguments((40, 3), (40, 50), dim=72, window=window))


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2), (3, 1), (0, 0), (0, 2)])
def test_grouped_heads(backward, heads, key_heads):
    check(backward, arguments((7, 2), (3, 9), heads=heads, key_heads=key_heads))


@pytest.mark.parametrize("dim", [24, 130])
def test_groups_over_many_tiles(backward, dim):
    """The next tile may be another head's."""
    options = {"heads": 4, "key_heads": 2, "window": (12, 9)}
    check(backward, arguments((40, 0, 3), dim=dim, **options))


def test_layouts(backward):
    others = arguments((7, 13), heads=2, key_heads=2, dim=24)[7:]
    fused = torch.randn(20, 3, 2, 24).to(HALF)
    head_major = torch.randn(3, 2, 20, 24).to(HALF)
    shifted = torch.randn(3, 20, 2, 25).to(HALF)
    sparse = torch.randn(3, 40, 2, 24).to(HALF)
    for qkv in (
        fused.unbind(1), head_major.transpose(1, 2), shifted[..., 1:], shifted[..., :24],
        sparse[:, ::2],
    ):  # fmt: skip
        check(backward, with_results(*qkv, *others))


@pytest.mark.parametrize("which", [0, 2, 3, 4, 5])
@pytest.mark.parametrize("part", ["address", "tokens", "heads"])
def test_one_unaligned(backward, which, part):
    """Whatever keeps a vector of one tensor from starting at a multiple of 16 bytes."""
    args = list(arguments((5, 9), heads=2, key_heads=2, dim=16))
    x = args[which]
    strides = {"address": (32, 16), "tokens": (34, 16), "heads": (40, 17)}[part]
    storage = torch.empty(1000, dtype=HALF)[part == "address" :]
    args[which] = storage.as_strided(x.shape, (*strides, 1)).copy_(x)
    expected = backward(*args[:which], x, *args[which + 1 :])
    assert all(map(torch.equal, backward(*args), expected))


def test_one_gradient_for_all(backward):
    """As autograd expands that of a sum."""
    grad_out, *rest = arguments((5, 9), dim=40)
    check(backward, (torch.ones(1, 1, 40).to(HALF).expand(grad_out.shape), *rest))


@pytest.mark.parametrize("scale", [0.0, -0.7, 1.0])
def test_scales(backward, scale):
    check(backward, arguments((9, 70), scale=scale))


@pytest.mark.parametrize("dim", [32, 72, 130])
def test_softcap(backward, dim):
    check(backward, arguments((9, 20), dim=dim, scale=0.5, shaping=(2.0, None)))
    check(backward, arguments((9,), dim=dim, scale=0.5, shaping=(0.25, None)))


def test_alibi(backward):
    slopes = torch.tensor([[0.5, 0.1], [2.0, 0.0], [0.01, 1.0]])
    for given in (slopes, slopes[:1]):
        shaping = (0.0, given)
        check(backward, arguments((3, 70, 9), (5, 66, 20), heads=2, shaping=shaping))
    options = {"heads": 2, "window": (9, 4), "shaping": (3.0, slopes[1:2])}
    check(backward, arguments((30,), dim=130, **options))


@pytest.mark.parametrize("dim", [24, 72, 130])
def test_queries_without_keys(backward, dim):
    args = arguments((9, 40, 1), (4, 0, 1), dim=dim, window=(2, 0))
    hidden = torch.ones(50, dtype=torch.bool)
    hidden[[5, 6, 7, 8, 49]] = False
    grad_q, grad_k, grad_v, _ = backward(*args)
    assert (grad_q[hidden] == 0).all()
    assert (grad_q[~hidden] != 0).any(2).all()
    args[0][hidden], args[2][hidden] = 9, -9
    for x, y in zip(backward(*args)[1:3], (grad_k, grad_v), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dim", [24, 72, 130])
def test_same_bits_whatever_else_is_packed(backward, dim):
    """And neighbours' values are never used, be they NaN."""
    args = list(arguments((11, 40, 5), (9, 35, 30), dim=dim, window=(30, 9)))
    of_queries, of_keys = slice(11, 51), slice(9, 44)
    alone = [
        x[of_keys] if i in (3, 4) else x[:, of_queries] if i in (1, 6) else x[of_queries]
        for i, x in enumerate(args[:7])
    ]
    alone[1], alone[6] = alone[1].contiguous(), alone[6].contiguous()
    expected = backward(*alone, packed((40,)), packed((35,)), *args[9:])[:3]

    def own(grads):
        return grads[0][of_queries], grads[1][of_keys], grads[2][of_keys]

    assert all(map(torch.equal, own(backward(*args)), expected))
    for i, x in enumerate(args[:7]):
        kept = of_keys if i in (3, 4) else of_queries
        rows = x.t() if i in (1, 6) else x
        rows[: kept.start], rows[kept.stop :] = torch.nan, torch.nan
    assert all(map(torch.equal, own(backward(*args)), expected))


@pytest.mark.parametrize("order", emulator.ORDERS)
@pytest.mark.parametrize("dim", [32, 136])
def test_same_bits_in_any_order(backward, order, dim):
    torch.manual_seed(1)
    args = arguments((35, 3), (20, 17), dim=dim, heads=2)
    expected = backward(*args)
    with emulator.schedule(order, seed=3, preemption=0.2):
        assert all(map(torch.equal, backward(*args), expected))


@pytest.mark.parametrize("dim", [16, 130])
@pytest.mark.parametrize(
    "wrong",
    [(5, 2, 9, 12), (-4, 3, 12, 12), (0, 2**31 - 1, -(2**31), 12), (12, 12, 0, 0), (0, 1, 2, 3),
     (2**31 - 1,) * 4, (-(2**31),) * 4, (9, 10, 90, 12)],
)  # fmt: skip
def test_wrong_offsets_stay_in_bounds(backward, wrong, dim):
    args = arguments((4, 3, 5), dim=dim)
    wrong, right = torch.tensor(wrong, dtype=torch.int32), args[7]
    with emulator.schedule(check_races=False, check_uninitialized=False):
        for pair in ((wrong, right), (right, wrong), (wrong, wrong)):
            backward(*args[:7], *pair, *args[9:])


@pytest.mark.parametrize(
    ("window", "of_queries", "of_keys"),
    [((-1, -1), 3 * 5, 3 * 5), ((-1, 0), 2 + 4 + 5, 5 + 3 + 1), ((16, 0), 2 + 3 + 1, 3 + 3 + 1)],
)
def test_tiles_that_nobody_sees_are_skipped(backward, window, of_queries, of_keys):
    """Three own tiles of 130 tokens, five of 32 to walk through."""
    args = arguments((130,), dim=72, window=window)
    emulator.take_launches()
    backward(*args)
    launches = emulator.take_launches()
    for (_, counts), steps, products in zip(launches, (of_queries, of_keys), (3, 4), strict=True):
        assert counts["tensor_flops"] == steps * products * 2 * ROWS * 32 * 128
    matrix, vector = 2 * 130 * 72, 4 * 130
    written = [counts["distinct_write"] for _, counts in launches]
    assert written == [matrix + vector, 2 * matrix]
    if window == (-1, -1):
        read = [counts["distinct_read"] for _, counts in launches]
        assert read == [5 * matrix + 2 * vector + 16, 4 * matrix + 2 * vector + 16]


def test_what_nobody_sees_is_not_read(backward):
    """Keys by queries before the first of them, and queries by keys that they have left behind."""

    def read(*lengths, window):
        emulator.take_launches()
        backward(*arguments(*lengths, dim=72, window=window))
        return [counts["global_read"] for _, counts in emulator.take_launches()]

    rows = 2 * 2 * 2 * 72  # two of two tensors
    assert read((66,), (2,), window=(-1, -1))[0] - read((66,), (2,), window=(-1, 0))[0] == rows
    before = read((2,), (66,), window=(-1, -1))[1] - read((2,), (66,), window=(0, -1))[1]
    assert before == rows + 2 * 2 * 4
    pairs = zip(read((130,), window=(-1, -1)), read((130,), window=(-1, 0)), strict=True)
    of_queries, of_keys = (whole - causal for whole, causal in pairs)
    assert of_queries == (3 * 130 - 64 - 128 - 130) * 4 * 72
    assert of_keys == (3 * 130 - 130 - 66 - 2) * (4 * 72 + 8)


def test_refusals(backward):
    grad_out, grad_lse, q, k, v, out, lse, cu, cu_k, *rest = arguments((2, 3), heads=4, key_heads=2)
    inputs = q, k, v
    above = grad_out, grad_lse
    offsets = cu, cu_k
    for given in (
        (*above, q.float(), k, v, out, lse, *offsets), (*above, q, k, v[:4], out, lse, *offsets),
        (*above, *inputs, out, lse, cu.long(), cu_k), (*above, *inputs, out, lse, cu[:1], cu[:1]),
        (*above, q[:0], k, v, out[:0], lse[:, :0], cu[:1], cu[:1]),
        (grad_out[:4], grad_lse, *inputs, out, lse, *offsets),
        (grad_out[:, :3], grad_lse, *inputs, out, lse, *offsets),
        (grad_out[..., :8], grad_lse, *inputs, out, lse, *offsets),
        (grad_out.bfloat16(), grad_lse, *inputs, out, lse, *offsets),
        (grad_out.transpose(1, 2), grad_lse, *inputs, out, lse, *offsets),
        (*above, *inputs, out[:4], lse, *offsets), (*above, *inputs, out[0], lse, *offsets),
        (*above, *inputs, out.float(), lse, *offsets), (*above, *inputs, out, lse.half(), *offsets),
        (*above, *inputs, out, lse[:3], *offsets), (*above, *inputs, out, lse[:, :4], *offsets),
        (*above, *inputs, out, lse[0], *offsets), (*above, *inputs, out, lse.t(), *offsets),
        (grad_out, grad_lse[:3], *inputs, out, lse, *offsets),
        (grad_out, grad_lse.half(), *inputs, out, lse, *offsets),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="emblas: "):
            backward(*given, *rest)


def test_supported_calls():
    supports = _op.ops()["varlen_attention_backward"].cuda_supports
    args = arguments((2, 3), heads=4, key_heads=2)
    grad_out, grad_lse, q, k, v, out, *rest = args
    assert supports(*args)
    assert not supports(grad_out, grad_lse, q.float(), k.float(), v.float(), out, *rest)
    assert not supports(grad_out.float(), grad_lse, q, k, v, out, *rest)
    assert not supports(grad_out, grad_lse, q, k, v, out.float(), *rest)
    huge = torch.empty(1, dtype=HALF)
    keys = huge.expand(2**29, 257, 32)
    assert not supports(grad_out, grad_lse, q, keys, keys, out, *rest)
