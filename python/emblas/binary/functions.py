"""The public functions of bit codes: arguments are checked here, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from emblas import _op
from emblas.binary import op


def pack_sign(
    x: Tensor,
    *,
    threshold: Tensor | None = None,
    rotation: Callable[[Tensor], Tensor] | None = None,
    dims: int | None = None,
) -> Tensor:
    """Pack the signs of vectors into bits.

    Bit = value > threshold. Bit 7 of byte 0 is dimension 0, as in ``numpy.packbits`` and in
    sentence-transformers' ``ubinary``; the bits after the last dimension are 0.
    :mod:`emblas.binary.formats` converts to what others store.

    Parameters
    ----------
    x : Tensor
        ``(..., dim)``; float32, float64, bfloat16 or float16. A value at its threshold gives 0, and
        so does NaN, silently: nothing is above or below it.
    threshold : Tensor, optional
        One value per packed dimension, such as the mean or median of the data
        (:func:`emblas.binary.fit_threshold`); 0 by default. Compared in float64 if ``x`` is, in
        float32 otherwise. A NaN threshold gives 0.
    rotation : callable, optional
        Applied to the vectors first: :class:`emblas.binary.HadamardRotation`, the result of
        :func:`emblas.binary.fit_itq` or any other map of ``(..., dim)``.
    dims : int, optional
        Pack the first ``dims`` dimensions only, the prefix of a Matryoshka model. The prefix is
        taken before the rotation, since rotated dimensions are no longer ordered.

    Returns
    -------
    Tensor
        uint8 ``(..., ceil(dim / 8))``. No gradient flows through bits; train with
        :func:`sign_ste`.

    Raises
    ------
    TypeError
        If ``x`` is no tensor of a floating-point dtype.
    ValueError
        If ``x`` has no dimension, ``dims`` is not between 1 and ``dim``, or ``threshold`` does not
        have one value per packed dimension.
    """
    _op.check_tensor("x", x, dtypes=_op.FLOATS)
    if x.dim() == 0:
        raise ValueError("x must have at least 1 dimension, got shape ()")
    if dims is not None:
        if not 1 <= dims <= x.shape[-1]:
            raise ValueError(f"dims must be between 1 and {x.shape[-1]}, got {dims}")
        x = x[..., :dims]
    if rotation is not None:
        x = rotation(x)
    if threshold is not None:
        _op.check_tensor("threshold", threshold, ndim=1, dtypes=_op.FLOATS, device=x.device)
        if threshold.shape[0] != x.shape[-1]:
            raise ValueError(
                f"threshold must have one value for each of {x.shape[-1]} dimensions, "
                f"got {threshold.shape[0]}"
            )
        accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
        threshold = threshold.to(accumulator).contiguous()
    rows = x[None] if x.dim() == 1 else x.flatten(0, -2)
    codes = op.pack_sign(_op.rows(rows), threshold)
    return codes.view(*x.shape[:-1], (x.shape[-1] + 7) // 8)


def unpack_sign(codes: Tensor, dim: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Unpack bits to +1 and -1.

    Parameters
    ----------
    codes : Tensor
        uint8 ``(..., ceil(dim / 8))``, as :func:`pack_sign` makes them.
    dim : int
        Dimensions of the vectors.
    dtype : torch.dtype, default torch.float32
        Type of the result.

    Returns
    -------
    Tensor
        ``(..., dim)``: +1 where the bit is set, -1 elsewhere.

    Raises
    ------
    TypeError
        If ``codes`` is no uint8 tensor.
    ValueError
        If ``codes`` hold another number of bytes than ``dim`` dimensions need.
    """
    _op.check_tensor("codes", codes, dtypes=(torch.uint8,))
    if codes.dim() == 0 or codes.shape[-1] != (dim + 7) // 8:
        raise ValueError(
            f"codes must end in ceil(dim / 8) = {(dim + 7) // 8} bytes for dim={dim}, "
            f"got shape {tuple(codes.shape)}"
        )
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=codes.device)
    bits = (codes[..., None] >> shifts & 1).flatten(-2)[..., :dim]
    return bits.to(dtype) * 2 - 1


def sign_ste(
    x: Tensor,
    estimator: str = "clipped",
    *,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Binarize to +1 and -1 with a straight-through gradient.

    Forward: +1 where ``x > 0``, -1 elsewhere, the signs that :func:`pack_sign` packs. Backward, by
    ``estimator``:

    - "clipped": the gradient passes unchanged where ``|x| <= 1`` and is 0 outside (recurrent binary
      embeddings, arXiv 2302.08714).
    - "tanh": the gradient of ``tanh(x / temperature)``. Lowered step by step, the temperature
      anneals from a smooth function to the sign: ``(1 + 0.1 * step) ** -0.5`` in the binary passage
      retriever (arXiv 2106.00882, section 3).
    - "gumbel": logistic noise of scale 1 is added to ``x`` before the sign is taken, a sample of
      the binary concrete distribution (arXiv 1611.00712, appendix B) made hard; the gradient is
      that of the relaxed sample ``2 sigmoid((x + noise) / temperature) - 1``. For training only:
      its forward is random.

    Parameters
    ----------
    x : Tensor
        Any shape; float32, float64, bfloat16 or float16. NaN gives -1.
    estimator : {"clipped", "tanh", "gumbel"}, default "clipped"
        Which gradient.
    temperature : float, default 1.0
        Width of the smooth functions, above 0; not used by "clipped".
    generator : torch.Generator, optional
        Source of the noise of "gumbel".

    Returns
    -------
    Tensor
        Shape and dtype of ``x``.

    Raises
    ------
    TypeError
        If ``x`` is no tensor of a floating-point dtype.
    ValueError
        If ``estimator`` is unknown or ``temperature`` is not above 0.
    """
    _op.check_tensor("x", x, dtypes=_op.FLOATS)
    _op.check_choice("estimator", estimator, ("clipped", "tanh", "gumbel"))
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if estimator == "clipped":
        return op.sign_ste(x)
    if estimator == "tanh":
        return op.sign_tanh(x, temperature)
    uniform = torch.empty_like(x, dtype=torch.float32, requires_grad=False)
    noise = uniform.uniform_(1e-6, 1 - 1e-6, generator=generator).logit().to(x.dtype)
    # 2 sigmoid(z) - 1 = tanh(z / 2)
    return op.sign_tanh(x + noise, 2 * temperature)


def hamming_topk(queries: Tensor, codes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the codes at the smallest Hamming distance from each query, exactly.

    Parameters
    ----------
    queries : Tensor
        uint8 ``(Q, bytes)``. Rows may be any stride apart.
    codes : Tensor
        uint8 ``(N, bytes)``, of any width below 2^20 bytes. They are read once for all queries.
    k : int
        Number of results per query, at least 0.

    Returns
    -------
    distances : Tensor
        int32 ``(Q, k)``, ascending.
    ids : Tensor
        int64 ``(Q, k)``: rows of ``codes``, ascending among equal distances, whatever the number of
        threads. Beyond the N-th result, ids are -1 and distances the largest int32.

    Raises
    ------
    TypeError
        If an argument is no uint8 tensor.
    ValueError
        If shapes or devices don't fit together, or ``k`` is negative.

    Examples
    --------
    >>> codes = torch.tensor([[0b1111], [0b0001], [0b0111]], dtype=torch.uint8)
    >>> hamming_topk(codes[:1], codes, k=2)
    (tensor([[0, 1]], dtype=torch.int32), tensor([[0, 2]]))
    """
    _op.check_tensor("queries", queries, ndim=2, dtypes=(torch.uint8,))
    _op.check_tensor("codes", codes, ndim=2, dtypes=(torch.uint8,), device=queries.device)
    if queries.shape[1] != codes.shape[1]:
        raise ValueError(
            f"queries and codes must have the same width, got {queries.shape[1]} and "
            f"{codes.shape[1]} bytes"
        )
    if k < 0:
        raise ValueError(f"k must be at least 0, got {k}")
    return op.hamming_topk(_op.rows(queries), _op.rows(codes), k)
