"""Triton kernels with one bug each, and sound counterparts, for test_triton_check.py."""

import triton
import triton.language as tl


@triton.jit
def double(x, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    tl.store(out + at, 2 * tl.load(x + at, mask=inside), mask=inside)


@triton.jit
def load_without_mask(x, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, 2 * tl.load(x + at), mask=at < size)


@triton.jit
def store_without_mask(x, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, 2 * tl.load(x + at, mask=at < size))


@triton.jit
def mask_of_one_too_many(x, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at <= size
    tl.store(out + at, 2 * tl.load(x + at, mask=inside), mask=inside)


@triton.jit
def reads_the_gap_between_rows(x, out, columns, row_stride, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    values = tl.load(x + tl.program_id(0) * row_stride + at)
    tl.store(out + tl.program_id(0) * columns + at, values, mask=at < columns)


@triton.jit
def add_without_atomics(x, out):
    total = tl.load(out)
    tl.store(out, total + tl.load(x + tl.program_id(0)))


@triton.jit
def add_with_atomics(x, out):
    tl.atomic_add(out, tl.load(x + tl.program_id(0)))


@triton.jit
def atomic_beside_plain_store(x, out):
    if tl.program_id(0) == 0:
        tl.store(out, 0.0)
    tl.atomic_add(out, tl.load(x + tl.program_id(0)))


@triton.jit
def every_program_stores(x, out):
    tl.store(out, tl.load(x + tl.program_id(0)))


@triton.jit
def reads_what_a_neighbour_writes(x, out, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    tl.store(out + program, tl.load(x + program))
    if program > 0:
        tl.store(out + program + BLOCK, tl.load(out + program - 1))


@triton.jit
def scatter(x, index, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + tl.load(index + at), tl.load(x + at))


@triton.jit
def store_then_load(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at))
    turned = tl.load(out + BLOCK - 1 - at)
    tl.store(x + at, turned)


@triton.jit
def store_barrier_load(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at))
    tl.debug_barrier()
    turned = tl.load(out + BLOCK - 1 - at)
    tl.store(x + at, turned)


@triton.jit
def sum_of_masked_lanes(x, out, size, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out, tl.sum(tl.load(x + at, mask=at < size)))


@triton.jit
def misaligned(x, out):
    words = x.to(tl.pointer_type(tl.int32))
    tl.store(out, tl.load(words))


@triton.jit
def product(a, b, out, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tile = at[:, None] * BLOCK + at
    result = tl.dot(tl.load(a + tile), tl.load(b + tile), input_precision=PRECISION)
    tl.store(out + tile, result)


@triton.jit
def square_plus(x, y, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x_values, y_values = tl.load(x + at), tl.load(y + at)
    tl.store(out + at, x_values * x_values + y_values)


@triton.jit
def cast(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at).to(out.dtype.element_ty))


@triton.jit
def wide_product(out, a: tl.int64, b: tl.int64):
    tl.store(out, a * b)


@triton.jit
def sort_rows(x, out, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.sort(tl.load(x + at)))
