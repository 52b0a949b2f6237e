"""The last layer for the tokens alone that a sequence is pooled by.

>>> from emblas.attention import pooled_tokens
>>> from emblas.integrations.last_layer import forward_rows
>>> vectors = forward_rows(model, input_ids, cu_seqlens, pooled_tokens(cu_seqlens, "cls"))

Keys and values come from all tokens; queries, the projection behind attention and the MLP of the
last layer are computed for the chosen ones only, which saves most of that layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from emblas.attention import attend_rows, rotary
from emblas.integrations import transformers as hf

try:
    from transformers.models.bert.modeling_bert import BertLayer
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer
    from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
    from transformers.models.nomic_bert.modeling_nomic_bert import NomicBertLayer
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
    from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer
    from transformers.models.roberta.modeling_roberta import RobertaLayer
    from transformers.models.xlm_roberta.modeling_xlm_roberta import XLMRobertaLayer
except ImportError as error:
    raise ImportError(
        "emblas.integrations.last_layer needs transformers >= 5: pip install 'emblas[hf]'"
    ) from error


class _Chosen:
    """The tokens ``rows`` of a packed batch, in one layer."""

    def __init__(self, rows: Tensor, attention: Any, options: dict[str, Any]) -> None:
        self.index = rows.clamp_min(0)
        self.rows = rows
        self.scale: float = attention.scaling
        self.batch = options["cu_seq_lens_q"], options["max_length_q"]
        causal: bool | None = options.get("is_causal")
        self.causal: bool = attention.is_causal if causal is None else causal

    def attend(self, q: Tensor, k: Tensor, v: Tensor, sliding_window: int | None = None) -> Tensor:
        """Attend from the queries of the chosen tokens; heads side by side."""
        radius = -1 if sliding_window is None else sliding_window - 1
        out = attend_rows(
            q, k, v, *self.batch, self.rows, self.scale, self.causal, (radius, radius)
        )
        return out.flatten(1)

    def attend_rotary(self, attention: Any, x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
        """Attend with the projections of all tokens x, turned by their positions."""

        def heads(projected: Tensor, name: str) -> Tensor:
            projected = projected.unflatten(-1, (-1, attention.head_dim))
            norm: nn.Module | None = getattr(attention, name, None)
            return projected if norm is None else norm(projected)

        q = heads(attention.q_proj(x[self.index]), "q_norm")
        k = heads(attention.k_proj(x), "k_norm")
        v = attention.v_proj(x).unflatten(-1, (-1, attention.head_dim))
        # transformers holds each number twice, for both elements of a pair.
        cos, sin = (table[0, :, : table.shape[-1] // 2] for table in cos_sin)
        q, k = rotary(q, cos[self.index], sin[self.index]), rotary(k, cos, sin)
        projected: Tensor = attention.o_proj(self.attend(q, k, v, _sliding_window(attention)))
        return projected


def _sliding_window(attention: Any) -> int | None:
    """Return how many tokens a layer sees, itself counted; None: all."""
    if hasattr(attention, "sliding_window"):
        window: int | None = attention.sliding_window
    else:  # Mistral: that of the model; others that don't know it have none
        window = getattr(attention.config, "sliding_window", None)
    return window


def _bert(layer: Any, rows: Tensor, hidden_states: Tensor, *args: Any, **options: Any) -> Tensor:
    """BERT and RoBERTa: the norms come after the sums."""
    attention = layer.attention.self
    chosen, x = _Chosen(rows, attention, options), hidden_states[0]
    q, k, v = (
        project(y).unflatten(-1, (attention.num_attention_heads, -1))
        for project, y in (
            (attention.query, x[chosen.index]), (attention.key, x), (attention.value, x)
        )
    )  # fmt: skip
    attended = layer.attention.output(chosen.attend(q, k, v), x[chosen.index])
    out: Tensor = layer.feed_forward_chunk(attended)
    return out[None]


def _nomic(layer: Any, rows: Tensor, hidden_states: Tensor, *args: Any, **options: Any) -> Tensor:
    """NomicBERT: rotary, and the norms come after the sums."""
    chosen, x = _Chosen(rows, layer.self_attn, options), hidden_states[0]
    attended = chosen.attend_rotary(layer.self_attn, x, options["position_embeddings"])
    y = layer.post_attention_layernorm(x[chosen.index] + layer.post_attention_dropout(attended))
    out: Tensor = layer.post_mlp_layernorm(y + layer.post_mlp_dropout(layer.mlp(y)))
    return out[None]


def _llama(layer: Any, rows: Tensor, hidden_states: Tensor, *args: Any, **options: Any) -> Tensor:
    """Llama, Mistral and Qwen: rotary, and the norms come before attention and the MLP."""
    chosen, x = _Chosen(rows, layer.self_attn, options), hidden_states[0]
    normed = layer.input_layernorm(x)
    y = x[chosen.index]
    y = y + chosen.attend_rotary(layer.self_attn, normed, options["position_embeddings"])
    out: Tensor = y + layer.mlp(layer.post_attention_layernorm(y))
    return out[None]


_LAYERS: dict[type, Callable[..., Tensor]] = {
    BertLayer: _bert,
    LlamaDecoderLayer: _llama,
    MistralDecoderLayer: _llama,
    NomicBertLayer: _nomic,
    Qwen2DecoderLayer: _llama,
    Qwen3DecoderLayer: _llama,
    RobertaLayer: _bert,
    XLMRobertaLayer: _bert,
}


@contextmanager
def _replaced(layer: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward


def forward_rows(
    model: nn.Module, input_ids: Tensor | None, cu_seqlens: Tensor, rows: Tensor, **kwargs: Any
) -> Tensor:
    """Run an encoder over a packed batch for the last hidden states of chosen tokens.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A model whose attention implementation is "emblas": BERT, RoBERTa, XLM-RoBERTa, NomicBERT,
        Llama, Mistral, Qwen2 or Qwen3, without a head.
    input_ids, cu_seqlens, **kwargs
        As in :func:`emblas.integrations.transformers.forward_packed`.
    rows : Tensor
        The tokens ``(rows,)``, int64, whose hidden states are wanted; see
        :func:`emblas.attention.pooled_tokens`. Negative: nobody's.

    Returns
    -------
    Tensor
        ``(rows, hidden)``: those rows of :func:`forward_packed`, zeros for nobody's. Gradients flow
        as they do there.

    Raises
    ------
    ValueError
        If the last layer isn't one of these, drops probabilities of attention (in training), or the
        model uses another attention implementation.

    Notes
    -----
    The layer is replaced for the time of the call: calls of one model from several threads must
    not overlap.
    """
    stack = next(
        (m for m in model.modules() if isinstance(m, nn.ModuleList) and type(m[-1]) in _LAYERS),
        None,
    )
    if stack is None:
        known = ", ".join(sorted(layer.__name__ for layer in _LAYERS))
        raise ValueError(
            f"the last layer of model must be one of {known}; {type(model).__name__} has none"
        )
    layer = stack[-1]
    if model.training and _dropout(layer) > 0:
        raise ValueError("model must not drop attention probabilities in its last layer")
    replaced = partial(_LAYERS[type(layer)], layer, rows.long())
    with _replaced(layer, replaced):
        out = hf.forward_packed(model, input_ids, cu_seqlens, **kwargs)
    return torch.where((rows >= 0)[:, None], out, 0)


def _dropout(layer: Any) -> float:
    """Return the probability with which attention drops a key in training."""
    if hasattr(layer, "self_attn"):
        return float(layer.self_attn.attention_dropout)
    return float(layer.attention.self.dropout.p)
