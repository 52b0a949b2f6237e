"""Packing and unpacking of bit codes: arguments are checked here, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from emblas import _op
from emblas.binary import op

# Of the uniform quantizer of a normal distribution with the least squared error, for 1 to 4 bits.
_BEST_STEP = (1.596, 0.9957, 0.5860, 0.3352)


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
    if dim == 0:
        return codes.new_empty(codes.shape, dtype=dtype)
    rows = codes[None] if codes.dim() == 1 else codes.flatten(0, -2)
    return _unpack(rows, dim, dtype).view(*codes.shape[:-1], dim)


def _unpack(codes: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Unpack rows to any dtype; the operator knows the floating-point ones."""
    if dtype in _op.FLOATS:
        return op.unpack_planes(_op.rows(codes), dim, dtype)
    return op.unpack_planes(_op.rows(codes), dim, torch.float32).to(dtype)


def pack_planes(x: Tensor, bits: int, *, scale: Tensor | float | None = None) -> Tensor:
    """Quantize vectors to 1 to 4 bits per dimension, one plane of bits after the other.

    The first plane holds the signs, each further one the sign of what is left: with planes 0 to t
    a value is ``scale * sum of 2^-t (+1 or -1)``, the recurrent binary form of arXiv 2302.08714
    without its networks, which is a uniform quantizer. The first plane alone is a sign code, so
    the prefix ``codes[:, :ceil(dim / 8)]`` serves :func:`hamming_topk`.

    Parameters
    ----------
    x : Tensor
        ``(rows, dim)``; float32, float64, bfloat16 or float16. NaN gives zero bits.
    bits : int
        Planes, 1 to 4.
    scale : Tensor or float, optional
        What the values are divided by first: one number or one per dimension, above 0. By default
        the best uniform quantizer of a normal distribution with the root mean square of ``x`` (Max,
        "Quantizing for minimum distortion", 1960, table II), one number for all dimensions. Rows
        packed in several calls must share a scale for their scores to be comparable.

    Returns
    -------
    Tensor
        uint8 ``(rows, bits * ceil(dim / 8))``.

    Raises
    ------
    TypeError
        If ``x`` is no tensor of a floating-point dtype.
    ValueError
        If ``x`` is not 2-D, or ``bits`` is not between 1 and 4.
    """
    _op.check_tensor("x", x, ndim=2, dtypes=_op.FLOATS)
    if not 1 <= bits <= 4:
        raise ValueError(f"bits must be between 1 and 4, got {bits}")
    rest = x if x.dtype == torch.float64 else x.float()
    if scale is None:
        step = _BEST_STEP[bits - 1] * 2 ** (bits - 2)  # of the quantizer, in units of the planes'
        scale = rest.square().mean().sqrt().clamp_min(torch.finfo(rest.dtype).tiny) * step
    rest = rest / scale
    planes = []
    for plane in range(bits):
        planes.append(pack_sign(rest))
        rest = rest - 2.0**-plane * torch.where(rest > 0, 1.0, -1.0).to(rest.dtype)
    return torch.cat(planes, 1)


def unpack_planes(codes: Tensor, dim: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the values of the codes of :func:`pack_planes`, in units of its scale.

    Parameters
    ----------
    codes : Tensor
        uint8 ``(rows, bits * ceil(dim / 8))``.
    dim : int
        Dimensions of the vectors.
    dtype : torch.dtype, default torch.float32
        Type of the result.

    Returns
    -------
    Tensor
        ``(rows, dim)``: odd multiples of ``2^(1 - bits)`` between -2 and 2.

    Raises
    ------
    TypeError
        If ``codes`` is no uint8 tensor.
    ValueError
        If ``codes`` are not 1 to 24 times ``ceil(dim / 8)`` bytes wide.
    """
    _op.check_tensor("codes", codes, ndim=2, dtypes=(torch.uint8,))
    width = (dim + 7) // 8
    if dim < 1 or codes.shape[1] % width or not 1 <= codes.shape[1] // width <= 24:
        raise ValueError(
            f"codes must be 1 to 24 times ceil(dim / 8) = {width} bytes wide for dim={dim}, "
            f"got {codes.shape[1]}"
        )
    return _unpack(codes, dim, dtype)


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
