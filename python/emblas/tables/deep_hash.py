"""Embeddings from codes that nothing stores: a network's output, or the codes themselves."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from emblas import _op
from emblas.tables.base import VocabularyEmbedding, check_at_least
from emblas.tables.codes import CodeSpec, random_codes

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "mish": nn.Mish}


class DeepHashEmbedding(VocabularyEmbedding):
    """DHE: a network computes the vector of an id from a long code of hashes; there is no table.

    Kang et al. (2021), "Learning to Embed Categorical Features without Embedding Tables for
    Recommendation". Any 64-bit id has a vector. The code's numbers are Philox words (see
    :func:`random_codes`) where the paper takes universal hashes, whose constants it must store.
    There is no batch normalization, which would let an id's vector depend on its batch. Each
    distinct id of a batch is computed once.

    Parameters
    ----------
    embedding_dim : int
        Width of the vectors.
    width : int, default 64
        Of the hidden layers.
    code_dim : int, default 1024
        Numbers of a code; the paper's k.
    num_layers : int, default 5
        Hidden layers, at least 1; the paper's best has five.
    kind : {"uniform", "normal"}, default "uniform"
        Distribution of the codes.
    activation : {"relu", "mish"}, default "mish"
    seed : int, default 0
        Of the codes.
    padding_id, device, dtype : optional
        As for :class:`HashEmbedding`.

    Attributes
    ----------
    layers : Sequential
        ``num_layers`` times a linear layer and the activation, and a last linear layer.
    """

    _specified = ("embedding_dim", "width", "code_dim", "num_layers", "kind", "activation", "seed")
    _size_argument = "width"

    def __init__(
        self,
        embedding_dim: int,
        width: int = 64,
        *,
        code_dim: int = 1024,
        num_layers: int = 5,
        kind: str = "uniform",
        activation: str = "mish",
        seed: int = 0,
        padding_id: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(None, embedding_dim, padding_id=padding_id)
        check_at_least(1, width=width, code_dim=code_dim, num_layers=num_layers)
        _op.check_choice("kind", kind, ("uniform", "normal"))
        _op.check_choice("activation", activation, tuple(ACTIVATIONS))
        self.codes = CodeSpec(kind, seed)
        self.width, self.code_dim, self.num_layers = width, code_dim, num_layers
        self.kind, self.activation, self.seed = kind, activation, seed
        layers: list[nn.Module] = []
        for number in range(num_layers):
            before = width if number else code_dim
            layers += [nn.Linear(before, width, device=device, dtype=dtype)]
            layers += [ACTIVATIONS[activation]()]
        layers += [nn.Linear(width, embedding_dim, device=device, dtype=dtype)]
        self.layers = nn.Sequential(*layers)

    def vectors(self, ids: Tensor) -> Tensor:
        """Embed distinct ids, int64 ``(ids,)``, as ``(ids, embedding_dim)``."""
        dtype = next(self.parameters()).dtype
        return self.layers(random_codes(ids, self.code_dim, self.codes, dtype=dtype))


class LexinvariantEmbedding(nn.Module):
    """Random vectors that a token keeps inside a sequence only: a model can't learn any token.

    Huang et al. (2023), "Lexinvariant Language Models": token ``t`` of sequence ``s`` embeds as
    ``scale`` times standard normal numbers that depend on ``t`` and ``s``. Nothing is stored or
    trained; the output layer of the same model scores tokens by :meth:`scores`.

    Parameters
    ----------
    embedding_dim : int
    scale : float, optional
        Default ``embedding_dim ** -0.5``: vectors of length about 1.
    seed : int, default 0
        0 to 2^64 - 1.
    dtype : torch.dtype, default float32
    """

    def __init__(
        self,
        embedding_dim: int,
        *,
        scale: float | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        check_at_least(1, embedding_dim=embedding_dim)
        self.embedding_dim = embedding_dim
        self.scale = embedding_dim**-0.5 if scale is None else scale
        self.spec = CodeSpec("normal", seed)
        self.dtype = dtype

    def forward(self, ids: Tensor, sequences: Tensor) -> Tensor:
        """Embed ids.

        Parameters
        ----------
        ids : Tensor
            int64 or uint64 of any shape.
        sequences : Tensor
            int64, 0 to 2^32 - 1: which sequence an id stands in, of a shape that broadcasts to
            that of ``ids``; ``(batch, 1)`` for ids ``(batch, length)``. A number that never comes
            again, such as a count over all batches, gives each sequence vectors of its own.

        Returns
        -------
        Tensor
            ``(*ids.shape, embedding_dim)``.
        """
        codes = random_codes(
            ids, self.embedding_dim, self.spec, sequence=sequences, dtype=self.dtype
        )
        return self.scale * codes

    def scores(self, hidden: Tensor, vocabulary: Tensor, sequences: Tensor) -> Tensor:
        """Score a vocabulary's ids by inner products with their vectors in each sequence.

        Parameters
        ----------
        hidden : Tensor
            ``(batch, length, embedding_dim)``.
        vocabulary : Tensor
            int64 ``(ids,)``.
        sequences : Tensor
            int64 ``(batch,)``.

        Returns
        -------
        Tensor
            ``(batch, length, ids)``.
        """
        ids = vocabulary.expand(len(sequences), -1)
        return hidden @ self(ids, sequences[:, None]).to(hidden.dtype).transpose(1, 2)
