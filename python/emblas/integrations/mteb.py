"""An :class:`emblas.Encoder` for the mteb package, in the protocols of its versions 1 and 2.

>>> results = mteb.evaluate(MtebEncoder(encoder), tasks)      # mteb 2
>>> results = mteb.MTEB(tasks=tasks).run(MtebEncoder(encoder))  # mteb 1

mteb itself isn't imported: what it calls is what it takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from emblas import _op
from emblas.encoder import Encoder, EncoderPair


class MtebEncoder:
    """What mteb calls to embed queries, documents and sentences.

    Parameters
    ----------
    encoder : Encoder or EncoderPair
        Queries and documents get its prompts for them; other texts, and those of which it has no
        prompt, get its ``default_prompt`` (of a pair: other texts go through the encoder of
        documents).
    mteb_model_meta : mteb.ModelMeta, optional
        Name, revision and so on under which mteb files the results; without it, they have no name.
    progress : bool, default False
        Show progress bars.
    similarity : {"cosine", "dot"}, default "cosine"
        How mteb compares vectors: as their model was trained to be compared.

    Raises
    ------
    ValueError
        If ``similarity`` is something else.
    """

    def __init__(
        self,
        encoder: Encoder | EncoderPair,
        mteb_model_meta: Any = None,
        *,
        progress: bool = False,
        similarity: str = "cosine",
    ) -> None:
        _op.check_choice("similarity", similarity, ("cosine", "dot"))
        self._scaled = _unit if similarity == "cosine" else _plain
        self.encoder = encoder
        self.mteb_model_meta = mteb_model_meta
        self.progress = progress

    def encode(self, inputs: Iterable[Any], *args: Any, prompt_type: Any = None, **_: Any) -> Any:
        """Embed the texts of a task.

        Parameters
        ----------
        inputs : iterable of str, or of mappings
            Version 1 hands over sentences, version 2 a DataLoader whose batches have their
            sentences under "text".
        *args, **_
            What mteb says about the task: not used.
        prompt_type : str or enum, optional
            "query", or "document" ("passage" in version 1).

        Returns
        -------
        ndarray
            float32 ``(texts, dim)``.

        Warns
        -----
        TruncationWarning
            If texts were cut.
        """
        texts = list(_texts(inputs))
        kind = getattr(prompt_type, "value", prompt_type)
        options: dict[str, Any] = {"progress": self.progress}
        if kind == "query":
            return self.encoder.encode_query(texts, **options)
        if kind in ("document", "passage"):
            return self.encoder.encode_document(texts, **options)
        if kind is not None:
            raise ValueError(f"prompt_type must be 'query' or 'document', got {kind!r}")
        if isinstance(self.encoder, EncoderPair):
            return self.encoder.document.encode(texts, **options)
        return self.encoder.encode(texts, **options)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Similarities ``(n, m)`` of all pairs."""
        return self._scaled(embeddings1) @ self._scaled(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Similarities ``(n,)`` of row and row."""
        return (self._scaled(embeddings1) * self._scaled(embeddings2)).sum(-1)


def _texts(inputs: Iterable[Any]) -> Iterator[str]:
    for item in inputs:
        if isinstance(item, str):
            yield item
        elif isinstance(item, Mapping) and "text" in item:
            yield from item["text"]
        else:
            keys = list(item) if isinstance(item, Mapping) else type(item).__name__
            raise TypeError(f"inputs must be texts or batches with a field 'text', got {keys}")


def _plain(embeddings: Any) -> Tensor:
    return torch.as_tensor(embeddings).float()


def _unit(embeddings: Any) -> Tensor:
    return torch.nn.functional.normalize(_plain(embeddings), dim=-1)
