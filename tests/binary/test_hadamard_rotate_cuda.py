"""What only the CUDA rotation has: pairs over threads, shared memory, alignment.

That it rotates right is in test_executors.py too, which runs it like every executor.
"""

from __future__ import annotations

import pytest
import torch
from contract import layouts, tolerance
from emblas import _op
from emblas.binary import reference
from simt import emulator

pytestmark = pytest.mark.skipif(bool(emulator.why_not()), reason=emulator.why_not() or "")


@pytest.fixture(scope="module")
def ops():
    emulator.library()
    return torch.ops.emblas_simt


def signs_of(rounds, dim):
    return (torch.randint(0, 2, (rounds, dim)) * 2 - 1).to(torch.int8)


@pytest.mark.parametrize("dtype", _op.FLOATS, ids=str)
@pytest.mark.parametrize("dim", [1, 2, 3, 7, 8, 9, 63, 64, 65, 127, 1023, 1030])
def test_widths(ops, dtype, dim):
    x, signs = torch.randn(3, dim).to(dtype), signs_of(3, dim)
    limit = tolerance(dtype, dim)
    for name in ("hadamard_rotate", "hadamard_unrotate"):
        expected = getattr(reference, name)(x.double(), signs)
        for view in layouts(x).values():
            if view.stride(1) == 1:
                actual = getattr(ops, f"{name}_cuda")(view, signs)
                assert actual.dtype == dtype
                torch.testing.assert_close(actual.double(), expected, **limit)


def test_same_bits_in_any_order(ops):
    for dtype in _op.FLOATS:
        x, signs = torch.randn(3, 200).to(dtype), signs_of(2, 200)
        expected = ops.hadamard_rotate_cuda(x, signs), ops.hadamard_unrotate_cuda(x, signs)
        for order, seed, preemption in (("reverse", 0, 0), ("random", 1, 0), ("random", 2, 0.1)):
            with emulator.schedule(order, seed, preemption):
                actual = ops.hadamard_rotate_cuda(x, signs), ops.hadamard_unrotate_cuda(x, signs)
            assert all(map(torch.equal, actual, expected))


def test_bytes_moved(ops):
    """x is read once, the result written once."""
    x, signs = torch.randn(4, 48), signs_of(3, 48)
    emulator.take_traffic()
    out = ops.hadamard_rotate_cuda(x, signs)
    traffic = emulator.take_traffic()
    assert traffic["distinct_read"] == x.nbytes + signs.nbytes
    assert traffic["global_write"] == traffic["distinct_write"] == out.nbytes


def test_largest(ops):
    for dtype, dim in ((torch.float16, 12288), (torch.float64, 6144)):
        x, signs = torch.randn(1, dim).to(dtype), signs_of(1, dim)
        expected = reference.hadamard_rotate(x.double(), signs)
        actual = ops.hadamard_rotate_cuda(x, signs)
        torch.testing.assert_close(actual.double(), expected, **tolerance(dtype, dim))
        with pytest.raises(RuntimeError, match="emblas: x must have at most"):
            ops.hadamard_rotate_cuda(torch.zeros(1, dim + 1, dtype=dtype), signs_of(1, dim + 1))


def test_bad_arguments(ops):
    x, signs = torch.zeros(4, 3), signs_of(2, 3)
    for args in (
        (x.long(), signs),
        (x[0], signs),
        (torch.zeros(3, 4).t(), signs),
        (x, signs.int()),
        (x, signs[0]),
        (x, signs[:, :2]),
        (x, signs_of(3, 2).t()),
    ):
        with pytest.raises(RuntimeError, match="emblas: "):
            ops.hadamard_rotate_cuda(*args)
