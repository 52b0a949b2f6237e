"""Several modes that read the tokens once: each has the bits that it has alone."""

from __future__ import annotations

import itertools

import executors
import pytest
import torch
from contract import check_compiled, check_gradients, check_op, check_threads, packed, tolerance
from emblas import _op, use_backend
from emblas.pooling import gather_pool, group_pool, segment_pool, span_pool
from emblas.pooling.reference import MAX, Mode
from pooling_oracles import MODES, pool_spans

KERNELS = ("segment_pool_modes", "segment_pool_modes_backward")
TOGETHER = ("max", "weighted_mean", "last", "mean", "sum", "cls", "mean_sqrt_len")
LENGTHS = (0, 5, 1, 0, 9, 150, 4, 0)
STARTS, ENDS = torch.tensor([0, 2, 2, 40, 3]), torch.tensor([169, 9, 9, 40, 150])

executor = executors.fixture(*KERNELS, "segment_pool", "segment_max", "segment_gem")
kernel_executor = executors.fixture(*KERNELS, without=("reference",))


def pools(x, weights):
    """The same tokens in every form, as functions of the modes."""
    index = torch.arange(169).remainder(13) * 13 % 169
    mask = torch.ones(13, 13).tril().roll(3, 1)
    return {
        "packed": lambda modes: segment_pool(x, packed(LENGTHS), modes, weights=weights),
        "skipped": lambda modes: segment_pool(x, packed(LENGTHS), modes, skip_prefix=3),
        "padded": lambda modes: segment_pool(x.view(13, 13, -1), mask=mask, mode=modes),
        "spans": lambda modes: span_pool(x, STARTS, ENDS, modes, weights=weights),
        "lists": lambda modes: gather_pool(x, index, packed(LENGTHS)[:-1], modes),
        "groups": lambda modes: group_pool(x, index % 5, 6, modes, weights=weights),
    }


def some_weights():
    weights = torch.rand(169) + 0.1
    weights[::3] = 0
    weights[:5] = 0
    return weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_bits_of_each_mode(executor, dtype):
    x = torch.randn(169, 24).to(dtype)
    x[torch.rand(x.shape) < 0.01] = torch.nan
    for name, pool in pools(x, some_weights()).items():
        for part, mode in zip(pool(TOGETHER).tensor_split(len(TOGETHER), 1), TOGETHER, strict=True):
            torch.testing.assert_close(part, pool(mode), rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("modes", [*itertools.permutations(("cls", "max", "mean"), 2), MODES])
def test_equals_oracle(modes):
    x, weights = torch.randn(169, 19), some_weights()
    spans = list(itertools.pairwise(packed(LENGTHS).tolist()))
    expected = torch.cat([pool_spans(x, spans, mode, weights, 2) for mode in modes], 1)
    actual = segment_pool(x, packed(LENGTHS), modes, weights=weights, skip_prefix=2)
    limit = {name: 16 * value for name, value in tolerance(torch.float32, 150).items()}
    torch.testing.assert_close(actual.double(), expected, **limit)


def test_modes_that_repeat():
    x, cu_seqlens = torch.rand(20, 6), packed((8, 0, 12))
    for modes in (("mean", "mean"), ("max", "gem", "max"), ("gem", "last", "cls", "last")):
        parts = [segment_pool(x, cu_seqlens, mode) for mode in modes]
        assert torch.equal(segment_pool(x, cu_seqlens, modes), torch.cat(parts, 1))


def test_gradients(isa):
    x, w = torch.randn(10, 3), torch.rand(10) + 0.1
    cu_seqlens = packed((3, 0, 1, 6))
    check_gradients(lambda x: segment_pool(x, cu_seqlens, TOGETHER, skip_prefix=1), [x], KERNELS)
    linear = TOGETHER[1:]
    check_gradients(lambda x, w: segment_pool(x, cu_seqlens, linear, weights=w), [x, w], KERNELS)
    starts, ends = torch.tensor([0, 2, 2, 5]), torch.tensor([9, 6, 6, 5])
    check_gradients(lambda x: span_pool(x, starts, ends, TOGETHER), [x], KERNELS)
    check_gradients(lambda x, w: span_pool(x, starts, ends, linear, weights=w), [x, w], KERNELS)
    index = torch.tensor([3, 3, 0, 9, 5, 2, 3, 0])
    lists = packed((3, 0, 4, 1))
    check_gradients(lambda x: gather_pool(x, index, lists, TOGETHER), [x], KERNELS)
    check_gradients(
        lambda x, w: gather_pool(x, index, lists, linear, weights=w), [x, w[:8]], KERNELS
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradient_is_the_sum_of_those_of_each_mode(kernel_executor, dtype):
    for name in ("packed", "spans", "lists", "padded"):
        grads = []
        for together in (True, False):
            x = torch.randn(169, 19, generator=torch.Generator().manual_seed(1)).to(dtype)
            x.requires_grad_()
            wide = x if together else x.double()
            backend = "auto" if together else "reference"
            with use_backend(backend):
                out = pools(wide, None)[name](TOGETHER)
                out.backward(torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype))
            grads.append(x.grad)
        limit = {key: 16 * value for key, value in tolerance(dtype, 150).items()}
        torch.testing.assert_close(*grads, **limit)


def test_spans_in_any_order(kernel_executor):
    """The gradient has the same bits."""
    grads = []
    for order in (torch.arange(5), torch.tensor([3, 2, 0, 4, 1])):
        x = torch.randn(169, 9, generator=torch.Generator().manual_seed(2)).requires_grad_()
        out = span_pool(x, STARTS[order], ENDS[order], ("max", "mean", "last"))
        out.backward(torch.linspace(-1, 1, out.numel()).view_as(out)[order])
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_empty_means_zero(executor):
    x = torch.randn(6, 4, requires_grad=True)
    for weights in (None, torch.zeros(6)):
        x.grad = None
        cu_seqlens, skip = packed((0, 6, 0)), None if weights is not None else 6
        out = segment_pool(x, cu_seqlens, TOGETHER, weights=weights, skip_prefix=skip)
        out.sum().backward()
        assert torch.equal(out, torch.zeros_like(out))
        assert torch.equal(x.grad, torch.zeros_like(x))


def test_operator_contract():
    x, cu_seqlens, w = torch.rand(10, 5), packed((3, 0, 7)), torch.rand(10)
    skip, index = torch.tensor([1, 0, 2], dtype=torch.int32), torch.arange(10, dtype=torch.int32)
    for modes in ([MAX, Mode.cls, Mode.weighted_mean], [Mode.sum]):
        options = cu_seqlens, w, list(map(int, modes)), None, skip, index, True
        check_op("segment_pool_modes", x, *options)
        out, argmax = torch.ops.emblas.segment_pool_modes(x, *options)
        args = (out, x, out, argmax, *options[:3], True, True, *options[3:])
        check_op("segment_pool_modes_backward", *args)


def test_compiled():
    calls = [
        (torch.randn(sum(lengths), 24), packed(lengths))
        for lengths in ((3, 4), (5, 0, 9), (2, 2, 2, 40))
    ]
    for modes in (("max", "mean"), ("mean", "gem", "cls")):
        check_compiled(
            lambda x, cu, modes=modes: segment_pool(x * 2, cu, modes).relu(), calls, backward=True
        )


def test_same_bits_for_any_thread_count():
    x = torch.randn(3000, 48, requires_grad=True)
    cu_seqlens = packed((1000, 0, 1, 1999))
    starts, ends = torch.tensor([0, 9]), torch.tensor([2999, 2999])

    def run():
        x.grad = None
        out = segment_pool(x, cu_seqlens, TOGETHER), span_pool(x, starts, ends, TOGETHER)
        torch.cat(out).pow(2).sum().backward()
        return *(part.detach() for part in out), x.grad

    check_threads(run)


X, CU = torch.zeros(4, 3), packed((4,))


def test_bad_arguments():
    weights = torch.ones(4, requires_grad=True)
    with pytest.raises(ValueError, match="weights get no gradient"):
        segment_pool(X, CU, ("mean", "max"), weights=weights)
    with pytest.raises(ValueError, match="mode must be one of"):
        segment_pool(X, CU, ("mean", "men"))


def test_direct_call_is_guarded(kernel_executor):
    """C++ guards memory whatever Python lets through."""
    pool, backward = (_op.ops()[name] for name in KERNELS)
    rest = None, None, None, False
    for modes in ([], [0, 7], [-1], [3, 3], [*range(7), 0]):
        with pytest.raises((ValueError, RuntimeError), match="modes must hold"):
            pool(X, CU, None, modes, *rest)
    out, argmax = pool(X, CU, None, [0, 6], *rest)
    for args in (
        (out[:, :3].contiguous(), X, out, argmax),
        (out, X, out.double(), argmax),
        (out, X, out, argmax[:0]),
        (out, X, out, argmax.long()),
    ):
        with pytest.raises((ValueError, RuntimeError), match="must be"):
            backward(*args, CU, None, [0, 6], True, True, *rest)
