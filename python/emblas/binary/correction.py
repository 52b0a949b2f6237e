"""Codes with a correction per document, which turns their scores into unbiased inner products.

A code stands for the direction of its values v, not for their length nor for how far the document
x is from it. With r the cosine of v and x, an inner product is estimated by

    <q, x>  ~  scale <q, v>,   scale = |x|^2 / <v, x>

which is unbiased if x was rotated at random, and off by about |x| |q| sqrt(1 / r^2 - 1) /
sqrt(dim - 1): the part of v across x meets the part of q across x at a random angle (RaBitQ, Gao
and Long 2024, arXiv 2405.12497, theorem 3.2; with several bits: Gao et al. 2024, arXiv
2409.09913).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from emblas import _op
from emblas.binary.functions import _BEST_STEP, pack_planes

_ROWS = 1 << 12
# Widths of a row's quantizer that are tried, around the best one of a normal distribution.
_WIDTHS = tuple(0.6 + 0.05 * i for i in range(19))


class CorrectedCodes(NamedTuple):
    """What :func:`pack_rabitq` makes of vectors."""

    codes: Tensor  # uint8 (rows, bits * ceil(dim / 8))
    scale: Tensor  # float32 (rows,): of asymmetric_topk
    error: Tensor  # float32 (rows,): standard deviation of the estimate, for queries of length 1


def _values(scaled: Tensor, bits: int) -> Tensor:
    """Values of the codes of :func:`pack_planes` with scale 1, without packing."""
    step = 2.0 ** (2 - bits)
    largest = 2 - step / 2
    return ((scaled / step).ceil() - 0.5).mul(step).clamp(-largest, largest)


def _best_width(x: Tensor, bits: int) -> Tensor:
    """Find the width ``(rows, 1)`` whose code has the largest cosine with its row."""
    root = x.square().mean(1, keepdim=True).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    if bits == 1:
        return root
    unit = root * _BEST_STEP[bits - 1] * 2 ** (bits - 2)
    best, width = torch.full_like(unit, -torch.inf), unit
    for factor in _WIDTHS:
        values = _values(x / (unit * factor), bits)
        cosine = (values * x).sum(1, keepdim=True) / values.norm(dim=1, keepdim=True)
        width = torch.where(cosine > best, unit * factor, width)
        best = torch.maximum(best, cosine)
    return width


def pack_rabitq(x: Tensor, bits: int = 1) -> CorrectedCodes:
    """Pack vectors to codes with a correction: inner products instead of ranks.

    ``asymmetric_topk(rotation(q), codes, k, scale=scale)`` then returns estimates of ``<q, x>``:
    unbiased, with a known error. One bit gives the signs of :func:`pack_sign`; with more, each row
    is quantized with the width that brings its code nearest to it, where :func:`pack_planes` takes
    one width for all.

    Parameters
    ----------
    x : Tensor
        ``(rows, dim)``; floating-point, finite, rotated at random before, for example by
        :class:`HadamardRotation`, and queries alike: without it, the errors of some directions are
        larger than said.
    bits : int, default 1
        Bits per dimension, 1 to 4.

    Returns
    -------
    codes : Tensor
        uint8 ``(rows, bits * ceil(dim / 8))``, in the layout of :func:`pack_planes`.
    scale : Tensor
        float32 ``(rows,)``, above 0: ``|x|^2 / <v, x>`` of the code's values v. The estimate of a
        zero vector is 0 up to 1e-37.
    error : Tensor
        float32 ``(rows,)``. The estimate for a query q is within ``e * error * |q|`` of the inner
        product for about 95 of 100 rotations at e = 2, and practically always at e = 4. For vectors
        of length 1 and one bit it follows from the scale alone:
        ``sqrt((scale^2 dim - 1) / (dim - 1))``.

    Raises
    ------
    TypeError
        If ``x`` is no tensor of a floating-point dtype.
    ValueError
        If ``x`` is not 2-D or not finite, or ``bits`` is not between 1 and 4.

    Notes
    -----
    Of extended RaBitQ (arXiv 2409.09913, section 3) this keeps the grid, the choice of a width per
    vector and the estimator. Widths are chosen among 19 instead of all breakpoints.
    """
    _op.check_tensor("x", x, ndim=2, dtypes=_op.FLOATS)
    if not 1 <= bits <= 4:
        raise ValueError(f"bits must be between 1 and 4, got {bits}")
    codes, scales, errors = [], [], []
    for part in x.split(_ROWS):
        rows = part.double()
        if not bool(rows.isfinite().all()):
            raise ValueError("x must be finite, got NaN or infinity")
        scaled = rows / _best_width(rows, bits)
        codes.append(pack_planes(scaled, bits, scale=1.0))
        values = _values(scaled, bits)
        square, product = rows.square().sum(1), (values * rows).sum(1)
        least = torch.finfo(torch.float32).tiny
        scale = torch.where(product > 0, square / product, least).clamp_min(least)
        # |x| sqrt(1 / r^2 - 1) = |scale v - x|, since scale v is x and something across it.
        across = (scale[:, None] * values - rows).norm(dim=1)
        scales.append(scale.float())
        errors.append((across / max(x.shape[1] - 1, 1) ** 0.5).float())
    return CorrectedCodes(torch.cat(codes), torch.cat(scales), torch.cat(errors))
