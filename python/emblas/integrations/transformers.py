"""emblas attention inside Hugging Face transformers models, padded or packed.

>>> from emblas.integrations import transformers as hf
>>> hf.register()
>>> model.set_attn_implementation("emblas")
>>> hidden = hf.forward_packed(model, input_ids, cu_seqlens)      # (tokens, hidden), no padding
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from emblas import packed
from emblas.attention import varlen_attention
from emblas.attention.sequences import positions
from emblas.integrations import versions

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
except ImportError as error:
    raise versions.import_error(__name__, "transformers", error) from error

# transformers reads "flash", "sdpa" and "/" in a name as requests of its own.
NAME = "emblas"
BRANCH = "emblas_branch"  # travels through a model's keyword arguments, like cu_seq_lens_q
# Attribute of attention modules: arguments of varlen_attention that are the layer's own.
KEYS = "emblas_keys"
# Parameters, which are wider than activations under autocast.
_PREFIX = frozenset({"k_prefix", "v_prefix"})


class PaddedBatch(NamedTuple):
    """Where the tokens of a padded batch are. Made once per forward pass, used by every layer."""

    rows: Tensor
    """Rows of ``(batch * length, ...)`` that hold a token, int64."""
    cu_seqlens: Tensor
    max_seqlen: int

    def take(self, x: Tensor) -> Tensor:
        """Take the tokens ``(1, tokens, ...)`` out of ``(batch, length, ...)``."""
        return x.flatten(0, 1)[self.rows][None]

    def spread(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """Put tokens ``(1, tokens, ...)`` into zeros of ``(batch, length)``."""
        padded = x.new_zeros(math.prod(shape), *x.shape[2:])
        return padded.index_copy(0, self.rows, x[0]).unflatten(0, tuple(shape))

    def check_without_holes(self) -> None:
        """Raise if the tokens of a sequence don't lie side by side.

        Between such tokens, distances in a packed batch are others than in the padded one.
        """
        begin, end = self.cu_seqlens[:-1], self.cu_seqlens[1:]
        filled = begin < end
        span = self.rows[end[filled] - 1] - self.rows[begin[filled]] + 1
        if bool((span != (end - begin)[filled]).any()):
            raise ValueError(
                "attention_mask must be without holes for a model with sliding windows or relative "
                "positions, whose distances would change"
            )


class PackedBatch(NamedTuple):
    """Sequences end to end, for modules that get no keyword arguments of their model."""

    cu_seqlens: Tensor
    max_seqlen: int


class RelativeBias(NamedTuple):
    """Table and lookup of ``relative_bias``, in the place of a bias for each pair of tokens."""

    table: Tensor
    lookup: Tensor


class DisentangledBias(NamedTuple):
    """Position keys, position queries and lookup of ``disentangled``."""

    keys: Tensor | None
    queries: Tensor | None
    lookup: Tensor


class PackedEncoder(nn.Module):
    """What an encoder inherits whose model has no way for packed input to it."""

    def forward_packed(self, x: Tensor, batch: PackedBatch) -> Tensor:
        """Map embedded tokens ``(1, tokens, hidden)`` to the last hidden states."""
        raise NotImplementedError


def register() -> None:
    """Make ``attn_implementation="emblas"`` known to transformers.

    Both halves are registered. With the attention function alone, a model would hand it no mask and
    attend to padding without a word.
    """
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _mask)


def _mask(*, attention_mask: Tensor | None = None, **kwargs: Any) -> PaddedBatch | None:
    """Locate the tokens of a padded batch; None where there is no padding."""
    return None if attention_mask is None else padded_batch(attention_mask)


def padded_batch(attention_mask: Tensor) -> PaddedBatch:
    """Locate the tokens of a padded batch by its mask ``(batch, length)``."""
    lengths = attention_mask.sum(1)
    return PaddedBatch(
        attention_mask.flatten().nonzero().squeeze(1),
        packed.offsets(lengths),
        int(lengths.max()) if len(lengths) else 0,
    )


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: PaddedBatch | PackedBatch | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: RelativeBias | DisentangledBias | Tensor | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    emblas_branch: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers asks: heads first in, tokens first out."""
    if isinstance(position_bias, Tensor):
        raise NotImplementedError(
            "attn_implementation='emblas' takes no position_bias for each pair of tokens; "
            "emblas.integrations.transformers_modules.replace_modules(model) gives T5 a table"
        )
    if s_aux is not None:
        raise NotImplementedError("attn_implementation='emblas' can't take s_aux yet")
    if isinstance(attention_mask, PackedBatch):
        cu_seq_lens_q = cu_seq_lens_k = attention_mask.cu_seqlens
        max_length_q = max_length_k = attention_mask.max_seqlen
    elif attention_mask is not None and not isinstance(attention_mask, PaddedBatch):
        raise TypeError(
            "attention_mask must be (batch, length) with attn_implementation='emblas', "
            f"got one that the model passed on as {type(attention_mask).__name__}"
        )
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    window = (-1, -1)
    if sliding_window is not None:
        # transformers counts the token itself: radius sliding_window - 1.
        window = (sliding_window - 1, 0 if causal else sliding_window - 1)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    q, k = q.to(v.dtype), k.to(v.dtype)  # rotary embedding widens them under autocast
    extra = dict(getattr(module, KEYS, {}))
    extra |= {name: extra[name].to(v.dtype) for name in _PREFIX.intersection(extra)}

    def run(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int
    ) -> Tensor:
        return varlen_attention(
            q, k, v, cu_q, cu_k, max_q, max_k, dropout, scaling, causal, window, softcap or 0.0,
            relative_bias=position_bias if isinstance(position_bias, RelativeBias) else None,
            disentangled=position_bias if isinstance(position_bias, DisentangledBias) else None,
            branch=emblas_branch, **extra,
        )  # fmt: skip

    batch_size, heads, length, _ = query.shape
    if cu_seq_lens_q is not None:
        if cu_seq_lens_k is None or max_length_q is None or max_length_k is None:
            raise ValueError(
                "packed input needs cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k"
            )
        out = run(q, k, v, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    elif not isinstance(attention_mask, PaddedBatch):  # None: no padding
        offsets_q, offsets_k = (
            torch.arange(batch_size + 1, dtype=torch.int32, device=x.device) * x.shape[2]
            for x in (query, key)
        )
        out = run(q, k, v, offsets_q, offsets_k, length, key.shape[2])
    elif length == key.shape[2]:
        rows, offsets, longest = attention_mask
        tokens = run(q[rows], k[rows], v[rows], offsets, offsets, longest, longest)
        out = q.new_zeros(len(q), heads, v.shape[-1]).index_copy(0, rows, tokens)
    else:  # cross-attention: every query is a token, the keys are padded
        rows, offsets, longest = attention_mask
        offsets_q = torch.arange(batch_size + 1, dtype=torch.int32, device=q.device) * length
        out = run(q, k[rows], v[rows], offsets_q, offsets, length, longest)
    return out.unflatten(0, (batch_size, length)), None


def implementation(config: Any) -> str:
    """Return the name of the attention that a model with this configuration uses."""
    name: str = versions.private("transformers", config, "_attn_implementation")
    return name


def position_start(model: nn.Module) -> int:
    """Return the position of a sequence's first token.

    0, but ``padding_idx + 1`` in models of the RoBERTa family, which keep the positions up to there
    for padding.
    """
    for module in model.modules():
        padding_idx = getattr(module, "padding_idx", None)
        table = getattr(module, "position_embeddings", None)
        if isinstance(padding_idx, int) and isinstance(table, nn.Embedding):
            return padding_idx + 1
    return 0


def _positions(input_ids: Tensor | None, cu_seqlens: Tensor, count: int, start: int) -> Tensor:
    """Positions ``(tokens,)`` of a packed batch, for a model whose first one is ``start``."""
    at = positions(cu_seqlens, count)
    if start == 0 or input_ids is None:
        return at + start
    # Padding inside a text, which its writer may name, has the position before the first and is not
    # counted.
    padding = input_ids == start - 1
    before = padding.cumsum(0) - padding.long()
    own = before - before[torch.arange(count, device=at.device) - at]
    return torch.where(padding, start - 1, at - own + start)


def forward_packed(
    model: nn.Module,
    input_ids: Tensor | None,
    cu_seqlens: Tensor,
    *,
    inputs_embeds: Tensor | None = None,
    position_ids: Tensor | None = None,
    max_seqlen: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """Run an encoder over a packed batch, without a single padding token.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A model whose attention implementation is "emblas".
    input_ids : Tensor or None
        Token ids ``(tokens,)`` of all sequences, end to end.
    cu_seqlens : Tensor
        Offsets ``(batch + 1,)``.
    inputs_embeds : Tensor, optional
        In place of ``input_ids``: vectors ``(tokens, hidden)`` as ``model.get_input_embeddings()``
        makes them, of which some may be no word's (soft prompts, an embedding fed back). Gradients
        flow to them.
    position_ids : Tensor, optional
        ``(tokens,)``; by default every sequence counts from :func:`position_start`.
    max_seqlen : int, optional
        At least the length of the longest sequence. Without it, the lengths are read, for which a
        GPU is waited for, and which ``torch.export`` can't do.
    **kwargs
        Handed on to the model.

    Returns
    -------
    Tensor
        Last hidden states ``(tokens, hidden)``.

    Raises
    ------
    ValueError
        If the model uses another attention implementation: those of transformers would let the
        sequences attend to each other. If both or neither of ``input_ids`` and ``inputs_embeds``
        are given.
    """
    used = implementation(model.config)
    if used != NAME:
        raise ValueError(
            f"model must use attn_implementation={NAME!r}, got {used!r}, which lets "
            f"packed sequences attend to each other; call model.set_attn_implementation({NAME!r})"
        )
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("either input_ids or inputs_embeds must be given")
    tokens = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
    inputs = {name: x[None] for name, x in tokens.items() if x is not None}
    if max_seqlen is None:
        max_seqlen = int(cu_seqlens.diff().max()) if len(cu_seqlens) > 1 else 0
    if position_ids is None:
        count = next(iter(inputs.values())).shape[1]
        position_ids = _positions(input_ids, cu_seqlens, count, position_start(model))
    encoder = getattr(model, "encoder", None)
    if isinstance(encoder, PackedEncoder):
        embed: Any = model.embeddings
        x = embed(**inputs, position_ids=position_ids[None], **kwargs)
        return encoder.forward_packed(x, PackedBatch(cu_seqlens, max_seqlen))[0]
    outputs = model(
        **inputs,
        position_ids=position_ids[None],
        cu_seq_lens_q=cu_seqlens,
        cu_seq_lens_k=cu_seqlens,
        max_length_q=max_seqlen,
        max_length_k=max_seqlen,
        **kwargs,
    )
    return outputs.last_hidden_state[0]


def layers(model: nn.Module, start: int = 1) -> list[nn.Module]:
    """Return the modules that give the hidden states of a model's layers.

    For :func:`emblas.pooling.pooled_outputs`: the layers themselves but, in place of the last one,
    the model without its head, since its final norm belongs to the last hidden state. The outputs
    are then those of ``output_hidden_states=True``, without ever being kept together.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With or without a head.
    start : int, default 1
        The first layer taken, counted from 1.

    Returns
    -------
    list of Module

    Raises
    ------
    ValueError
        If ``start`` isn't a layer, or the layers of the model can't be told.
    """
    base: nn.Module = getattr(model, "base_model")  # noqa: B009
    count: int = getattr(base.config, "num_hidden_layers")  # noqa: B009
    if not 1 <= start <= count:
        raise ValueError(f"start must be between 1 and {count}, got {start}")
    for module in base.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return [*list(module)[start - 1 : -1], base]
    raise ValueError(f"model must hold a torch.nn.ModuleList of its {count} layers, found none")


def attentions(model: nn.Module) -> list[nn.Module]:
    """Return the self-attention of a model's layers, in order.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With or without a head.

    Returns
    -------
    list of Module
        Those that :func:`attend` is called with.

    Raises
    ------
    ValueError
        If there isn't one of each layer that can be told by its ``is_causal``.
    """
    base: Any = model.base_model
    found = [module for module in base.modules() if hasattr(module, "is_causal")]
    if len(found) != getattr(base.config, "num_hidden_layers", None):
        raise ValueError(
            "model must have one attention module with is_causal in each layer, and no other, got "
            f"{type(model).__name__} with {len(found)}"
        )
    return found


def is_causal(model: nn.Module) -> bool:
    """Return whether no token of a model sees those behind it; raises as :func:`attentions`."""
    base: Any = model.base_model
    setting = getattr(base.config, "is_causal", None)  # transformers lets it decide, where it's set
    return all(m.is_causal for m in attentions(model)) if setting is None else bool(setting)


def routers(model: nn.Module) -> list[nn.Module]:
    """Return the modules of a mixture of experts that compute the routers' logits, in order.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With or without a head.

    Returns
    -------
    list of Module
        Whose output, or its first part, is ``(tokens, experts)``.

    Raises
    ------
    ValueError
        If the model names no routers.
    """
    recorded = None
    if isinstance(model, PreTrainedModel):
        recorded = versions.private("transformers", model, "_can_record_outputs")
    recorder = (recorded or {}).get("router_logits")
    kind = getattr(recorder, "target_class", recorder)
    found = [m for m in model.modules() if kind is not None and isinstance(m, kind)]
    if not found or getattr(recorder, "index", 0) != 0:
        raise ValueError("model must be a mixture of experts that names its routers, got another")
    return found


@torch.no_grad()
def verify(model: nn.Module, texts: Sequence[Tensor], **kwargs: Any) -> float:
    """Return how far a packed batch is from the same texts one at a time.

    A text that sees another one, a wrong window or a wrong position shows as a difference far above
    rounding. Weights of low softmax entropy (trained ones) show it best.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A model whose attention implementation is "emblas". Dropout must be off (``model.eval()``).
    texts : sequence of Tensor
        Token ids ``(length,)`` of each text; at least one text, none empty.
    **kwargs
        Handed on to the model.

    Returns
    -------
    float
        Largest absolute difference of the last hidden states.

    Raises
    ------
    ValueError
        If there is no text, one is empty, or the model uses another attention implementation.
    """
    if not texts or any(len(text) == 0 for text in texts):
        raise ValueError("texts must hold at least one text, and none that is empty")
    together = forward_packed(model, *packed.pack(list(texts)), **kwargs)
    alone = torch.cat(
        [model(input_ids=text[None], **kwargs).last_hidden_state[0] for text in texts]
    )
    return float((together - alone).abs().max())
