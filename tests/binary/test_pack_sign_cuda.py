"""What only the CUDA kernel of pack_sign has: blocks of rows, pieces of bytes, alignment.

That it packs the right bits is in test_executors.py too, which runs it like every executor.
"""

from __future__ import annotations

import pytest
import torch
from contract import layouts
from emblas import _op
from emblas.binary import reference
from simt import emulator

pytestmark = pytest.mark.skipif(bool(emulator.why_not()), reason=emulator.why_not() or "")


@pytest.fixture(scope="module")
def ops():
    emulator.library()
    return torch.ops.emblas_simt


def values(rows, dim, dtype):
    x = torch.randn(rows, dim).to(dtype)
    x[: rows // 2, ::3] = 0
    x[rows // 2 :, 1::3] = torch.nan
    threshold = torch.randn(dim, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    threshold[::5] = torch.nan
    return x, threshold


@pytest.mark.parametrize("dtype", _op.FLOATS, ids=str)
@pytest.mark.parametrize("dim", [1, 2, 7, 8, 9, 15, 16, 17, 33, 130, 2048, 8200])
def test_widths(ops, dtype, dim):
    x, threshold = values(7, dim, dtype)
    for view in layouts(x).values():
        if view.stride(1) != 1:
            continue
        for limit in (None, threshold):
            expected = reference.pack_sign(x, limit)
            assert torch.equal(ops.pack_sign_cuda(view, limit), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_blocks_of_rows(ops, dtype):
    """Rows around what one block packs: 1024 pieces of 16 bytes."""
    for dim in (8, 24):
        of_block = 1024 // (dim // 8 * (2 if dtype == torch.float32 else 1))
        for rows in (of_block - 1, of_block, of_block + 1, 2 * of_block + 1):
            x, _ = values(rows, dim, dtype)
            assert torch.equal(ops.pack_sign_cuda(x), reference.pack_sign(x))


@pytest.mark.parametrize("order", ["reverse", "random"])
def test_same_bits_in_any_order(ops, order):
    for dtype in _op.FLOATS:
        x, threshold = values(300, 41, dtype)
        with emulator.schedule(order, 1, 0.1):
            assert torch.equal(ops.pack_sign_cuda(x), reference.pack_sign(x))
            assert torch.equal(ops.pack_sign_cuda(x, threshold), reference.pack_sign(x, threshold))


def test_bytes_moved(ops):
    """Each value is read once, each byte written once."""
    for dtype in _op.FLOATS:
        x, _ = values(100, 64, dtype)
        emulator.take_traffic()
        codes = ops.pack_sign_cuda(x)
        traffic = emulator.take_traffic()
        assert traffic["distinct_read"] == x.nbytes
        assert traffic["distinct_write"] == codes.nbytes


def test_bad_arguments(ops):
    x = torch.zeros(4, 3)
    for args in (
        (x.long(),),
        (x[0],),
        (torch.zeros(3, 4).t(),),
        (x, torch.zeros(2)),
        (x, torch.zeros(3, dtype=torch.float64)),
        (x.double(), torch.zeros(3)),
    ):
        with pytest.raises(RuntimeError, match="emblas: "):
            ops.pack_sign_cuda(*args)
