"""Sharing one table between two networks without their gradients pulling at each other."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GradientDisentangledEmbedding(nn.Module):
    """GDES: another network's embedding, held fast, plus a difference of one's own.

    He, Gao and Chen (2023), "DeBERTaV3: Improving DeBERTa using ELECTRA-Style Pre-Training with
    Gradient-Disentangled Embedding Sharing": the discriminator embeds with ``sg(E_G) + E_delta``.
    The generator's table ``E_G`` learns from the generator alone, the difference from the
    discriminator alone.

    Parameters
    ----------
    shared : Module
        The other network's embedding, called with the same arguments. Not a submodule of this one:
        its parameters belong to the other network.
    difference : Module
        An embedding of the same width with a table ``weight`` that vectors are linear in, which is
        set to zero.

    Raises
    ------
    TypeError
        If ``difference`` has no table, or multiplies its rows: a product of zeros never learns.
    """

    def __init__(self, shared: nn.Module, difference: nn.Module) -> None:
        super().__init__()
        weight = getattr(difference, "weight", None)
        composition = getattr(difference, "composition", None)
        if not isinstance(weight, nn.Parameter) or getattr(composition, "combine", "") == "product":
            raise TypeError(
                "difference must be an embedding with a table `weight` of which rows are summed, "
                f"got {type(difference).__name__}"
            )
        self._shared = (shared,)  # a tuple hides it from torch's registration
        self.difference = difference
        nn.init.zeros_(weight)

    @property
    def shared(self) -> nn.Module:
        """The other network's embedding."""
        return self._shared[0]

    def forward(self, *args: Tensor, **kwargs: object) -> Tensor:
        """Embed with both modules and add; gradients go to the difference."""
        with torch.no_grad():
            fixed = self.shared(*args, **kwargs)
        return fixed + self.difference(*args, **kwargs)
