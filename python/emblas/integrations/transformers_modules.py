"""Models whose attention transformers doesn't let others replace: DeBERTa-v2 and v3, MPNet, T5.

>>> from emblas.integrations import transformers as hf, transformers_modules
>>> hf.register()
>>> transformers_modules.replace_modules(model)
>>> hidden = hf.forward_packed(model, input_ids, cu_seqlens)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from emblas.attention import deberta_buckets, t5_buckets
from emblas.integrations import transformers as hf
from emblas.integrations import versions

try:
    from transformers.modeling_outputs import BaseModelOutput
    from transformers.models.deberta_v2 import modeling_deberta_v2
    from transformers.models.mpnet import modeling_mpnet
    from transformers.models.t5 import modeling_t5
    from transformers.utils.generic import ModelOutput
except ImportError as error:
    raise versions.import_error(__name__, "transformers", error) from error


class MPNetSelfAttention(modeling_mpnet.MPNetSelfAttention):
    """Self-attention of MPNet through emblas."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: hf.PaddedBatch | hf.PackedBatch | None = None,
        position_bias: hf.RelativeBias | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor]:
        """Attend within each sequence; there are no probabilities to return."""
        _refuse(output_attentions=output_attentions)
        q, k, v = (
            project(hidden_states).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
            for project in (self.q, self.k, self.v)
        )
        dropout = self.dropout.p if self.training else 0.0
        out, _ = hf.attend(
            self, q, k, v, attention_mask, dropout, is_causal=False, position_bias=position_bias
        )
        return (self.o(out.flatten(2)),)


class MPNetEncoder(modeling_mpnet.MPNetEncoder, hf.PackedEncoder):
    """Encoder of MPNet whose relative bias is a table."""

    def compute_position_bias(
        self, x: Tensor, position_ids: Tensor | None = None, num_buckets: int = 32
    ) -> hf.RelativeBias:
        """Return the bias by distance; distances within a sequence need no positions."""
        table = self.relative_attention_bias.weight
        return hf.RelativeBias(table.t(), t5_buckets(num_buckets).to(table.device))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,  # PaddedBatch, PackedBatch or None
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Run the layers on tokens only, whether they come padded or packed."""
        if not isinstance(attention_mask, hf.PaddedBatch):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        batch, shape = attention_mask, hidden_states.shape[:2]
        batch.check_without_holes()
        inside: Any = hf.PackedBatch(batch.cu_seqlens, batch.max_seqlen)
        outputs = super().forward(batch.take(hidden_states), inside, *args, **kwargs)
        return _spread(outputs, batch, shape)

    def forward_packed(self, x: Tensor, batch: hf.PackedBatch) -> Tensor:
        """Map embedded tokens ``(1, tokens, hidden)`` to the last hidden states."""
        hidden: Tensor = self(x, batch)[0]
        return hidden


class T5Attention(modeling_t5.T5Attention):
    """Attention of T5 whose relative bias is a table, which the layers hand on."""

    def compute_bias(
        self,
        query_length: int,
        key_length: int,
        device: Any = None,
        past_seen_tokens: int = 0,
    ) -> hf.RelativeBias:
        """Return the bias by distance; queries are aligned with the last keys."""
        lookup = t5_buckets(
            self.relative_attention_num_buckets,
            self.relative_attention_max_distance,
            bidirectional=not self.is_decoder,
        )
        table = self.relative_attention_bias.weight
        return hf.RelativeBias(table.t(), lookup.to(table.device))


class DebertaV2SelfAttention(modeling_deberta_v2.DisentangledSelfAttention):
    """Disentangled self-attention of DeBERTa-v2 and v3 through emblas."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: hf.PaddedBatch | hf.PackedBatch,
        output_attentions: bool = False,
        query_states: Tensor | None = None,
        relative_pos: Tensor | None = None,
        rel_embeddings: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Attend within each sequence; ``relative_pos`` is the lookup of the position vectors."""
        _refuse(output_attentions=output_attentions, query_states=query_states is not None)
        q, k, v = (
            self._heads(project(hidden_states)).transpose(1, 2)
            for project in (self.query_proj, self.key_proj, self.value_proj)
        )
        kinds = sum(kind in self.pos_att_type for kind in ("c2p", "p2c"))
        out, _ = hf.attend(
            self,
            q,
            k,
            v,
            attention_mask,
            self.dropout.p if self.training else 0.0,
            scaling=(self.attention_head_size * (1 + kinds)) ** -0.5,
            is_causal=False,
            position_bias=self._position_vectors(rel_embeddings, relative_pos),
        )
        return out.flatten(2), None

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_attention_heads, -1))

    def _position_vectors(
        self, rel_embeddings: Tensor | None, lookup: Tensor | None
    ) -> hf.DisentangledBias | None:
        if not self.relative_attention or rel_embeddings is None or lookup is None:
            return None
        embeddings = self.pos_dropout(rel_embeddings[: 2 * self.pos_ebd_size])
        keys = queries = None
        if "c2p" in self.pos_att_type:
            project = self.key_proj if self.share_att_key else self.pos_key_proj
            keys = self._heads(project(embeddings))
        if "p2c" in self.pos_att_type:
            project = self.query_proj if self.share_att_key else self.pos_query_proj
            queries = self._heads(project(embeddings))
        return hf.DisentangledBias(keys, queries, lookup)


class DebertaV2Encoder(modeling_deberta_v2.DebertaV2Encoder, hf.PackedEncoder):
    """Encoder of DeBERTa-v2 and v3 without a mask or positions for each pair of tokens."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        output_hidden_states: bool = True,
        output_attentions: bool = False,
        query_states: Tensor | None = None,
        relative_pos: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Run the layers on the tokens of a padded batch with a mask ``(batch, length)``."""
        _refuse(
            output_attentions=output_attentions,
            query_states=query_states is not None,
            relative_pos=relative_pos is not None,
        )
        batch, shape = hf.padded_batch(attention_mask.bool()), hidden_states.shape[:2]
        if self.relative_attention or self.conv is not None:
            batch.check_without_holes()
        inside = hf.PackedBatch(batch.cu_seqlens, batch.max_seqlen)
        states = self._states(batch.take(hidden_states), inside)
        if output_hidden_states:
            every = (hidden_states, *(batch.spread(state, shape) for state in states))
            last = every[-1]
        else:
            every = None
            *_, packed = states
            last = batch.spread(packed, shape)
        if not return_dict:
            return (last,) if every is None else (last, every)
        return BaseModelOutput(last_hidden_state=last, hidden_states=every)

    def forward_packed(self, x: Tensor, batch: hf.PackedBatch) -> Tensor:
        """Map embedded tokens ``(1, tokens, hidden)`` to the last hidden states."""
        *_, last = self._states(x, batch)
        return last

    def _states(self, x: Tensor, batch: hf.PackedBatch) -> Iterator[Tensor]:
        """Yield the hidden states ``(1, tokens, hidden)`` of one layer after the other."""
        embedded, lookup = x, None
        if self.relative_attention:
            # By distance, in the place of a position for each pair of tokens.
            lookup = deberta_buckets(self.position_buckets, self.max_relative_positions)
            lookup = lookup.to(x.device)
        embeddings = self.get_rel_embedding()
        for i, layer in enumerate(self.layer):
            x, _ = layer(x, batch, relative_pos=lookup, rel_embeddings=embeddings)
            if i == 0 and self.conv is not None:
                x = self._convolve(embedded, x, batch)
            yield x

    def _convolve(self, embedded: Tensor, x: Tensor, batch: hf.PackedBatch) -> Tensor:
        """Run the convolution over a padded copy: its window ends where a sequence does."""
        lengths = batch.cu_seqlens.diff()
        mask = torch.arange(batch.max_seqlen, device=x.device) < lengths[:, None]
        rows = mask.flatten().nonzero().squeeze(1)

        def pad(tokens: Tensor) -> Tensor:
            padded = tokens.new_zeros(mask.numel(), tokens.shape[-1])
            return padded.index_copy(0, rows, tokens[0]).unflatten(0, mask.shape)

        convolve: Any = self.conv
        return convolve(pad(embedded), pad(x), mask.long()).flatten(0, 1)[rows][None]


_REPLACEMENTS: dict[type, type] = {
    modeling_deberta_v2.DisentangledSelfAttention: DebertaV2SelfAttention,
    modeling_deberta_v2.DebertaV2Encoder: DebertaV2Encoder,
    modeling_mpnet.MPNetSelfAttention: MPNetSelfAttention,
    modeling_mpnet.MPNetEncoder: MPNetEncoder,
    modeling_t5.T5Attention: T5Attention,
}


def _spread(value: Any, batch: hf.PaddedBatch, shape: Sequence[int]) -> Any:
    """Put the padding back into a layer's outputs, whatever holds them."""
    if isinstance(value, Tensor):
        return batch.spread(value, shape)
    if isinstance(value, ModelOutput):
        for name, part in value.items():
            value[name] = _spread(part, batch, shape)
        return value
    return tuple(_spread(part, batch, shape) for part in value)


def _refuse(**options: Any) -> None:
    for name, value in options.items():
        if value:
            raise NotImplementedError(f"attn_implementation='emblas' can't take {name}")


def replaceable(model: nn.Module) -> list[nn.Module]:
    """Return the modules of a model that :func:`replace_modules` changes."""
    return [module for module in model.modules() if type(module) in _REPLACEMENTS]


def replace_modules(model: nn.Module) -> nn.Module:
    """Put emblas attention into a model that has no way of its own to choose it.

    The attention of DeBERTa-v2 (and v3) and MPNet, and the relative bias of T5 encoders, change
    their class in place: parameters, their names and hooks stay. No bias, mask or table of
    positions of the size (length, length) is made any more.
    :func:`emblas.integrations.transformers.register` must have been called.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        ``DebertaV2Model``, ``MPNetModel`` or ``T5EncoderModel``, or a model that contains one.

    Returns
    -------
    nn.Module
        ``model`` itself, with ``attn_implementation="emblas"``.

    Raises
    ------
    ValueError
        If nothing in the model can be replaced, or it has a decoder.
    """
    found = replaceable(model)
    if not found or any(getattr(module, "is_decoder", False) for module in found):
        raise ValueError(
            "model must be DeBERTa-v2, MPNet or a T5 encoder without a decoder, "
            f"got {type(model).__name__}"
        )
    for module in found:
        module.__class__ = _REPLACEMENTS[type(module)]
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hf.implementation(config) != hf.NAME:
            config._attn_implementation = hf.NAME
    return model
