"""The last layer for the tokens alone that a sequence is pooled by.

>>> from emblas.attention import pooled_tokens
>>> from emblas.integrations.last_layer import forward_rows
>>> vectors = forward_rows(model, input_ids, cu_seqlens, pooled_tokens(cu_seqlens, "cls"))

Keys and values come from all tokens; queries, the projection behind attention and the MLP of the
last layer, ten of the twelve products with weights in BERT, are computed for the chosen ones only.
The rows that come out are the ones that would have come out of the whole layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from emblas import packed
from emblas.attention import attend_rows, rotary
from emblas.integrations import transformers as hf
from emblas.integrations import versions

try:
    from transformers.models.bert.modeling_bert import BertLayer
    from transformers.models.camembert.modeling_camembert import CamembertLayer
    from transformers.models.electra.modeling_electra import ElectraLayer
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer
    from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
    from transformers.models.nomic_bert.modeling_nomic_bert import NomicBertLayer
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
    from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer
    from transformers.models.roberta.modeling_roberta import RobertaLayer
    from transformers.models.xlm_roberta.modeling_xlm_roberta import XLMRobertaLayer
except ImportError as error:
    raise versions.import_error(__name__, "transformers", error) from error


# The tokens ``(pooled,)``, int64, in a model's keyword arguments, like cu_seq_lens_q.
KEY = "emblas_pooled_rows"
MODES = frozenset({"cls", "last"})


class PooledRows(NamedTuple):
    """The tokens of a packed batch that are pooled: at most two of each text."""

    rows: Tensor
    """``(pooled,)`` int64."""
    cu_seqlens: Tensor
    """Offsets ``(batch + 1,)`` of the texts in ``rows``."""


def pooled_rows(cu_seqlens: Tensor, modes: Sequence[str]) -> PooledRows:
    """Choose the tokens that are pooled.

    Parameters
    ----------
    cu_seqlens : Tensor
        Offsets ``(batch + 1,)`` of a packed batch.
    modes : sequence of {"cls", "last"}
        Which tokens of a text are wanted. A text of a single token gives it once, one without
        tokens none.

    Returns
    -------
    PooledRows
    """
    lengths = cu_seqlens.diff()
    rows = torch.stack([cu_seqlens[:-1], cu_seqlens[1:] - 1], 1).long()
    first = lengths.gt(0) if "cls" in modes else torch.zeros_like(lengths, dtype=torch.bool)
    last = lengths.gt(int("cls" in modes)) & ("last" in modes)
    wanted = torch.stack([first, last], 1)
    return PooledRows(rows[wanted], packed.offsets(wanted.sum(1)))


class _Chosen:
    """The tokens ``rows`` of a packed batch, in one layer."""

    def __init__(self, rows: Tensor, attention: Any, options: dict[str, Any]) -> None:
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

        q = heads(attention.q_proj(x[self.rows]), "q_norm")
        k = heads(attention.k_proj(x), "k_norm")
        v = attention.v_proj(x).unflatten(-1, (-1, attention.head_dim))
        # transformers holds each number twice, for both elements of a pair.
        cos, sin = (table[0, :, : table.shape[-1] // 2] for table in cos_sin)
        q, k = rotary(q, cos[self.rows], sin[self.rows]), rotary(k, cos, sin)
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
            (attention.query, x[chosen.rows]), (attention.key, x), (attention.value, x)
        )
    )  # fmt: skip
    attended = layer.attention.output(chosen.attend(q, k, v), x[chosen.rows])
    out: Tensor = layer.feed_forward_chunk(attended)
    return out[None]


def _nomic(layer: Any, rows: Tensor, hidden_states: Tensor, *args: Any, **options: Any) -> Tensor:
    """NomicBERT: rotary, and the norms come after the sums."""
    chosen, x = _Chosen(rows, layer.self_attn, options), hidden_states[0]
    attended = chosen.attend_rotary(layer.self_attn, x, options["position_embeddings"])
    y = layer.post_attention_layernorm(x[chosen.rows] + layer.post_attention_dropout(attended))
    out: Tensor = layer.post_mlp_layernorm(y + layer.post_mlp_dropout(layer.mlp(y)))
    return out[None]


def _llama(layer: Any, rows: Tensor, hidden_states: Tensor, *args: Any, **options: Any) -> Tensor:
    """Llama, Mistral and Qwen: rotary, and the norms come before attention and the MLP."""
    chosen, x = _Chosen(rows, layer.self_attn, options), hidden_states[0]
    normed = layer.input_layernorm(x)
    y = x[chosen.rows]
    y = y + chosen.attend_rotary(layer.self_attn, normed, options["position_embeddings"])
    out: Tensor = y + layer.mlp(layer.post_attention_layernorm(y))
    return out[None]


_LAYERS: dict[type, Callable[..., Tensor]] = {
    BertLayer: _bert,
    CamembertLayer: _bert,
    ElectraLayer: _bert,
    LlamaDecoderLayer: _llama,
    MistralDecoderLayer: _llama,
    NomicBertLayer: _nomic,
    Qwen2DecoderLayer: _llama,
    Qwen3DecoderLayer: _llama,
    RobertaLayer: _bert,
    XLMRobertaLayer: _bert,
}


def last_layer(model: Any) -> nn.Module | None:
    """Return the layer of a model of transformers that :func:`forward` can run; None if it can't.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With or without a head.
    """
    for stack in model.base_model.modules():
        if isinstance(stack, nn.ModuleList) and len(stack) > 0 and type(stack[-1]) in _LAYERS:
            layer: Any = stack[-1]
            return None if getattr(layer, "is_decoder", False) else layer
    return None


def is_patched(model: Any) -> bool:
    """Return whether a model's last layer listens to ``KEY``."""
    layer = last_layer(model)
    return layer is not None and getattr(vars(layer).get("forward"), "func", None) is forward


def forward(layer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Run a last layer; with ``KEY`` among the arguments, for the pooled tokens.

    Parameters
    ----------
    layer : Module
        From :func:`last_layer`.
    hidden_states : Tensor
        ``(1, tokens, hidden)``, packed where there are pooled rows.
    *args, **kwargs
        Those of the layer's own ``forward``.

    Returns
    -------
    Tensor
        ``(1, pooled, hidden)``, or what the layer itself returns.
    """
    rows: Tensor | None = kwargs.pop(KEY, None)
    if rows is None:
        return type(layer).forward(layer, hidden_states, *args, **kwargs)
    attention = layer.self_attn if hasattr(layer, "self_attn") else layer.attention.self
    # Attention of chosen rows has neither dropout nor keys of a layer's own.
    if (layer.training and _dropout(attention) > 0) or hasattr(attention, hf.KEYS):
        return type(layer).forward(layer, hidden_states, *args, **kwargs)[:, rows]
    return _LAYERS[type(layer)](layer, rows, hidden_states, *args, **kwargs)


@contextmanager
def _patched(layer: nn.Module) -> Iterator[None]:
    if "forward" in vars(layer):  # by optimize()
        yield
        return
    layer.forward = partial(forward, layer)
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
        If the last layer isn't one of these, or the model uses another attention implementation.

    Notes
    -----
    The layer is replaced for the time of the call: calls of one model from several threads must
    not overlap.
    """
    layer = last_layer(model)
    if layer is None:
        known = ", ".join(sorted(known.__name__ for known in _LAYERS))
        raise ValueError(
            f"the last layer of model must be one of {known}; {type(model).__name__} has none"
        )
    rows = rows.long()
    kwargs[KEY] = rows.clamp_min(0)
    with _patched(layer):
        out = hf.forward_packed(model, input_ids, cu_seqlens, **kwargs)
    return torch.where((rows >= 0)[:, None], out, 0)


def _dropout(attention: Any) -> float:
    """Return the probability with which attention drops a key in training."""
    if hasattr(attention, "attention_dropout"):
        return float(attention.attention_dropout)
    return float(attention.dropout.p)
