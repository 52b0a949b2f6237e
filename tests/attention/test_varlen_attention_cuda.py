"""What only the CUDA kernel of packed attention has: tiles, pieces, swizzles, slots, tensor cores.

That it computes the right thing is in test_executors.py too.
"""

from __future__ import annotations

import pytest
import torch
from contract import packed
from emblas import _op
from emblas.attention import reference
from simt import emulator

pytestmark = pytest.mark.skipif(bool(emulator.why_not()), reason=emulator.why_not() or "")

QUERIES = 64  # of a tile
KEYS = {32: 64, 64: 64, 128: 32, 256: 16}  # of a tile, by the widest vectors
HALF = torch.float16


@pytest.fixture(scope="module")
def attend():
    emulator.library()
    return torch.ops.emblas_simt.varlen_attention_cuda


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
    lse=True,
):
    lengths_k = lengths_q if lengths_k is None else lengths_k
    q = torch.randn(sum(lengths_q), heads, dim).to(dtype)
    k = torch.randn(sum(lengths_k), key_heads, dim).to(dtype)
    v = torch.randn(sum(lengths_k), key_heads, value_dim or dim).to(dtype)
    return q, k, v, packed(lengths_q), packed(lengths_k), 1, 1, scale, *window, lse


def check(attend, args, softcap=0.0, slopes=None):
    """The maximum lengths above are wrong: nobody plans by them."""
    out, lse = attend(*args, softcap, slopes)
    expected, expected_lse = reference.varlen_attention(*map(wide, args), softcap, wide(slopes))
    # Weights are rounded to 16 bits before they are multiplied, the result after.
    error = 2 * torch.finfo(out.dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=error, atol=error)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dim", KEYS)
def test_edges_of_tiles(attend, dim):
    tile = KEYS[dim]
    check(attend, arguments((1, 2, 1), (tile - 1, tile, tile + 1), dim=dim))
    check(attend, arguments((3,), (3 * tile + 1,), dim=dim, dtype=torch.bfloat16))


def test_edges_of_tiles_of_queries(attend):
    lengths = (QUERIES - 1, 0, QUERIES, QUERIES + 1, 0, 0, 1)
    check(attend, arguments(lengths, (9, 3, 0, 17, 1, 0, 2)))
    check(attend, arguments((2 * QUERIES + 1, 0), (5, 0), dim=24, heads=2))
    check(attend, arguments((0, 0, 1, 0), (0, 2, 3, 0)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, HALF], ids=str)
@pytest.mark.parametrize(
    ("dim", "value_dim"),
    [(1, 1), (16, 16), (32, 33), (33, 7), (8, 64), (65, 8), (24, 100), (128, 15), (129, 24),
     (17, 255), (256, 256)],
)  # fmt: skip
def test_widths(attend, dim, value_dim, dtype):
    check(attend, arguments((9, 20), dim=dim, value_dim=value_dim, dtype=dtype))


WINDOWS = ((-1, 0), (0, 0), (5, 3), (70, -1), (-1, 70), (0, -1), (66, 1), (2**40, 2**31))


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_windows(attend, window):
    """With queries before the first key, and keys before the first query."""
    check(attend, arguments((70, 5, 90), (70, 99, 20), window=window))


@pytest.mark.parametrize("window", [(0, 0), (3, 20), (-1, 15), (16, -1)], ids=str)
def test_windows_over_small_tiles(attend, window):
    check(attend, arguments((40, 3), (40, 50), dim=130, window=window, dtype=torch.bfloat16))


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2), (3, 1), (0, 0)])
def test_grouped_heads(attend, heads, key_heads):
    check(attend, arguments((7, 2), (3, 9), heads=heads, key_heads=key_heads))


def test_layouts(attend):
    args = arguments((7, 13), heads=2, key_heads=2, dim=24)
    fused = torch.randn(20, 3, 2, 24).to(HALF)
    head_major = torch.randn(3, 2, 20, 24).to(HALF)
    shifted = torch.randn(3, 20, 2, 25).to(HALF)
    sparse = torch.randn(3, 40, 2, 24).to(HALF)
    for qkv in (
        fused.unbind(1), head_major.transpose(1, 2), shifted[..., 1:], shifted[..., :24],
        sparse[:, ::2],
    ):  # fmt: skip
        check(attend, (*qkv, *args[3:]))


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("part", ["address", "tokens", "heads"])
def test_one_unaligned(attend, which, part):
    """Whatever keeps a vector of one of q, k and v from starting at a multiple of 16 bytes."""
    args = list(arguments((5, 9), heads=2, key_heads=2, dim=16))
    x = args[which]
    strides = {"address": (32, 16), "tokens": (34, 16), "heads": (40, 17)}[part]
    storage = torch.empty(1000, dtype=HALF)[part == "address" :]
    args[which] = storage.as_strided(x.shape, (*strides, 1)).copy_(x)
    expected = attend(*args[:which], x, *args[which + 1 :])
    assert all(map(torch.equal, attend(*args), expected))


@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
def test_scales(attend, scale):
    check(attend, arguments((9, 70), scale=scale))


def test_large_scores(attend):
    """Scores of thousands, rising and falling over tiles, and from query to query."""
    keys = 3 * KEYS[128]
    ramp = torch.linspace(-1, 1, keys)[:, None, None].repeat(1, 1, 128)
    for x in (ramp, ramp.flip(0), ramp.abs(), -ramp.abs()):
        _, _, *rest = arguments((24,), (keys,), dim=128)
        q = torch.linspace(-30, 30, 24)[:, None, None].repeat(1, 1, 128).to(HALF)
        check(attend, (q, x.to(HALF), *rest))


def test_softcap(attend):
    check(attend, arguments((9, 70), scale=1.0), 2.0)
    check(attend, arguments((20,), dim=130, scale=1.0, window=(3, 1)), 5.0)
    check(attend, arguments((9,), scale=2.0), 0.25)


def test_alibi(attend):
    slopes = torch.tensor([[0.5, 0.1], [2.0, 0.0], [0.01, 1.0]])
    for lengths in ((3, 70, 9), (80, 1, 5)):
        args = arguments(lengths, (5, 66, 20), heads=2)
        check(attend, args, 0.0, slopes)
        check(attend, args, 0.0, slopes[:1])
    check(attend, arguments((30,), dim=130, heads=2, window=(9, 4)), 3.0, slopes[1:2])


def test_queries_without_keys(attend):
    out, lse = attend(*arguments((9, 40, 1), (4, 0, 1), window=(2, 0)))
    hidden = torch.ones(50, dtype=torch.bool)
    hidden[[5, 6, 7, 8, 49]] = False
    assert (out[hidden] == 0).all()
    assert (lse[:, hidden] == -torch.inf).all()
    assert (out[~hidden] != 0).any(2).all()
    assert lse[:, ~hidden].isfinite().all()


def test_without_lse(attend):
    args = arguments((9, 3))
    out, lse = attend(*args[:-1], False)
    assert lse.shape == (0, 12)
    assert torch.equal(out, attend(*args)[0])


@pytest.mark.parametrize("dim", [24, 130])
def test_same_bits_whatever_else_is_packed(attend, dim):
    """And neighbours' values are never used, be they NaN."""
    q, k, v, *rest = arguments((11, 70, 5), (9, 40, 30), dim=dim, window=(50, 20))
    alone = (packed((70,)), packed((40,)), *rest[2:])
    expected = attend(q[11:81], k[9:49], v[9:49], *alone)
    out, lse = attend(q, k, v, *rest)
    assert all(map(torch.equal, (out[11:81], lse[:, 11:81]), expected))
    for x, begin, end in ((q, 11, 81), (k, 9, 49), (v, 9, 49)):
        x[:begin], x[end:] = torch.nan, torch.nan
    out, lse = attend(q, k, v, *rest)
    assert all(map(torch.equal, (out[11:81], lse[:, 11:81]), expected))


@pytest.mark.parametrize("order", emulator.ORDERS)
def test_same_bits_in_any_order(attend, order):
    torch.manual_seed(1)
    for dim in (32, 136):
        args = arguments((70, 3), (40, 17), dim=dim, heads=2, window=(30, 9))
        expected = attend(*args)
        with emulator.schedule(order, seed=3, preemption=0.2):
            assert all(map(torch.equal, attend(*args), expected))


@pytest.mark.parametrize(
    "wrong",
    [(5, 2, 9, 12), (-4, 3, 12, 12), (0, 2**31 - 1, -(2**31), 12), (12, 12, 0, 0), (0, 1, 2, 3),
     (2**31 - 1,) * 4, (-(2**31),) * 4, (9, 10, 90, 12)],
)  # fmt: skip
def test_wrong_offsets_stay_in_bounds(attend, wrong):
    q, k, v, right, _, *rest = arguments((4, 3, 5), dim=16)
    wrong = torch.tensor(wrong, dtype=torch.int32)
    with emulator.schedule(check_races=False):
        for pair in ((wrong, right), (right, wrong), (wrong, wrong)):
            attend(q, k, v, *pair, *rest)


@pytest.mark.parametrize(
    ("window", "steps"),
    [((-1, -1), 3 * 5), ((-1, 0), 2 + 4 + 5), ((16, 0), 2 + 3 + 2), ((0, -1), 5 + 3 + 1)],
)
def test_tiles_that_nobody_sees_are_skipped(attend, window, steps):
    """Three tiles of queries, five of 32 keys."""
    args = arguments((130,), (130,), dim=72, window=window)
    emulator.take_launches()
    attend(*args)
    ((_, counts),) = emulator.take_launches()
    assert counts["tensor_flops"] == steps * 4 * QUERIES * 32 * 128
    q, k, v = args[:3]
    if window == (-1, -1):
        assert counts["distinct_read"] == 2 * (q.numel() + k.numel() + v.numel()) + 16
    assert counts["distinct_write"] == 2 * q.numel() + 4 * 130


def test_keys_that_nobody_sees_are_not_read(attend):
    """Of keys and values, so many rows of each: offsets and queries are read in all windows."""

    def read(lengths_q, lengths_k, window):
        emulator.take_launches()
        attend(*arguments(lengths_q, lengths_k, dim=72, window=window))
        ((_, counts),) = emulator.take_launches()
        return counts["global_read"]

    causal = read((130,), (130,), (-1, 0))
    assert read((130,), (130,), (-1, -1)) - causal == (3 * 130 - 64 - 128 - 130) * 4 * 72
    # All queries of the first tile come before the first key.
    assert read((66,), (2,), (-1, -1)) - read((66,), (2,), (-1, 0)) == 2 * 4 * 72


def test_refusals(attend):
    args = arguments((2, 3), heads=4, key_heads=2)
    q, k, v, cu, *_ = args
    rest = args[5:]
    slopes = torch.zeros(2, 4)
    for given in (
        (q[0], k, v, cu, cu), (q, k[0], v, cu, cu), (q, k, v[0], cu, cu),
        (q.transpose(1, 2), k, v, cu, cu), (q, k, v.transpose(1, 2), cu, cu),
        (q.float(), k.float(), v.float(), cu, cu), (q, k.bfloat16(), v, cu, cu),
        (q, k, v.bfloat16(), cu, cu), (q[..., :0], k[..., :0], v, cu, cu),
        (q, k, v.repeat(1, 1, 9), cu, cu), (q.repeat(1, 1, 9), k.repeat(1, 1, 9), v, cu, cu),
        (q, k, v[:4], cu, cu), (q, k, v[:, :1], cu, cu), (q, k[..., :8], v, cu, cu),
        (q[:, :3], k, v, cu, cu), (q, k[:, :0], v[:, :0], cu, cu), (q, k, v, cu.long(), cu),
        (q, k, v, cu, cu.long()), (q, k, v, cu[:1], cu[:1]), (q, k, v, cu[:0], cu[:0]),
        (q, k, v, cu, cu[:2]), (q, k, v, cu.repeat(2)[::2], cu),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="emblas: "):
            attend(*given, *rest)
    for wrong in (slopes[0], slopes[:, :3], slopes.repeat(2, 1), slopes.double(), slopes.t()):
        with pytest.raises(RuntimeError, match="emblas: alibi_slopes"):
            attend(q, k, v, cu, cu, *rest, 0.0, wrong)


def test_supported_calls():
    supports = _op.ops()["varlen_attention"].cuda_supports
    args = arguments((2, 3), heads=4, key_heads=2)
    q, k, v, *rest = args
    assert supports(*args, 1.0, torch.zeros(1, 4))
    assert not supports(q.float(), k.float(), v.float(), *rest)
    assert not supports(q.double(), k, v, *rest)
    huge = torch.empty(1, dtype=HALF)
    assert supports(huge.expand(2**30 - 1, 1, 32), k, v, *rest)
    assert not supports(huge.expand(2**30, 1, 32), k, v, *rest)
    assert not supports(q, huge.expand(2**30, 1, 32), v, *rest)
    assert not supports(huge.expand(2**29, 257, 32), k, v, *rest)
    assert not supports(huge.expand(5, 4, 257), huge.expand(5, 2, 257), v, *rest)
    assert not supports(q, k, huge.expand(5, 2, 257), *rest)
