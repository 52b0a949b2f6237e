"""Rotations in front of binarization: they spread variance evenly over the bits.

A sign bit says most about a vector if every dimension varies alike and independently. Models
whose vectors crowd along few directions lose much of their quality to sign bits; a rotation, and a
threshold at each dimension's centre, win part of it back.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from emblas import _op
from emblas.binary import op


def fit_threshold(x: Tensor, kind: str = "mean") -> Tensor:
    """Find the centre of each dimension, the threshold of :func:`emblas.binary.pack_sign`.

    Parameters
    ----------
    x : Tensor
        Sample of vectors ``(rows, dim)``, after the rotation if there is one. No NaN.
    kind : {"mean", "median"}, default "mean"
        "median" splits each dimension in two halves of equal size, the most a bit can tell.

    Returns
    -------
    Tensor
        ``(dim,)``: float64 if ``x`` is, else float32.

    Raises
    ------
    TypeError
        If ``x`` is no tensor of a floating-point dtype.
    ValueError
        If ``x`` has no rows, contains NaN, or ``kind`` is unknown.
    """
    _op.check_tensor("x", x, ndim=2, dtypes=_op.FLOATS)
    _op.check_choice("kind", kind, ("mean", "median"))
    if x.shape[0] == 0:
        raise ValueError("x must have at least one row, got none")
    if bool(x.isnan().any()):
        raise ValueError("x must not contain NaN")
    values = x if x.dtype == torch.float64 else x.float()
    return values.mean(0) if kind == "mean" else values.quantile(0.5, dim=0)


class HadamardRotation(nn.Module):
    """A random rotation in ``O(dim log dim)``: sign flips and Hadamard transforms.

    Each round flips random signs and applies the normalized Hadamard matrix to the largest power
    of two of dimensions that fits, the first ones in even rounds, the last ones in odd rounds: any
    dimension stays what it is, no padding. The rotation needs no data and serves any model (the
    fast transform of RaBitQ, Gao and Long, arXiv 2405.12497, without its Givens steps).

    Parameters
    ----------
    dim : int
        Dimensions of the vectors.
    rounds : int, default 4
        Rounds; two are the least that mix all dimensions if ``dim`` is no power of two.
    seed : int, default 0
        Seed of the signs. They are a buffer and travel with the state dict.

    Raises
    ------
    ValueError
        If ``dim`` or ``rounds`` is below 1.
    """

    signs: Tensor

    def __init__(self, dim: int, *, rounds: int = 4, seed: int = 0) -> None:
        super().__init__()
        if dim < 1 or rounds < 1:
            raise ValueError(f"dim and rounds must be at least 1, got {dim} and {rounds}")
        generator = torch.Generator().manual_seed(seed)
        bits = torch.randint(0, 2, (rounds, dim), dtype=torch.int8, generator=generator)
        self.register_buffer("signs", bits * 2 - 1)

    def forward(self, x: Tensor) -> Tensor:
        """Rotate ``(..., dim)``; dtype and shape stay."""
        return self._apply_rounds(x, op.hadamard_rotate)

    def inverse(self, x: Tensor) -> Tensor:
        """Undo the rotation."""
        return self._apply_rounds(x, op.hadamard_unrotate)

    def _apply_rounds(self, x: Tensor, rotate: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        _op.check_tensor("x", x, dtypes=_op.FLOATS, device=self.signs.device)
        dim = self.signs.shape[1]
        if x.dim() == 0 or x.shape[-1] != dim:
            raise ValueError(f"x must end in {dim} dimensions, got shape {tuple(x.shape)}")
        return rotate(_op.rows(x.reshape(-1, dim)), self.signs).view(x.shape)

    def extra_repr(self) -> str:
        """Return the settings that ``repr`` shows."""
        return f"dim={self.signs.shape[1]}, rounds={self.signs.shape[0]}"


class LinearRotation(nn.Module):
    """``(x - mean) @ weight``, as :func:`fit_itq` learns it.

    Parameters
    ----------
    mean : Tensor
        ``(dim,)``.
    weight : Tensor
        ``(dim, bits)`` with orthonormal columns.
    """

    mean: Tensor
    weight: Tensor

    def __init__(self, mean: Tensor, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        """Rotate ``(..., dim)`` to ``(..., bits)``."""
        return (x - self.mean.to(x.dtype)) @ self.weight.to(x.dtype)


def fit_itq(
    x: Tensor, bits: int | None = None, *, iterations: int = 50, seed: int = 0
) -> LinearRotation:
    """Learn the rotation that brings vectors closest to their own sign vectors.

    Iterative quantization: centre, project to the ``bits`` first principal components, then
    alternate B = sign(VR) and R = the orthogonal matrix nearest to V'B (Gong et al., "Iterative
    Quantization: A Procrustean Approach to Learning Binary Codes", section 3).

    Parameters
    ----------
    x : Tensor
        Sample of vectors ``(rows, dim)``; a few tens of ``dim`` rows are enough.
    bits : int, optional
        Dimensions of the result, at most ``dim``; all of them by default.
    iterations : int, default 50
        Alternations.
    seed : int, default 0
        Seed of the rotation that the alternation starts from.

    Returns
    -------
    LinearRotation
        In the dtype of ``x`` (float32 for 16-bit types), fitted in float64.

    Raises
    ------
    TypeError
        If ``x`` is no tensor of a floating-point dtype.
    ValueError
        If ``bits`` is not between 1 and ``dim``, or ``x`` has fewer rows than ``bits``.
    """
    _op.check_tensor("x", x, ndim=2, dtypes=_op.FLOATS)
    bits = x.shape[1] if bits is None else bits
    if not 1 <= bits <= x.shape[1]:
        raise ValueError(f"bits must be between 1 and dim = {x.shape[1]}, got {bits}")
    if x.shape[0] < bits:
        raise ValueError(f"x must have at least bits = {bits} rows, got {x.shape[0]}")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    values = x.double()
    mean = values.mean(0)
    centred = values - mean
    components = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :bits]
    projected = centred @ components
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(bits, bits, dtype=torch.float64, generator=generator).to(x.device)
    rotation = torch.linalg.qr(start).Q
    for _ in range(iterations):
        signs = torch.where(projected @ rotation > 0, 1.0, -1.0).double()
        left, _, right = torch.linalg.svd(projected.T @ signs)
        rotation = left @ right
    return LinearRotation(mean.to(dtype), (components @ rotation).to(dtype))
