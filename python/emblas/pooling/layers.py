"""Pooling over the layers of a model, whose token vectors are never kept together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from emblas import _op


@contextmanager
def pooled_outputs(
    modules: Iterable[nn.Module], pool: Callable[[Tensor], Tensor]
) -> Iterator[list[Tensor]]:
    """Pool what modules return while a model runs, and keep nothing else of it.

    A model that hands out the token vectors of all layers holds ``layers`` times the memory of one.
    Inside this context each is pooled as soon as its layer is done.

    Parameters
    ----------
    modules : iterable of Module
        For example the layers of a model, or the routers of its experts;
        :mod:`emblas.integrations.transformers` finds both.
    pool : callable
        Takes the output of a module (its first part, if it has several), returns the tensor to
        keep.

    Yields
    ------
    list of Tensor
        Grows by one tensor with each call of one of the modules, in the order of the calls.

    Examples
    --------
    >>> with pooled_outputs(model.layers, lambda x: segment_pool(x, mask=mask)) as vectors:
    ...     model(input_ids, mask)
    >>> torch.stack(vectors, 1).shape  # (batch, layers, dim)
    """
    pooled: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        pooled.append(pool(output if isinstance(output, Tensor) else output[0]))

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield pooled
    finally:
        for handle in handles:
            handle.remove()


class LayerPooling(nn.Module):
    """Trainable pooling over layers (arXiv 2409.02727, multi-layers trainable pooling).

    Learned latents attend to one pooled vector per layer of a model; a gated feed-forward layer
    follows, then the mean over the latents. The arguments are those of the authors' module, whose
    state dict :data:`emblas.pooling.key_maps.MULTI_LAYER` renames. Take the vectors of the layers
    with :func:`pooled_outputs`.

    The output projection comes before the sum over the layers and the last linear layer after the
    mean, which changes rounding only and spares most of the work: there are fewer layers than
    latents.

    Parameters
    ----------
    hidden_dim : int, default 4096
        Dimension of the vectors and of the result.
    latent_dim : int, default 4096
        Dimension of the latents; must be ``hidden_dim``.
    cross_dim_head : int, default 2048
        Width of a head.
    num_cross_heads : int, default 32
        Attention heads.
    num_latents_value : int, default 768
        Number of latents.
    layers : int, default 32
        Number of layers, each of which has a learned vector of its own.
    output_normalize : bool, default True
        Return vectors of unit length.

    Raises
    ------
    ValueError
        If ``latent_dim`` isn't ``hidden_dim``.
    """

    def __init__(
        self,
        hidden_dim: int = 4096,
        latent_dim: int = 4096,
        cross_dim_head: int = 2048,
        num_cross_heads: int = 32,
        num_latents_value: int = 768,
        layers: int = 32,
        output_normalize: bool = True,
    ) -> None:
        super().__init__()
        if latent_dim != hidden_dim:
            raise ValueError(f"latent_dim must be hidden_dim, {hidden_dim}, got {latent_dim}")
        inner = num_cross_heads * cross_dim_head
        self.num_cross_heads = num_cross_heads
        self.output_normalize = output_normalize
        self.latents = nn.Parameter(torch.randn(num_latents_value, latent_dim))
        self.layer_embedding = nn.Embedding(layers, hidden_dim)
        self.norm = nn.LayerNorm(hidden_dim)
        self.norm_context = nn.LayerNorm(latent_dim)
        self.to_q = nn.Linear(latent_dim, inner, bias=False)
        self.to_kv = nn.Linear(hidden_dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, latent_dim, bias=False)
        self.norm_ff = nn.LayerNorm(latent_dim)
        self.ff_in = nn.Linear(latent_dim, 8 * latent_dim)
        self.ff_out = nn.Linear(4 * latent_dim, latent_dim)

    def forward(self, vectors: Tensor) -> Tensor:
        """Return ``(batch, hidden_dim)`` for ``vectors`` (batch, layers, hidden_dim)."""
        check_layers(vectors, *self.layer_embedding.weight.shape)
        heads = (self.num_cross_heads, -1)
        keys, values = self.to_kv(self.norm(vectors + self.layer_embedding.weight)).chunk(2, -1)
        # Projected to the output by its head before it is added up over the layers.
        values = torch.einsum(
            "bnhd,ohd->bhno", values.unflatten(2, heads), self.to_out.weight.unflatten(1, heads)
        )
        queries = self.to_q(self.norm_context(self.latents)).unflatten(1, heads)
        scores = torch.einsum("mhd,bnhd->bmhn", queries, keys.unflatten(2, heads))
        shares = (scores * queries.shape[2] ** -0.5).softmax(3)
        hidden = self.latents + shares.flatten(2) @ values.flatten(1, 2)
        a, b = self.ff_in(self.norm_ff(hidden)).chunk(2, -1)
        pooled = hidden.mean(1) + self.ff_out((a * functional.gelu(b)).mean(1))
        return functional.normalize(pooled) if self.output_normalize else pooled


class WeightedLayerPooling(nn.Module):
    """Mean over the last layers of a model with learned weights.

    The module of that name in sentence-transformers, whose ``layer_weights`` it loads, adds up the
    token vectors of all layers and pools then; here they are pooled first (in a linear mode that is
    the same), by :func:`pooled_outputs`.

    Parameters
    ----------
    num_hidden_layers : int, default 12
        Layers of the model.
    layer_start : int, default 4
        The first of the layers taken, counted from 1; 0 stands for the input embeddings.

    Raises
    ------
    ValueError
        If ``layer_start`` is not a layer.
    """

    def __init__(self, num_hidden_layers: int = 12, layer_start: int = 4) -> None:
        super().__init__()
        if not 0 <= layer_start <= num_hidden_layers:
            raise ValueError(
                f"layer_start must be between 0 and {num_hidden_layers}, got {layer_start}"
            )
        self.layer_weights = nn.Parameter(torch.ones(num_hidden_layers + 1 - layer_start))

    def forward(self, vectors: Tensor) -> Tensor:
        """Return ``(batch, dim)`` for ``vectors`` (batch, layers from layer_start on, dim)."""
        check_layers(vectors, self.layer_weights.shape[0])
        weights = self.layer_weights.to(vectors.dtype)
        return torch.einsum("n,bnd->bd", weights / weights.sum(), vectors)


def check_layers(vectors: Tensor, layers: int, dim: int | None = None) -> None:
    """Raise unless ``vectors`` are one for each of ``layers``, of dimension ``dim`` if given."""
    _op.check_tensor("vectors", vectors, ndim=3, dtypes=_op.FLOATS)
    if vectors.shape[1] != layers or dim not in (None, vectors.shape[2]):
        raise ValueError(
            f"vectors must have the shape (batch, {layers}, {'dim' if dim is None else dim}), "
            f"got {tuple(vectors.shape)}"
        )
