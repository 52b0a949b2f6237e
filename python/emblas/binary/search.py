"""Exact search over bit codes: arguments are checked here, by name."""

from __future__ import annotations

import torch
from torch import Tensor

from emblas import _op
from emblas.binary import op
from emblas.binary.functions import pack_sign, unpack_planes


def _check_codes(a_name: str, a: Tensor, b_name: str, b: Tensor) -> None:
    _op.check_tensor(a_name, a, ndim=2, dtypes=(torch.uint8,))
    _op.check_tensor(b_name, b, ndim=2, dtypes=(torch.uint8,), device=a.device)
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"{a_name} and {b_name} must have the same width, got {a.shape[1]} and "
            f"{b.shape[1]} bytes"
        )


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _filter(filter: Tensor | None, queries: Tensor, rows: int) -> Tensor | None:
    """Return a filter as the kernels take it: bitmaps (1 or queries, bytes) or ascending ids."""
    if filter is None:
        return None
    dtypes = (torch.bool, torch.uint8, torch.int64, torch.int32)
    _op.check_tensor("filter", filter, dtypes=dtypes, device=queries.device)
    if filter.dtype in (torch.int64, torch.int32):
        if filter.dim() != 1:
            raise ValueError(f"filter must be a vector of ids, got shape {tuple(filter.shape)}")
        ids = filter.long()
        return _without_repeats(ids) if ids.is_cuda else ids.unique()
    length = rows if filter.dtype == torch.bool else (rows + 7) // 8
    what = "values" if filter.dtype == torch.bool else "bytes"
    if filter.dim() not in (1, 2) or filter.shape[-1] != length:
        raise ValueError(
            f"filter must have {length} {what} for {rows} rows of codes, got shape "
            f"{tuple(filter.shape)}"
        )
    if filter.dim() == 1:
        filter = filter[None]
    if filter.shape[0] not in (1, queries.shape[0]):
        raise ValueError(
            f"filter must be one for all or one for each of {queries.shape[0]} queries, got "
            f"{filter.shape[0]}"
        )
    return pack_sign(filter.float()) if filter.dtype == torch.bool else filter.contiguous()


def _without_repeats(ids: Tensor) -> Tensor:
    """Sort ids and replace repeated ones by -1, which GPU kernels pass over, without waiting."""
    ordered = ids.sort().values
    return ordered.masked_fill(ordered.diff(prepend=ordered.new_full((1,), -1)) == 0, -1)


def hamming_distance(a: Tensor, b: Tensor) -> Tensor:
    """Count the differing bits of all pairs of codes.

    Parameters
    ----------
    a, b : Tensor
        uint8 ``(Q, bytes)`` and ``(N, bytes)``, of any width below 2^20 bytes. Rows may be any
        stride apart.

    Returns
    -------
    Tensor
        int32 ``(Q, N)``. :func:`hamming_topk` and :func:`range_search` don't write this matrix.

    Raises
    ------
    TypeError
        If an argument is no uint8 tensor.
    ValueError
        If shapes or devices don't fit together.

    Examples
    --------
    >>> codes = torch.tensor([[0b1111], [0b0001], [0b0111]], dtype=torch.uint8)
    >>> hamming_distance(codes[:1], codes)
    tensor([[0, 3, 1]], dtype=torch.int32)
    """
    _check_codes("a", a, "b", b)
    return op.hamming_distance(_op.rows(a), _op.rows(b))


def hamming_topk(
    queries: Tensor, codes: Tensor, k: int, *, filter: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Find the codes at the smallest Hamming distance from each query, exactly.

    Parameters
    ----------
    queries : Tensor
        uint8 ``(Q, bytes)``. Rows may be any stride apart.
    codes : Tensor
        uint8 ``(N, bytes)``, of any width below 2^20 bytes. They are read once for all queries.
    k : int
        Number of results per query, at least 1.
    filter : Tensor, optional
        Which rows may be returned: bool ``(N,)``, the same packed by :func:`pack_sign` to uint8
        ``(ceil(N / 8),)``, either of them with a first dimension ``Q`` for a filter per query, or
        int64 or int32 ids ``(M,)`` of rows, in any order.

    Returns
    -------
    distances : Tensor
        int32 ``(Q, k)``, ascending.
    ids : Tensor
        int64 ``(Q, k)``: rows of ``codes``, ascending among equal distances, whatever the number of
        threads. Beyond the last row allowed, ids are -1 and distances the largest int32.

    Raises
    ------
    TypeError
        If an argument has a wrong type.
    ValueError
        If shapes or devices don't fit together, ``k`` is below 1 or an id doesn't exist.

    Examples
    --------
    >>> codes = torch.tensor([[0b1111], [0b0001], [0b0111]], dtype=torch.uint8)
    >>> hamming_topk(codes[:1], codes, k=2)
    (tensor([[0, 1]], dtype=torch.int32), tensor([[0, 2]]))
    """
    _check_codes("queries", queries, "codes", codes)
    _check_at_least("k", k, 1)
    allowed = _filter(filter, queries, codes.shape[0])
    return op.hamming_topk(_op.rows(queries), _op.rows(codes), k, allowed)


def range_search(
    queries: Tensor,
    codes: Tensor,
    radius: int,
    *,
    max_results: int = 100,
    filter: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the codes within a Hamming distance of each query: arrays of fixed size, and counts.

    Parameters
    ----------
    queries, codes, filter
        As in :func:`hamming_topk`.
    radius : int
        Largest distance that is still found (faiss finds distances below its radius), at least 0.
    max_results : int, default 100
        Results kept per query, the nearest ones; 0 only counts.

    Returns
    -------
    counts : Tensor
        int64 ``(Q,)``: how many codes are within the radius, also where that is more than kept.
    distances, ids : Tensor
        int32 and int64 ``(Q, max_results)``, ordered and filled up as in :func:`hamming_topk`.

    Raises
    ------
    TypeError
        If an argument has a wrong type.
    ValueError
        If shapes or devices don't fit together, ``radius`` or ``max_results`` is negative or an id
        doesn't exist.

    See Also
    --------
    range_search_csr : All of them, in arrays of exactly their size.
    """
    _check_codes("queries", queries, "codes", codes)
    _check_at_least("radius", radius, 0)
    _check_at_least("max_results", max_results, 0)
    allowed = _filter(filter, queries, codes.shape[0])
    return op.range_search(_op.rows(queries), _op.rows(codes), radius, max_results, allowed, False)


def range_search_csr(
    queries: Tensor, codes: Tensor, radius: int, *, filter: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Find all codes within a Hamming distance of each query: arrays of exactly the size found.

    Parameters
    ----------
    queries, codes, filter
        As in :func:`hamming_topk`.
    radius : int
        Largest distance that is still found, at least 0.

    Returns
    -------
    offsets : Tensor
        int64 ``(Q + 1,)``: query ``q`` found the entries ``offsets[q]:offsets[q + 1]``.
    distances, ids : Tensor
        int32 and int64, one entry per code found; ascending distance, then row, in each query.

    Raises
    ------
    TypeError, ValueError
        As :func:`range_search`.

    Notes
    -----
    The size depends on the data: on a GPU the call waits for the device once.
    """
    _check_codes("queries", queries, "codes", codes)
    _check_at_least("radius", radius, 0)
    allowed = _filter(filter, queries, codes.shape[0])
    return op.range_search_csr(_op.rows(queries), _op.rows(codes), radius, allowed, False)


def near_duplicates(codes: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    """Find all pairs of codes within a Hamming distance of each other.

    Parameters
    ----------
    codes : Tensor
        uint8 ``(N, bytes)``.
    radius : int
        Largest distance of a pair, at least 0.

    Returns
    -------
    pairs : Tensor
        int64 ``(M, 2)``: rows ``i < j``, each pair once; ascending ``i``, then distance, then
        ``j``.
    distances : Tensor
        int32 ``(M,)``.

    Raises
    ------
    TypeError
        If ``codes`` is no uint8 tensor.
    ValueError
        If ``codes`` is not 2-D or ``radius`` is negative.

    Notes
    -----
    Exact, N^2 / 2 comparisons. The size depends on the data: on a GPU the call waits for the device
    once; :func:`near_duplicate_counts` has a fixed size.
    """
    _op.check_tensor("codes", codes, ndim=2, dtypes=(torch.uint8,))
    _check_at_least("radius", radius, 0)
    rows = _op.rows(codes)
    offsets, distances, later = op.range_search_csr(rows, rows, radius, None, True)
    first = torch.arange(codes.shape[0], device=codes.device)
    first = first.repeat_interleave(offsets.diff(), output_size=later.shape[0])
    return torch.stack((first, later), 1), distances


def near_duplicate_counts(
    codes: Tensor, radius: int, *, max_results: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the later near duplicates of each code: arrays of fixed size, and counts.

    Parameters
    ----------
    codes : Tensor
        uint8 ``(N, bytes)``.
    radius : int
        Largest distance of a pair, at least 0.
    max_results : int, default 0
        Duplicates kept per code, the nearest ones; 0 only counts.

    Returns
    -------
    counts, distances, ids : Tensor
        As :func:`range_search` with the codes as queries, among the rows after each one.

    Raises
    ------
    TypeError, ValueError
        As :func:`near_duplicates`.
    """
    _op.check_tensor("codes", codes, ndim=2, dtypes=(torch.uint8,))
    _check_at_least("radius", radius, 0)
    _check_at_least("max_results", max_results, 0)
    rows = _op.rows(codes)
    return op.range_search(rows, rows, radius, max_results, None, True)


def inverse_norms(codes: Tensor, dim: int) -> Tensor:
    """One over the length of the values of each code: the ``scale`` of a cosine.

    Codes of one plane all have length ``sqrt(dim)``; those of several differ.

    Parameters
    ----------
    codes : Tensor
        uint8 ``(N, bits * ceil(dim / 8))``, as :func:`pack_planes` makes them.
    dim : int
        Dimensions of the vectors.

    Returns
    -------
    Tensor
        float32 ``(N,)``.

    Raises
    ------
    TypeError, ValueError
        As :func:`unpack_planes`.
    """
    parts = [unpack_planes(part, dim).norm(dim=1) for part in codes.split(1 << 16)]
    return 1 / torch.cat(parts)


def asymmetric_topk(
    queries: Tensor,
    codes: Tensor,
    k: int,
    *,
    filter: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the codes of highest inner product with real-valued queries, exactly.

    Asymmetric: only the documents are quantized, so the query keeps what its bits would lose.

    Parameters
    ----------
    queries : Tensor
        ``(Q, dim)``; int8 or floating-point, finite. Computed as float32.
    codes : Tensor
        uint8 ``(N, bits * ceil(dim / 8))``: sign codes of :func:`pack_sign`, or several planes of
        :func:`pack_planes`. Their number is taken from the width. Less than 2^32 rows.
    k : int
        Number of results per query, at least 1.
    filter : Tensor, optional
        As in :func:`hamming_topk`.
    scale : Tensor, optional
        float32 ``(N,)``, above 0 and finite: multiplies the scores of each code, before the best
        are chosen. :func:`inverse_norms` ranks codes of several planes by cosine, the scale of
        :func:`pack_rabitq` makes scores estimates of inner products.

    Returns
    -------
    scores : Tensor
        float32 ``(Q, k)``, descending: inner products of the queries with the values of
        :func:`unpack_planes`, +1 and -1 for sign codes. Divided by ``sqrt(dim)`` and the norm of
        the query, the score of a sign code is a cosine.
    ids : Tensor
        int64 ``(Q, k)``, ascending among equal scores. Beyond the last row allowed, ids are -1 and
        scores -inf.

    Raises
    ------
    TypeError
        If an argument has a wrong type.
    ValueError
        If shapes or devices don't fit together, ``k`` is below 1, an id doesn't exist or a query
        is not finite.
    """
    _op.check_tensor("queries", queries, ndim=2, dtypes=(*_op.FLOATS, torch.int8))
    _op.check_tensor("codes", codes, ndim=2, dtypes=(torch.uint8,), device=queries.device)
    width = (queries.shape[1] + 7) // 8
    if width == 0 or codes.shape[1] == 0 or codes.shape[1] % width:
        raise ValueError(
            f"codes must be a multiple of ceil(dim / 8) = {width} bytes wide for queries of "
            f"{queries.shape[1]} dimensions, got {codes.shape[1]}"
        )
    _check_at_least("k", k, 1)
    if scale is not None:
        _op.check_tensor("scale", scale, ndim=1, dtypes=(torch.float32,), device=queries.device)
        if scale.shape[0] != codes.shape[0]:
            raise ValueError(
                f"scale must have {codes.shape[0]} values, one for each code, got {scale.shape[0]}"
            )
        scale = scale.contiguous()
    allowed = _filter(filter, queries, codes.shape[0])
    return op.asymmetric_topk(_op.rows(queries.float()), _op.rows(codes), k, allowed, scale)


def symmetric_topk(
    queries: Tensor,
    codes: Tensor,
    k: int,
    *,
    dim: int,
    filter: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the multi-bit codes of highest inner product with query codes, exactly.

    The symmetric distance of arXiv 2302.08714: both sides are quantized, and scores are those of
    the values that the codes stand for. For codes of one plane the order is that of
    :func:`hamming_topk`, which is faster.

    Parameters
    ----------
    queries : Tensor
        uint8 ``(Q, bits * ceil(dim / 8))``, as :func:`pack_planes` makes them.
    codes : Tensor
        uint8 ``(N, bits * ceil(dim / 8))``.
    k : int
        Number of results per query, at least 1.
    dim : int
        Dimensions of the vectors.
    filter, scale : Tensor, optional
        As in :func:`asymmetric_topk`. Learned codes are compared by cosine: their ``scale`` is
        :func:`inverse_norms`.

    Returns
    -------
    scores, ids : Tensor
        As :func:`asymmetric_topk`; without ``scale``, exact multiples of ``4^(1 - bits)``.

    Raises
    ------
    TypeError
        If an argument has a wrong type.
    ValueError
        If shapes or devices don't fit together, ``k`` is below 1 or an id doesn't exist.
    """
    _check_codes("queries", queries, "codes", codes)
    return asymmetric_topk(unpack_planes(queries, dim), codes, k, filter=filter, scale=scale)
