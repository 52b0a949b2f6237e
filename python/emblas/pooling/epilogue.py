"""What happens to pooled vectors before they are stored: projection to quantization."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from emblas import _op
from emblas.pooling import op
from emblas.pooling.reference import accumulator

QUANTIZATIONS = (None, "int8", "binary")


def check_dims(dims: int | Sequence[int], dim: int) -> tuple[int, ...]:
    """Return ``dims`` as a tuple of dimensions between 1 and ``dim``."""
    values = (dims,) if isinstance(dims, int) else tuple(dims)
    if not values or not all(1 <= k <= dim for k in values):
        raise ValueError(f"dims must be between 1 and {dim}, the pooled dimension, got {dims}")
    return values


def split(x: Tensor, widths: Sequence[int]) -> tuple[Tensor, ...]:
    """Return the parts of these widths, as views of the rows of ``x``."""
    return tuple(x[:, begin:end] for begin, end in pairwise([0, *accumulate(widths)]))


@dataclass(frozen=True)
class Epilogue:
    """Steps from pooled vectors to stored embeddings, in this order; each one optional.

    Every pooling function takes one as ``epilogue=``. The tokens are read once and nothing of their
    size is written: all steps work on one vector per document.

    Parameters
    ----------
    mean : Tensor, optional
        ``(dim,)``, subtracted.
    projection : Tensor, optional
        ``(new_dim, dim)``: a linear projection, or with ``mean`` a PCA-whitening
        (arXiv 2103.15316; the transpose of its ``W``). A projection of every token followed by a
        mean is the same as the projection of the mean, and that much cheaper.
    dims : int or sequence of int, optional
        Matryoshka dimensions (arXiv 2205.13147): keep the first ``k`` values, for each ``k``.
        Several dimensions give a tuple of results.
    normalize : bool, default False
        Divide by the Euclidean length (at least 1e-12), for each of ``dims`` anew.
    noise : float, default 0
        Standard deviation of Gaussian noise that is added, independent for every value, row and
        entry of ``dims``.
    seed : int, optional
        Of the noise: 64 bits. Row i gets the same noise in every call with the same seed, so use a
        seed once only; None draws one from torch's generator.
    quantize : {"int8", "binary"}, optional
        ``int8``: 256 levels between the ranges of each dimension, rounded to nearest, clamped.
        ``binary``: one bit per value, ``> 0``, packed into uint8 as ``numpy.packbits`` does.
        Quantized results carry no gradient.
    ranges : Tensor, optional
        ``(2, dim)``: lowest and highest value of each dimension for ``int8``, with several ``dims``
        ``(2, sum of dims)``; None takes them from the batch itself.
    dtype : torch.dtype, optional
        Of a result that isn't quantized; default that of the tokens.

    Notes
    -----
    The formulas stand in ``csrc/pooling/finish.h``. Noise comes from Philox4x32-10, a counter-based
    generator: the same bits on any number of threads.
    """

    mean: Tensor | None = None
    projection: Tensor | None = None
    dims: int | Sequence[int] | None = None
    normalize: bool = False
    noise: float = 0.0
    seed: int | None = None
    quantize: str | None = None
    ranges: Tensor | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.quantize not in QUANTIZATIONS:
            raise ValueError(
                f"quantize must be one of {', '.join(map(repr, QUANTIZATIONS))}, "
                f"got {self.quantize!r}"
            )
        if not 0 <= self.noise < float("inf"):
            raise ValueError(f"noise must be a finite number of at least 0, got {self.noise}")
        if self.ranges is not None and self.quantize != "int8":
            raise ValueError("ranges are for quantize='int8' only")
        if self.dtype is not None and self.dtype not in _op.FLOATS:
            raise TypeError(f"dtype must be a floating-point dtype, got {self.dtype}")

    def __call__(
        self, pooled: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """Apply the steps to ``pooled`` (batch, dim); ``dtype`` is the default of the result's."""
        _op.check_tensor("pooled", pooled, ndim=2, dtypes=_op.FLOATS)
        dtype = self.dtype or dtype or pooled.dtype
        pooled = self._project(pooled.to(accumulator(pooled.dtype)))
        dims = check_dims(pooled.shape[1] if self.dims is None else self.dims, pooled.shape[1])
        seed = self.seed or 0
        if self.noise and self.seed is None:
            seed = int(torch.randint(2**63 - 1, ()))
        widths: Sequence[int] = dims
        if self.quantize is None:
            out = op.finish(pooled, dims, self.normalize, noise=self.noise, seed=seed, dtype=dtype)
        elif self.quantize == "binary":
            out = op.finish(pooled, dims, self.normalize, noise=self.noise, seed=seed, kind=2)
            widths = [(k + 7) // 8 for k in dims]
        else:
            out = self._int8(pooled.detach(), dims, seed)
        several = self.dims is not None and not isinstance(self.dims, int)
        return split(out, widths) if several else out

    def _project(self, pooled: Tensor) -> Tensor:
        dim = pooled.shape[1]
        if self.mean is not None:
            mean = _op.check_tensor("mean", self.mean, ndim=1, device=pooled.device)
            if mean.shape[0] != dim:
                raise ValueError(f"mean must have the pooled dimension {dim}, got {mean.shape[0]}")
            pooled = pooled - mean.to(pooled.dtype)
        if self.projection is not None:
            matrix = _op.check_tensor("projection", self.projection, ndim=2, device=pooled.device)
            if matrix.shape[1] != dim:
                raise ValueError(
                    f"projection must have the shape (new_dim, {dim}), got {tuple(matrix.shape)}"
                )
            pooled = torch.nn.functional.linear(pooled, matrix.to(pooled.dtype))
        return pooled

    def _int8(self, pooled: Tensor, dims: tuple[int, ...], seed: int) -> Tensor:
        values, width = pooled, sum(dims)
        if self.ranges is None:
            values = op.finish(pooled, dims, self.normalize, noise=self.noise, seed=seed)
            if not len(values):
                return values.to(torch.int8)
            ranges = int8_ranges(values)
            return op.finish(values, (width,), False, kind=1, ranges=ranges)
        ranges = _op.check_tensor("ranges", self.ranges, ndim=2, device=pooled.device)
        if ranges.shape != (2, width):
            raise ValueError(f"ranges must have the shape (2, {width}), got {tuple(ranges.shape)}")
        ranges = ranges.to(pooled.dtype).contiguous()
        return op.finish(
            pooled, dims, self.normalize, noise=self.noise, seed=seed, kind=1, ranges=ranges
        )


def int8_ranges(embeddings: Tensor) -> Tensor:
    """Return the lowest and highest value ``(2, dim)`` of each dimension, for :class:`Epilogue`."""
    _op.check_tensor("embeddings", embeddings, ndim=2, dtypes=_op.FLOATS)
    return torch.stack([embeddings.amin(0), embeddings.amax(0)])
