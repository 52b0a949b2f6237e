"""Hashed and composed tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from costs.work import Work
from emblas import _op
from emblas.tables import Composition, Part
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Hashing:
    """Row numbers of ids under the first hash family."""

    ids: int
    hashes: int
    rows: int

    def __str__(self) -> str:
        return f"{self.ids} ids, {self.hashes} hashes"

    def arguments(self) -> tuple[Any, ...]:
        return torch.arange(self.ids) * 977, 0, 5, self.hashes, self.rows


@dataclasses.dataclass(frozen=True)
class Bag(Hashing):
    """Sums of hashed rows; ``bag`` ids make a bag (0: no bags)."""

    dim: int
    dtype: torch.dtype
    bag: int = 0

    def __str__(self) -> str:
        words = f"{super().__str__()}, {self.rows} rows of {self.dim}, "
        words += str(self.dtype).removeprefix("torch.")
        return words + (f", bags of {self.bag}" if self.bag else "")

    @property
    def outputs(self) -> int:
        return self.ids // (self.bag or 1)

    @property
    def row(self) -> int:
        return self.dim * self.dtype.itemsize

    @property
    def hit(self) -> int:
        """Distinct rows: all but those that a random draw misses; exact for few ids."""
        drawn = self.ids * self.hashes
        if drawn < 10_000:
            return len(torch.ops.emblas.hash_keys(*super().arguments()).unique())
        return round(self.rows * (1 - (1 - 1 / self.rows) ** drawn))

    @property
    def adds(self) -> int:
        return self.ids * self.hashes * self.dim

    def offsets(self) -> Tensor | None:
        if not self.bag:
            return None
        return torch.arange(self.outputs + 1, dtype=torch.int32) * self.bag

    def arguments(self) -> tuple[Any, ...]:
        ids, *hashing, rows = super().arguments()
        table = torch.rand(rows, self.dim).to(self.dtype)
        return ids, table, self.offsets(), None, *hashing, None


def _hash_keys(kernel: str) -> Callable[[Hashing], dict[str, Work]]:
    return lambda h: {kernel: Work(8 * h.ids, 8 * h.ids * h.hashes)}


def _sums(
    entries: int, segments: int, row: int, source: str, read: int, adds: int
) -> dict[str, Work]:
    """Sums over segments, none of which is so long that it is cut into pieces."""
    bounds = 4 * (segments + 1)
    kernels = {f"sum_segments<{source}": Work(read + bounds, segments * row, adds)}
    if entries >= 128:  # from here on there may be pieces, for which these look in vain
        kernels |= {"sum_pieces": Work(0, 0, slack=bounds), "add_pieces": Work(0, 0, slack=bounds)}
    return kernels


def _bag_cuda(b: Bag) -> dict[str, Work]:
    read = 8 * b.ids + b.hit * b.row
    if not b.bag:
        return {"look_up": Work(read, b.outputs * b.row, b.adds)}
    return _sums(b.ids, b.outputs, b.row, "HashedRows", read, b.adds)


def _bag_backward_cuda(b: BagBackward) -> dict[str, Work]:
    drawn = b.ids * b.hashes
    bag_of = 4 * b.ids if b.bag else 0
    kernels = {"find_bags": Work(0, bag_of, slack=4 * (b.outputs + 1))} if b.bag else {}
    return {
        **kernels,
        "hash_ids": Work(8 * b.ids + bag_of, 4 * drawn),
        "find_bounds": Work(0, 4 * (b.rows + 1), slack=4 * drawn),
        **_sums(
            drawn, b.rows, b.row, "SortedGradients", 8 * drawn + bag_of + b.outputs * b.row, b.adds
        ),
    }


def _bag_triton(b: Bag) -> dict[str, Work]:
    offsets = 4 * (b.outputs + 1) if b.bag else 0
    work = Work(8 * b.ids + offsets + b.hit * b.row, b.outputs * b.row, b.adds)
    return {"_bags" if b.bag else "_lookup": work}


@dataclasses.dataclass(frozen=True)
class BagBackward(Bag):
    """Their gradient with respect to the table."""

    def arguments(self) -> tuple[Any, ...]:
        return torch.rand(self.outputs, self.dim).to(self.dtype), *super().arguments(), True, False


def _bag_backward_triton(b: BagBackward) -> dict[str, Work]:
    drawn = b.ids * b.hashes
    bag_of = 8 * b.ids if b.bag else 0
    return {
        "_hash_keys": Work(8 * b.ids, 4 * drawn),
        "_grad_rows": Work(
            8 * drawn + 8 * (b.rows + 1) + bag_of + b.outputs * b.row, b.rows * b.row, b.adds
        ),
    }


_PLAN = 1024  # at least the bytes that describe a composition of one part


@dataclasses.dataclass(frozen=True)
class Composed:
    """A composition of one part, the remainders of ids; ``bag`` ids make a bag (0: no bags)."""

    ids: int
    rows: int
    dim: int
    dtype: torch.dtype
    bag: int = 0

    def __str__(self) -> str:
        words = f"{self.ids} ids, remainders, {self.rows} rows of {self.dim}, "
        words += str(self.dtype).removeprefix("torch.")
        return words + (f", bags of {self.bag}" if self.bag else "")

    @property
    def outputs(self) -> int:
        return self.ids // (self.bag or 1)

    @property
    def row(self) -> int:
        return self.dim * self.dtype.itemsize

    @property
    def fields(self) -> list[int]:
        return Composition((Part(self.rows, self.dim, "radix", a=1),)).fields

    def arguments(self) -> tuple[Any, ...]:
        offsets = torch.arange(self.outputs + 1, dtype=torch.int32) * self.bag
        table = torch.rand(self.rows * self.dim).to(self.dtype)
        bags = offsets if self.bag else None
        return torch.arange(self.ids), table, bags, None, self.fields, 0, 0, None


@dataclasses.dataclass(frozen=True)
class ComposedBackward(Composed):
    """Its gradient with respect to the table."""

    def arguments(self) -> tuple[Any, ...]:
        ids, table, offsets, weights, *options = super().arguments()
        grad = torch.rand(self.outputs, self.dim).to(self.dtype)
        return grad, ids, table, offsets, weights, None, *options, True, False


@dataclasses.dataclass(frozen=True)
class ComposedRows(Composed):
    """The rows in use of that gradient; as many lookups as there are ids, all of different rows."""

    def arguments(self) -> tuple[Any, ...]:
        ids, table, offsets, weights, *options = super().arguments()
        grad = torch.rand(self.outputs, self.dim).to(self.dtype)
        return grad, ids, table, offsets, weights, None, *options


@dataclasses.dataclass(frozen=True)
class RowWiseAdagrad(ComposedRows):
    """The step of row-wise Adagrad on them."""

    def arguments(self) -> tuple[Any, ...]:
        nothing, steps = torch.zeros(0), torch.zeros(1, dtype=torch.int64)
        state = (torch.zeros(self.rows), nothing, nothing.long(), steps)
        return *super().arguments(), *state, 1, 0.1, 1e-8, 0.0, 0.0, 0.0


def _lookups_cuda(c: Composed) -> dict[str, Work]:
    bag_of = 4 * c.ids if c.bag else 0
    kernels = {"find_bags": Work(0, bag_of, slack=4 * (c.outputs + 1))} if c.bag else {}
    return {**kernels, "write_lookups": Work(8 * c.ids + bag_of, 8 * c.ids)}


def _used_cuda(c: Composed, read: int, written: int, adds: int) -> dict[str, Work]:
    """Sums over the lookups of rows in use, which are all different."""
    read += 4 * c.ids + 12 * c.ids + (4 * c.ids if c.bag else 0) + c.outputs * c.row
    kernels = {"sum_segments<LookupGradients": Work(read, written, c.ids * c.dim + adds)}
    if c.ids >= 128:
        pieces = Work(0, 0, slack=4 * c.ids)
        kernels |= {"sum_pieces": pieces, "add_pieces": pieces}
    return kernels


def _rows_cuda(c: ComposedRows) -> dict[str, Work]:
    keys = 4 * c.ids
    return {
        **_lookups_cuda(c),
        "mark_rows": Work(keys, keys),
        "list_rows": Work(keys + 8 * c.ids, 8 * c.ids + 8),
        **_used_cuda(c, 8 * c.ids, c.ids * c.row, 0),
    }


def _update_cuda(c: RowWiseAdagrad) -> dict[str, Work]:
    own = c.ids * (c.row + 4)  # rows in use and their sums of squares
    return {
        **_lookups_cuda(c),
        "count_step": Work(8, 16),
        **_used_cuda(c, own, own, 4 * c.ids * c.dim),
    }


def _rows_triton(c: ComposedRows) -> dict[str, Work]:
    works = _composed_backward_triton(ComposedBackward(**dataclasses.asdict(c)))
    bag_of = 8 * c.ids if c.bag else 0
    read = 8 * c.ids + 8 * (c.ids + 1) + 4 * c.ids + bag_of + c.outputs * c.row
    sums = Work(read, c.ids * c.row, c.ids * c.dim, slack=_PLAN + 8 * c.ids)
    return {**works, "_row_gradients": sums}


def _update_triton(c: RowWiseAdagrad) -> dict[str, Work]:
    works, rows = _rows_triton(c), 4 * c.ids * c.dim
    sums = dataclasses.replace(works["_row_gradients"], written=rows)
    own = c.ids * (c.row + 4)
    step = Work(4 * c.ids + rows + own, own, 4 * c.ids * c.dim)
    return {**works, "_row_gradients": sums, "_update_rows": step}


def _composed_cuda(c: Composed) -> dict[str, Work]:
    offsets = 4 * (c.outputs + 1) if c.bag else 0
    read = 8 * c.ids + offsets + min(c.ids, c.rows) * c.row
    work = Work(read, c.outputs * c.row, c.ids * c.dim, slack=_PLAN)
    return {"compose_bags" if c.bag else "compose_ids": work}


def _composed_backward_cuda(c: ComposedBackward) -> dict[str, Work]:
    bag_of = 4 * c.ids if c.bag else 0
    kernels = {"find_bags": Work(0, bag_of, slack=4 * (c.outputs + 1))} if c.bag else {}
    read = 12 * c.ids + bag_of + c.outputs * c.row
    return {
        **kernels,
        "write_lookups": Work(8 * c.ids + bag_of, 8 * c.ids),
        "find_bounds": Work(0, 4 * (c.rows + 1), slack=4 * c.ids),
        **_sums(c.ids, c.rows, c.row, "LookupGradients", read, c.ids * c.dim),
    }


def _composed_triton(c: Composed) -> dict[str, Work]:
    offsets = 4 * (c.outputs + 1) if c.bag else 0
    read = 8 * c.ids + offsets + min(c.ids, c.rows) * c.row
    work = Work(read, c.outputs * c.row, c.ids * c.dim, slack=_PLAN)
    return {"_compose_bags" if c.bag else "_compose_ids": work}


def _composed_backward_triton(c: ComposedBackward) -> dict[str, Work]:
    bag_of = 8 * c.ids if c.bag else 0
    read = 8 * c.ids + 8 * (c.rows + 1) + bag_of + c.outputs * c.row
    slack = _PLAN + 8 * c.ids
    return {
        "_lookups": Work(8 * c.ids + bag_of, 12 * c.ids, slack=slack),
        "_row_gradients": Work(read, c.rows * c.row, c.ids * c.dim, slack=slack),
    }


@dataclasses.dataclass(frozen=True)
class Quantized:
    """Rows of integers with a scale each; ``bag`` ids make a bag (0: no bags)."""

    ids: int
    rows: int
    dim: int
    bits: int
    dtype: torch.dtype
    bag: int = 0

    def __str__(self) -> str:
        words = f"{self.ids} ids, {self.rows} rows of {self.dim} integers of {self.bits} bits, "
        words += str(self.dtype).removeprefix("torch.")
        return words + (f", bags of {self.bag}" if self.bag else "")

    @property
    def outputs(self) -> int:
        return self.ids // (self.bag or 1)

    @property
    def row(self) -> int:
        return self.dim * self.dtype.itemsize

    @property
    def read(self) -> int:
        """Bytes of ids, and of rows in use with their scales."""
        own = self.dim * self.bits // 8 + self.dtype.itemsize
        return 8 * self.ids + min(self.ids, self.rows) * own

    def table(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        packed = torch.randint(0, 256, (self.rows, self.dim * self.bits // 8)).to(torch.uint8)
        offsets = torch.arange(self.outputs + 1, dtype=torch.int32) * self.bag
        scale = torch.rand(self.rows).to(self.dtype)
        return torch.arange(self.ids) % self.rows, packed, scale, offsets if self.bag else None

    def arguments(self) -> tuple[Any, ...]:
        return *self.table(), None, self.bits, self.dim, 0, None, None


@dataclasses.dataclass(frozen=True)
class QuantizedBackward(Quantized):
    """The gradient of the weights of ids."""

    def arguments(self) -> tuple[Any, ...]:
        grad = torch.rand(self.outputs, self.dim).to(self.dtype)
        return grad, *self.table(), self.bits, self.dim, None, None


@dataclasses.dataclass(frozen=True)
class Codes:
    """Normal numbers of ids; some sixty operations on doubles for each are not counted."""

    ids: int
    dim: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return (
            f"{self.ids} ids, {self.dim} normal numbers, {str(self.dtype).removeprefix('torch.')}"
        )

    def arguments(self) -> tuple[Any, ...]:
        ids = torch.arange(self.ids)
        return ids, ids[:1], self.dim, 0, 5, 1, _op.FLOATS.index(self.dtype)


def _codes(kernel: str) -> Callable[[Codes], dict[str, Work]]:
    return lambda c: {kernel: Work(8 * c.ids, c.ids * c.dim * c.dtype.itemsize, slack=8)}


def _quantized(bags: str, ids: str) -> Callable[[Quantized], dict[str, Work]]:
    def works(q: Quantized) -> dict[str, Work]:
        offsets = 4 * (q.outputs + 1) if q.bag else 0
        work = Work(q.read + offsets, q.outputs * q.row, 2 * q.ids * q.dim)
        return {bags if q.bag else ids: work}

    return works


def _quantized_backward_cuda(q: QuantizedBackward) -> dict[str, Work]:
    bag_of = 4 * q.ids if q.bag else 0
    kernels = {"find_bags": Work(0, bag_of, slack=4 * (q.outputs + 1))} if q.bag else {}
    read = q.read + bag_of + q.outputs * q.row
    return {**kernels, "dot_codes": Work(read, 4 * q.ids, 3 * q.ids * q.dim)}


def _quantized_backward_triton(q: QuantizedBackward) -> dict[str, Work]:
    read = q.read + (8 * q.ids if q.bag else 0) + q.outputs * q.row
    return {"_quantized_dots": Work(read, 4 * q.ids, 3 * q.ids * q.dim)}


_BF16, _F32 = torch.bfloat16, torch.float32
MODELS: dict[tuple[str, str], Callable[[Any], dict[str, Work]]] = {
    ("hash_keys", "CUDA C++"): _hash_keys("hash_ids"),
    ("hash_keys", "Triton"): _hash_keys("_hash_keys"),
    ("hash_bag", "CUDA C++"): _bag_cuda,
    ("hash_bag", "Triton"): _bag_triton,
    ("hash_bag_backward", "CUDA C++"): _bag_backward_cuda,
    ("hash_bag_backward", "Triton"): _bag_backward_triton,
    ("compose_bag", "CUDA C++"): _composed_cuda,
    ("compose_bag", "Triton"): _composed_triton,
    ("compose_bag_backward", "CUDA C++"): _composed_backward_cuda,
    ("compose_bag_backward", "Triton"): _composed_backward_triton,
    ("compose_bag_backward_rows", "CUDA C++"): _rows_cuda,
    ("compose_bag_backward_rows", "Triton"): _rows_triton,
    ("compose_bag_update_", "CUDA C++"): _update_cuda,
    ("compose_bag_update_", "Triton"): _update_triton,
    ("random_codes", "CUDA C++"): _codes("make_codes"),
    ("random_codes", "Triton"): _codes("_random_codes"),
    ("quantized_bag", "CUDA C++"): _quantized("pool_codes", "look_up_codes"),
    ("quantized_bag", "Triton"): _quantized("_quantized_bags", "_quantized_lookup"),
    ("quantized_bag_backward", "CUDA C++"): _quantized_backward_cuda,
    ("quantized_bag_backward", "Triton"): _quantized_backward_triton,
}
SMALL: dict[str, tuple[Any, ...]] = {
    "hash_keys": (Hashing(300, 4, 50), Hashing(70, 3, 1000)),
    "hash_bag": (
        Bag(60, 4, 500, 24, _F32),
        Bag(60, 2, 500, 20, _BF16, bag=6),
        Bag(180, 2, 500, 20, _BF16, bag=6),
    ),
    "hash_bag_backward": (
        BagBackward(60, 4, 50, 24, _F32),
        BagBackward(60, 2, 50, 20, _BF16, bag=6),
    ),
    "compose_bag": (Composed(60, 50, 24, _F32), Composed(60, 500, 20, _BF16, bag=6)),
    "compose_bag_backward": (
        ComposedBackward(60, 50, 24, _F32),
        ComposedBackward(60, 50, 20, _BF16, bag=6),
    ),
    "compose_bag_backward_rows": (
        ComposedRows(60, 70, 24, _F32),
        ComposedRows(60, 70, 20, _BF16, bag=6),
    ),
    "compose_bag_update_": (
        RowWiseAdagrad(60, 70, 24, _F32),
        RowWiseAdagrad(60, 70, 20, _BF16, bag=6),
    ),
    "random_codes": (Codes(70, 36, _F32), Codes(9, 7, _BF16)),
    "quantized_bag": (Quantized(60, 50, 36, 8, _F32), Quantized(60, 80, 48, 4, _BF16, bag=6)),
    "quantized_bag_backward": (
        QuantizedBackward(60, 50, 36, 8, _F32),
        QuantizedBackward(60, 80, 48, 4, _BF16, bag=6),
    ),
}
LARGE: dict[str, tuple[Any, ...]] = {
    "hash_keys": (Hashing(1 << 20, 4, 1 << 20),),
    "hash_bag": (Bag(1 << 18, 4, 1 << 20, 128, _F32), Bag(1 << 20, 2, 1 << 20, 64, _BF16, bag=16)),
    "hash_bag_backward": (BagBackward(1 << 18, 4, 1 << 20, 128, _F32),),
    "compose_bag": (Composed(1 << 20, 1 << 20, 64, _BF16, bag=16),),
    "compose_bag_backward": (ComposedBackward(1 << 20, 1 << 20, 64, _BF16, bag=16),),
    "compose_bag_backward_rows": (ComposedRows(1 << 20, 1 << 22, 64, _BF16, bag=16),),
    "compose_bag_update_": (RowWiseAdagrad(1 << 20, 1 << 22, 64, _F32),),
    "random_codes": (Codes(1 << 18, 128, _F32),),
    "quantized_bag": (
        Quantized(1 << 18, 1 << 20, 128, 8, _F32),
        Quantized(1 << 20, 1 << 20, 64, 4, _BF16, bag=16),
    ),
    "quantized_bag_backward": (QuantizedBackward(1 << 20, 1 << 20, 64, 4, _BF16, bag=16),),
}
