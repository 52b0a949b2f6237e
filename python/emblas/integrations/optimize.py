"""One line for somebody else's model: no padding inside, emblas' attention and pooling.

>>> optimized = emblas.optimize(model)      # transformers or sentence-transformers, in place
>>> model.encode(texts)                     # or a Trainer, or a loop of one's own
>>> emblas.verify(model, texts)             # how far from the untouched model, on these texts
>>> optimized.undo()

A model keeps its interface. Where it is handed a padded batch and a mask, the padding is taken out
before the first layer and put back behind the last one, so that every layer sees tokens only. The
attention interface of transformers and plain ``forward`` attributes are all that is used, since
sentence-transformers calls ``model.forward`` past all hooks: saved folders are those of the
untouched model.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from emblas.integrations import last_layer, linear_layers, versions
from emblas.integrations import transformers as hf
from emblas.integrations.transformers_modules import replace_modules, replaceable

try:
    from transformers import PreTrainedModel, __version__
    from transformers.utils.generic import ModelOutput
except ImportError as error:
    raise versions.import_error(__name__, "transformers", error) from error

# How tokens are pooled whose hidden states nobody sees; () where they are wanted themselves.
_POOLED: ContextVar[tuple[str, ...]] = ContextVar("emblas_pooled", default=())
_PROBE_LENGTHS = (5, 1, 9)
_LONGEST_PROBE = 600
_KEY = "_emblas_optimized"  # the attribute of an optimized model that holds its Optimized

hf.register()  # on import, since models that are unpickled in another process only import this


class UnsupportedModelError(ValueError):
    """A model that :func:`optimize` refuses, and has left as it was.

    Attributes
    ----------
    reason : str
        "transformers_version", "already_optimized", "no_transformer", "encoder_decoder",
        "attention_interface" (the architecture doesn't let its attention be replaced), "forward"
        (it can't run on packed texts) or "outputs_differ".
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"can't optimize this model ({reason}): {message}")
        self.reason = reason


class Optimized:
    """An optimized model; :meth:`undo` restores it. Serves as a context manager, too.

    Attributes
    ----------
    model : Module
        The model, changed in place.
    changes : list of str
        What was changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.changes: list[str] = []
        self._undo = contextlib.ExitStack()

    def undo(self) -> None:
        """Restore the model exactly; nothing happens the second time."""
        self._undo.close()
        if vars(self.model).get(_KEY) is self:
            vars(self.model).pop(_KEY)

    def __reduce__(self) -> tuple[Any, ...]:
        # None in a copy of the model, which this one can't restore.
        return type(None), ()

    def __enter__(self) -> Optimized:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"Optimized({type(self.model).__name__}: {', '.join(self.changes) or 'undone'})"

    def _apply(self) -> None:
        for transformer in _transformers(self.model):
            self._pack(transformer)
        self._multiply()
        for name, module in self.model.named_modules():
            self._fuse(name, module)
        if _is_sentence_transformer(self.model):
            self._patch(self.model, "encode", _encode)

    def _pack(self, model: Any) -> None:
        base = model.base_model
        if replaceable(model):
            self._replace(model)
            if any(isinstance(module, hf.PackedEncoder) for module in model.modules()):
                return  # which packs what comes to it
        else:
            before = hf.implementation(model.config)
            model.set_attn_implementation(hf.NAME)
            self._undo.callback(model.set_attn_implementation, before)
        if hf.implementation(base.config) != hf.NAME:
            raise UnsupportedModelError(
                "attention_interface",
                f"{type(model).__name__} does not take its attention from transformers' interface",
            )
        self._patch(base, "forward", _forward)
        layer = last_layer.last_layer(model)
        self.changes.append(f"{type(base).__name__} runs packed with {hf.NAME} attention")
        if layer is not None:
            self._patch(layer, "forward", last_layer.forward)
            self.changes.append(f"{type(layer).__name__} runs for single tokens where they suffice")

    def _replace(self, model: Any) -> None:
        for module in replaceable(model):
            self._undo.callback(setattr, module, "__class__", type(module))
        for module in model.modules():
            config: Any = getattr(module, "config", None)
            if config is not None:
                before = hf.implementation(config)
                self._undo.callback(setattr, config, "_attn_implementation", before)
        replace_modules(model)
        self.changes.append(f"{type(model.base_model).__name__} runs packed with {hf.NAME} modules")

    def _multiply(self) -> None:
        found = {module: linear_layers.forward_of(module) for module in self.model.modules()}
        for module, forward in found.items():
            if forward is not None:
                self._patch(module, "forward", forward)
        count = sum(forward is not None for forward in found.values())
        if count:
            self.changes.append(f"{count} modules are one linear kernel without a gradient")

    def _patch(self, module: nn.Module, name: str, function: Callable[..., Any]) -> None:
        """Put a function in the place of a method."""
        # Not another class: what is saved shall name the class that everybody has.
        replacement: Any = functools.partial(function, module)
        replacement.__signature__ = _signature(getattr(module, name))  # trainers look at it
        setattr(module, name, replacement)
        self._undo.callback(module.__dict__.pop, name)

    def _fuse(self, name: str, module: nn.Module) -> None:
        forward = _fused().get(type(module))
        if forward is not None:
            self._patch(module, "forward", forward)
            self.changes.append(f"{name} ({type(module).__name__}) is one kernel")


def optimize(model: nn.Module) -> Optimized:
    """Run a model without padding, on emblas' attention and pooling.

    Parameters
    ----------
    model : Module
        A model of transformers (any with a token encoder or decoder on its attention interface, and
        DeBERTa-v2 and v3, MPNet and T5 encoders, whose modules are replaced; under any head) or of
        sentence-transformers (dense, sparse, cross-encoder or multi-vector). It is changed in place
        and keeps its interface: ``encode``, trainers and plain loops work as before, with
        gradients. Parameters are neither copied nor changed.

    Returns
    -------
    Optimized
        Its ``undo()`` restores the model exactly.

    Raises
    ------
    UnsupportedModelError
        A ValueError with a ``reason``. Before anything else is done with it, an optimized model has
        to give the outputs of the untouched one on a few random texts; if it doesn't, it is
        restored.
    TypeError
        If ``model`` is no torch module.

    Notes
    -----
    Differences to the untouched model: attention weights (``output_attentions``) aren't returned,
    as in all fused attention, and a decoder returns key-value caches only where ``use_cache=True``
    is passed. Hidden states of padding are zeros. Batches that come without a mask, or go on from a
    cache, are not packed. Dropout of attention weights, in training, draws other
    numbers.

    Undo before ``copy.deepcopy`` if the copy shall be restored as well.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if int(__version__.split(".")[0]) < 5:
        raise UnsupportedModelError(
            "transformers_version", f"transformers >= 5 is needed, this is {__version__}"
        )
    found = _transformers(model)
    if not found:
        raise UnsupportedModelError(
            "no_transformer", f"{type(model).__name__} holds no model of transformers"
        )
    for transformer in found:
        if transformer.config.is_encoder_decoder:
            raise UnsupportedModelError(
                "encoder_decoder",
                f"{type(transformer).__name__} has a decoder that attends to an encoder",
            )
        forward = vars(transformer.base_model).get("forward")
        if getattr(forward, "func", None) is _forward or any(
            isinstance(module, hf.PackedEncoder) for module in transformer.modules()
        ):
            raise UnsupportedModelError("already_optimized", "undo() it first")
        if forward is not None:
            raise UnsupportedModelError(
                "forward",
                f"the forward of {type(transformer.base_model).__name__} has been replaced by "
                "another library; restore it first (Accelerator.unwrap_model does)",
            )
        try:
            hf.implementation(transformer.config)
        except versions.UnsupportedVersionError as error:
            raise UnsupportedModelError("transformers_version", str(error)) from error
    expected = [_probe(transformer) for transformer in found]
    optimized = Optimized(model)
    try:
        optimized._apply()
        for transformer, outputs in zip(found, expected, strict=True):
            _compare(transformer, outputs)
            with linear_layers.any_rows():
                _compare(transformer, outputs)
    except BaseException:
        optimized.undo()
        raise
    vars(model)[_KEY] = optimized
    return optimized


@torch.no_grad()
def verify(
    model: nn.Module, texts: Sequence[str], *, tokenizer: Any = None, batch_size: int = 32
) -> float:
    """Measure how far an optimized model is from the untouched one, on texts of one's own.

    Batches of the optimized model are compared with one text at a time through the untouched one,
    which has no padding and nothing to mix up.

    Parameters
    ----------
    model : Module
        As for :func:`optimize`, optimized or not: it is left as it was found.
    texts : sequence of str
        At least one.
    tokenizer : transformers tokenizer, optional
        Needed for a model of transformers; those of sentence-transformers have their own. Texts are
        truncated to its ``model_max_length``.
    batch_size : int, default 32
        Texts in a batch.

    Returns
    -------
    float
        Largest absolute difference of embeddings (sentence-transformers) or of the last hidden
        states (transformers), over the largest absolute value. A few 1e-6 in float32, 1e-2 in
        bfloat16; a mistake is far above.

    Raises
    ------
    ValueError
        If there is no text or no tokenizer.
    UnsupportedModelError
        If the model can't be optimized.

    Examples
    --------
    >>> assert emblas.verify(model, texts) < 1e-5  # doctest: +SKIP
    """
    if isinstance(texts, str) or not len(texts):
        raise ValueError("texts must hold at least one text, as a list")
    if tokenizer is None and isinstance(model, PreTrainedModel):
        raise ValueError("tokenizer must be given for a model of transformers")
    active = vars(model).get(_KEY)
    with _evaluating(model):
        if active is not None:
            active.undo()
        try:
            alone = [_outputs(model, [text], tokenizer) for text in texts]
            with optimize(model):
                together = [
                    _outputs(model, texts[i : i + batch_size], tokenizer)
                    for i in range(0, len(texts), batch_size)
                ]
        finally:
            if active is not None:
                vars(model)[_KEY] = active
                active.changes.clear()
                active._apply()
    expected, actual = torch.cat(alone).float(), torch.cat(together).float()
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


# --- parts ---------------------------------------------------------------------------------------


def _transformers(model: nn.Module) -> list[Any]:
    """Return the outermost models of transformers inside ``model``."""
    if isinstance(model, PreTrainedModel):
        return [model]
    return [found for child in model.children() for found in _transformers(child)]


def _fused() -> Mapping[type, Any]:
    """Functions that replace the ``forward`` of modules, by their exact type."""
    if "sentence_transformers" not in sys.modules:  # then the model has none of these modules
        return {}
    from emblas.integrations import sentence_transformers_pooling as twins

    return twins.FORWARD


def _is_sentence_transformer(model: nn.Module) -> bool:
    if "sentence_transformers" not in sys.modules:
        return False
    from sentence_transformers import SentenceTransformer

    return isinstance(model, SentenceTransformer)


def _encode(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Encode texts; where only pooled vectors are wanted, the model is told which tokens are."""
    arguments = inspect.signature(type(model).encode).bind(model, *args, **kwargs).arguments
    wanted = arguments.get("output_value", "sentence_embedding")
    token = _POOLED.set(_pooled_modes(model) if wanted == "sentence_embedding" else ())
    try:
        return type(model).encode(model, *args, **kwargs)
    finally:
        _POOLED.reset(token)


def _pooled_modes(model: Any) -> tuple[str, ...]:
    """Return the modes of a model whose vectors come from first and last tokens, () for others."""
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    from emblas.integrations.sentence_transformers_pooling import MODES

    first, pooling, *rest = [*model, None, None][: max(len(model), 2)]
    if (
        not isinstance(first, Transformer)
        or type(pooling) is not Pooling
        or not pooling.include_prompt
        or any(type(module) not in (Dense, Normalize) for module in rest)
        or not last_layer.is_patched(first.model)
    ):
        return ()
    modes = pooling.pooling_mode
    modes = tuple(MODES[mode] for mode in ((modes,) if isinstance(modes, str) else modes))
    return modes if last_layer.MODES.issuperset(modes) else ()


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    """Return names and defaults, without annotations: these can't always be pickled."""
    signature = inspect.signature(function)
    empty = inspect.Parameter.empty
    parameters = [p.replace(annotation=empty) for p in signature.parameters.values()]
    return signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty)


def _forward(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a model on the tokens of a padded batch, if that is what it is called with."""
    given = dict(kwargs)
    if args:
        names = [*inspect.signature(type(model).forward).parameters][1:]
        given |= zip(names, args, strict=False)
    batch = _padded_batch(model, given)
    if batch is None:
        return type(model).forward(model, *args, **kwargs)
    shape = given["attention_mask"].shape
    given = _take_padding_out(model, given, batch)
    outputs = type(model).forward(model, **given)
    if last_layer.KEY in given:
        batch = batch._replace(rows=batch.rows[given[last_layer.KEY]])
    return _put_padding_back(model, outputs, batch, shape)


def _padded_batch(model: Any, given: Mapping[str, Any]) -> hf.PaddedBatch | None:
    """Locate the tokens of a padded batch among arguments; None if they hold something else."""
    mask = given.get("attention_mask")
    if (
        not isinstance(mask, Tensor)
        or mask.dim() != 2
        or given.get("use_cache")
        or given.get("past_key_values") is not None
        or given.get("return_dict") is False
        or "cu_seq_lens_q" in given
    ):
        return None
    tokens = given.get("input_ids")
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    if not isinstance(tokens, Tensor) or tokens.shape[:2] != mask.shape:
        return None
    batch = hf.padded_batch(mask != 0)
    if batch.max_seqlen == 0:
        return None
    if _window(model.config) or hasattr(model.config, "relative_attention_num_buckets"):
        batch.check_without_holes()
    return batch


def _take_padding_out(
    model: Any, given: Mapping[str, Any], batch: hf.PaddedBatch
) -> dict[str, Any]:
    """Turn the arguments of a padded batch into those of a packed one."""
    given = dict(given)
    mask = given["attention_mask"]
    positions = given.get("position_ids")
    if positions is None:
        positions = _positions(model, given.get("input_ids"), mask)
    given["position_ids"] = positions.expand(mask.shape)
    packable = [
        name
        for name, value in given.items()
        if isinstance(value, Tensor) and value.dim() >= 2 and value.shape[:2] == mask.shape
    ]
    given |= {name: batch.take(given[name]) for name in packable}
    given |= {
        "attention_mask": None,
        "cu_seq_lens_q": batch.cu_seqlens,
        "cu_seq_lens_k": batch.cu_seqlens,
        "max_length_q": batch.max_seqlen,
        "max_length_k": batch.max_seqlen,
    }
    states = given.get("output_hidden_states")
    states = model.config.output_hidden_states if states is None else states
    if _POOLED.get() and not states:
        pooled = last_layer.pooled_rows(batch.cu_seqlens, _POOLED.get())
        given[last_layer.KEY] = pooled.rows
    if getattr(model.config, "use_cache", False):
        given["use_cache"] = False
    return given


def _positions(model: Any, ids: Tensor | None, mask: Tensor) -> Tensor:
    """Positions of a padded batch, as its model would number them."""
    start = hf.position_start(model)
    if start and ids is not None:  # such models count what is no padding, masked or not
        real = (ids != start - 1).long()
        return real.cumsum(1) * real + start - 1
    return torch.arange(start, start + mask.shape[1], device=mask.device)[None]


def _put_padding_back(model: Any, outputs: Any, batch: hf.PaddedBatch, shape: torch.Size) -> Any:
    """Spread the outputs of a packed batch over the shape of the padded one."""

    def spread(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(spread(part) for part in value)
        if not isinstance(value, Tensor) or value.dim() < 3:
            return value
        return batch.spread(value, shape) if value.shape[:2] == (1, len(batch.rows)) else value

    if not isinstance(outputs, ModelOutput):
        return spread(outputs)
    for name, value in outputs.items():
        outputs[name] = spread(value)
    if outputs.get("pooler_output") is not None:  # of the first token of each text, not of them all
        outputs["pooler_output"] = model.pooler(outputs["last_hidden_state"])
    return outputs


def _window(config: Any) -> int | None:
    """Return the width of a model's sliding windows; None where it has none."""
    window = getattr(config, "sliding_window", None) or getattr(config, "local_attention", None)
    return int(window) if window else None


# --- does it give the same? ----------------------------------------------------------------------


def _probe_inputs(model: Any) -> tuple[Tensor, Tensor]:
    """Random ids and mask of a batch that is padded on the right."""
    lengths = list(_PROBE_LENGTHS)
    window = _window(model.config)
    if window and window + 3 <= _LONGEST_PROBE:
        lengths.append(window + 3)  # so that the window cuts something off
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    pad = getattr(model.config, "pad_token_id", None)
    pad = 0 if pad is None else pad
    ids = torch.randint(vocabulary, mask.shape, generator=generator)
    ids = torch.where(ids == pad, (pad + 1) % vocabulary, ids).masked_fill(~mask, pad)
    return ids.to(model.device), mask.to(device=model.device, dtype=torch.int64)


@torch.no_grad()
def _probe(model: Any, pooled: tuple[str, ...] = ()) -> Tensor:
    """Last hidden states ``(texts, length, hidden)`` of the inputs that a model is compared on."""
    token = _POOLED.set(pooled)
    with _evaluating(model):
        try:
            ids, mask = _probe_inputs(model)
            hidden: Tensor = model.base_model(input_ids=ids, attention_mask=mask)[0]
        except Exception as error:
            raise UnsupportedModelError(
                "forward", f"{type(model).__name__} raised {type(error).__name__}: {error}"
            ) from error
        finally:
            _POOLED.reset(token)
    return hidden.float()


def _compare(model: Any, expected: Tensor) -> None:
    """Raise if an optimized model doesn't give the hidden states of the untouched one."""
    mask = _probe_inputs(model)[1].bool()
    _compare_rows(model, _probe(model)[mask], expected[mask])
    if last_layer.is_patched(model):
        last = torch.zeros_like(mask)
        last[torch.arange(len(mask), device=mask.device), mask.sum(1) - 1] = True
        _compare_rows(model, _probe(model, ("last",))[last], expected[last])


def _compare_rows(model: Any, actual: Tensor, expected: Tensor) -> None:
    eps = torch.finfo(next(model.parameters()).dtype).eps
    tolerance = max(1e-4, 16 * eps)
    difference = float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not difference <= tolerance:
        raise UnsupportedModelError(
            "outputs_differ",
            f"hidden states of {type(model).__name__} differ by {difference:.1e} of the largest "
            f"value from the untouched model's, more than {tolerance:.1e}",
        )


def _outputs(model: Any, texts: Sequence[str], tokenizer: Any) -> Tensor:
    """Rows to compare: embeddings of the texts, or hidden states of their tokens."""
    if isinstance(model, PreTrainedModel):
        batch = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        batch = {name: value.to(model.device) for name, value in batch.items()}
        hidden: Tensor = model.base_model(**batch)[0]
        return hidden[batch["attention_mask"].bool()]
    features = model.preprocess(list(texts))
    features = {
        name: value.to(model.device) if isinstance(value, Tensor) else value
        for name, value in features.items()
    }
    out = model(features)
    for name in ("sentence_embedding", "scores", "token_embeddings"):
        if name in out:
            rows: Tensor = out[name]
            mask = out["attention_mask"].bool()
            return rows[mask] if name == "token_embeddings" else rows.flatten(1)
    raise ValueError(f"model must return embeddings, got {', '.join(out)}")
