"""Pooling as torch modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from emblas.pooling import op
from emblas.pooling.epilogue import Epilogue, check_dims, split
from emblas.pooling.functions import check_modes, segment_pool


class Pooling(nn.Module):
    """Token vectors to one vector per sequence; see :func:`emblas.pooling.segment_pool`.

    Parameters
    ----------
    mode : str or sequence of str, default "mean"
        How tokens are combined.
    normalize : bool, default False
        Return vectors of unit length.
    dims : int or sequence of int, optional
        Matryoshka dimensions to cut to.
    epilogue : Epilogue, optional
        Further steps on the pooled vectors.

    Attributes
    ----------
    p : Parameter or None
        The exponent of ``gem``, learned, where that is one of the modes; it starts at 3.
    """

    def __init__(
        self,
        mode: str | Sequence[str] = "mean",
        *,
        normalize: bool = False,
        dims: int | Sequence[int] | None = None,
        epilogue: Epilogue | None = None,
    ) -> None:
        super().__init__()
        modes = check_modes(mode)
        self.mode = modes[0] if len(modes) == 1 else modes
        self.normalize = normalize
        self.dims = dims
        self.epilogue = epilogue
        self.p = nn.Parameter(torch.tensor([3.0])) if "gem" in modes else None

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        skip_prefix: int | Tensor | None = None,
    ) -> Any:
        """Pool ``x`` (tokens, dim) by ``cu_seqlens`` or ``x`` (batch, length, dim) by ``mask``."""
        return segment_pool(
            x,
            cu_seqlens,
            self.mode,
            mask=mask,
            weights=weights,
            skip_prefix=skip_prefix,
            p=3.0 if self.p is None else self.p,
            normalize=self.normalize,
            dims=self.dims,
            epilogue=self.epilogue,
        )

    def extra_repr(self) -> str:
        """Return the settings that ``repr`` shows."""
        more = "" if self.dims is None else f", dims={self.dims}"
        return f"mode={self.mode!r}, normalize={self.normalize}{more}"


class Matryoshka(nn.Module):
    """Nested prefixes of embeddings (Matryoshka representations, arXiv 2205.13147).

    Parameters
    ----------
    dims : sequence of int
        Lengths of the prefixes.
    normalize : bool, default True
        Divide every prefix by its own length.
    """

    def __init__(self, dims: Sequence[int], *, normalize: bool = True) -> None:
        super().__init__()
        self.dims = tuple(dims)
        self.normalize = normalize

    def forward(self, embeddings: Tensor) -> tuple[Tensor, ...]:
        """Return one tensor ``(batch, k)`` for each ``k`` of ``dims``."""
        dims = check_dims(self.dims, embeddings.shape[1])
        return split(op.finish(embeddings, dims, self.normalize), dims)

    def extra_repr(self) -> str:
        """Return the settings that ``repr`` shows."""
        return f"dims={self.dims}, normalize={self.normalize}"
