"""The last layer of an encoder for those tokens only that are pooled.

A vector pooled from the first or the last token needs that token alone of the last hidden states.
The last layer then needs keys and values of all tokens, but queries, the output of the attention
and the feed-forward network, ten of its twelve products with weights, of one or two tokens of each
text. The rows that come out are the ones that would have come out of the whole layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from emblas import packed
from emblas.integrations import transformers as hf

try:
    from transformers.models.bert.modeling_bert import BertLayer
    from transformers.models.camembert.modeling_camembert import CamembertLayer
    from transformers.models.electra.modeling_electra import ElectraLayer
    from transformers.models.roberta.modeling_roberta import RobertaLayer
    from transformers.models.xlm_roberta.modeling_xlm_roberta import XLMRobertaLayer
except ImportError as error:
    raise ImportError(
        "emblas.integrations.last_layer needs transformers >= 5: pip install 'emblas[hf]'"
    ) from error

KEY = "emblas_pooled_rows"  # travels through a model's keyword arguments, like cu_seq_lens_q
MODES = frozenset({"cls", "last"})
_LAYERS = (BertLayer, CamembertLayer, ElectraLayer, RobertaLayer, XLMRobertaLayer)


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


def last_layer(model: Any) -> nn.Module | None:
    """Return the layer of a model of transformers that :func:`forward` can run; None if it can't.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With or without a head.
    """
    layers = [module for module in model.base_model.modules() if isinstance(module, _LAYERS)]
    if not layers or type(layers[-1]) not in _LAYERS or model.config.is_decoder:
        return None
    return layers[-1]


def is_patched(model: Any) -> bool:
    """Return whether a model's last layer listens to ``KEY``."""
    layer = last_layer(model)
    return layer is not None and getattr(vars(layer).get("forward"), "func", None) is forward


def forward(layer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Run a layer of the BERT family; with ``KEY`` among the arguments, for the pooled tokens.

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
    pooled: PooledRows | None = kwargs.pop(KEY, None)
    if pooled is None:
        return type(layer).forward(layer, hidden_states, *args, **kwargs)
    attention = layer.attention.self
    chosen = hidden_states[:, pooled.rows]
    q, k, v = (
        project(x).unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)
        for project, x in (
            (attention.query, chosen),
            (attention.key, hidden_states),
            (attention.value, hidden_states),
        )
    )
    # Neither order nor distance matters to this attention: a query is what it is at any position.
    out, _ = hf.attend(
        attention,
        q,
        k,
        v,
        None,
        attention.dropout.p if attention.training else 0.0,
        scaling=attention.scaling,
        is_causal=False,
        cu_seq_lens_q=pooled.cu_seqlens,
        cu_seq_lens_k=kwargs["cu_seq_lens_k"],
        max_length_q=2,
        max_length_k=kwargs["max_length_k"],
    )
    return layer.feed_forward_chunk(layer.attention.output(out.flatten(2), chosen))
