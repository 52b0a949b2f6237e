"""Pooling as torch modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from emblas.pooling import op
from emblas.pooling.epilogue import Epilogue, check_dims, split
from emblas.pooling.functions import check_modes, segment_pool
from emblas.pooling.learned import SparseRows, attention_pool, lexical_weights, vocab_pool


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


class AttentionPooling(nn.Module):
    """Pooling by multi-head attention (PMA of the Set Transformer, arXiv 1810.00825, section 3.2).

    ``O = S + heads(S, x)``, then ``O + relu(fc_o(O))``, with ``S`` the learned seeds; scores are
    divided by the root of the whole width, as in the authors' code. The key projection is folded
    into the seeds and the value projection follows the sum, so tokens are read once and never
    projected. :data:`emblas.pooling.key_maps.PMA` renames the state dict of C2LLM's module.

    Parameters
    ----------
    dim : int
        Dimension of the tokens.
    num_heads : int
        Heads; a divisor of the width of the output.
    num_seeds : int, default 1
        Vectors per sequence.
    compress_dim : int, optional
        Width of the output; default ``dim``.
    ln : bool, default False
        Normalize layers after either step.

    Raises
    ------
    ValueError
        If ``num_heads`` doesn't divide ``compress_dim``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_seeds: int = 1,
        compress_dim: int | None = None,
        *,
        ln: bool = False,
    ) -> None:
        super().__init__()
        compress_dim = compress_dim or dim
        if compress_dim % num_heads:
            raise ValueError(f"num_heads must divide compress_dim {compress_dim}, got {num_heads}")
        self.num_heads = num_heads
        self.S = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, num_seeds, compress_dim)))
        self.fc_q = nn.Linear(compress_dim, compress_dim)
        self.fc_k = nn.Linear(dim, compress_dim)
        self.fc_v = nn.Linear(dim, compress_dim)
        self.fc_o = nn.Linear(compress_dim, compress_dim)
        self.ln0 = nn.LayerNorm(compress_dim) if ln else nn.Identity()
        self.ln1 = nn.LayerNorm(compress_dim) if ln else nn.Identity()

    def forward(
        self, x: Tensor, cu_seqlens: Tensor | None = None, *, mask: Tensor | None = None
    ) -> Tensor:
        """Return ``(batch, num_seeds, compress_dim)``; zeros for sequences without tokens."""
        seeds, heads = self.S[0], self.num_heads
        q = self.fc_q(seeds).unflatten(1, (heads, -1))
        keys = self.fc_k.weight.unflatten(0, (heads, -1))
        # The bias of the keys adds the same to all scores of a query: softmax cancels it.
        queries = torch.einsum("khd,hdi->khi", q, keys).flatten(0, 1)
        scale = seeds.shape[1] ** -0.5
        pooled = attention_pool(x, queries, cu_seqlens, mask=mask, scale=scale)
        pooled = pooled.to(seeds.dtype).unflatten(1, (len(seeds), heads))
        values = self.fc_v.weight.unflatten(0, (heads, -1))
        out = torch.einsum("bkhi,hdi->bkhd", pooled, values).flatten(2) + self.fc_v.bias
        out = self.ln0(seeds + out)
        out = self.ln1(out + self.fc_o(out).relu())
        if mask is not None:
            present = (mask != 0).any(1)
        else:
            assert cu_seqlens is not None
            present = cu_seqlens.diff() > 0
        return torch.where(present[:, None, None], out, 0)


class SpladePooling(nn.Module):
    """SPLADE vectors from hidden states; see :func:`emblas.pooling.vocab_pool`.

    Parameters
    ----------
    decoder : Linear
        The output layer of a masked language model, shared, not copied. What the model's head does
        before it (transform, norm) is the caller's.
    activation, mode, top_n
        As in :func:`emblas.pooling.vocab_pool`.
    """

    def __init__(
        self,
        decoder: nn.Linear,
        activation: str | None = "log1p_relu",
        *,
        mode: str = "max",
        top_n: int | None = None,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.activation = activation
        self.mode = mode
        self.top_n = top_n

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        skip_prefix: int | Tensor | None = None,
    ) -> Any:
        """Return ``(batch, vocabulary)``, or with ``top_n`` its largest values."""
        return vocab_pool(
            x,
            self.decoder.weight,
            self.decoder.bias,
            cu_seqlens,
            mask=mask,
            mode=self.mode,
            activation=self.activation,
            skip_prefix=skip_prefix,
            top_n=self.top_n,
        )


class LexicalWeights(nn.Module):
    """The sparse head of BGE-M3 (arXiv 2402.03216); see :func:`emblas.pooling.lexical_weights`.

    Parameters
    ----------
    dim : int
        Dimension of the tokens.
    ignored_ids : sequence of int, optional
        Ids of special tokens, which get no weight.
    """

    def __init__(self, dim: int, ignored_ids: Sequence[int] = ()) -> None:
        super().__init__()
        self.sparse_linear = nn.Linear(dim, 1)
        self.ignored_ids = tuple(ignored_ids)

    def forward(
        self,
        x: Tensor,
        token_ids: Tensor,
        cu_seqlens: Tensor | None = None,
        *,
        mask: Tensor | None = None,
    ) -> SparseRows:
        """Weigh the tokens ``x`` (tokens, dim) or (batch, length, dim) with ids ``token_ids``."""
        weights = self.sparse_linear(x).squeeze(-1).relu()
        return lexical_weights(
            token_ids, weights, cu_seqlens, mask=mask, ignored_ids=self.ignored_ids
        )
