"""Different models for queries and for documents."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emblas.encoder.loading import sentence_transformer
from emblas.encoder.model import Encoder


@dataclass(frozen=True)
class EncoderPair:
    """Different models for queries and for documents, whose vectors are compared.

    Raises
    ------
    ValueError
        If their vectors differ in length.
    """

    query: Encoder
    document: Encoder

    def __post_init__(self) -> None:
        if self.query.dim != self.document.dim:
            raise ValueError(
                f"both encoders must have vectors of one length, got {self.query.dim} for queries "
                f"and {self.document.dim} for documents"
            )

    @classmethod
    def load(
        cls,
        query: str | Path,
        document: str | Path | None = None,
        *,
        device: str | None = None,
        **options: Any,
    ) -> EncoderPair:
        """Load both models from their folders or their names on a hub.

        Parameters
        ----------
        query : str or Path
            As in :meth:`emblas.Encoder.load`.
        document : str or Path, optional
            Without it, ``query`` is a model of sentence-transformers that starts with a ``Router``
            of "query" and "document".
        device : str, optional
            Where they run; default: where the library puts them.
        **options
            Further arguments of both encoders, over what the folders say.

        Raises
        ------
        ValueError
            As in :meth:`emblas.Encoder.from_sentence_transformer`, and if their vectors differ in
            length.
        """
        if document is not None:
            return cls(*(Encoder.load(at, device=device, **options) for at in (query, document)))
        model = sentence_transformer(query, device)
        take_over = Encoder.from_sentence_transformer
        return cls(*(take_over(model, route, **options) for route in ("query", "document")))

    def encode_query(self, texts: str | Iterable[str], **options: Any) -> Any:
        """Embed queries; see :meth:`emblas.Encoder.encode`."""
        return self.query.encode_query(texts, **options)

    def encode_document(self, texts: str | Iterable[str], **options: Any) -> Any:
        """Embed documents; see :meth:`emblas.Encoder.encode`."""
        return self.document.encode_document(texts, **options)
