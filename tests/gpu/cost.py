"""What the GPU kernels have to move and compute, as formulas of shapes, and what that bounds.

Bytes are distinct bytes of global memory that a launch reads and writes. The tests hold them, the
products on tensor cores and the population counts to what the SIMT emulator and the checked
interpreter count (test_cost.py beside this file, tests/interpreted/test_cost.py). Other arithmetic
is counted by hand. Run as a script, this writes docs/gpu_bounds.md.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from emblas.tables import Composition, Part
from torch import Tensor

FILE = Path(__file__).parents[2] / "docs" / "gpu_bounds.md"


@dataclasses.dataclass(frozen=True)
class Work:
    """What one launch of a kernel reads, writes and computes."""

    read: int
    written: int
    flops: int = 0  # additions and multiplications of float32
    tensor_flops: int = 0  # on tensor cores
    binary_flops: int = 0  # the same, of single bits
    popcounts: int = 0  # of 32 bits
    slack: int = 0  # bytes or population counts more that it may take, depending on the data


@dataclasses.dataclass(frozen=True)
class Device:
    """Public figures of a GPU."""

    name: str
    bandwidth: float  # bytes a second
    flops: float  # float32, a second
    tensor_flops: float  # of bfloat16, dense, a second
    binary_flops: float  # of single bits, a second; infinite where nothing is published
    popcounts: float  # a second: 16 a clock and multiprocessor (CUDA C++ Programming Guide)


# Data sheets of NVIDIA: A100 80GB SXM, H100 SXM, HGX B200 (one GPU).
DEVICES = (
    Device("A100", 2.039e12, 19.5e12, 312e12, 4992e12, 108 * 1.41e9 * 16),
    Device("H100", 3.35e12, 67e12, 989e12, math.inf, 132 * 1.98e9 * 16),
    Device("B200", 8.0e12, 75e12, 2250e12, math.inf, 148 * 1.965e9 * 16),
)


# --- pooling -------------------------------------------------------------------------------------

_CHUNK = 128  # rows that one block of sum_chunks adds up


@dataclasses.dataclass(frozen=True)
class Pooling:
    """Mean pooling of sequences of these lengths, none of them empty."""

    lengths: tuple[int, ...]
    dim: int
    dtype: torch.dtype
    weights: bool = False
    normalize: bool = False

    def __str__(self) -> str:
        words = f"{len(self.lengths)} x {self.lengths[0]} tokens, dim {self.dim}, "
        words += str(self.dtype).removeprefix("torch.")
        return words + ", weights" * self.weights + ", normalize" * self.normalize

    @property
    def x(self) -> int:
        return sum(self.lengths) * self.dim * self.dtype.itemsize

    @property
    def out(self) -> int:
        return len(self.lengths) * self.dim * self.dtype.itemsize

    @property
    def wide(self) -> int:  # as `out`, in accumulators
        return len(self.lengths) * self.dim * 4

    @property
    def partial(self) -> int:
        return sum(-(-length // _CHUNK) for length in self.lengths) * self.dim * 4

    @property
    def per_token(self) -> int:
        return sum(self.lengths) * 4

    @property
    def per_sequence(self) -> int:
        return len(self.lengths) * 4

    @property
    def offsets(self) -> int:
        return (len(self.lengths) + 1) * 4

    @property
    def read_always(self) -> int:
        return self.offsets + self.per_token * self.weights

    def arguments(self) -> tuple[Any, ...]:
        x = torch.rand(sum(self.lengths), self.dim).to(self.dtype)
        offsets = torch.tensor([0, *self.lengths]).cumsum(0).int()
        return x, offsets, torch.rand(len(x)) + 1 if self.weights else None, self.normalize


def _pool_cuda(p: Pooling) -> dict[str, Work]:
    adds = sum(p.lengths) * p.dim * (2 if p.weights else 1)
    return {
        "sum_chunks": Work(p.read_always + p.x, p.partial, adds),
        "finish_means": Work(
            p.read_always + p.partial,
            p.wide + p.out + p.per_sequence * p.normalize,
            p.partial // 4 + 2 * p.wide // 4 * (1 + p.normalize),
        ),
    }


def _pool_triton(p: Pooling) -> dict[str, Work]:
    adds = 2 * sum(p.lengths) * p.dim
    if not p.normalize:
        return {"_mean": Work(p.read_always + p.x, p.out, adds)}
    return {
        "_mean": Work(p.read_always + p.x, p.wide, adds),
        "_normalize": Work(p.wide, p.out + p.per_sequence, 3 * p.wide // 4),
    }


@dataclasses.dataclass(frozen=True)
class PoolingBackward(Pooling):
    """Its gradient with respect to x, and to the weights where there are some."""

    def arguments(self) -> tuple[Any, ...]:
        x, offsets, weights, normalize = super().arguments()
        out, norm = torch.ops.emblas.segment_pool(x, offsets, weights, normalize)
        needs = (normalize, True, self.weights)
        return torch.rand(out.shape).to(x.dtype), x, out, norm, offsets, weights, *needs


def _pool_backward(first: str, second: str, along_mean: bool) -> Callable[..., dict[str, Work]]:
    def works(p: PoolingBackward) -> dict[str, Work]:
        passes = 5 + 4 * p.normalize
        means = Work(
            p.read_always + 2 * p.out + p.per_sequence * p.normalize,
            p.wide + 2 * p.per_sequence,
            p.wide // 4 * passes,
        )
        tokens = Work(
            p.read_always
            + p.wide
            + p.per_sequence * (1 + (along_mean or p.weights))
            + p.x * p.weights,
            p.x + p.per_token * p.weights,
            sum(p.lengths) * p.dim * (3 if p.weights else 1),
        )
        return {first: means, second: tokens}

    return works


# --- tables --------------------------------------------------------------------------------------


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


# --- binary --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Packing:
    """Signs of vectors, one bit each."""

    rows: int
    dim: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.rows} x {self.dim}, {str(self.dtype).removeprefix('torch.')}"

    def arguments(self) -> tuple[Any, ...]:
        return (torch.rand(self.rows, self.dim).to(self.dtype),)


def _pack(kernel: str) -> Callable[[Packing], dict[str, Work]]:
    def works(p: Packing) -> dict[str, Work]:
        return {kernel: Work(p.rows * p.dim * p.dtype.itemsize, p.rows * -(-p.dim // 8))}

    return works


@dataclasses.dataclass(frozen=True)
class Distances:
    """Hamming distances of all queries from all codes."""

    queries: int
    codes: int
    width: int  # bytes of a code

    def __str__(self) -> str:
        return f"{self.queries} queries, {self.codes} codes of {8 * self.width} bits"

    @property
    def read(self) -> int:
        return (self.queries + self.codes) * self.width

    @property
    def words(self) -> int:
        return -(-self.width // 4)

    @property
    def popcounts(self) -> int:
        return self.queries * self.codes * self.words

    def arguments(self) -> tuple[Any, ...]:
        return tuple(
            torch.randint(0, 256, (n, self.width), dtype=torch.uint8)
            for n in (self.queries, self.codes)
        )


@dataclasses.dataclass(frozen=True)
class Search(Distances):
    """The k nearest of the codes for every query."""

    k: int

    def __str__(self) -> str:
        return f"{super().__str__()}, k = {self.k}"

    def arguments(self) -> tuple[Any, ...]:
        return *super().arguments(), self.k


@dataclasses.dataclass(frozen=True)
class RangeSearch(Search):
    """Up to k of the codes within a radius of every query, and how many there are."""

    radius: int

    def __str__(self) -> str:
        return f"{super().__str__()}, radius {self.radius}"

    @property
    def bins(self) -> int:
        return min(self.radius, 8 * self.width) + 1

    def arguments(self) -> tuple[Any, ...]:
        queries, codes, k = super().arguments()
        return queries, codes, self.radius, k, None, False


@dataclasses.dataclass(frozen=True)
class AllInRange(RangeSearch):
    """All of the codes within a radius of every query; k of them is a guess."""

    def arguments(self) -> tuple[Any, ...]:
        return *Distances.arguments(self), self.radius, None, False


@dataclasses.dataclass(frozen=True)
class Scores(Search):
    """The k codes with the highest scores for every real-valued query."""

    def arguments(self) -> tuple[Any, ...]:
        _, codes, k = super().arguments()
        return torch.randn(self.queries, 8 * self.width), codes, k, None, None


@dataclasses.dataclass(frozen=True)
class Rotation:
    """Two rounds of signs and Hadamard transforms of vectors whose dim is a power of two."""

    rows: int
    dim: int

    def __str__(self) -> str:
        return f"{self.rows} x {self.dim}, float32"

    def arguments(self) -> tuple[Any, ...]:
        signs = torch.randint(0, 2, (2, self.dim), dtype=torch.int8) * 2 - 1
        return torch.rand(self.rows, self.dim), signs


def _rotation(kernel: str) -> Callable[[Rotation], dict[str, Work]]:
    def works(r: Rotation) -> dict[str, Work]:
        adds = 2 * r.rows * r.dim * (r.dim.bit_length() - 1)
        return {kernel: Work(r.rows * r.dim * 4 + 2 * r.dim, r.rows * r.dim * 4, adds)}

    return works


def _scan_cuda(d: Distances, written: int, slack: int) -> dict[str, Work]:
    """One pass over the codes, on tensor cores from 5 queries on."""
    if d.queries <= 4:
        return {"scan_codes": Work(d.read, written, popcounts=d.popcounts, slack=slack)}
    # |a xor b| = |a| + |b| - 2 |a and b|, once more for each 32 queries and each 256 codes.
    norms = d.words * (-(-d.queries // 32) * d.codes + -(-d.codes // 256) * d.queries)
    products = 2 * 8 * d.queries * d.codes * d.width
    scan = Work(d.read, written, popcounts=norms, binary_flops=products, slack=slack)
    return {"scan_codes_by_mma": scan}


def _distances_cuda(d: Distances) -> dict[str, Work]:
    return _scan_cuda(d, 4 * d.queries * d.codes, 0)


def _search_cuda(s: Search) -> dict[str, Work]:
    together = 1 if s.queries == 1 else 4 if s.queries <= 4 else 32
    return _lists_cuda(s, together, functools.partial(_scan_cuda, s))


def _scores_cuda(s: Scores) -> dict[str, Work]:
    tables = 128 * s.queries * s.width

    def scan(written: int, slack: int) -> dict[str, Work]:
        make = Work(32 * s.queries * s.width, tables, tables)
        adds = 2 * s.queries * s.codes * s.width
        look_up = Work(s.codes * s.width + tables, written, adds, slack=slack)
        return {"build_tables": make, "scan_scores": look_up}

    return _lists_cuda(s, min(s.queries, 2), scan)


def _lists_cuda(
    s: Search | Dense, together: int, scan: Callable[[int, int], dict[str, Work]]
) -> dict[str, Work]:
    """Lists of the nearest, one for each query and range of codes, are merged 16 to 1."""
    groups = -(-s.queries // together)
    tiles = -(-s.codes // 256)
    tiles_per_list = -(-tiles // (max(1024 // groups, 1) * max(8 // together, 1)))
    count, keep = -(-tiles // tiles_per_list), min(s.k, 256 * tiles_per_list)
    counts = 8 * s.queries * count if isinstance(s, RangeSearch) else 0
    offered = s.queries * count * 256 * tiles_per_list
    kernels = scan(8 * s.queries * count * keep + counts, 16 * offered)
    if counts:
        kernels["sum_counts"] = Work(counts, 8 * s.queries)
    merges = 0
    while count > 1:
        entries, more = s.queries * count * keep, min(s.k, 16 * keep)
        count = -(-count // 16)
        merges += 1
        slack = 16 * s.queries * count * max(16 * keep, 128)
        work = Work(8 * entries, 8 * s.queries * count * more, slack=slack)
        kernels[f"merge_lists #{merges}"] = work
        keep = more
    return kernels | {"rank_entries": Work(8 * s.queries * keep, 12 * s.queries * s.k)}


def _programs_triton(s: Distances, together: int) -> int:
    groups = -(-s.queries // together)
    return max(1, min(-(-s.codes // 256), 2048 // groups))


# The interpreter doesn't count the bits that the Triton kernels count: it knows no such operation.
def _distances_triton(d: Distances) -> dict[str, Work]:
    return {"_all_distances": Work(d.read, 4 * d.queries * d.codes, popcounts=d.popcounts)}


def _search_triton(s: Search) -> dict[str, Work]:
    kept = next(size for size in (16, 64, 256) if s.k <= size)
    chunks = _programs_triton(s, 1 if s.queries == 1 or kept > 64 else 4)
    found = 8 * s.queries * chunks * kept
    return {"_nearest_of_chunk": Work(s.read, found, popcounts=s.popcounts)}


def _range_triton(s: RangeSearch) -> dict[str, Work]:
    chunks = _programs_triton(s, 1 if s.queries == 1 else 4)
    chunks = min(chunks, max(1, 2**24 // (s.queries * s.bins)))
    counters = s.queries * chunks * 4 * s.bins  # of which only some are touched
    read = s.read + 8 * s.queries + 16 * s.queries * chunks
    return {
        "_count_of_chunk": Work(s.read, 0, popcounts=s.popcounts, slack=counters),
        "_collect_chunk": Work(read, 0, popcounts=s.popcounts, slack=8 * s.queries * s.k),
    }


@dataclasses.dataclass(frozen=True)
class Dense:
    """The k rows with the highest dot products with every query."""

    queries: int
    codes: int  # rows
    dim: int
    dtype: torch.dtype
    k: int

    def __str__(self) -> str:
        words = f"{self.queries} queries, {self.codes} rows of {self.dim}, "
        return f"{words}{str(self.dtype).removeprefix('torch.')}, k = {self.k}"

    @property
    def read(self) -> int:
        return self.queries * self.dim * 4 + self.codes * self.dim * self.dtype.itemsize

    def arguments(self) -> tuple[Any, ...]:
        rows = torch.rand(self.codes, self.dim).to(self.dtype)
        return torch.rand(self.queries, self.dim), rows, self.k, 0, None


@dataclasses.dataclass(frozen=True)
class Gather(Dense):
    """Dot products of every query with k rows of its own."""

    def arguments(self) -> tuple[Any, ...]:
        queries, rows, *_ = super().arguments()
        ids = torch.arange(self.queries * self.k) % self.codes
        return queries, rows, ids.view(self.queries, self.k), 0


@dataclasses.dataclass(frozen=True)
class MaxSim:
    """Late interaction of one query of so many tokens with every document."""

    tokens: int
    lengths: tuple[int, ...]  # of documents
    dim: int

    def __str__(self) -> str:
        return f"{self.tokens} x {len(self.lengths)} documents of {self.lengths[0]}, dim {self.dim}"

    @property
    def query(self) -> int:
        return 4 * self.tokens * self.dim

    @property
    def documents(self) -> int:
        return 4 * sum(self.lengths) * self.dim

    @property
    def offsets(self) -> int:
        return 8 + 4 * (len(self.lengths) + 1)

    @property
    def argmax(self) -> int:
        return 4 * self.tokens * len(self.lengths)

    @property
    def products(self) -> int:
        return 2 * self.tokens * sum(self.lengths) * self.dim

    def arguments(self) -> tuple[Any, ...]:
        offsets = torch.tensor([0, *self.lengths]).cumsum(0).int()
        query = torch.tensor([0, self.tokens], dtype=torch.int32)
        tokens = (torch.rand(n, self.dim) for n in (self.tokens, sum(self.lengths)))
        return next(tokens), query, next(tokens), offsets, self.dim, True


@dataclasses.dataclass(frozen=True)
class MaxSimBackward(MaxSim):
    """Its gradient with respect to both."""

    def arguments(self) -> tuple[Any, ...]:
        forward = super().arguments()
        scores, argmax = torch.ops.emblas.maxsim(*forward)
        return torch.rand(scores.shape), *forward[:4], argmax


def _lists_triton(queries: int, rows: int, k: int) -> int:
    """Bytes of the lists of the programs, each of 16 queries and some tiles of 64 rows."""
    kept = 16 if k <= 16 else 64
    chunks = max(1, min(-(-rows // 64), 2048 // -(-queries // 16)))
    return 8 * queries * chunks * kept


def _scores_triton(s: Scores) -> dict[str, Work]:
    read = 32 * s.queries * s.width + s.codes * s.width
    products = 16 * s.queries * s.codes * s.width
    written = _lists_triton(s.queries, s.codes, s.k)
    return {"_highest_of_chunk": Work(read, written, tensor_flops=products)}


def _dense_triton(d: Dense) -> dict[str, Work]:
    written = _lists_triton(d.queries, d.codes, d.k)
    products = 2 * d.queries * d.codes * d.dim
    return {"_highest_of_chunk": Work(d.read, written, tensor_flops=products)}


def _dense_cuda(d: Dense) -> dict[str, Work]:
    together = 1 if d.queries == 1 else 4
    # The squares of a row for each block of queries, too.
    adds = 2 * d.codes * d.dim * (d.queries + -(-d.queries // together))

    def scan(written: int, slack: int) -> dict[str, Work]:
        return {"scan_dense": Work(d.read, written, adds, slack=slack)}

    return _lists_cuda(d, together, scan)


def _gather(kernel: str) -> Callable[[Gather], dict[str, Work]]:
    def works(g: Gather) -> dict[str, Work]:
        pairs = g.queries * g.k
        rows = min(pairs, g.codes) * g.dim * g.dtype.itemsize
        read = g.queries * g.dim * 4 + rows + 8 * pairs
        return {kernel: Work(read, 4 * pairs, 6 * pairs * g.dim)}

    return works


def _maxsim_triton(m: MaxSim) -> dict[str, Work]:
    read = m.query + m.documents + m.offsets
    written = 4 * len(m.lengths) + m.argmax
    return {"_maxsim": Work(read, written, tensor_flops=m.products)}


def _maxsim_backward_triton(m: MaxSimBackward) -> dict[str, Work]:
    read = m.argmax + 4 * len(m.lengths)
    return {  # which tokens of the documents matter is for the data to say
        "_grad_queries": Work(read, m.query, slack=m.documents + m.offsets),
        "_grad_documents": Work(
            read + m.query, m.documents, tensor_flops=m.products, slack=m.offsets + m.query
        ),
    }


# --- attention -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Attention:
    """Attention of sequences over themselves."""

    lengths: tuple[int, ...]
    heads: int
    head_dim: int
    dtype: torch.dtype

    def __str__(self) -> str:
        words = f"{len(self.lengths)} x {self.lengths[0]} tokens, {self.heads} heads of "
        return words + f"{self.head_dim}, {str(self.dtype).removeprefix('torch.')}"

    @property
    def matrix(self) -> int:
        return sum(self.lengths) * self.heads * self.head_dim * self.dtype.itemsize

    def arguments(self) -> tuple[Any, ...]:
        q, k, v = torch.rand(3, sum(self.lengths), self.heads, self.head_dim).to(self.dtype)
        offsets = torch.tensor([0, *self.lengths]).cumsum(0).int()
        longest = max(self.lengths)
        return q, k, v, offsets, offsets, longest, longest, None, -1, -1, False


def _attend(a: Attention) -> dict[str, Work]:
    pairs = sum(length**2 for length in a.lengths) * a.heads
    read = 3 * a.matrix + 4 * (len(a.lengths) + 1)
    return {"_attend": Work(read, a.matrix, 0, 4 * pairs * a.head_dim)}


# --- all -----------------------------------------------------------------------------------------

_BF16, _F32 = torch.bfloat16, torch.float32
MODELS: dict[tuple[str, str], Callable[[Any], dict[str, Work]]] = {
    ("segment_pool", "CUDA C++"): _pool_cuda,
    ("segment_pool", "Triton"): _pool_triton,
    ("segment_pool_backward", "CUDA C++"): _pool_backward(
        "mean_gradients", "token_gradients", True
    ),
    ("segment_pool_backward", "Triton"): _pool_backward(
        "_mean_gradient", "_token_gradients", False
    ),
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
    ("pack_sign", "CUDA C++"): _pack("pack_rows"),
    ("pack_sign", "Triton"): _pack("_pack_sign"),
    ("hadamard_rotate", "CUDA C++"): _rotation("rotate_rows"),
    ("hadamard_rotate", "Triton"): _rotation("_rotate"),
    ("hadamard_unrotate", "CUDA C++"): _rotation("rotate_rows"),
    ("hadamard_unrotate", "Triton"): _rotation("_rotate"),
    ("hamming_distance", "CUDA C++"): _distances_cuda,
    ("hamming_distance", "Triton"): _distances_triton,
    ("hamming_topk", "CUDA C++"): _search_cuda,
    ("hamming_topk", "Triton"): _search_triton,
    ("range_search", "CUDA C++"): _search_cuda,
    ("range_search", "Triton"): _range_triton,
    ("range_search_csr", "Triton"): _range_triton,
    ("asymmetric_topk", "CUDA C++"): _scores_cuda,
    ("asymmetric_topk", "Triton"): _scores_triton,
    ("dense_topk", "CUDA C++"): _dense_cuda,
    ("dense_topk", "Triton"): _dense_triton,
    ("gather_scores", "CUDA C++"): _gather("gather_rows"),
    ("gather_scores", "Triton"): _gather("_gather_scores"),
    ("maxsim", "Triton"): _maxsim_triton,
    ("maxsim_backward", "Triton"): _maxsim_backward_triton,
    ("varlen_attention", "Triton"): _attend,
}
# Small enough for the emulators.
SMALL: dict[str, tuple[Any, ...]] = {
    "segment_pool": (
        Pooling((130, 1, 300), 24, _F32),
        Pooling((130, 1, 300), 24, _BF16, weights=True, normalize=True),
    ),
    "segment_pool_backward": (
        PoolingBackward((130, 1, 300), 24, _F32),
        PoolingBackward((130, 1, 300), 24, _BF16, weights=True, normalize=True),
    ),
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
    "pack_sign": (Packing(40, 100, _F32), Packing(3, 64, _BF16)),
    "hadamard_rotate": (Rotation(5, 64),),
    "hadamard_unrotate": (Rotation(5, 64),),
    "hamming_distance": (Distances(4, 512, 16), Distances(32, 256, 32)),
    "hamming_topk": (Search(1, 600, 16, 5), Search(4, 300, 16, 20), Search(32, 512, 32, 9)),
    "range_search": (RangeSearch(1, 600, 16, 5, 60), RangeSearch(32, 512, 32, 20, 110)),
    "range_search_csr": (AllInRange(3, 600, 16, 600, 60),),
    "asymmetric_topk": (Scores(16, 128, 8, 20), Scores(16, 512, 16, 5)),
    "dense_topk": (Dense(16, 128, 64, _F32, 20), Dense(16, 128, 64, _BF16, 5)),
    "gather_scores": (Gather(3, 90, 40, _F32, 10),),
    "maxsim": (MaxSim(32, (64, 64), 32),),
    "maxsim_backward": (MaxSimBackward(32, (64, 64), 32),),
    "varlen_attention": (Attention((128, 256), 2, 64, _BF16), Attention((64, 32), 1, 64, _F32)),
}
# What the bounds are given for.
LARGE: dict[str, tuple[Any, ...]] = {
    "segment_pool": (Pooling((512,) * 256, 1024, _BF16, normalize=True),),
    "segment_pool_backward": (PoolingBackward((512,) * 256, 1024, _BF16, normalize=True),),
    "hash_keys": (Hashing(1 << 20, 4, 1 << 20),),
    "hash_bag": (Bag(1 << 18, 4, 1 << 20, 128, _F32), Bag(1 << 20, 2, 1 << 20, 64, _BF16, bag=16)),
    "hash_bag_backward": (BagBackward(1 << 18, 4, 1 << 20, 128, _F32),),
    "compose_bag": (Composed(1 << 20, 1 << 20, 64, _BF16, bag=16),),
    "compose_bag_backward": (ComposedBackward(1 << 20, 1 << 20, 64, _BF16, bag=16),),
    "pack_sign": (Packing(1 << 20, 1024, _BF16),),
    "hadamard_rotate": (Rotation(1 << 20, 1024),),
    "hadamard_unrotate": (Rotation(1 << 20, 1024),),
    "hamming_distance": (Distances(1024, 100_000, 128),),
    "hamming_topk": (Search(1, 8_000_000, 128, 100), Search(256, 8_000_000, 128, 100)),
    "range_search": (RangeSearch(256, 8_000_000, 128, 100, 300),),
    "range_search_csr": (AllInRange(256, 8_000_000, 128, 100, 300),),
    "asymmetric_topk": (Scores(1, 8_000_000, 128, 50), Scores(64, 8_000_000, 128, 50)),
    "dense_topk": (Dense(64, 1_000_000, 384, _BF16, 50),),
    "gather_scores": (Gather(256, 1_000_000, 384, _BF16, 100),),
    "maxsim": (MaxSim(32, (180,) * 1000, 128),),
    "maxsim_backward": (MaxSimBackward(32, (180,) * 1000, 128),),
    "varlen_attention": (Attention((512,) * 64, 12, 64, _BF16), Attention((8192,), 16, 128, _BF16)),
}

INTRODUCTION = """\
# What the GPU kernels can't be faster than

Written by `make gpu-table`; not by hand. **These are bounds on paper, not measurements**: what a
kernel has to move and compute (`tests/gpu/cost.py` has the formulas, which the emulators confirm on
small shapes), divided by the public figures of a GPU. A kernel that reaches its bound would use all
of the bandwidth or all of the arithmetic from its first to its last microsecond, without a launch;
none does. Arithmetic on integers other than population counts (hashing, sorting) is not in it.

Bytes are the distinct bytes that a launch reads and writes. What one kernel of an operator hands to
the next is small and may be found in the second-level cache, so the second may beat its bound.

| GPU | memory | float32 | bfloat16, tensor cores | population counts |
|---|---|---|---|---|
"""


def _limit(work: Work, device: Device) -> tuple[float, str]:
    """Return the least time in seconds, and what sets it."""
    return max(
        ((work.read + work.written) / device.bandwidth, "memory"),
        (work.flops / device.flops, "float32"),
        (work.tensor_flops / device.tensor_flops, "tensor cores"),
        (work.binary_flops / device.binary_flops, "tensor cores"),
        (work.popcounts / device.popcounts, "population counts"),
    )


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def page() -> str:
    """Lay out the bounds of all kernels."""
    lines = [INTRODUCTION.rstrip("\n")]
    lines += [
        f"| {d.name} | {d.bandwidth / 1e12:.3g} TB/s | {d.flops / 1e12:.3g} T/s "
        f"| {d.tensor_flops / 1e12:,.0f} T/s | {d.popcounts / 1e12:.2g} T/s |"
        for d in DEVICES
    ]
    lines += [
        "",
        f"| operator, call | kernel | MB read | MB written | G flop | "
        f"{' | '.join(f'{d.name}, us' for d in DEVICES)} | limit (H100) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (operator, backend), model in MODELS.items():
        for shape in LARGE[operator]:
            for kernel, work in model(shape).items():
                times = [_number(1e6 * _limit(work, device)[0]) for device in DEVICES]
                cells = (
                    f"{operator}: {shape}",
                    f"{backend} `{kernel}`",
                    _number(work.read / 1e6),
                    _number(work.written / 1e6),
                    _number((work.flops + work.tensor_flops + work.binary_flops) / 1e9),
                    *times,
                    _limit(work, DEVICES[1])[1],
                )
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FILE.write_text(page())
