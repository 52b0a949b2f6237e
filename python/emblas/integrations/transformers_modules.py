"""Models whose attention transformers doesn't let others replace: MPNet, and the bias of T5.

>>> from emblas.integrations import transformers as hf, transformers_modules
>>> hf.register()
>>> transformers_modules.replace_modules(model)
>>> hidden = hf.forward_packed(model, input_ids, cu_seqlens)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from emblas.attention import t5_buckets
from emblas.integrations import transformers as hf

try:
    from transformers.models.mpnet import modeling_mpnet
    from transformers.models.t5 import modeling_t5
except ImportError as error:
    raise ImportError(
        "emblas.integrations.transformers_modules needs transformers >= 5: pip install 'emblas[hf]'"
    ) from error


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

    def forward_packed(self, x: Tensor, batch: hf.PackedBatch) -> Tensor:
        """Map embedded tokens ``(1, tokens, hidden)`` to the last hidden states."""
        hidden: Tensor = self(x, attention_mask=batch)[0]
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


_REPLACEMENTS: dict[type, type] = {
    modeling_mpnet.MPNetSelfAttention: MPNetSelfAttention,
    modeling_mpnet.MPNetEncoder: MPNetEncoder,
    modeling_t5.T5Attention: T5Attention,
}


def _refuse(**options: Any) -> None:
    for name, value in options.items():
        if value:
            raise NotImplementedError(f"attn_implementation='emblas' can't take {name}")


def replace_modules(model: nn.Module) -> nn.Module:
    """Put emblas attention into a model that has no way of its own to choose it.

    The attention of MPNet, and the relative bias of T5 encoders, change their class in place:
    parameters, their names and hooks stay. No bias or mask of the size (length, length) is made
    any more. :func:`emblas.integrations.transformers.register` must have been called.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        ``MPNetModel`` or ``T5EncoderModel``, or a model that contains one.

    Returns
    -------
    nn.Module
        ``model`` itself, with ``attn_implementation="emblas"``.

    Raises
    ------
    ValueError
        If nothing in the model can be replaced, or it has a decoder.
    """
    found = [module for module in model.modules() if type(module) in _REPLACEMENTS]
    if not found or any(getattr(module, "is_decoder", False) for module in found):
        raise ValueError(
            f"model must be MPNet or a T5 encoder without a decoder, got {type(model).__name__}"
        )
    for module in found:
        module.__class__ = _REPLACEMENTS[type(module)]
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            config._attn_implementation = hf.NAME
    return model
