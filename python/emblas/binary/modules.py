"""Bit codes as a torch module."""

from __future__ import annotations

from torch import Tensor, nn

from emblas.binary.functions import pack_sign, sign_ste


class SignBinarizer(nn.Module):
    """Last layer of a model whose vectors will be stored as bits.

    In training it gives +1 and -1 with the straight-through gradient of
    :func:`emblas.binary.sign_ste`; in evaluation it gives the packed codes of the same signs.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Binarize ``(..., dim)``: signs in training, uint8 ``(..., ceil(dim / 8))`` otherwise."""
        return sign_ste(x) if self.training else pack_sign(x)
