"""The public functions of pooling: arguments are checked here, by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from emblas import _op
from emblas.pooling import op, reference
from emblas.pooling.epilogue import Epilogue, check_dims, split
from emblas.pooling.op import Segments
from emblas.pooling.reference import Mode, accumulator

MODES = (*(mode.name for mode in Mode), "max", "gem")
GEM_EPSILON = 1e-6

Result = Tensor | tuple[Tensor, ...]
_LINEAR_MODES = tuple(Mode.__members__)


def segment_pool(
    x: Tensor,
    cu_seqlens: Tensor | None = None,
    mode: str | Sequence[str] = "mean",
    *,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    token_ids: Tensor | None = None,
    skip_prefix: int | Tensor | None = None,
    p: float | Tensor = 3.0,
    normalize: bool = False,
    dims: int | Sequence[int] | None = None,
    epilogue: Epilogue | None = None,
) -> Any:
    """Pool the token vectors of every sequence into one vector.

    A sequence without tokens gives the zero vector and receives no gradient; so does one whose
    weights sum to zero, in the modes that divide by the sum.

    Parameters
    ----------
    x : Tensor
        Token vectors: packed ``(tokens, dim)`` with ``cu_seqlens``, or padded
        ``(batch, length, dim)`` with ``mask``. float32, float64, bfloat16 or float16; sums are kept
        in float32 (float64 for float64). Padded input is read in place; rows and tokens may be any
        strides apart.
    cu_seqlens : Tensor, optional
        Offsets ``(batch + 1,)``, int32 or int64: sequence ``b`` owns the tokens
        ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``. The first is 0, the last is the number of
        tokens, and they never decrease.
    mode : str or sequence of str, default "mean"
        One of the modes below, or several, whose results are concatenated in this order.

        - ``mean``: the weighted mean. ``sum``: the weighted sum. ``mean_sqrt_len``: the sum over
          the root of the (absolute) sum of weights.
        - ``weighted_mean``: the mean with weights that grow with the position, 1, 2, ... from the
          first token of the sequence (SGPT, arXiv 2202.08904); times ``weights``, if given.
        - ``cls``, ``last``: the first or last token whose weight isn't zero.
        - ``max``: the largest value of each dimension over the tokens whose weight isn't zero. The
          first maximum gets the gradient.
        - ``gem``: the generalized mean ``mean(max(x, 1e-6) ** p) ** (1 / p)`` (arXiv 1711.02512).
    mask : Tensor, optional
        ``(batch, length)``, bool or number: the padded counterpart of ``cu_seqlens``. Tokens where
        it is 0 are not read. Holes and padding on either side are legal; positions count from the
        first token.
    weights : Tensor, optional
        Weight of each token, ``(tokens,)`` or ``(batch, length)``; default 1. Gradients flow to
        floating-point weights; with ``max``, which takes them as constants, they must not ask for
        any.
    token_ids : Tensor, optional
        Vocabulary ids of the tokens, of the shape that ``weights`` would have. ``weights`` is then
        a table ``(vocabulary,)`` of weights by id, such as :func:`sif_weights` makes.
    skip_prefix : int or Tensor, optional
        How many tokens at the start of each sequence (an instruction) are not pooled; one number or
        ``(batch,)``. The positions of the others stay.
    p : float or Tensor, default 3.0
        Exponent of ``gem``; a tensor of one element may be learned.
    normalize : bool, default False
        Divide each result by its Euclidean length (at least 1e-12).
    dims : int or sequence of int, optional
        Matryoshka dimensions: cut the result to its first values, before it is normalized. Several
        give a tuple of results.
    epilogue : Epilogue, optional
        Further steps: projection, quantization, noise; not together with ``dims``. It starts from
        the normalized vector if ``normalize`` is set.

    Returns
    -------
    Tensor or tuple of Tensor
        ``(batch, dim)``, in the dtype of ``x`` unless the epilogue says otherwise. The bits of a
        row depend on its own sequence only, not on the rest of the batch nor on the number of
        threads.

    Raises
    ------
    TypeError
        If an argument has the wrong type or dtype.
    ValueError
        If shapes, devices or offsets don't fit together, weights hold NaN, or not exactly one of
        ``cu_seqlens`` and ``mask`` is given.

    Notes
    -----
    Normalizing follows ``torch.nn.functional.normalize``. Forward and backward formulas stand in
    ``csrc/pooling/pooling.h``. ``torch.func`` transforms are not supported. Several modes read the
    tokens once together, and have the bits of each alone; ``gem`` takes a pass of its own.

    Examples
    --------
    >>> x = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]])
    >>> segment_pool(x, torch.tensor([0, 2, 3]))
    tensor([[2., 0.],
            [0., 2.]])
    """
    segments = token_segments(x, cu_seqlens, mask, skip_prefix, weights, token_ids)
    return _pool(segments, mode, p, normalize, dims, epilogue)


def span_pool(
    x: Tensor,
    starts: Tensor,
    ends: Tensor,
    mode: str | Sequence[str] = "mean",
    *,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    token_ids: Tensor | None = None,
    skip_prefix: int | Tensor | None = None,
    p: float | Tensor = 3.0,
    normalize: bool = False,
    dims: int | Sequence[int] | None = None,
    epilogue: Epilogue | None = None,
) -> Any:
    """Pool any spans of tokens, which may overlap or nest.

    Late chunking (arXiv 2409.04701), chunks in context, landmark tokens, words in context; with the
    documents among the spans, document and chunk vectors come from one call.

    Parameters
    ----------
    x : Tensor
        ``(tokens, dim)``, or ``(batch, length, dim)``, whose token ``t`` of row ``b`` has the
        number ``b * length + t``.
    starts, ends : Tensor
        ``(spans,)``, int32 or int64: span ``s`` is the tokens ``starts[s]`` to ``ends[s]``
        (exclusive), with ``0 <= start <= end <= tokens``.
    mode, weights, token_ids, skip_prefix, p, normalize, dims, epilogue
        As in :func:`segment_pool`; weights belong to tokens, ``skip_prefix`` to spans.
    mask : Tensor, optional
        ``(batch, length)`` for padded ``x``: tokens where it is 0 are not read.

    Returns
    -------
    Tensor or tuple of Tensor
        ``(spans, dim)``. Gradients have the same bits in whatever order the spans are given.

    Raises
    ------
    TypeError, ValueError
        As in :func:`segment_pool`.

    Examples
    --------
    >>> x = torch.tensor([[1.0], [3.0], [8.0]])
    >>> span_pool(x, torch.tensor([0, 0]), torch.tensor([3, 2]))  # a document and its first chunk
    tensor([[4.],
            [2.]])
    """
    _op.check_tensor("x", x, dtypes=_op.FLOATS)
    if x.dim() not in (2, 3):
        raise ValueError(f"x must have 2 or 3 dimensions, got shape {tuple(x.shape)}")
    token_weights = _weights(weights, token_ids, x.shape[:-1], x)
    if mask is not None:
        token_weights = _masked(x, mask, token_weights)
    bounds = [
        _op.check_tensor(name, value, ndim=1, dtypes=(torch.int32, torch.int64), device=x.device)
        for name, value in (("starts", starts), ("ends", ends))
    ]
    if starts.shape != ends.shape:
        raise ValueError(
            f"starts and ends must have the same size, got {starts.shape[0]} and {ends.shape[0]}"
        )
    first, last = (_int32(bound) for bound in bounds)
    skip = _skip(skip_prefix, starts.shape[0], x.device)
    segments = Segments(_op.rows(x), first, token_weights, last, skip)
    return _pool(segments, mode, p, normalize, dims, epilogue)


def gather_pool(
    x: Tensor,
    index: Tensor,
    offsets: Tensor,
    mode: str | Sequence[str] = "mean",
    *,
    weights: Tensor | None = None,
    p: float | Tensor = 3.0,
    normalize: bool = False,
    dims: int | Sequence[int] | None = None,
    epilogue: Epilogue | None = None,
) -> Any:
    """Pool lists of tokens, in any order and with repetitions.

    A contextual token and EOS (arXiv 2507.23386), landmark tokens, the pieces of a word.

    Parameters
    ----------
    x : Tensor
        ``(tokens, dim)`` or ``(batch, length, dim)``, as in :func:`span_pool`.
    index : Tensor
        ``(positions,)``, int32 or int64: the listed tokens, 0 to the number of tokens - 1.
    offsets : Tensor
        ``(lists + 1,)``, int32 or int64: list ``i`` is ``index[offsets[i]]`` to
        ``index[offsets[i + 1]]``.
    weights : Tensor, optional
        Weight of each listed token, ``(positions,)``.
    mode, p, normalize, dims, epilogue
        As in :func:`segment_pool`.

    Returns
    -------
    Tensor or tuple of Tensor
        ``(lists, dim)``.

    Raises
    ------
    TypeError, ValueError
        As in :func:`segment_pool`.
    """
    _op.check_tensor("x", x, dtypes=_op.FLOATS)
    if x.dim() not in (2, 3):
        raise ValueError(f"x must have 2 or 3 dimensions, got shape {tuple(x.shape)}")
    _op.check_tensor("index", index, ndim=1, dtypes=(torch.int32, torch.int64), device=x.device)
    segments = Segments(
        _op.rows(x),
        _op.offsets("offsets", offsets, x.device),
        _weights(weights, None, index.shape, x),
        rows=_int32(index),
    )
    return _pool(segments, mode, p, normalize, dims, epilogue)


def group_pool(
    x: Tensor,
    groups: Tensor,
    num_groups: int,
    mode: str | Sequence[str] = "mean",
    *,
    weights: Tensor | None = None,
    p: float | Tensor = 3.0,
    normalize: bool = False,
    dims: int | Sequence[int] | None = None,
    epilogue: Epilogue | None = None,
) -> Any:
    """Pool the tokens of each group, wherever they are.

    From contextual to static word vectors: the group of a token is its word.

    Parameters
    ----------
    x : Tensor
        ``(tokens, dim)`` or ``(batch, length, dim)``.
    groups : Tensor
        Group of each token, of the shape of ``x`` without its last dimension; int32 or int64, 0 to
        ``num_groups - 1``.
    num_groups : int
        Number of groups; those without a token give zeros.
    weights : Tensor, optional
        Weight of each token, of the shape of ``groups``; 0 leaves a token out.
    mode, p, normalize, dims, epilogue
        As in :func:`segment_pool`; tokens count in the order of ``x``.

    Returns
    -------
    Tensor or tuple of Tensor
        ``(num_groups, dim)``.

    Raises
    ------
    TypeError, ValueError
        As in :func:`segment_pool`, and where a group is out of range (in eager mode on a CPU;
        elsewhere such tokens are left out).
    """
    _op.check_tensor("x", x, dtypes=_op.FLOATS)
    _op.check_tensor("groups", groups, dtypes=(torch.int32, torch.int64), device=x.device)
    if x.dim() not in (2, 3) or groups.shape != x.shape[:-1]:
        raise ValueError(
            f"groups must have the shape of x, {tuple(x.shape)}, without its last dimension, "
            f"got {tuple(groups.shape)}"
        )
    if num_groups < 0:
        raise ValueError(f"num_groups must not be negative, got {num_groups}")
    flat = groups.reshape(-1)
    eager_cpu = _eager_cpu(x)
    if eager_cpu and len(flat) and (int(flat.min()) < 0 or int(flat.max()) >= num_groups):
        raise ValueError(
            f"groups must be between 0 and num_groups - 1 = {num_groups - 1}, "
            f"got {int(flat.min())} to {int(flat.max())}"
        )
    order = torch.argsort(flat, stable=True)
    bounds = torch.arange(num_groups + 1, dtype=flat.dtype, device=x.device)
    offsets = torch.searchsorted(flat[order], bounds).to(torch.int32)
    token_weights = _weights(weights, None, groups.shape, x)
    segments = Segments(
        _op.rows(x),
        offsets[:-1].contiguous(),
        None if token_weights is None else token_weights[order],
        offsets[1:].contiguous(),
        rows=order.to(torch.int32),
    )
    return _pool(segments, mode, p, normalize, dims, epilogue)


def sif_weights(frequencies: Tensor, a: float = 1e-3) -> Tensor:
    """Weights by vocabulary id, ``a / (a + p)``: smooth inverse frequency.

    Parameters
    ----------
    frequencies : Tensor
        ``(vocabulary,)``: counts, or anything proportional to them.
    a : float, default 1e-3
        The smoothing constant; rarer words than this share weigh more than 1/2.

    Returns
    -------
    Tensor
        ``(vocabulary,)``, for ``segment_pool(..., weights=..., token_ids=...)``.

    References
    ----------
    Arora, Liang, Ma: A simple but tough-to-beat baseline for sentence embeddings, ICLR 2017,
    equation 3.
    """
    if a <= 0:
        raise ValueError(f"a must be positive, got {a}")
    frequencies = frequencies.to(torch.float32)
    return a / (a + frequencies / frequencies.sum().clamp_min(1e-30))


# --- arguments to segments -----------------------------------------------------------------------


def token_segments(
    x: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    skip_prefix: int | Tensor | None = None,
    weights: Tensor | None = None,
    token_ids: Tensor | None = None,
) -> Segments:
    """Return the segments of packed or padded input."""
    if (cu_seqlens is None) == (mask is None):
        raise ValueError("give either cu_seqlens (packed x) or mask (padded x), not both or none")
    _op.check_tensor("x", x, ndim=2 if mask is None else 3, dtypes=_op.FLOATS)
    token_weights = _weights(weights, token_ids, x.shape[:-1], x)
    if mask is None:
        starts, ends = _op.offsets("cu_seqlens", cu_seqlens, x.device), None
    else:
        starts, ends, token_weights = _padded_segments(x, mask, token_weights)
    batch = starts.shape[0] - int(ends is None)  # symbolic sizes take no bool
    skip = _skip(skip_prefix, batch, x.device)
    return Segments(_op.rows(x), starts, token_weights, ends, skip)


def pooled_spans(segments: Segments) -> tuple[Tensor, Tensor]:
    """Return where the pooled tokens of each segment start and end, without its skipped prefix."""
    if _eager_cpu(segments.x):
        op.check_segments(segments)  # the kernels won't see what they'd have named
    _, starts, _, ends, skip, _ = segments
    if ends is None:
        starts, ends = starts[:-1], starts[1:]
    if skip is not None:
        starts = torch.minimum(starts.long() + skip, ends.long()).to(torch.int32)
    return starts, ends


def _eager_cpu(x: Tensor) -> bool:
    """Tell whether values may be looked at: no GPU to wait for, nothing being traced."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _int32(positions: Tensor) -> Tensor:
    """Narrow to int32; what doesn't fit stays out of range."""
    if positions.dtype != torch.int32:
        positions = positions.clamp(-1, 2**31 - 1).to(torch.int32)
    return positions.contiguous()


def _weights(
    weights: Tensor | None, token_ids: Tensor | None, shape: torch.Size, x: Tensor
) -> Tensor | None:
    """Return the weights of the positions as the vector that kernels take."""
    if weights is None:
        if token_ids is not None:
            raise ValueError("token_ids needs weights, a table of weights by id")
        return None
    _op.check_tensor("weights", weights, device=x.device)
    if token_ids is not None:
        _op.check_tensor("weights", weights, ndim=1)
        _op.check_tensor("token_ids", token_ids, dtypes=(torch.int32, torch.int64), device=x.device)
        if token_ids.shape != shape:
            raise ValueError(
                f"token_ids must have one id per token of x, {tuple(shape)}, "
                f"got {tuple(token_ids.shape)}"
            )
        eager_cpu = _eager_cpu(x)
        if eager_cpu and token_ids.numel():  # a negative one would count from the end
            low, high = int(token_ids.min()), int(token_ids.max())
            if low < 0 or high >= weights.shape[0]:
                raise IndexError(
                    f"token_ids must be between 0 and {weights.shape[0] - 1}, got {low} to {high}"
                )
        weights = weights[token_ids]
    if weights.shape != shape:
        raise ValueError(
            f"weights must have one value per token of x, {tuple(shape)}, "
            f"got {tuple(weights.shape)}"
        )
    return weights.reshape(-1).to(accumulator(x.dtype)).contiguous()


def _masked(x: Tensor, mask: Tensor, weights: Tensor | None) -> Tensor:
    _op.check_tensor("mask", mask, ndim=2, device=x.device)
    if mask.shape != x.shape[:-1]:
        raise ValueError(
            f"mask must have the shape (batch, length) of x, {tuple(x.shape[:-1])}, "
            f"got {tuple(mask.shape)}"
        )
    eager_cpu = _eager_cpu(x)
    if eager_cpu and mask.is_floating_point() and mask.isnan().any():
        raise ValueError("mask must not hold NaN")
    flat = mask.reshape(-1).to(accumulator(x.dtype))
    return flat if weights is None else flat * weights


def _padded_segments(
    x: Tensor, mask: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Segments of padded input, each from its first token to the end of its row."""
    token_weights = _masked(x, mask, weights)
    batch, length = x.shape[:2]
    begin = torch.arange(batch, dtype=torch.int32, device=x.device) * length
    if length == 0:
        return begin, begin, token_weights
    first = (mask != 0).to(torch.uint8).argmax(1).to(torch.int32)
    return begin + first, begin + length, token_weights


def _skip(skip_prefix: int | Tensor | None, batch: int, device: torch.device) -> Tensor | None:
    if skip_prefix is None:
        return None
    if isinstance(skip_prefix, int):
        if skip_prefix < 0:
            raise ValueError(f"skip_prefix must not be negative, got {skip_prefix}")
        return torch.full((batch,), min(skip_prefix, 2**31 - 1), dtype=torch.int32, device=device)
    integers = (torch.int32, torch.int64)
    skip = _op.check_tensor("skip_prefix", skip_prefix, ndim=1, dtypes=integers, device=device)
    if skip.shape[0] != batch:
        raise ValueError(
            f"skip_prefix must have one count per sequence, ({batch},), got {tuple(skip.shape)}"
        )
    return _int32(skip)


# --- modes and what follows ----------------------------------------------------------------------


def _pool(
    segments: Segments,
    mode: str | Sequence[str],
    p: float | Tensor,
    normalize: bool,
    dims: int | Sequence[int] | None,
    epilogue: Epilogue | None,
) -> Result:
    modes = check_modes(mode)
    if "max" in modes and _op.needs_grad(segments.weights):
        raise ValueError("weights get no gradient in mode 'max': detach them")
    if dims is not None and epilogue is not None:
        raise ValueError("give dims either to the function or to its epilogue, not both")
    dtype = segments.x.dtype
    wide = dims is not None or epilogue is not None or (normalize and len(modes) > 1)
    whole = normalize and dims is None
    if len(modes) == 1 and modes[0] in _LINEAR_MODES:  # the kernel normalizes by itself
        pooled = op.segment_pool(segments, Mode[modes[0]], whole, wide)
    else:
        pooled = _pool_modes(segments, modes, p, wide)
        if whole:
            narrow = dtype if epilogue is None else pooled.dtype
            pooled = op.finish(pooled, (pooled.shape[1],), True, dtype=narrow)
    if epilogue is not None:
        return epilogue(pooled, dtype)
    if dims is None:
        return pooled
    widths = check_dims(dims, pooled.shape[1])
    out = op.finish(pooled, widths, normalize, dtype=dtype)
    return out if isinstance(dims, int) else split(out, widths)


def check_modes(mode: str | Sequence[str]) -> tuple[str, ...]:
    """Return ``mode`` as a tuple of known modes."""
    modes = (mode,) if isinstance(mode, str) else tuple(mode)
    if not modes:
        raise ValueError("mode must name at least one mode, got none")
    for name in modes:
        _op.check_choice("mode", name, MODES)
    return modes


def _pool_modes(
    segments: Segments, modes: tuple[str, ...], p: float | Tensor, wide: bool
) -> Tensor:
    """Pool in modes that may repeat, side by side."""
    distinct = dict.fromkeys(modes)
    together = tuple(mode for mode in distinct if mode != "gem")  # which takes a pass of its own
    parts: dict[str, Tensor] = {}
    if len(together) > 1:
        numbers = tuple(reference.MAX if mode == "max" else int(Mode[mode]) for mode in together)
        pooled = op.segment_pool_modes(segments, numbers, wide)
        if together == modes:
            return pooled
        parts = dict(zip(together, pooled.tensor_split(len(together), 1), strict=True))
    for mode in distinct:
        if mode not in parts:
            parts[mode] = _pool_one(segments, mode, p, wide)
    return torch.cat([parts[mode] for mode in modes], 1) if len(modes) > 1 else parts[modes[0]]


def _pool_one(segments: Segments, mode: str, p: float | Tensor, wide: bool) -> Tensor:
    x = segments.x
    if mode in _LINEAR_MODES:
        return op.segment_pool(segments, Mode[mode], False, wide)
    stored = accumulator(x.dtype) if wide else x.dtype
    if mode == "max":
        return op.segment_max(segments).to(stored)
    power = torch.as_tensor(p, dtype=accumulator(x.dtype), device=x.device).reshape(-1)
    if power.shape[0] != 1:
        raise ValueError(f"p must be a number or a tensor of one element, got {tuple(power.shape)}")
    return op.segment_gem(segments, power, GEM_EPSILON).to(stored)
