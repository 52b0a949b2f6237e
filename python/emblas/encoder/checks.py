"""Arguments of an encoder, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from emblas import _op
from emblas.binary import Int8Quantizer
from emblas.encoder.branches import check_branches
from emblas.encoder.outputs import OUTPUTS
from emblas.encoder.tokens import TRUNCATION

if TYPE_CHECKING:
    from emblas.encoder.model import Encoder


def model(value: Any, tokenizer: Any) -> None:
    """Raise if ``value`` is no model of transformers, or ``tokenizer`` no tokenizer."""
    if not isinstance(value, nn.Module) or not hasattr(value, "config"):
        raise TypeError(
            f"model must be a model of transformers, got {type(value).__name__}; Encoder.load "
            "takes names and folders, Encoder.from_sentence_transformer models of that library"
        )
    if not callable(tokenizer):
        raise TypeError(f"tokenizer must be callable, got {type(tokenizer).__name__}")


def outputs(names: Sequence[str]) -> None:
    """Raise if ``names`` is no list of outputs."""
    if isinstance(names, str) or not names:
        raise ValueError(f"outputs must be a list of names, got {names!r}")
    for name in names:
        _op.check_choice("outputs", name, OUTPUTS)


def request(
    encoder: Encoder,
    outputs: Sequence[str],
    truncation: str,
    dims: Sequence[int] | None = None,
    quantizer: Int8Quantizer | None = None,
    chunk_size: int = 128,
    chunk_overlap: int = 0,
    branches: Sequence[str] | None = None,
) -> None:
    """Raise if outputs lack what they need, or it doesn't fit the encoder."""
    _op.check_choice("truncation", truncation, TRUNCATION)
    if ("branches" in outputs) != (branches is not None):
        raise ValueError("branches and the output 'branches' go together")
    if branches is not None:
        check_branches(encoder.model, encoder.modes)
    if ("matryoshka" in outputs) != (dims is not None):
        raise ValueError("dims and the output 'matryoshka' go together")
    if dims is not None and not (dims and all(k in range(1, encoder.dim + 1) for k in dims)):
        raise ValueError(f"dims must lie between 1 and {encoder.dim}, got {list(dims)}")
    if "int8" in outputs and quantizer is None:
        raise ValueError("the output 'int8' of a stream needs a quantizer")
    if quantizer is not None and quantizer.start.shape != (encoder.dim,):
        raise ValueError(
            f"quantizer must be of {encoder.dim} dimensions, got {tuple(quantizer.start.shape)}"
        )
    if "lexical" in outputs and encoder.lexical is None:
        raise ValueError("the output 'lexical' needs an Encoder with a lexical head")
    if "prefixes" in outputs and encoder.prefixes is None:
        raise ValueError("the output 'prefixes' needs an Encoder with prefixes")
    if not 0 <= chunk_overlap < chunk_size:
        raise ValueError(
            f"chunk_overlap must lie between 0 and chunk_size - 1, got {chunk_overlap} of "
            f"{chunk_size}"
        )
    device = encoder.model.device
    parts = {**vars(encoder), "quantizer": quantizer}
    del parts["model"]  # which may lie on several
    for name, part in parts.items():
        for x in _tensors(part):
            if x.device != device:
                raise ValueError(f"{name} must be on device {device}, as model, got {x.device}")


def _tensors(part: Any) -> Iterable[Tensor]:
    if isinstance(part, Int8Quantizer):
        return part.start, part.step
    return part.parameters() if isinstance(part, nn.Module) else ()
