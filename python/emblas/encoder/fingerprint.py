"""What tells encoders apart that give other vectors: a hash of all that goes into them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from emblas.integrations import layer_keys

if TYPE_CHECKING:
    from emblas.encoder.model import Encoder


def fingerprint(encoder: Encoder) -> str:
    """Return a hash of an encoder's parameters and of what is done with them."""
    model = encoder.model
    settings = {
        "config": model.config.to_dict(),
        "tokenizer": _tokenizer(encoder.tokenizer),
        "pooling": encoder.modes,
        "normalize": encoder.normalize,
        "include_prompt": encoder.include_prompt,
        "max_length": encoder.max_length,
        **{name: _structure(getattr(encoder, name)) for name in ("head", "lexical", "token_head")},
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    hidden = model.config.hidden_size
    tensors = dict(
        [
            *model.state_dict().items(),
            *layer_keys.tensors(model).items(),
            *_tensors("prefixes", encoder.prefixes, encoder, hidden),
            *_tensors("head", encoder.head, encoder, hidden * len(encoder.modes)),
            *_tensors("lexical", encoder.lexical, encoder, hidden),
            *_tensors("token_head", encoder.token_head, encoder, hidden),
        ]
    )
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        data = value.detach().cpu().contiguous().reshape(-1)
        digest.update(data.view(torch.uint8).numpy())
    return digest.hexdigest()


def _tokenizer(tokenizer: Any) -> Any:
    """Vocabulary and rules of a fast tokenizer; of others, the name."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return type(tokenizer).__qualname__
    rules = json.loads(backend.to_str())
    for state in ("truncation", "padding"):  # of the last call, whatever it was
        rules.pop(state, None)
    return [rules, getattr(tokenizer, "truncation_side", None)]


def _structure(part: Any) -> list[str] | None:
    """Kinds and settings of a module and those in it."""
    if not isinstance(part, nn.Module):
        return None
    lines = []
    for path, module in part.named_modules():
        settings = {
            name: value
            for name, value in vars(module).items()
            # Not how a module is run: evaluation or training, its own forward or an optimized one.
            if not name.startswith("_") and name not in ("training", "forward")
        }
        # Addresses of functions differ from process to process.
        line = re.sub(r" at 0x[0-9a-f]+", "", f"{path} {type(module).__qualname__} {settings}")
        lines.append(line)
    return lines


def _tensors(
    name: str, part: nn.Module | Callable[[Tensor], Tensor] | None, encoder: Encoder, width: int
) -> Iterator[tuple[str, Tensor]]:
    """Parameters of a module; of a function, which can't be looked into, what it gives."""
    if isinstance(part, nn.Module):
        yield from part.state_dict(prefix=f"{name}.").items()
    elif part is not None:
        rows = torch.arange(4 * width).remainder(17).sub(8).div(8).reshape(4, width)
        with torch.no_grad():
            yield name, part(rows.to(encoder.model.device, encoder.model.dtype))
