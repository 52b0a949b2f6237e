"""Proof of the emulator: it reports every kind of fault, and sound kernels pass and are right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from simt import emulator

pytestmark = pytest.mark.skipif(bool(emulator.why_not()), reason=emulator.why_not() or "")

N = 128  # two blocks of 64 threads
X = np.linspace(-3, 5, N, dtype=np.float32)
REVERSED = X.reshape(2, 64)[:, ::-1].ravel()
SWAPPED_WARPS = X.reshape(2, 2, 32)[:, ::-1].ravel()
NEIGHBOURS = X.reshape(-1, 2)[:, ::-1].ravel()
XOR_2 = X.reshape(-1, 2, 2)[:, ::-1].ravel()

# name -> (what the message must say, what the sound kernel computes)
CASES = {
    "read_past_end": (
        r"read_past_end: block \(1,0,0\) thread \(63,0,0\): out of bounds: 4-byte read of global "
        r"memory at 0x[0-9a-f]+, 0 bytes past the end of buffer 1 \(an input\) \(512 bytes\)"
        r" in tests/simt/cases.cuh:\d+",
        X,
    ),
    "read_before_begin": (r"block \(0,0,0\) thread \(0,0,0\): out of bounds: .* 4 bytes before", X),
    "write_past_end": (r"out of bounds: 4-byte write .* 0 bytes past the end of buffer 2", X),
    "read_null": (r"out of bounds: .* far from all memory that the kernel was given", X),
    "write_argument": (r"out of bounds: 4-byte write .* past the end of buffer 1", X),
    "shared_past_end": (r"out of bounds: 4-byte read of shared .* past the end of tile", X),
    "shared_uninitialized": (
        r"thread \(54,0,0\): uninitialized: 4-byte read of shared memory .* byte 36 of tile",
        REVERSED,
    ),
    "dynamic_shared_past_end": (
        r"out of bounds: 4-byte write of shared .* past the end of the dynamic shared memory",
        REVERSED,
    ),
    "local_past_end": (r"out of bounds: index 4 of an array of fixed size", X),
    "global_uninitialized": (r"uninitialized: 4-byte read of global memory .* of buffer 2", X),
    "misaligned_vector": (r"misaligned: 16-byte read .* byte \d+ of buffer 1", X),
    "misaligned_word": (r"misaligned: 4-byte read .* byte \d+ of buffer 1", X),
    "race_read_after_write": (r"(data race|uninitialized): 4-byte .* of tile", SWAPPED_WARPS),
    "race_write_after_read": (r"data race: 4-byte .* of tile .* unordered with a", SWAPPED_WARPS),
    "race_write_write": (r"data race: 4-byte write of shared .* of flag .* with a write by", X),
    "race_in_warp": (r"(data race|uninitialized): 4-byte .* of tile", NEIGHBOURS),
    "race_over_shuffle": (r"data race: 4-byte read .* of tile .* with a write by", NEIGHBOURS),
    "race_between_blocks": (r"data race: 4-byte write of global .* a write by another block", X),
    "race_with_atomic": (r"data race: 4-byte (read|atomic) of shared .* counter", np.full(N, 64)),
    "barrier_in_branch": (
        r"divergent barrier: __syncthreads at tests/simt/cases.cuh:\d+ waits in vain; "
        r"of 64 threads 32 wait at a barrier .*, 32 have exited",
        X,
    ),
    "barriers_apart": (r"divergent barrier: .* not all at the same one", SWAPPED_WARPS),
    "exit_before_barrier": (r"divergent barrier: .* 60 wait at a barrier .* 4 have exited", X),
    "shuffle_in_branch": (
        r"deadlock: __shfl_xor_sync at .* \(mask 0xffffffff\); of 64 threads 32 wait at a barrier",
        XOR_2,
    ),
    "shuffle_after_exit": (
        r"(deadlock: __shfl_xor_sync|divergent collective: .* names lane 3, which has exited)",
        XOR_2,
    ),
    "shuffle_from_outside": (
        r"divergent collective: a shuffle reads a lane outside its mask",
        None,
    ),
    "masks_disagree": (r"divergent collective: .* meets lane \d+ in __shfl_xor_sync", NEIGHBOURS),
    "lane_outside_mask": (r"by a lane outside its own mask 0x7fffffff", X),
    "async_without_wait": (r"uninitialized: 4-byte read of shared memory .* tile", REVERSED),
    "async_without_barrier": (r"(data race|uninitialized): 4-byte read .* of tile", REVERSED),
    "async_wait_too_weak": (r"uninitialized: 4-byte read of shared memory .* tile", None),
    "static_shared_limit": (r"shared memory limit exceeded: 49408 bytes static", X),
}


@pytest.mark.parametrize("order", emulator.ORDERS)
@pytest.mark.parametrize("name", CASES)
def test_fault_is_reported(name, order):
    message, _ = CASES[name]
    with emulator.schedule(order, seed=7), pytest.raises(RuntimeError, match="simt: ") as error:
        emulator.run_case(name, X, N, broken=True)
    if order == "forward":
        assert error.match(message)
    else:  # another order may meet another symptom of the same fault first
        assert error.match("race|out of bounds|misaligned|uninitialized|divergent|deadlock|limit")


@pytest.mark.parametrize("name", CASES)
def test_sound_kernel_passes(name):
    _, expected = CASES[name]
    for order, preemption in (("forward", 0), ("reverse", 0), ("random", 0), ("random", 0.2)):
        with emulator.schedule(order, seed=3, preemption=preemption):
            actual = emulator.run_case(name, X, N)
        if expected is not None:
            np.testing.assert_array_equal(actual, expected)


def test_async_groups():
    """The second group copies 8 bytes of each 16 and zeros the rest."""
    expected = X.reshape(2, 16, 4).copy()
    expected[:, 8:, 2:] = 0
    np.testing.assert_array_equal(emulator.run_case("async_wait_too_weak", X, N), expected.ravel())


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        ({"block": 1025}, r"launch limit exceeded: a block has 1 to 1024 threads"),
        ({"dynamic_shared_bytes": 100 << 10}, r"at most 99 KiB of shared memory"),
        ({"grid_y": 65536}, r"at most 2\^31 - 1 blocks along x and 65535 along y"),
        ({"dynamic_shared_bytes": 99 << 10}, r"shared memory limit exceeded: 256 bytes static"),
    ],
)
def test_limits(launch, message):
    with pytest.raises(RuntimeError, match=message):
        emulator.run_case("shared_past_end", X, N, **launch)


def test_partial_warp():
    """A full mask names lanes that a block of 40 threads does not have."""
    with pytest.raises(RuntimeError, match="names lane 8, which does not exist"):
        emulator.run_case("masks_disagree", X[:40], 40, block=40)


def test_order_shows_in_results():
    """What depends on the schedule differs between schedules, and a seed repeats it."""
    results = []
    for order, seed in (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)):
        for _ in range(2):
            with emulator.schedule(order, seed):
                results.append(tuple(emulator.run_case("order_dependent", X[:64], 64)))
    assert results[::2] == results[1::2]
    assert len(set(results)) == 4


def test_traffic_is_counted():
    emulator.take_traffic()
    emulator.run_case("race_read_after_write", X, N)
    names = ("global", "shared", "distinct")
    expected = {f"{name}_{way}": 4 * N for name in names for way in ("read", "write")}
    assert +emulator.take_traffic() == expected


# --- behaviour -------------------------------------------------------------------------------


def test_primitives():
    x = X.reshape(4, 32)
    lanes = np.arange(32)
    rows = emulator.run_case("primitives", X, 16 * N).reshape(16, 4, 32)
    votes = (x > 0) @ (1 << lanes.astype(np.uint64)).astype(np.float64)
    expected = [
        np.repeat(x[:, 5:6], 32, 1),
        x[:, lanes // 8 * 8 + 5],
        x[:, np.where(lanes < 3, lanes, lanes - 3)],
        x[:, np.where(lanes % 16 + 3 < 16, lanes + 3, lanes)],
        x[:, lanes ^ 9],
        np.repeat(np.floor(votes / 256)[:, None], 32, 1),
        2,
        (lanes - 10).sum(),
        -10,
        31,
        496 + 3 - 9,
        31 + 5,
        np.repeat(x.sum(1, keepdims=True), 32, 1),
        np.repeat(x.astype(float).reshape(2, 64).sum(1), 64).reshape(4, 32),
        8 + 100 * 31 + 10000 * 4,
        20 + 100 + 3000,
    ]
    for i, (actual, wanted) in enumerate(zip(rows, expected, strict=True)):
        np.testing.assert_allclose(
            actual, np.broadcast_to(wanted, actual.shape), rtol=1e-5, err_msg=str(i)
        )


@pytest.mark.parametrize("order", emulator.ORDERS)
def test_atomics(order):
    with emulator.schedule(order, seed=5, preemption=0.3 if order == "random" else 0):
        actual = emulator.run_case("atomics", X, 16).reshape(2, 8)
    t = range(64)
    xor = np.bitwise_xor.reduce(np.arange(64))
    np.testing.assert_array_equal(actual, [[sum(t), -63, 63, 63, -64, xor, 7, 128]] * 2)


def test_every_16_bit_float():
    """Widening and narrowing agree with torch on all 65536 patterns."""
    bits = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
    rows = emulator.run_case("conversions", bits.to(torch.float32).numpy(), 4 * 65536)
    rows = torch.from_numpy(rows).reshape(4, -1)
    for row, dtype in enumerate((torch.bfloat16, torch.float16)):
        values = bits.view(dtype)
        torch.testing.assert_close(rows[row], values.float(), rtol=0, atol=0, equal_nan=True)
        number = ~values.isnan()
        torch.testing.assert_close(rows[row + 2][number], bits.float()[number], rtol=0, atol=0)


def test_rounding():
    """To nearest, ties to even, through subnormals and overflow: as torch rounds."""
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 2**32, 8192, dtype=np.uint64).astype(np.uint32)
    bits[:1024] &= np.uint32(0xFFFF8000)  # ties of bfloat16
    bits[1024:2048] &= np.uint32(0xFFFFF000)  # ties of float16
    bits[2048:] = bits[2048:] & np.uint32(0x87FFFFFF) | np.uint32(0x30000000)  # float16's range
    x = torch.from_numpy(bits.view(np.float32))
    x = x[~x.isnan()][:7168]
    rows = torch.from_numpy(emulator.run_case("rounding", x.numpy(), 2 * len(x))).reshape(2, -1)
    assert torch.equal(rows[0], x.bfloat16().float())
    assert torch.equal(rows[1], x.half().float())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("order", emulator.ORDERS)
def test_matrix_multiply(dtype, order):
    values = torch.randn(384).to(getattr(torch, dtype)).float()
    a, b = values[:256].reshape(16, 16), values[256:].reshape(8, 16)
    with emulator.schedule(order):
        actual = emulator.run_case(f"multiply_{dtype}", values.numpy(), 128, n=1)
    torch.testing.assert_close(torch.from_numpy(actual).reshape(16, 8), a @ b.T)


def test_matrix_loads():
    values = np.arange(256)
    loaded = emulator.run_case("matrix_loads", values, 512, n=1).reshape(2, 32, 4, 2)
    matrices = values.reshape(4, 8, 8)
    for actual, source in zip(loaded, (matrices, matrices.transpose(0, 2, 1)), strict=True):
        for lane in range(32):
            expected = source[:, lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2]
            np.testing.assert_array_equal(actual[lane], expected)
