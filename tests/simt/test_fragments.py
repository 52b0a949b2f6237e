"""The emulated fragment layouts against an independent source: Triton's layout engine.

Which lane and register hold which element is written down in PTX's manual; Triton encodes the same
facts in its compiler, and gives them as bits: element = xor of the bases of the bits set in the
register number and in the lane number.
"""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from simt import emulator

pytestmark = pytest.mark.skipif(bool(emulator.why_not()), reason=emulator.why_not() or "")

# In a process of its own: Triton's bindings complain at exit about builders made by hand.
ASK = """
import json
from triton._C.libtriton import gluon_ir, ir
from triton.experimental.gluon import language as gl

context = ir.context()
ir.load_dialects(context)
builder = gluon_ir.GluonOpBuilder(context)
mma = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8])
wanted = {
    "d": (mma, [16, 8]),
    "a": (gl.DotOperandLayout(0, mma, 2), [16, 16]),
    "b": (gl.DotOperandLayout(1, mma, 2), [16, 8]),
    "a of bytes": (gl.DotOperandLayout(0, mma, 4), [16, 32]),
    "b of bytes": (gl.DotOperandLayout(1, mma, 4), [32, 8]),
}
layouts = {}
for name, (layout, shape) in wanted.items():
    linear = builder.to_linear_layout(layout._to_ir(builder), shape)
    layouts[name] = [linear.reg_bases, linear.lane_bases]
print(json.dumps(layouts), flush=True)
"""


def elements(bases) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each (lane, register)."""
    registers, lanes = bases
    at = np.zeros((32, 2 ** len(registers), 2), int)
    for number, count, which in ((registers, at.shape[1], 1), (lanes, 32, 0)):
        for bit, base in enumerate(number):
            is_set = (np.arange(count) >> bit & 1).astype(bool)
            at ^= np.where(np.expand_dims(is_set, (1 - which, 2)), base, 0)
    return at[..., 0], at[..., 1]


@pytest.fixture(scope="module")
def layouts():
    pytest.importorskip("triton", minversion="3.9", reason="asks Triton's layout engine")
    result = subprocess.run(
        [sys.executable, "-c", ASK], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout.splitlines()[0])
    return {name: elements(bases) for name, bases in answer.items()}


def test_mma_of_16_bit_values(layouts):
    generator = np.random.default_rng(0)
    a, b = (generator.integers(-8, 9, shape).astype(np.float32) for shape in ((16, 16), (16, 8)))
    halves = np.concatenate([a[layouts["a"]], b[layouts["b"]]], axis=1).astype(np.float32)
    bits = (halves.view(np.uint32) >> 16).astype(np.uint16)  # exact: small whole numbers
    words = np.ascontiguousarray(bits).view(np.float32)
    assert words.shape == (32, 6)
    d = emulator.run_case("fragments_bfloat16", words.ravel(), 128, n=1).reshape(32, 4)
    np.testing.assert_array_equal(d, (a @ b + 1)[layouts["d"]])


def test_mma_of_bits(layouts):
    """A 32-bit word of bits sits where 4 bytes sit in the byte form of the instruction."""
    generator = np.random.default_rng(1)
    a, b = (generator.integers(0, 2**32, (n, 8)).astype(np.uint32) for n in (16, 8))
    rows, columns = (at[:, ::4] for at in layouts["a of bytes"])
    b_rows, b_columns = (at[:, ::4] for at in layouts["b of bytes"])
    words = np.concatenate([a[rows, columns // 4], b[b_columns, b_rows // 4]], axis=1)
    d = emulator.run_case("fragments_bits", words.view(np.float32).ravel(), 128, n=1)
    a_bits, b_bits = (np.unpackbits(m.view(np.uint8), axis=1).astype(int) for m in (a, b))
    np.testing.assert_array_equal(d.reshape(32, 4), (a_bits @ b_bits.T + 1)[layouts["d"]])


def test_ldmatrix_loads_the_operands(layouts):
    """The four 8 x 8 matrices of a 16 x 16 tile, down before across, make the operand a."""
    tile = np.arange(256).reshape(16, 16)
    blocks = [tile[r : r + 8, c : c + 8] for c in (0, 8) for r in (0, 8)]
    loaded = emulator.run_case("matrix_loads", np.concatenate(blocks).ravel(), 512, n=1)
    np.testing.assert_array_equal(loaded.reshape(2, 32, 8)[0], tile[layouts["a"]])
    # b is (k, n): stored by rows it comes transposed, two matrices for one column of 8.
    tile = np.arange(256).reshape(32, 8)
    loaded = emulator.run_case("matrix_loads", tile.ravel(), 512, n=1).reshape(2, 32, 8)[1]
    np.testing.assert_array_equal(loaded[:, :4], tile[:16][layouts["b"]])
    np.testing.assert_array_equal(loaded[:, 4:], tile[16:][layouts["b"]])
