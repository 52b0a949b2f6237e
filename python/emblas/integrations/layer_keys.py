"""Keys that all tokens of a text see in chosen layers of a model, beside the text's own.

A decoder becomes an encoder without training (KV-Embedding, arXiv 2601.01046) where tokens see the
last key and value of their text, which have seen all of it:

>>> layers = choose_layers(intrinsic_dimensions(model, texts))
>>> rerouted = reroute(model, layers)
>>> hidden = hf.forward_packed(model, input_ids, cu_seqlens)      # or Encoder(model, tokenizer)
>>> rerouted.undo()

Or a layer has keys and values that are learned, and the model stays as it is (prefix tuning):

>>> memory = LayerMemory(model, 16)
>>> memory.attach(model)
>>> optimizer = torch.optim.AdamW(memory.parameters())
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from emblas import packed
from emblas.evaluation import two_nn
from emblas.integrations import transformers as hf
from emblas.integrations import versions
from emblas.pooling import pooled_outputs

try:
    from transformers import PreTrainedModel
except ImportError as error:
    raise versions.import_error(__name__, "transformers", error) from error


class AddedKeys:
    """Keys that layers of a model were given; :meth:`undo` takes them away.

    Serves as a context manager, too.
    """

    def __init__(self, undo: contextlib.ExitStack) -> None:
        self._undo = undo

    def undo(self) -> None:
        """Restore the model exactly; nothing happens the second time."""
        self._undo.close()

    def __enter__(self) -> AddedKeys:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def reroute(model: nn.Module, layers: Iterable[int], bias: float | Tensor = 1.0) -> AddedKeys:
    """Let all tokens of a text see the key and value of its last token, in chosen layers.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal model, with or without a head, whose attention implementation is "emblas"; it is
        changed in place. Padded and packed batches, :func:`emblas.optimize`,
        :class:`emblas.Encoder` and gradients work as before.
    layers : iterable of int
        Their numbers, from 0; see :func:`choose_layers`.
    bias : float or Tensor, default 1.0
        Added to the scores of that key: a number, or ``(heads,)`` with a gradient.

    Returns
    -------
    AddedKeys
        Its ``undo()`` restores the model exactly.

    Raises
    ------
    TypeError
        If ``model`` is no model of transformers, or a layer no integer.
    ValueError
        If the model isn't causal, uses another attention implementation or doesn't name the
        attention of its layers; if a layer isn't there, is named twice or is re-routed already.

    Notes
    -----
    Tang and Yang, 2026 (arXiv 2601.01046). Key and value are those of the layer itself, in the one
    pass there is, and the key keeps its position. The last token sees them twice. Vectors are the
    mean of the last hidden state and the mean of all of them: pooling ``("last", "mean")``, and the
    mean of both parts. With a cache the last token is the last one so far: don't generate.

    Examples
    --------
    >>> encoder = emblas.Encoder(  # doctest: +SKIP
    ...     model, tokenizer, pooling=("last", "mean"),
    ...     head=lambda pooled: pooled.unflatten(1, (2, -1)).mean(1),
    ... )
    >>> reroute(encoder.model, range(14, 17))  # doctest: +SKIP
    """
    numbers = _numbers(model, layers)
    if not hf.is_causal(model):
        raise ValueError(
            "model must be causal, so that the last token has seen what others haven't, got "
            f"{type(model).__name__} whose tokens see each other"
        )
    return _add(model, numbers, [{"reroute_last": True, "reroute_bias": bias}] * len(numbers))


class LayerMemory(nn.Module):
    """Learned keys and values of a model's layers, which all tokens see.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Decoder or encoder, with or without a head, that they are made for.
    length : int
        Keys in each layer.
    layers : iterable of int, optional
        Numbers of the layers, from 0; default: all.
    bias : float, default 0.0
        Added to the scores of these keys. Far below 0, the model begins nearly as it was.
    std : float, default 0.02
        Of the normal distribution that keys and values are drawn from.

    Attributes
    ----------
    keys, values : ParameterList
        ``(length, key_heads, head_dim)`` for each of the layers, float32.

    Raises
    ------
    TypeError
        If ``model`` is no model of transformers, or a layer no integer.
    ValueError
        If ``length`` isn't positive, a layer isn't there or is named twice, or the model doesn't
        name the attention of its layers.

    Notes
    -----
    Prefix tuning (Li and Liang, 2021, arXiv 2101.00190) in each layer (P-Tuning v2, Liu et al.,
    2022, arXiv 2110.07602), without the network that reparametrizes it. The keys have no position.
    Layers whose heads aren't those of the model's configuration raise when the model runs.
    """

    def __init__(
        self,
        model: nn.Module,
        length: int,
        layers: Iterable[int] | None = None,
        *,
        bias: float = 0.0,
        std: float = 0.02,
    ) -> None:
        super().__init__()
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        self.layers = _numbers(model, layers)
        self.bias = bias
        config: Any = _transformer(model).base_model.config
        heads = config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        shape = length, getattr(config, "num_key_value_heads", None) or heads, dim
        device = next(model.parameters()).device

        def draw() -> nn.ParameterList:
            return nn.ParameterList(torch.randn(shape, device=device) * std for _ in self.layers)

        self.keys, self.values = draw(), draw()

    def attach(self, model: nn.Module) -> AddedKeys:
        """Let the layers of a model see this memory.

        Parameters
        ----------
        model : transformers.PreTrainedModel
            Whose attention implementation is "emblas". It is changed in place, but neither its
            parameters nor what is saved of it: the memory has a ``state_dict`` of its own.

        Returns
        -------
        AddedKeys
            Its ``undo()`` restores the model exactly.

        Raises
        ------
        TypeError
            If ``model`` is no model of transformers.
        ValueError
            If the model uses another attention implementation, or has fewer layers or a memory
            already.
        """
        options = [
            {"k_prefix": keys, "v_prefix": values, "prefix_bias": self.bias}
            for keys, values in zip(self.keys, self.values, strict=True)
        ]
        return _add(model, _numbers(model, self.layers), options)

    def extra_repr(self) -> str:
        """Return the settings that ``repr`` shows."""
        return f"length={len(self.keys[0])}, layers={self.layers}, bias={self.bias}"


@torch.no_grad()
def intrinsic_dimensions(
    model: nn.Module,
    texts: Sequence[Tensor],
    *,
    tokens: int = 1000,
    token_budget: int = 2048,
    seed: int = 0,
) -> list[float]:
    """Estimate the intrinsic dimension of the hidden states that each layer of a decoder returns.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With or without a head, whose attention implementation is "emblas". Dropout must be off
        (``model.eval()``).
    texts : sequence of Tensor
        Token ids ``(length,)`` of each text; the authors take about 1,000 texts.
    tokens : int, default 1000
        Tokens drawn from all texts, whose hidden states are compared: time grows with the square.
        Tokens with the same text up to them count once, since their states are the same.
    token_budget : int, default 2048
        Most tokens in a batch.
    seed : int, default 0
        Of the draw.

    Returns
    -------
    list of float
        One per layer, by :func:`emblas.evaluation.two_nn`; the last layer's behind the final norm.

    Raises
    ------
    TypeError
        If ``model`` is no model of transformers.
    ValueError
        If there are less than 3 different tokens, or the model uses another attention
        implementation.
    """
    base: Any = _transformer(model).base_model
    lengths = [len(text) for text in texts]
    total = sum(lengths)
    text_of = torch.arange(len(texts)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    at = packed.positions(packed.offsets(lengths))
    drawn: dict[tuple[int, ...], tuple[int, int]] = {}
    for token in torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist():
        if len(drawn) == tokens:
            break
        text, position = int(text_of[token]), int(at[token])
        drawn.setdefault(tuple(texts[text][: position + 1].tolist()), (text, position))
    if len(drawn) < 3:
        raise ValueError(f"texts must hold at least 3 different tokens, got {len(drawn)}")
    places: list[list[int]] = [[] for _ in texts]
    for text, position in drawn.values():
        places[text].append(position)

    layers = hf.layers(base)
    rows: list[int] = []
    with pooled_outputs(layers, lambda x: x[0, rows].cpu()) as states:
        for batch in packed.token_budget_batches(lengths, token_budget):
            ids, offsets = packed.pack([texts[i] for i in batch])
            rows[:] = [
                begin + position
                for i, begin in zip(batch, offsets.tolist(), strict=False)
                for position in places[i]
            ]
            if rows:
                hf.forward_packed(base, ids.to(base.device), offsets.to(base.device))
    return [two_nn(torch.cat(states[i :: len(layers)])) for i in range(len(layers))]


def choose_layers(dimensions: Sequence[float]) -> list[int]:
    """Choose the layers that :func:`reroute` takes, by the intrinsic dimension of each.

    Parameters
    ----------
    dimensions : sequence of float
        One per layer, from :func:`intrinsic_dimensions`.

    Returns
    -------
    list of int
        Numbers of a tenth of the layers and one, rising from 0.

    Raises
    ------
    ValueError
        If there is no layer, or a dimension is NaN.

    Notes
    -----
    Where dimensions fall and rise again, the layers from the lowest one on (arXiv 2601.01046). That
    is taken to be so if the lowest one lies neither in the first nor in the last fifth. Otherwise
    the layers of the lowest dimensions behind the first fifth, as many.
    """
    count = len(dimensions)
    if not count or any(dimension != dimension for dimension in dimensions):
        raise ValueError(f"dimensions must be numbers, at least one, got {list(dimensions)}")
    more, fifth = count // 10, count // 5
    lowest = min(range(count), key=dimensions.__getitem__)
    if fifth <= lowest < count - fifth:
        return list(range(lowest, lowest + more + 1))
    return sorted(sorted(range(fifth, count), key=dimensions.__getitem__)[: more + 1])


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what was added to a model's layers, named as in a ``state_dict``."""
    return {
        f"{path}.{hf.KEYS}.{name}": torch.as_tensor(value)
        for path, module in model.named_modules()
        for name, value in getattr(module, hf.KEYS, {}).items()
    }


# --- parts ---------------------------------------------------------------------------------------


def _transformer(model: nn.Module) -> PreTrainedModel:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a model of transformers, got {type(model).__name__}")
    return model


def _numbers(model: nn.Module, layers: Iterable[int] | None) -> list[int]:
    """Check the numbers of layers; None: all."""
    count = len(hf.attentions(_transformer(model)))
    numbers = list(range(count)) if layers is None else [operator.index(i) for i in layers]
    if len(set(numbers)) < max(1, len(numbers)) or not all(0 <= i < count for i in numbers):
        raise ValueError(
            f"layers must be different numbers from 0 to {count - 1}, at least one, got {numbers}"
        )
    return numbers


def _add(
    model: nn.Module, layers: Sequence[int], options: Sequence[Mapping[str, Any]]
) -> AddedKeys:
    """Give arguments of ``varlen_attention`` to the attention of layers."""
    attentions = hf.attentions(model)
    for i, new in zip(layers, options, strict=True):
        _check_implementation(attentions[i])
        if new.keys() & getattr(attentions[i], hf.KEYS, {}).keys():
            raise ValueError(f"layers must have no such keys yet, layer {i} has; undo() them first")
    undo = contextlib.ExitStack()
    for i, new in zip(layers, options, strict=True):
        attention = attentions[i]
        setattr(attention, hf.KEYS, {**getattr(attention, hf.KEYS, {}), **new})
        undo.callback(_take_away, attention, new)
        # Another implementation would leave them out without a word.
        hook = attention.register_forward_pre_hook(_check_implementation)
        undo.callback(hook.remove)
    return AddedKeys(undo)


def _take_away(attention: nn.Module, options: Mapping[str, Any]) -> None:
    left = {k: v for k, v in getattr(attention, hf.KEYS).items() if k not in options}
    if left:
        setattr(attention, hf.KEYS, left)
    else:
        delattr(attention, hf.KEYS)


def _check_implementation(attention: Any, *_: object) -> None:
    used = hf.implementation(attention.config)
    if used != hf.NAME:
        raise ValueError(
            f"model must use attn_implementation={hf.NAME!r} for keys in its layers, got {used!r}; "
            f"call model.set_attn_implementation({hf.NAME!r}), or undo() what added the keys"
        )
