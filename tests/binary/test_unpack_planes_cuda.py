"""What only the CUDA kernel of unpack_planes has: blocks of rows, pieces of 16 bytes, alignment.

That it unpacks the right values is in test_executors.py too, which runs it like every executor.
"""

from __future__ import annotations

import pytest
import torch
from emblas import _op
from emblas.binary import reference
from simt import emulator

pytestmark = pytest.mark.skipif(bool(emulator.why_not()), reason=emulator.why_not() or "")


@pytest.fixture(scope="module")
def ops():
    emulator.library()
    return torch.ops.emblas_simt


def codes(rows, dim, planes):
    return torch.randint(0, 256, (rows, planes * ((dim + 7) // 8)), dtype=torch.uint8)


def unpacked(ops, packed, dim, dtype):
    values = ops.unpack_planes_cuda(packed, dim, dtype)
    assert torch.equal(values, reference.unpack_planes(packed, dim, dtype))


@pytest.mark.parametrize("dtype", _op.FLOATS, ids=str)
@pytest.mark.parametrize("dim", [1, 2, 7, 8, 9, 15, 16, 17, 33, 130, 2048])
def test_widths(ops, dtype, dim):
    for planes in (1, 3):
        packed = codes(3, dim, planes)
        wide = torch.cat((packed, packed[:, :1]), 1)[:, :-1]
        for view in (packed, wide):
            unpacked(ops, view, dim, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_blocks_of_rows(ops, dtype):
    """Rows around what one block unpacks: 1024 pieces of 16 bytes."""
    for dim in (8, 20):
        of_block = 1024 // -(-dim * dtype.itemsize // 16)
        for rows in (of_block - 1, of_block, of_block + 1, 2 * of_block + 1):
            unpacked(ops, codes(rows, dim, 1), dim, dtype)
    unpacked(ops, codes(2, 9000, 1), 9000, dtype)  # a row has more


@pytest.mark.parametrize("order", ["reverse", "random"])
def test_same_bits_in_any_order(ops, order):
    for dtype in _op.FLOATS:
        with emulator.schedule(order, 1, 0.1):
            unpacked(ops, codes(300, 41, 2), 41, dtype)


def test_bytes_moved(ops):
    """Each byte is read once, each value written once."""
    for dtype in _op.FLOATS:
        packed = codes(100, 64, 3)
        emulator.take_traffic()
        values = ops.unpack_planes_cuda(packed, 64, dtype)
        traffic = emulator.take_traffic()
        assert traffic["distinct_read"] == packed.nbytes
        assert traffic["distinct_write"] == values.nbytes


def test_bad_arguments(ops):
    packed = codes(4, 24, 1)
    for args in (
        (packed.int(), 24, torch.float32),
        (packed[0], 24, torch.float32),
        (packed.t(), 24, torch.float32),
        (packed, 24, torch.int8),
        (packed, 0, torch.float32),
        (packed, 16, torch.float32),
        (packed[:, :0], 8, torch.float32),
        (packed.repeat(1, 9), 8, torch.float32),
    ):
        with pytest.raises(RuntimeError, match="emblas: "):
            ops.unpack_planes_cuda(*args)
