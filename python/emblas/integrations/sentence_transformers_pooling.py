"""Twins of sentence-transformers' Pooling, Normalize and SpladePooling on the kernels of emblas.

They take the same configuration, and save to and load from the same model folders. A model folder
names the classes of its modules, and sentence-transformers refuses to load those of other packages
unless told to trust them. Twins are therefore saved under the names of their peers, and what a
folder holds opens everywhere, without emblas. Loaded models get their twins by :func:`use_twins`::

    model = use_twins(SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2"))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from emblas.integrations import versions
from emblas.pooling import Epilogue, segment_pool

try:
    from sentence_transformers.base.modules.normalize import Normalize as _Normalize
    from sentence_transformers.sentence_transformer.modules import Pooling as _Pooling
    from sentence_transformers.sparse_encoder.modules import SpladePooling as _SpladePooling
except ImportError as error:
    raise versions.import_error(__name__, "sentence-transformers", error) from error

MODES = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted_mean",
    "lasttoken": "last",
}


Features = dict[str, Any]


def pool(module: _Pooling, features: Features, **kwargs: Any) -> Features:
    """Pool ``token_embeddings`` into ``sentence_embedding``, as ``module`` is configured."""
    if "token_weights_sum" in features or "cls_token_embeddings" in features:
        return _Pooling.forward(module, features, **kwargs)
    x: Tensor = features["token_embeddings"]
    modes = (module.pooling_mode,) if isinstance(module.pooling_mode, str) else module.pooling_mode
    mode = [MODES[name] for name in modes]
    skip = None
    if not module.include_prompt and "prompt_length" in features:
        length = features["prompt_length"]
        skip = int(length[0] if isinstance(length, Tensor) else length)
    if "cu_seq_lens_q" in features:
        offsets = features["cu_seq_lens_q"]
        pooled = segment_pool(x.squeeze(0), offsets, mode, skip_prefix=skip)
    else:
        mask = features.get("attention_mask")
        if mask is None or mask.shape[-1] != x.shape[1]:
            mask = torch.ones(x.shape[:-1], dtype=torch.int64, device=x.device)
        pooled = segment_pool(x, mask=mask, mode=mode, skip_prefix=skip)
    features["sentence_embedding"] = pooled
    return features


def normalize(module: _Normalize, features: Features, **kwargs: Any) -> Features:
    """Normalize the rows of one of the features."""
    x = features.get(module.module_input_name)
    if x is None or x.dim() != 2:
        return _Normalize.forward(module, features)
    features[module.module_output_name] = Epilogue(normalize=True)(x)
    return features


def pool_splade(module: _SpladePooling, features: Features, **kwargs: Any) -> Features:
    """Pool the logits in ``token_embeddings`` into ``sentence_embedding``."""
    if module.pooling_strategy != "max":
        return _SpladePooling.forward(module, features)
    logits: Tensor = features["token_embeddings"]
    if "cu_seq_lens_q" in features:
        pooled = segment_pool(logits.squeeze(0), features["cu_seq_lens_q"], "max")
    else:
        pooled = segment_pool(logits, mask=features["attention_mask"], mode="max")
    pooled = pooled.relu().log1p()
    if module.activation_function == "log1p_relu":
        pooled = pooled.log1p()
    if module.embedding_dimension is None:
        module.embedding_dimension = pooled.shape[1]
    features["sentence_embedding"] = pooled
    return features


# What `emblas.optimize` puts in place of the methods of these classes.
FORWARD = {_Pooling: pool, _Normalize: normalize, _SpladePooling: pool_splade}


def _new(name: str) -> Any:
    twin = TWINS[name]
    return twin.__new__(twin)


class _Twin:
    """Saved under the name of its peer, and pickled under its own."""

    def __init_subclass__(cls) -> None:
        cls.__module__ = cls.__bases__[1].__module__

    def __reduce__(self) -> tuple[Any, ...]:
        return _new, (type(self).__name__,), self.__dict__


class Pooling(_Twin, _Pooling):
    """Pooling with the results of its twin, but zeros for texts without a pooled token.

    Weights of whole words (``token_weights_sum``) and ready-made CLS vectors are left to the twin.
    """

    forward = pool


class Normalize(_Twin, _Normalize):
    """Normalization with the results of its twin."""

    forward = normalize


class SpladePooling(_Twin, _SpladePooling):
    """SPLADE pooling with the results of its twin: the maximum first, then relu and log1p.

    Both grow with their argument, so nothing of the size of the logits is written. The sum is left
    to the twin. To spare the logits themselves, see :func:`emblas.pooling.vocab_pool`.
    """

    forward = pool_splade


TWINS = {twin.__name__: twin for twin in (Pooling, Normalize, SpladePooling)}


def use_twins(model: nn.Module) -> nn.Module:
    """Put twins in the places of a sentence-transformers model's modules that have one.

    Parameters
    ----------
    model : SentenceTransformer or SparseEncoder
        Of modules that are not those of sentence-transformers, nothing is changed.

    Returns
    -------
    Module
        ``model``.
    """
    for parent in list(model.modules()):
        for name, module in parent.named_children():
            twin = TWINS.get(type(module).__name__)
            if twin is not None and type(module) is twin.__bases__[1]:
                new = _new(twin.__name__)
                new.__setstate__(module.__dict__)
                setattr(parent, name, new)
    return model
