"""Pooling as a torch module."""

from __future__ import annotations

from torch import Tensor, nn

from emblas import _op
from emblas.pooling.functions import MODES, segment_pool


class Pooling(nn.Module):
    """Token vectors to one vector per sequence; see :func:`emblas.pooling.segment_pool`.

    Parameters
    ----------
    mode : {"mean"}, default "mean"
        How tokens are combined.
    normalize : bool, default False
        Return vectors of unit length.
    """

    def __init__(self, mode: str = "mean", *, normalize: bool = False) -> None:
        super().__init__()
        self.mode = _op.check_choice("mode", mode, MODES)
        self.normalize = normalize

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Pool ``x`` (tokens, dim) by ``cu_seqlens`` or ``x`` (batch, length, dim) by ``mask``."""
        return segment_pool(
            x, cu_seqlens, self.mode, mask=mask, weights=weights, normalize=self.normalize
        )

    def extra_repr(self) -> str:
        """Return the settings that ``repr`` shows."""
        return f"mode={self.mode!r}, normalize={self.normalize}"
