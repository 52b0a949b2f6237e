"""Bit codes, searches by bits and by scores, late interaction."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from costs.work import Work


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


@dataclasses.dataclass(frozen=True)
class Unpacking(Packing):
    """Values of codes of two planes."""

    def arguments(self) -> tuple[Any, ...]:
        codes = torch.randint(0, 256, (self.rows, 2 * -(-self.dim // 8)), dtype=torch.uint8)
        return codes, self.dim, self.dtype


def _unpack(kernel: str) -> Callable[[Unpacking], dict[str, Work]]:
    def works(u: Unpacking) -> dict[str, Work]:
        read = 2 * u.rows * -(-u.dim // 8)
        return {kernel: Work(read, u.rows * u.dim * u.dtype.itemsize)}

    return works


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


def _all_in_range_cuda(s: AllInRange) -> dict[str, Work]:
    """Count, then collect: the codes twice. What is found and sorted is for the data to say."""
    together = 1 if s.queries == 1 else 4 if s.queries <= 4 else 32
    lists, tiles_per_list = _lists(s, together)
    counts, offered = 8 * s.queries * lists, s.queries * lists * 256 * tiles_per_list
    offsets, found = 8 * (s.queries + 1), 8 * s.queries * s.k
    ((scan, count),) = _scan_cuda(s, counts, 16 * offered).items()
    collect = dataclasses.replace(count, read=count.read + counts, written=0)
    return {
        scan: count,
        "begin_lists": Work(counts, counts + offsets),
        f"{scan} again": collect,
        "sort_found": Work(offsets, 0, slack=4 * found),
    }


def _scores_cuda(s: Scores) -> dict[str, Work]:
    tables = 128 * s.queries * s.width

    def scan(written: int, slack: int) -> dict[str, Work]:
        make = Work(32 * s.queries * s.width, tables, tables)
        adds = 2 * s.queries * s.codes * s.width
        look_up = Work(s.codes * s.width + tables, written, adds, slack=slack)
        return {"build_tables": make, "scan_scores": look_up}

    return _lists_cuda(s, min(s.queries, 2), scan)


def _lists(s: Search | Dense, together: int) -> tuple[int, int]:
    """Return how many lists a query has, and of how many tiles of codes each is."""
    groups = -(-s.queries // together)
    tiles = -(-s.codes // 256)
    tiles_per_list = -(-tiles // (max(1024 // groups, 1) * max(8 // together, 1)))
    return -(-tiles // tiles_per_list), tiles_per_list


def _lists_cuda(
    s: Search | Dense, together: int, scan: Callable[[int, int], dict[str, Work]]
) -> dict[str, Work]:
    """Lists of the nearest, one for each query and range of codes, are merged 16 to 1."""
    count, tiles_per_list = _lists(s, together)
    keep = min(s.k, 256 * tiles_per_list)
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
    dtype: torch.dtype

    def __str__(self) -> str:
        dtype = "bits" if self.bits else str(self.dtype).removeprefix("torch.")
        words = f"{self.tokens} x {len(self.lengths)} documents of {self.lengths[0]}"
        return f"{words}, dim {self.dim}, {dtype}"

    @property
    def bits(self) -> bool:
        return self.dtype == torch.uint8

    @property
    def token(self) -> int:
        return self.dim // 8 if self.bits else self.dim * self.dtype.itemsize

    @property
    def query(self) -> int:
        return self.token * self.tokens

    @property
    def documents(self) -> int:
        return self.token * sum(self.lengths)

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
        width = self.dim // 8 if self.bits else self.dim
        tokens = (torch.rand(n, width).to(self.dtype) for n in (self.tokens, sum(self.lengths)))
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


def _maxsim_cuda(m: MaxSim) -> dict[str, Work]:
    read, written = m.query + m.documents + m.offsets, 4 * len(m.lengths) + m.argmax
    if m.bits:  # what both have, and what neither has
        return {"score_pairs": Work(read, written, binary_flops=2 * m.products)}
    if m.dtype.itemsize == 2:
        return {"score_pairs": Work(read, written, tensor_flops=m.products)}
    return {"score_pairs": Work(read, written, m.products)}


def _maxsim_backward_cuda(m: MaxSimBackward) -> dict[str, Work]:
    read = m.argmax + 4 * len(m.lengths)
    adds = 2 * m.tokens * len(m.lengths) * m.dim
    return {  # which tokens of the documents matter is for the data to say
        "sum_winners of queries": Work(read, m.query, adds, slack=m.documents),
        "sum_winners of documents": Work(
            read + m.query, m.documents, adds, slack=m.offsets + m.query
        ),
    }


_BF16, _F32 = torch.bfloat16, torch.float32
MODELS: dict[tuple[str, str], Callable[[Any], dict[str, Work]]] = {
    ("pack_sign", "CUDA C++"): _pack("pack_rows"),
    ("pack_sign", "Triton"): _pack("_pack_sign"),
    ("unpack_planes", "CUDA C++"): _unpack("unpack_rows"),
    ("unpack_planes", "Triton"): _unpack("_unpack_planes"),
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
    ("range_search_csr", "CUDA C++"): _all_in_range_cuda,
    ("range_search_csr", "Triton"): _range_triton,
    ("asymmetric_topk", "CUDA C++"): _scores_cuda,
    ("asymmetric_topk", "Triton"): _scores_triton,
    ("dense_topk", "CUDA C++"): _dense_cuda,
    ("dense_topk", "Triton"): _dense_triton,
    ("gather_scores", "CUDA C++"): _gather("gather_rows"),
    ("gather_scores", "Triton"): _gather("_gather_scores"),
    ("maxsim", "CUDA C++"): _maxsim_cuda,
    ("maxsim", "Triton"): _maxsim_triton,
    ("maxsim_backward", "CUDA C++"): _maxsim_backward_cuda,
    ("maxsim_backward", "Triton"): _maxsim_backward_triton,
}
SMALL: dict[str, tuple[Any, ...]] = {
    "pack_sign": (Packing(40, 100, _F32), Packing(3, 64, _BF16)),
    "unpack_planes": (Unpacking(40, 100, _F32), Unpacking(3, 64, _BF16)),
    "hadamard_rotate": (Rotation(5, 64),),
    "hadamard_unrotate": (Rotation(5, 64),),
    "hamming_distance": (Distances(4, 512, 16), Distances(32, 256, 32)),
    "hamming_topk": (Search(1, 600, 16, 5), Search(4, 300, 16, 20), Search(32, 512, 32, 9)),
    "range_search": (RangeSearch(1, 600, 16, 5, 60), RangeSearch(32, 512, 32, 20, 110)),
    "range_search_csr": (AllInRange(3, 600, 16, 600, 60), AllInRange(32, 512, 32, 512, 110)),
    "asymmetric_topk": (Scores(16, 128, 8, 20), Scores(16, 512, 16, 5)),
    "dense_topk": (Dense(16, 128, 64, _F32, 20), Dense(16, 128, 64, _BF16, 5)),
    "gather_scores": (Gather(3, 90, 40, _F32, 10),),
    "maxsim": (
        MaxSim(32, (64, 64), 32, _F32),
        MaxSim(32, (64, 64), 32, _BF16),
        MaxSim(32, (64, 64), 256, torch.uint8),
    ),
    "maxsim_backward": (MaxSimBackward(32, (64, 64), 32, _F32),),
}
LARGE: dict[str, tuple[Any, ...]] = {
    "pack_sign": (Packing(1 << 20, 1024, _BF16),),
    "unpack_planes": (Unpacking(1 << 20, 1024, _BF16),),
    "hadamard_rotate": (Rotation(1 << 20, 1024),),
    "hadamard_unrotate": (Rotation(1 << 20, 1024),),
    "hamming_distance": (Distances(1024, 100_000, 128),),
    "hamming_topk": (Search(1, 8_000_000, 128, 100), Search(256, 8_000_000, 128, 100)),
    "range_search": (RangeSearch(256, 8_000_000, 128, 100, 300),),
    "range_search_csr": (AllInRange(256, 8_000_000, 128, 100, 300),),
    "asymmetric_topk": (Scores(1, 8_000_000, 128, 50), Scores(64, 8_000_000, 128, 50)),
    "dense_topk": (Dense(64, 1_000_000, 384, _BF16, 50),),
    "gather_scores": (Gather(256, 1_000_000, 384, _BF16, 100),),
    "maxsim": tuple(MaxSim(32, (180,) * 1000, 128, t) for t in (_F32, _BF16, torch.uint8)),
    "maxsim_backward": (MaxSimBackward(32, (180,) * 1000, 128, _F32),),
}
