"""The specification of the bit-code operators in plain torch."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

NO_DISTANCE = torch.iinfo(torch.int32).max
_WEIGHTS = (128, 64, 32, 16, 8, 4, 2, 1)


def pack_sign(x: Tensor, threshold: Tensor | None = None) -> Tensor:
    """Bits of ``x > threshold``, (rows, dim) -> (rows, ceil(dim / 8)), the first bit highest."""
    above = x > 0 if threshold is None else x.to(threshold.dtype) > threshold
    bits = torch.nn.functional.pad(above.to(torch.uint8), (0, -x.shape[1] % 8))
    weights = torch.tensor(_WEIGHTS, dtype=torch.uint8, device=x.device)
    return (bits.unflatten(1, (-(-x.shape[1] // 8), 8)) * weights).sum(2, dtype=torch.uint8)


def _hadamard(x: Tensor) -> Tensor:
    """Multiply rows of a power of two of values by the normalized Hadamard matrix."""
    n, stride = x.shape[1], 1
    while stride < n:
        pairs = x.view(-1, n // (2 * stride), 2, stride)
        x = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), 2)
        x = x.reshape(-1, n)
        stride *= 2
    return x / n**0.5


def _rotate(x: Tensor, signs: Tensor, inverse: bool) -> Tensor:
    rounds, dim = signs.shape
    if dim == 0:
        return x.clone()
    size = 1 << dim.bit_length() - 1
    values = x if x.dtype == torch.float64 else x.float()
    for round in reversed(range(rounds)) if inverse else range(rounds):
        first = dim - size if round % 2 else 0
        if not inverse:
            values = values * signs[round]
        mixed = _hadamard(values[:, first : first + size])
        values = torch.cat((values[:, :first], mixed, values[:, first + size :]), 1)
        if inverse:
            values = values * signs[round]
    return values.to(x.dtype)


def hadamard_rotate(x: Tensor, signs: Tensor) -> Tensor:
    """Flip signs and mix, round by round, (rows, dim) with signs (rounds, dim)."""
    return _rotate(x, signs, inverse=False)


def hadamard_unrotate(x: Tensor, signs: Tensor) -> Tensor:
    """Undo :func:`hadamard_rotate`: its transpose, the rounds backwards."""
    return _rotate(x, signs, inverse=True)


def hamming_distance(a: Tensor, b: Tensor) -> Tensor:
    """Count the differing bits of all pairs of rows."""
    differing = a[:, None].int() ^ b[None].int()
    return torch.stack([differing >> bit & 1 for bit in range(8)]).sum((0, 3)).int()


def unpack_bits(codes: Tensor) -> Tensor:
    """Bits of each row, the highest of each byte first, as booleans."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=codes.device)
    return (codes[..., None] >> shifts & 1).flatten(-2).bool()


def allowed(filter: Tensor | None, queries: int, rows: int, device: torch.device) -> Tensor:
    """Which rows each query may return, (queries, rows)."""
    if filter is None:
        return torch.ones(queries, rows, dtype=torch.bool, device=device)
    if filter.dtype == torch.uint8:
        return unpack_bits(filter)[:, :rows].expand(queries, rows)
    mask = torch.zeros(rows + 1, dtype=torch.bool, device=device)
    mask[filter] = True  # the last one for id -1, which is no row
    return mask[:rows].expand(queries, rows)


def _nearest(distances: Tensor, found: Tensor, k: int, none: float) -> tuple[Tensor, Tensor]:
    """Find the k smallest distances of each row among those marked, by distance and then by row."""
    kept = min(k, distances.shape[1])
    ordered = distances.double().where(found, torch.inf).sort(dim=1, stable=True)
    exists = ordered.values[:, :kept] < torch.inf
    best = ordered.values[:, :kept].where(exists, none).to(distances.dtype)
    ids = ordered.indices[:, :kept].where(exists, -1)
    pad = (0, k - kept)
    return (
        torch.nn.functional.pad(best, pad, value=none),
        torch.nn.functional.pad(ids, pad, value=-1),
    )


def hamming_topk(
    queries: Tensor, codes: Tensor, k: int, filter: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Find the k rows of ``codes`` nearest to each query, by distance and then by row."""
    found = allowed(filter, queries.shape[0], codes.shape[0], codes.device)
    return _nearest(hamming_distance(queries, codes), found, k, NO_DISTANCE)


def _within(
    queries: Tensor, codes: Tensor, radius: int, filter: Tensor | None, later_only: bool
) -> tuple[Tensor, Tensor]:
    distances = hamming_distance(queries, codes)
    found = allowed(filter, queries.shape[0], codes.shape[0], codes.device)
    found = found & (distances <= min(radius, NO_DISTANCE))
    return distances, found.triu(1) if later_only else found


def range_search(
    queries: Tensor,
    codes: Tensor,
    radius: int,
    max_results: int,
    filter: Tensor | None = None,
    later_only: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Count the rows within the radius of each query and return the nearest of them."""
    distances, found = _within(queries, codes, radius, filter, later_only)
    return found.sum(1), *_nearest(distances, found, max_results, NO_DISTANCE)


def range_search_csr(
    queries: Tensor,
    codes: Tensor,
    radius: int,
    filter: Tensor | None = None,
    later_only: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return all rows within the radius of each query, one query after the other."""
    distances, found = _within(queries, codes, radius, filter, later_only)
    counts = found.sum(1)
    best, ids = _nearest(distances, found, codes.shape[0], NO_DISTANCE)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return offsets, best[ids >= 0], ids[ids >= 0]


def plane_values(codes: Tensor, dim: int) -> Tensor:
    """Values of codes of one or more planes, (rows, dim): sum of 2^-plane times +1 or -1."""
    width = (dim + 7) // 8
    planes = codes.unflatten(1, (-1, width))
    signs = unpack_bits(planes)[..., :dim].double() * 2 - 1
    weights = 0.5 ** torch.arange(planes.shape[1], dtype=torch.float64, device=codes.device)
    return (signs * weights[:, None]).sum(1)


def unpack_planes(codes: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Return :func:`plane_values` in another dtype."""
    return plane_values(codes, dim).to(dtype)


def asymmetric_topk(
    queries: Tensor,
    codes: Tensor,
    k: int,
    filter: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the k rows of highest inner product with each query, by score and then by row."""
    scores = queries.double() @ plane_values(codes, queries.shape[1]).T
    if scale is not None:
        scores = scores * scale.double()
    found = allowed(filter, queries.shape[0], codes.shape[0], codes.device)
    best, ids = _nearest(-scores.float(), found, k, torch.inf)
    return -best, ids


def _scores(queries: Tensor, documents: Tensor, metric: int) -> Tensor:
    """Inner products, the same over the documents' lengths, or minus squared distances."""
    queries, documents = queries.double(), documents.double()
    dots = queries @ documents.T
    squares = documents.square().sum(1)
    if metric == 1:
        return torch.where(squares > 0, dots / squares.sqrt(), 0.0)
    if metric == 2:
        return 2 * dots - squares - queries.square().sum(1)[:, None]
    return dots


def dense_topk(
    queries: Tensor, documents: Tensor, k: int, metric: int, filter: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Find the k documents of highest score with each query, by score and then by row."""
    scores = _scores(queries, documents, metric)
    found = allowed(filter, queries.shape[0], documents.shape[0], documents.device)
    best, ids = _nearest(-scores.float(), found, k, torch.inf)
    return -best, ids


def gather_scores(queries: Tensor, documents: Tensor, ids: Tensor, metric: int) -> Tensor:
    """Scores of each query with its own documents; -inf for id -1."""
    if documents.shape[0] == 0:
        return torch.full(ids.shape, -torch.inf, device=ids.device)
    scores = _scores(queries, documents, metric).gather(1, ids.clamp_min(0))
    return scores.float().masked_fill(ids < 0, -torch.inf)


def maxsim(
    queries: Tensor,
    query_offsets: Tensor,
    documents: Tensor,
    document_offsets: Tensor,
    dim: int,
    need_argmax: bool,
) -> tuple[Tensor, Tensor]:
    """Sum over query tokens of the largest product with a token of each document."""
    dtype = torch.float64 if documents.dtype == torch.float64 else torch.float32
    queries, documents = (
        (unpack_bits(x)[:, :dim] * 2.0 - 1).to(dtype) if x.dtype == torch.uint8 else x.to(dtype)
        for x in (queries, documents)
    )
    dots = queries @ documents.T
    best, where = [], []
    starts = document_offsets.tolist()
    for first, last in itertools.pairwise(starts):
        if first == last:
            best.append(dots.new_zeros(len(dots)))
            where.append(torch.full((len(dots),), -1, device=dots.device))
        else:
            largest = dots[:, first:last].max(1)
            best.append(largest.values)
            where.append(largest.indices + first)
    tokens = torch.stack(best, 1) if best else dots.new_zeros(len(dots), 0)
    argmax = torch.stack(where, 1).int() if where else dots.new_zeros(len(dots), 0).int()
    owner = torch.repeat_interleave(query_offsets.diff())
    scores = tokens.new_zeros(len(query_offsets) - 1, tokens.shape[1]).index_add(0, owner, tokens)
    return scores, argmax if need_argmax else argmax[:0]


def maxsim_backward(
    grad: Tensor,
    queries: Tensor,
    query_offsets: Tensor,
    documents: Tensor,
    document_offsets: Tensor,
    argmax: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`maxsim`: each best pair of tokens carries its document's."""
    owner = torch.repeat_interleave(query_offsets.diff())
    weights = grad[owner].masked_fill(argmax < 0, 0)  # (query tokens, documents)
    if documents.shape[0] == 0:
        return torch.zeros_like(queries), torch.zeros_like(documents)
    pairs = torch.zeros(len(queries), len(documents), dtype=grad.dtype, device=grad.device)
    pairs.scatter_add_(1, argmax.clamp_min(0).long(), weights)
    return pairs @ documents, pairs.T @ queries
