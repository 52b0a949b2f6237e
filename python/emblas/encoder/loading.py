"""What a loaded model of sentence-transformers says about itself, as arguments of an Encoder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from emblas.encoder.tokens import most_positions
from emblas.integrations import versions


def sentence_transformer(folder: str | Path, device: str | None = None) -> Any:
    """Load a model of sentence-transformers from its folder or its name on a hub."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise versions.import_error("Encoder.load", "sentence-transformers", error) from error
    return SentenceTransformer(str(folder), device=device)


class Head(nn.Module):
    """Layers of sentence-transformers on pooled vectors, and where these are cut.

    Parameters
    ----------
    layers : iterable of Module
        They share their parameters with the model that they are taken from.
    dim : int or None
        First dimensions that are kept; None: all.
    """

    def __init__(self, layers: Iterable[nn.Module], dim: int | None) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.dim = dim

    def forward(self, pooled: Tensor) -> Tensor:
        """Turn pooled vectors ``(texts, hidden)`` into embeddings."""
        features: Any = {"sentence_embedding": pooled}
        embedding: Tensor = self.layers(features)["sentence_embedding"]
        return embedding[:, : self.dim]

    def extra_repr(self) -> str:
        """Return the settings that ``repr`` shows."""
        return f"dim={self.dim}"


def take_over(model: Any, route: str | None = None) -> tuple[Any, Any, dict[str, Any]]:
    """Return transformer, tokenizer and settings of a model of sentence-transformers.

    With these settings, :meth:`emblas.Encoder.encode` gives what the model's own ``encode`` gives
    by default.

    Raises
    ------
    ValueError
        If it isn't a transformer, a pooling of its tokens and layers on the pooled vectors, if it
        reads chat messages instead of texts, or has no such route.
    """
    from sentence_transformers.base.modules import Normalize, Router, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    from emblas.integrations.sentence_transformers_pooling import MODES

    modules: list[Any] = list(model)
    if route is not None:
        routes: Any = modules[0].sub_modules if modules and isinstance(modules[0], Router) else {}
        if route not in routes:
            raise ValueError(f"model must have a route {route!r}, got {list(routes)}")
        modules = [*routes[route], *modules[1:]]
    first, pooling, *rest = [*modules, None, None][: max(len(modules), 2)]
    if not isinstance(first, Transformer) or not isinstance(pooling, Pooling):
        names = ", ".join(type(module).__name__ for module in modules)
        raise ValueError(f"model must start with Transformer and Pooling, got {names}")
    if "message" in first.modality_config:
        raise ValueError("model must take plain texts, got one that takes chat messages")
    modes, dim = pooling.pooling_mode, model.truncate_dim
    # A vector that is cut is cut last, and not normalized again.
    normalize = dim is None and bool(rest) and isinstance(rest[-1], Normalize)
    layers = rest[:-1] if normalize else rest

    length = first.max_seq_length
    if length is not None:
        length = min(length, most_positions(first.model) or length)
    settings: dict[str, Any] = {
        "pooling": MODES[modes] if isinstance(modes, str) else [MODES[mode] for mode in modes],
        "normalize": normalize,
        "head": Head(layers, dim).eval() if dim is not None or layers else None,
        "prompts": {name: text or "" for name, text in model.prompts.items()},
        "default_prompt": model.default_prompt_name or "",
        "include_prompt": pooling.include_prompt,
        "max_length": length,
    }
    return first.model, first.tokenizer, settings
