"""Latent-attention pooling (NV-Embed) and its inference fold."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from emblas.pooling import op
from emblas.pooling.functions import pooled_spans, token_segments
from emblas.pooling.op import Segments
from emblas.pooling.reference import Mode, accumulator

_BLOCK = 512  # tokens in flight without gradients: at NV-Embed's sizes, 130 MB in float32
_MULTIPLE = 4  # of the feed-forward layer's width


class _LatentPooling(nn.Module):
    """What the module as published and its fold share: all but how tokens see the latents.

    With ``n`` a layer norm, every token ``h`` by itself becomes

        h1 = h + attend(n(h))        h2 = h1 + W2 (a * gelu(b)) + b2,  [a, b] = W1 n'(h1) + b1

    and the result is the mean of ``h2``. ``W2`` is linear, so it follows the mean: one product per
    sequence in place of one per token.
    """

    def __init__(self, hidden_dim: int, output_normalize: bool) -> None:
        super().__init__()
        self.output_normalize = output_normalize
        self.norm = nn.LayerNorm(hidden_dim)
        self.norm_ff = nn.LayerNorm(hidden_dim)
        self.ff_in = nn.Linear(hidden_dim, 2 * _MULTIPLE * hidden_dim)
        self.ff_out = nn.Linear(_MULTIPLE * hidden_dim, hidden_dim)

    def keys_values(self) -> tuple[Tensor, Tensor]:
        """Return what all tokens attend to, ``(heads, latents, width)`` each."""
        raise NotImplementedError

    def attend(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return the attention sublayer of normalized tokens ``(tokens, hidden_dim)``."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        skip_prefix: int | Tensor | None = None,
    ) -> Tensor:
        """Pool hidden states.

        Parameters
        ----------
        x : Tensor
            ``(tokens, hidden_dim)`` with ``cu_seqlens`` or ``(batch, length, hidden_dim)`` with
            ``mask``, in the dtype of the parameters.
        cu_seqlens, mask, skip_prefix
            As in :func:`emblas.pooling.segment_pool`. ``skip_prefix`` leaves the instruction out.

        Returns
        -------
        Tensor
            ``(batch, hidden_dim)``; zeros for sequences without a pooled token.

        Raises
        ------
        TypeError, ValueError
            As in :func:`emblas.pooling.segment_pool`, and where ``x`` doesn't fit the parameters.

        Notes
        -----
        Without gradients, tokens pass through in blocks, so that memory doesn't grow with their
        number. The products are torch's: last bits may depend on what else is in the batch.
        """
        segments = token_segments(x, cu_seqlens, mask, skip_prefix)
        dim, dtype = self.norm.normalized_shape[0], self.ff_in.weight.dtype
        if x.shape[-1] != dim or x.dtype != dtype:
            raise ValueError(
                f"x must have the dimension {dim} and the dtype {dtype} of the parameters, "
                f"got {x.shape[-1]} and {x.dtype}"
            )
        rows = x.flatten(0, -2)
        starts, ends = pooled_spans(segments)

        def add_up(tokens: Tensor, begin: int) -> Tensor:
            """Sum, by sequence, of ``tokens``, which are the rows ``begin`` and on of the batch."""
            end = begin + tokens.shape[0]
            first, last = (bound.clamp(begin, end) - begin for bound in (starts, ends))
            weights = None if segments.weights is None else segments.weights[begin:end]
            return op.segment_pool(Segments(tokens, first, weights, last), Mode.sum, False, True)

        count = add_up(rows.new_ones(rows.shape[0], 1), 0)
        keys, values = self.keys_values()
        sum_hidden = count.new_zeros(count.shape[0], dim)
        sum_gated = count.new_zeros(count.shape[0], self.ff_out.in_features)
        for begin, tokens in self._blocks(rows, count.shape[0]):
            hidden = tokens + self.attend(self.norm(tokens), keys, values)
            a, b = self.ff_in(self.norm_ff(hidden)).chunk(2, -1)
            sum_hidden = sum_hidden + add_up(hidden, begin)
            sum_gated = sum_gated + add_up(a * functional.gelu(b), begin)
        shares = 1 / count.clamp_min(1)
        pooled = shares * sum_hidden + self.ff_out((shares * sum_gated).to(dtype))
        pooled = torch.where(count > 0, pooled, 0)
        return (functional.normalize(pooled) if self.output_normalize else pooled).to(dtype)

    def _blocks(self, rows: Tensor, batch: int) -> Iterator[tuple[int, Tensor]]:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            yield 0, rows  # autograd keeps everything anyway
            return
        # Each block adds a row for every sequence, which must stay small beside the work in it.
        size = max(_BLOCK, batch)
        for begin in range(0, rows.shape[0], size):
            yield begin, rows[begin : begin + size]


class LatentAttentionPooling(_LatentPooling):
    """Latent-attention pooling (NV-Embed, arXiv 2405.17428, section 3.1), as the model defines it.

    Every token attends to learned latents, which no mask concerns; a gated feed-forward layer
    follows, then the mean. The arguments are those of the model's public configuration;
    :data:`emblas.pooling.key_maps.NV_EMBED` renames its state dict. For inference, :meth:`fold`
    makes an equal module that is several times cheaper.

    Parameters
    ----------
    num_latents_value : int, default 512
        Number of latents.
    num_cross_heads : int, default 8
        Attention heads.
    output_normalize : bool, default True
        Return vectors of unit length.
    hidden_dim : int, default 4096
        Dimension of the tokens and of the result.
    latent_dim : int, default 4096
        Dimension of the latents; the residual connections need ``hidden_dim``.
    cross_dim_head : int, default 4096
        Width of a head.

    Raises
    ------
    ValueError
        If ``latent_dim`` isn't ``hidden_dim``.
    """

    def __init__(
        self,
        num_latents_value: int = 512,
        num_cross_heads: int = 8,
        output_normalize: bool = True,
        hidden_dim: int = 4096,
        latent_dim: int = 4096,
        cross_dim_head: int = 4096,
    ) -> None:
        super().__init__(hidden_dim, output_normalize)
        if latent_dim != hidden_dim:
            raise ValueError(f"latent_dim must be hidden_dim, {hidden_dim}, got {latent_dim}")
        inner = num_cross_heads * cross_dim_head
        self.num_cross_heads = num_cross_heads
        self.latents = nn.Parameter(torch.randn(num_latents_value, latent_dim))
        self.norm_context = nn.LayerNorm(latent_dim)
        self.to_q = nn.Linear(hidden_dim, inner, bias=False)
        self.to_kv = nn.Linear(latent_dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, hidden_dim, bias=False)

    def keys_values(self) -> tuple[Tensor, Tensor]:
        """Return what all tokens attend to, ``(heads, latents, width)`` each."""
        keys, values = self.to_kv(self.norm_context(self.latents)).chunk(2, -1)
        return self._heads(keys), self._heads(values)

    def attend(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return the attention sublayer of normalized tokens ``(tokens, hidden_dim)``."""
        out = functional.scaled_dot_product_attention(self._heads(self.to_q(x)), keys, values)
        return self.to_out(out.transpose(0, 1).flatten(1))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.num_cross_heads, -1)).transpose(0, 1)

    @torch.no_grad()
    def fold(self) -> FoldedLatentAttentionPooling:
        """Return an equal module for inference, without the wide heads.

        Latents don't depend on the tokens, so each head's query projection can be multiplied into
        its keys, and its output projection into its values, once. A token's attention then costs
        ``4 heads latents hidden_dim`` flops, in place of ``4 heads latents cross_dim_head`` and
        ``4 heads cross_dim_head hidden_dim`` more for the projections: a ninth at the published
        sizes. Results differ by rounding, below 1e-5 in float32. Norms and feed-forward layers are
        shared with this module, not copied; later changes of the projections or latents are not
        seen.
        """
        dtype, heads = self.to_q.weight.dtype, self.num_cross_heads
        keys, values = (part.to(accumulator(dtype)) for part in self.keys_values())
        w_q = self.to_q.weight.to(keys.dtype).unflatten(0, (heads, -1))
        w_out = self.to_out.weight.to(keys.dtype).unflatten(1, (heads, -1))
        with torch.device("meta"):  # nothing of it stays
            folded = FoldedLatentAttentionPooling(
                keys.shape[1], heads, self.output_normalize, w_q.shape[2]
            )
        folded.norm, folded.norm_ff = self.norm, self.norm_ff
        folded.ff_in, folded.ff_out = self.ff_in, self.ff_out
        folded.keys = nn.Parameter((keys.shape[2] ** -0.5 * (keys @ w_q)).to(dtype))
        folded.values = nn.Parameter((values @ w_out.permute(1, 2, 0)).to(dtype))
        return folded.train(self.training)


class FoldedLatentAttentionPooling(_LatentPooling):
    """What :meth:`LatentAttentionPooling.fold` returns.

    Parameters
    ----------
    num_latents_value, num_cross_heads, output_normalize, hidden_dim
        As in :class:`LatentAttentionPooling`; to load the state dict of a folded module.
    """

    def __init__(
        self,
        num_latents_value: int = 512,
        num_cross_heads: int = 8,
        output_normalize: bool = True,
        hidden_dim: int = 4096,
    ) -> None:
        super().__init__(hidden_dim, output_normalize)
        shape = num_cross_heads, num_latents_value, hidden_dim
        self.keys = nn.Parameter(torch.randn(shape) / hidden_dim)
        self.values = nn.Parameter(torch.randn(shape) / hidden_dim)

    def keys_values(self) -> tuple[Tensor, Tensor]:
        """Return what all tokens attend to, ``(heads, latents, hidden_dim)`` each."""
        return self.keys, self.values

    def attend(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return the attention sublayer of normalized tokens ``(tokens, hidden_dim)``."""
        scores = functional.linear(x, keys.flatten(0, 1)).unflatten(1, keys.shape[:2])
        return scores.softmax(2).flatten(1) @ values.flatten(0, 1)
