"""Bit codes as a torch module."""

from __future__ import annotations

from torch import Tensor, nn

from emblas import _op
from emblas.binary.functions import pack_sign, sign_ste


class SignBinarizer(nn.Module):
    """Last layer of a model whose vectors will be stored as bits.

    In training it gives +1 and -1 with the straight-through gradient of
    :func:`emblas.binary.sign_ste`; in evaluation it gives the packed codes of the same signs.

    Parameters
    ----------
    estimator : {"clipped", "tanh", "gumbel"}, default "clipped"
        Gradient of the sign.
    temperature : float, default 1.0
        Width of "tanh" and "gumbel". An attribute: lower it while training goes on.

    Raises
    ------
    ValueError
        If ``estimator`` is unknown.
    """

    def __init__(self, estimator: str = "clipped", *, temperature: float = 1.0) -> None:
        super().__init__()
        self.estimator = _op.check_choice("estimator", estimator, ("clipped", "tanh", "gumbel"))
        self.temperature = temperature

    def forward(self, x: Tensor) -> Tensor:
        """Binarize ``(..., dim)``: signs in training, uint8 ``(..., ceil(dim / 8))`` otherwise."""
        if self.training:
            return sign_ste(x, self.estimator, temperature=self.temperature)
        return pack_sign(x)

    def extra_repr(self) -> str:
        """Return the settings that ``repr`` shows."""
        return f"estimator={self.estimator!r}, temperature={self.temperature}"
