"""Hashed tables as torch modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from emblas.tables.functions import hash_bag
from emblas.tables.spec import TableSpec


class HashEmbedding(nn.Module):
    """Embedding of ids from an unbounded vocabulary: the sum of ``num_hashes`` rows of a table.

    The layer is thinc's and spaCy's ``HashEmbed``, whose tables load by
    ``weight.data.copy_(torch.from_numpy(model.get_param("E")))`` with the same seed. Two ids share
    a vector only if all their rows coincide, so a table of a few thousand rows tells apart hundreds
    of thousands of ids.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
        Shape of the table.
    num_hashes, hash, seed, allow_degenerate_seed
        How ids become rows; see :class:`emblas.tables.TableSpec`. Layers side by side need
        different seeds.
    padding_id : int, optional
        An id that embeds to zeros and sends no gradient.
    device, dtype : optional
        Of the table.

    Attributes
    ----------
    weight : Parameter
        The table, ``(num_embeddings, embedding_dim)``, drawn from the uniform distribution on
        (-0.1, 0.1).
    spec : TableSpec
        Stored with the state dict (as the bytes of its JSON text, a uint8 tensor). Loading a table
        that was trained with another one raises ValueError: its rows would mean nothing.
    """

    weight: nn.Parameter

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        num_hashes: int = 4,
        hash: str = "murmur3",
        seed: int = 0,
        allow_degenerate_seed: bool = False,
        padding_id: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spec = TableSpec(num_embeddings, num_hashes, hash, seed, allow_degenerate_seed)
        self.padding_id = padding_id
        self.weight = nn.Parameter(
            torch.empty(num_embeddings, embedding_dim, device=device, dtype=dtype)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table anew."""
        nn.init.uniform_(self.weight, -0.1, 0.1)

    def forward(
        self,
        ids: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Embed ids, or the bags of ids that ``offsets`` delimit; see :func:`hash_bag`."""
        return hash_bag(
            ids, self.weight, self.spec, offsets, per_sample_weights, padding_id=self.padding_id
        )

    def get_extra_state(self) -> Tensor:
        """Return the specification as a tensor, which every checkpoint format can hold."""
        return torch.tensor(list(self.spec.to_json().encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Raise ValueError unless the state dict was made with this module's specification."""
        saved = TableSpec.from_json(bytes(state.tolist()).decode())
        if saved != self.spec:
            raise ValueError(f"the state dict holds a table of {saved}, this module is {self.spec}")

    def extra_repr(self) -> str:
        """Return the settings that ``repr`` shows."""
        text = f"{self.spec.num_embeddings}, {self.weight.shape[1]}"
        text += f", num_hashes={self.spec.num_hashes}, hash={self.spec.hash!r}"
        text += f", seed={self.spec.seed}"
        return text if self.padding_id is None else f"{text}, padding_id={self.padding_id}"
