"""What only the CUDA kernels of the epilogue have: alignment, blocks of columns, float64, guards.

That they compute the right thing is in test_executors.py too.
"""

from __future__ import annotations

import pytest
import torch
from contract import tolerance
from emblas.pooling import reference
from simt import emulator

pytestmark = pytest.mark.skipif(bool(emulator.why_not()), reason=emulator.why_not() or "")

THREADS = 128
MOST_DIMS = 32


@pytest.fixture(scope="module")
def ops():
    emulator.library()
    return torch.ops.emblas_simt


def placed(x, offset):
    """Return the same values, contiguous, so many elements behind an aligned address."""
    storage = torch.empty(x.numel() + offset, dtype=x.dtype)
    storage[offset:] = x.flatten()
    return storage[offset:].view(x.shape)


def check(ops, x, dims, normalize=True, noise=0.0):
    """All kinds, forward and backward, against the reference."""
    limit = tolerance(x.dtype, x.shape[1])
    limit = {name: 8 * value for name, value in limit.items()}
    ranges = torch.stack([-torch.ones(sum(dims)), 1.3 * torch.ones(sum(dims))]).to(x.dtype)
    for kind in range(3):
        args = (x, dims, normalize, noise, 3, kind, x.dtype, ranges if kind == 1 else None)
        actual, expected = ops.finish_cuda(*args), reference.finish(*args)
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, **(limit if kind == 0 else {}))
    grad = torch.randn(len(x), sum(dims), dtype=x.dtype)
    for offset in (0, 1):
        args = (placed(grad, offset), x, dims, normalize)
        torch.testing.assert_close(
            ops.finish_backward_cuda(*args), reference.finish_backward(*args), **limit
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("offset", [0, 1])
def test_edges(ops, dtype, offset):
    for dim in (1, 7, 8, 33, THREADS - 1, THREADS, THREADS + 1, 4 * THREADS, 4 * THREADS + 4):
        x = placed(torch.randn(2, dim, dtype=dtype), offset)
        check(ops, x, [dim])
        check(ops, x, [dim, (dim + 1) // 2, dim], normalize=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_noise(ops, dtype):
    """To the last bits of the dtype, for whatever place: rows beyond 2^32 are not tested."""
    check(ops, torch.randn(9, 67, dtype=dtype), [67, 3, 67], noise=0.5)
    zeros = torch.zeros(300, 40, dtype=dtype)
    noise = ops.finish_cuda(zeros, [40], False, 1.0, 11, 0, dtype, None)
    torch.testing.assert_close(
        noise.double(), reference.normal_noise(300, 40, 0, 11), **tolerance(dtype, 1)
    )


def test_rows_without_length(ops):
    """Lengths around epsilon; NaN stays NaN."""
    x = torch.tensor([[0.0, 0], [3e-13, 4e-13], [6e-13, 8e-13], [3e-12, 4e-12]]).double()
    check(ops, x, [2, 1])
    x[0] = torch.nan
    assert ops.finish_cuda(x, [2], True, 0.0, 0, 0, x.dtype, None)[0].isnan().all()
    ranges = torch.tensor([[0.0, 0], [1, 1]]).double()
    codes = ops.finish_cuda(x, [2], True, 0.0, 0, 1, x.dtype, ranges)
    assert codes[0].tolist() == [-128, -128]
    assert ops.finish_cuda(x, [2], True, 0.0, 0, 2, x.dtype, None)[0].tolist() == [0]


def test_int8_levels(ops):
    """Halves go to the even level, what is outside to the last one, no range to the first."""
    x = torch.tensor([[-128.5, -127.5, -126.5, -0.5, 0.5, 126.5, 127.5, 900, 1, -torch.inf]])
    ranges = torch.tensor([[-128.0], [127.0]]).repeat(1, 10)
    ranges[1, 8] = -128
    args = (x, [10], False, 0.0, 0, 1, torch.float32, ranges)
    codes = ops.finish_cuda(*args)
    assert codes.tolist() == [[-128, -128, -126, 0, 0, 126, 127, 127, -128, -128]]
    assert torch.equal(codes, reference.finish(*args))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_results(ops, dtype):
    args = (torch.randn(3, 37), [5, 37], True, 0.0, 0, 0, dtype, None)
    torch.testing.assert_close(ops.finish_cuda(*args), reference.finish(*args))


def test_most_dims(ops):
    x = torch.randn(2, 40)
    check(ops, x, [*range(1, MOST_DIMS), 40])
    with pytest.raises(RuntimeError, match="emblas: dims must be 1 to 32"):
        ops.finish_cuda(x, [1] * (MOST_DIMS + 1), False, 0.0, 0, 0, x.dtype, None)


def test_same_bits_in_any_schedule(ops):
    x, grad = torch.randn(3, 300), torch.randn(3, 310)
    results = []
    for order, seed in (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)):
        with emulator.schedule(order, seed, 0.01):
            results.append((
                ops.finish_cuda(x, [10, 300], True, 1.0, 5, 0, x.dtype, None),
                ops.finish_cuda(x, [10, 300], True, 1.0, 5, 2, x.dtype, None),
                ops.finish_backward_cuda(grad, x, [10, 300], True),
            ))  # fmt: skip
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_bytes_moved(ops):
    """Nothing behind the longest of the dims is read, x only where the gradient depends on it."""
    x, grad = torch.randn(5, 64), torch.randn(5, 40)
    emulator.take_traffic()
    out = ops.finish_cuda(x, [8, 32], True, 0.0, 0, 0, torch.bfloat16, None)
    traffic = emulator.take_traffic()
    assert traffic["distinct_read"] == x[:, :32].numel() * 4
    assert traffic["distinct_write"] == out.nbytes
    grad_x = ops.finish_backward_cuda(grad, x, [8, 32], False)
    traffic = emulator.take_traffic()
    assert traffic["distinct_read"] == grad.nbytes
    assert traffic["distinct_write"] == grad_x.nbytes


def test_bad_arguments(ops):
    x = torch.zeros(2, 3)
    for args in (
        (x, [], False, 0, 0, 0, x.dtype, None),
        (x, [4], False, 0, 0, 0, x.dtype, None),
        (x, [0], False, 0, 0, 0, x.dtype, None),
        (x, [3], False, 0, 0, 3, x.dtype, None),
        (x, [3], False, 0, 0, 0, torch.float64, None),
        (x, [3], False, 0, 0, 0, torch.int32, None),
        (x, [3], False, 0, 0, 1, x.dtype, None),
        (x, [3], False, 0, 0, 1, x.dtype, x[:, :2]),
        (x, [3], False, 0, 0, 1, x.dtype, x.double()),
        (x.t(), [2], False, 0, 0, 0, x.dtype, None),
        (x[0], [3], False, 0, 0, 0, x.dtype, None),
        (x.half(), [3], False, 0, 0, 2, x.dtype, None),
    ):
        with pytest.raises(RuntimeError, match="emblas: "):
            ops.finish_cuda(*args)
    for args in ((x, x, [2], False), (x.double(), x, [3], False), (x, x.t(), [2], False)):
        with pytest.raises(RuntimeError, match="emblas: "):
            ops.finish_backward_cuda(*args)
