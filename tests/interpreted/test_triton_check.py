"""The checked interpreter notices every kind of bug that it claims to, and no other.

Run by tests/test_interpreted.py in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from triton_check import KernelFault, checked_interpreter

spec = importlib.util.spec_from_file_location("kernels", Path(__file__).with_name("kernels.py"))
kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernels)

X = torch.arange(40.0)
ROWS = torch.arange(24.0).view(4, 6)[:, 1:4]


def launch(name, grid, *args, **constants):
    with checked_interpreter():
        getattr(kernels, name)[(grid,)](*args, **constants)


def tile(dtype=torch.float32, seed=0):
    return torch.randn(16, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)


def uninitialised():
    """A kernel adds to an output that nobody has cleared."""
    with checked_interpreter():
        kernels.add_with_atomics[(4,)](X, torch.empty(1))


def left_out():
    """A kernel leaves a part of its output unwritten, which torch reads."""
    with checked_interpreter():
        out = torch.empty(40)
        kernels.double[(2,)](X, out, 32, BLOCK=16)
        return out + 1


BROKEN = {
    "out of bounds": [
        lambda: launch("load_without_mask", 3, X, torch.zeros(40), 40, BLOCK=16),
        lambda: launch("store_without_mask", 3, X, torch.zeros(40), 40, BLOCK=16),
        lambda: launch("mask_of_one_too_many", 3, X, torch.zeros(40), 40, BLOCK=16),
        lambda: launch("reads_the_gap_between_rows", 4, ROWS, torch.zeros(12), 3, 6, BLOCK=4),
    ],
    "race": [
        lambda: launch("add_without_atomics", 4, X, torch.zeros(1)),
        lambda: launch("every_program_stores", 4, X, torch.zeros(1)),
        lambda: launch("atomic_beside_plain_store", 4, X, torch.zeros(1)),
        lambda: launch("reads_what_a_neighbour_writes", 4, X, torch.zeros(40), BLOCK=8),
    ],
    "different values": [
        lambda: launch("scatter", 1, X, torch.arange(16) // 2, torch.zeros(16), BLOCK=16),
    ],
    "uninitialised": [uninitialised],
    "nobody has written": [left_out],
    "no barrier": [lambda: launch("store_then_load", 1, X.clone(), torch.zeros(16), BLOCK=16)],
    "misaligned": [
        lambda: launch("misaligned", 1, torch.zeros(9, dtype=torch.uint8)[1:], torch.zeros(1).int())
    ],
    "no GPU takes the grid": [
        lambda: kernels_on_wide_grid(),
    ],
}


def kernels_on_wide_grid():
    with checked_interpreter():
        kernels.add_with_atomics[(1, 70000)](X, torch.zeros(1))


@pytest.mark.parametrize(
    ("message", "run"), [(message, run) for message, runs in BROKEN.items() for run in runs]
)
def test_broken_kernels_are_caught(message, run):
    with pytest.raises(KernelFault, match=message):
        run()


def test_message_names_the_place():
    with pytest.raises(
        KernelFault, match=r"load_without_mask, program \(2, 0, 0\), line 17: load out of bounds, "
        r"160 bytes from the start of x \(160 bytes\), 8 lanes"
    ):  # fmt: skip
        BROKEN["out of bounds"][0]()


def test_sound_kernels_pass():
    out = torch.zeros(40)
    launch("double", 3, X, out, 40, BLOCK=16)
    assert torch.equal(out, 2 * X)
    total = torch.zeros(1)
    launch("add_with_atomics", 40, X, total)
    assert total == X.sum()
    turned = X.clone()
    launch("store_barrier_load", 1, turned, torch.zeros(16), BLOCK=16)
    assert torch.equal(turned[:16], X[:16].flip(0))
    same = torch.zeros(16)
    launch("scatter", 1, torch.ones(16), torch.arange(16) // 2, same, BLOCK=16)
    assert same.sum() == 8


def test_masked_lanes_hold_garbage():
    """Now NaN, now a huge number, now zero: no comparison comes out as it should with all three."""
    sums = set()
    for seed in range(16):
        out = torch.zeros(1)
        with checked_interpreter(seed):
            kernels.sum_of_masked_lanes[(1,)](X, out, 12, BLOCK=16)
        sums.add(str(out.item()))
    assert sums == {"nan", "inf", str(X[:12].sum().item())}


def test_programs_run_in_random_order():
    """Seen through the one race that the checks can't tell: none here, so through the place."""
    places = []
    for seed in (0, 1):
        with pytest.raises(KernelFault) as error, checked_interpreter(seed):
            kernels.every_program_stores[(40,)](X, torch.zeros(1))
        places.append(str(error.value))
    assert places[0] != places[1]


def test_bfloat16_arithmetic():
    x, y, out = (torch.randn(64).bfloat16() for _ in range(3))
    launch("square_plus", 1, x, y, out, BLOCK=64)
    assert torch.equal(out, x * x + y)


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("source", [torch.float32, torch.float64, torch.bfloat16])
def test_casts_round_to_nearest_even(source, target):
    x = torch.cat([torch.randn(1020) * 100, torch.tensor([0.0, torch.inf, -torch.inf, torch.nan])])
    x, out = x.to(source), torch.zeros(1024).to(target)
    launch("cast", 1, x, out, BLOCK=1024)
    expected = x.float() if target == torch.bfloat16 else x
    assert torch.equal(out.isnan(), x.isnan())
    assert torch.equal(out.nan_to_num(0), expected.to(target).nan_to_num(0))


@pytest.mark.parametrize(
    ("dtype", "precision", "low", "high"),
    [
        (torch.bfloat16, "ieee", 0, 1e-5),
        (torch.float16, "ieee", 0, 1e-5),
        (torch.float32, "ieee", 0, 1e-5),
        (torch.float32, "tf32x3", 0, 1e-5),
        (torch.float32, "tf32", 1e-4, 3e-2),
    ],
)
def test_dots(dtype, precision, low, high):
    a, b, out = tile(dtype), tile(dtype, seed=1), torch.zeros(16, 16)
    launch("product", 1, a, b, out, PRECISION=precision, BLOCK=16)
    error = (out.double() - a.double() @ b.double()).abs().max()
    assert low <= error <= high


def test_annotated_integers_have_64_bits():
    out = torch.zeros(1, dtype=torch.int64)
    launch("wide_product", 1, out, 2**20, 2**20)
    assert out == 2**40


def test_sorting():
    x = torch.randint(-(2**62), 2**62, (4, 32))
    out = torch.zeros_like(x)
    launch("sort_rows", 4, x, out, BLOCK=32)
    assert torch.equal(out, x.sort(1).values)
