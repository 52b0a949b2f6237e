"""Different models for queries and for documents."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

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

    def encode_query(self, texts: str | Iterable[str], **options: Any) -> Any:
        """Embed queries; see :meth:`emblas.Encoder.encode`."""
        return self.query.encode_query(texts, **options)

    def encode_document(self, texts: str | Iterable[str], **options: Any) -> Any:
        """Embed documents; see :meth:`emblas.Encoder.encode`."""
        return self.document.encode_document(texts, **options)
