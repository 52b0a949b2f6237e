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
from emblas.pooling import Pooling, segment_pool, sif_weights
from hypothesis import given
from hypothesis import strategies as st
from pooling_oracles import MODES, pool_spans

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LENGTHS = (0, 5, 1, 0, 9, 70, 4, 0)
SPANS = list(pairwise(packed(LENGTHS).tolist()))
KERNELS = {"max": "segment_max", "gem": "segment_gem"}


def limits(dtype, mode):
    limit = tolerance(dtype, max(LENGTHS))
    scale = {"sum": 16, "mean_sqrt_len": 4, "gem": 8}.get(mode, 1)
    return {key: scale * value for key, value in limit.items()}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_equals_oracle(isa, dtype, mode):
    cu_seqlens = packed(LENGTHS)
    for dim in (1, 7, 33, 100):
        x = torch.randn(int(cu_seqlens[-1]), dim).to(dtype)
        weights = torch.rand(len(x)).round(decimals=1)
        for w in (None, weights):
            for skip in (0, 3):
                expected = pool_spans(x, SPANS, mode, w, skip)
                actual = segment_pool(x, cu_seqlens, mode, weights=w, skip_prefix=skip or None)
                assert actual.dtype == dtype
                torch.testing.assert_close(actual.double(), expected, **limits(dtype, mode))


def padded_batch(lengths, length, dim, side, dtype=torch.float32):
    """Padded tokens of NaN wherever there is no token, their mask, and the packed tokens."""
    tokens = torch.randn(sum(lengths), dim).to(dtype)
    x = torch.full((len(lengths), length, dim), torch.nan, dtype=dtype)
    mask = torch.zeros(len(lengths), length, dtype=torch.long)
    for b, (begin, end) in enumerate(pairwise(packed(lengths).tolist())):
        n = end - begin
        at = slice(length - n, length) if side == "left" else slice(0, n)
        x[b, at], mask[b, at] = tokens[begin:end], 1
    return x, mask, tokens


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mode", MODES)
def test_padded_has_the_bits_of_packed(mode, side):
    lengths = (3, 0, 8, 5)
    x, mask, tokens = padded_batch(lengths, 8, 24, side)
    for skip in (None, 2, torch.tensor([0, 1, 9, 5])):
        expected = segment_pool(tokens, packed(lengths), mode, skip_prefix=skip)
        assert torch.equal(segment_pool(x, mask=mask, mode=mode, skip_prefix=skip), expected)
        # Read in place whatever the strides: rows of a wider tensor, length before batch.
        wide = torch.cat([x, x], 2)[:, :, 24:]
        assert torch.equal(segment_pool(wide, mask=mask, mode=mode, skip_prefix=skip), expected)
        turned = x.transpose(0, 1).contiguous().transpose(0, 1)
        assert torch.equal(segment_pool(turned, mask=mask, mode=mode, skip_prefix=skip), expected)


def test_strided_input_is_not_copied():
    x = torch.randn(64, 32, 256).transpose(0, 1)[:, :, :128]
    mask = torch.ones(32, 64)
    with torch.profiler.profile(profile_memory=True) as profile:
        segment_pool(x, mask=mask)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < x.numel() * x.itemsize / 4


@given(seed=st.integers(0, 2**31), mode=st.sampled_from(MODES))
def test_mask_with_holes(seed, mode):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(4, 9, generator=generator) < 0.5
    mask[2] = False
    x = torch.randn(4, 9, 5, generator=generator)
    first = mask.int().argmax(1).tolist()
    spans = [(b * 9 + first[b], b * 9 + 9) for b in range(4)]
    expected = pool_spans(x.flatten(0, 1), spans, mode, mask.flatten().float(), 2)
    x[~mask] = float("nan")
    actual = segment_pool(x, mask=mask, mode=mode, skip_prefix=2)
    torch.testing.assert_close(actual.double(), expected, **limits(x.dtype, mode))


def test_several_modes_side_by_side():
    x, cu_seqlens = torch.randn(20, 6), packed((8, 0, 12))
    parts = [segment_pool(x, cu_seqlens, mode) for mode in MODES]
    together = segment_pool(x, cu_seqlens, MODES)
    assert torch.equal(together, torch.cat(parts, 1))
    unit = torch.nn.functional.normalize(together)
    torch.testing.assert_close(segment_pool(x, cu_seqlens, MODES, normalize=True), unit)
    parts = segment_pool(x, cu_seqlens, ("cls", "mean"), normalize=True, dims=(4, 9))
    whole = segment_pool(x, cu_seqlens, ("cls", "mean"))
    for part, k in zip(parts, (4, 9), strict=True):
        torch.testing.assert_close(part, torch.nn.functional.normalize(whole[:, :k]))


@pytest.mark.parametrize("mode", MODES)
def test_gradients(isa, mode):
    name = KERNELS.get(mode, "segment_pool")
    names = (name, f"{name}_backward")
    cu_seqlens, x, w = packed((3, 0, 1, 6)), torch.randn(10, 5), torch.rand(10) + 0.1
    if mode == "gem":
        x = x.abs() + 0.1
    for weights in (None, w * (torch.arange(10) != 4)):

        def pool(x, weights=weights):
            return segment_pool(x, cu_seqlens, mode, weights=weights, skip_prefix=1)

        check_gradients(pool, [x], names)
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 0, 0]])
    check_gradients(
        lambda x: segment_pool(x, mask=mask, mode=mode, normalize=True), [x.view(2, 5, 5)], names
    )
    if mode != "max":
        check_gradients(
            lambda x, w: segment_pool(x, cu_seqlens, mode, weights=w, normalize=True), [x, w], names
        )
    if mode == "gem":
        check_gradients(
            lambda x, p: segment_pool(x, cu_seqlens, mode, p=p), [x, torch.tensor([2.5])], names
        )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_backward_equals_reference(isa, dtype, mode):
    cu_seqlens = packed(LENGTHS)
    x, w = torch.randn(89, 37).to(dtype), torch.rand(89) + 0.1
    grad = torch.randn(len(LENGTHS), 37).to(dtype)
    if mode == "gem":
        x = x.abs() + 0.25
    results = []
    for backend in ("auto", "reference"):
        leaf, weights = x.clone().requires_grad_(), w.clone()
        with use_backend(backend):
            out = segment_pool(leaf, cu_seqlens, mode, weights=weights, skip_prefix=1)
        out.backward(grad)
        results.append([out.detach(), leaf.grad])
    for actual, expected in zip(*results, strict=True):
        limit = limits(dtype, mode)
        torch.testing.assert_close(actual, expected, rtol=4 * limit["rtol"], atol=8 * limit["atol"])


def test_max_sends_its_gradient_to_the_first():
    x = torch.tensor([[1.0, 5], [3, 5], [3, 2]], requires_grad=True)
    out = segment_pool(x, packed((3,)), "max")
    out.sum().backward()
    assert out.tolist() == [[3, 5]]
    assert x.grad.tolist() == [[0, 1], [1, 0], [0, 0]]


def test_max_of_strange_values():
    inf, nan = torch.inf, torch.nan
    x = torch.tensor([[-inf, 1, nan, inf], [-inf, nan, 2, -inf], [-inf, 3, nan, nan]])
    assert torch.equal(
        segment_pool(x, packed((3,)), "max")[0].isnan(), torch.tensor([False, True, True, True])
    )
    assert segment_pool(x, packed((1, 2)), "max")[0, 0] == -inf


@pytest.mark.parametrize("mode", MODES)
def test_empty_means_zero(mode):
    x = torch.randn(6, 4, requires_grad=True)
    for kwargs in (
        {"cu_seqlens": packed((0, 6, 0)), "skip_prefix": 6},
        {"cu_seqlens": packed((6,)), "weights": torch.zeros(6)},
    ):
        x.grad = None
        out = segment_pool(x, mode=mode, **kwargs)
        out.sum().backward()
        assert torch.equal(out, torch.zeros_like(out))
        assert torch.equal(x.grad, torch.zeros_like(x))
    assert segment_pool(x[:0], packed(()), mode).shape == (0, 4)
    assert (
        segment_pool(torch.empty(2, 0, 4), mask=torch.empty(2, 0), mode=mode).tolist()
        == [[0.0] * 4] * 2
    )


@pytest.mark.parametrize("mode", MODES)
def test_no_batch_in_the_bits(mode):
    x = torch.randn(100, 48)
    whole = segment_pool(x, packed((10, 0, 60, 30)), mode, normalize=True)
    alone = segment_pool(x[10:70], packed((60,)), mode, normalize=True)
    assert torch.equal(whole[2], alone[0])


@pytest.mark.parametrize("mode", MODES)
def test_same_bits_for_any_thread_count(mode):
    x = torch.randn(5000, 48, requires_grad=True)
    cu_seqlens = packed((1000, 0, 1, 2000, 1999))

    def run():
        x.grad = None
        out = segment_pool(x, cu_seqlens, mode)
        out.pow(2).sum().backward()
        return out.detach(), x.grad

    check_threads(run)


def test_operator_contract():
    x, cu_seqlens, w = torch.rand(10, 5), packed((3, 0, 7)), torch.rand(10)
    skip, index = torch.tensor([1, 0, 2], dtype=torch.int32), torch.arange(10, dtype=torch.int32)
    out, norm = torch.ops.emblas.segment_pool(x, cu_seqlens, w, True, 3, None, skip, index, True)
    check_op("segment_pool", x, cu_seqlens, w, True, 3, None, skip, index, True)
    check_op("segment_pool_backward", out, x, out, norm, cu_seqlens, w, True, True, True, 3, None,
             skip, index, True)  # fmt: skip
    check_op("segment_max", x, cu_seqlens, w, None, skip, index)
    out, argmax = torch.ops.emblas.segment_max(x, cu_seqlens, w)
    check_op("segment_max_backward", out, argmax, 10)
    power = torch.tensor([3.0])
    check_op("segment_gem", x, cu_seqlens, w, power, 1e-6, None, skip, index)
    out = torch.ops.emblas.segment_gem(x, cu_seqlens, w, power, 1e-6, None, skip, index)
    args = (out, x, out, cu_seqlens, w, power, 1e-6, None, skip, index, True)
    check_op("segment_gem_backward", *args)


@pytest.mark.parametrize("mode", ["weighted_mean", "last", "max", "gem", ("cls", "mean")])
def test_compiled(mode):
    calls = [
        (torch.randn(sum(lengths), 24), packed(lengths))
        for lengths in ((3, 4), (5, 0, 9), (2, 2, 2, 40))
    ]

    def pool(x, cu_seqlens):
        return segment_pool(x * 2, cu_seqlens, mode, normalize=True, skip_prefix=1).relu()

    check_compiled(pool, calls, backward=True)


def test_compiled_padded():
    calls = [
        (torch.randn(batch, length, 24), torch.ones(batch, length, dtype=torch.long).tril())
        for batch, length in ((3, 4), (5, 9), (2, 40))
    ]
    check_compiled(lambda x, mask: segment_pool(x, mask=mask, normalize=True), calls, backward=True)


def test_weights_by_vocabulary_id():
    table = sif_weights(torch.tensor([8.0, 1, 1]), a=0.1)
    torch.testing.assert_close(table, torch.tensor([0.1 / 0.9, 0.5, 0.5]))
    ids, x, table = torch.tensor([0, 2, 1, 1]), torch.randn(4, 3), table.requires_grad_()
    out = segment_pool(x, packed((2, 2)), "sum", weights=table, token_ids=ids)
    torch.testing.assert_close(out, segment_pool(x, packed((2, 2)), "sum", weights=table[ids]))
    out.sum().backward()
    torch.testing.assert_close(table.grad[1], x[2:].sum())
    with pytest.raises(IndexError):
        segment_pool(x, packed((2, 2)), weights=table, token_ids=ids + 5)


def test_module_learns_p():
    module = Pooling(("gem", "mean"))
    module(torch.rand(5, 3), packed((5,))).sum().backward()
    assert module.p.grad is not None
    assert Pooling().p is None
    assert repr(Pooling("max", dims=4)) == "Pooling(mode='max', normalize=False, dims=4)"


X, CU = torch.zeros(4, 3), packed((4,))


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "mode must be one of", lambda: segment_pool(X, CU, ("mean", "median"))),
        (ValueError, "mode must name at least", lambda: segment_pool(X, CU, ())),
        (ValueError, "skip_prefix must not be neg", lambda: segment_pool(X, CU, skip_prefix=-1)),
        (
            ValueError,
            "skip_prefix must not be neg",
            lambda: segment_pool(X, CU, skip_prefix=torch.tensor([-1])),
        ),
        (ValueError, "skip_prefix must have", lambda: segment_pool(X, CU, skip_prefix=CU)),
        (TypeError, "skip_prefix must be a", lambda: segment_pool(X, CU, skip_prefix=[1])),
        (
            ValueError,
            "weights must not hold NaN",
            lambda: segment_pool(X, CU, weights=torch.full((4,), torch.nan)),
        ),
        (ValueError, "token_ids needs weights", lambda: segment_pool(X, CU, token_ids=CU)),
        (ValueError, "p must be a number", lambda: segment_pool(X, CU, "gem", p=torch.ones(3))),
        (
            ValueError,
            "weights get no gradient in mode 'max'",
            lambda: segment_pool(X, CU, "max", weights=torch.ones(4, requires_grad=True)),
        ),
        (ValueError, "dims must be between 1 and 3", lambda: segment_pool(X, CU, dims=(1, 4))),
    ],
)
def test_bad_arguments(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_direct_call_is_guarded():
    ops = torch.ops.emblas
    bad = torch.tensor([9], dtype=torch.int32)
    for call in (
        lambda: ops.segment_pool(X, CU, None, False, 9),
        lambda: ops.segment_pool(X, CU[:1], None, False, 0, bad),
        lambda: ops.segment_pool(X, packed((1,)), None, False, 0, None, None, bad),
        lambda: ops.segment_pool(X, CU, None, False, 0, None, CU),
        lambda: ops.segment_max(X.long(), CU, None),
        lambda: ops.segment_max_backward(X[:1], bad.expand(1, 3).contiguous(), 4),
        lambda: ops.segment_gem(X, CU, None, torch.ones(2), 1e-6),
    ):
        with pytest.raises(RuntimeError, match="emblas: "):
            call()


def test_kernels_run():
    with only_kernels("segment_max", "segment_max_backward"):
        segment_pool(X.clone().requires_grad_(), CU, "max").sum().backward()
