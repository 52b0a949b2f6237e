"""Tables with few nonzero elements, stored as such."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from emblas.tables.base import VocabularyEmbedding


class SparseEmbedding(VocabularyEmbedding):
    """A table of which only the nonzero elements are stored: what pruning leaves.

    Elements lie row after row, with their columns. Where a row starts is either an array over all
    rows (compressed rows) or found by bisection of the row numbers of all elements (coordinates),
    whichever is smaller. Made by :meth:`from_table`. The elements can be trained on: retraining a
    pruned table with its mask is training this module from the table's first values.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
        Shape of the table.
    num_elements : int
        Stored elements.
    padding_id, device, dtype : optional
        As for :class:`HashEmbedding`.

    Attributes
    ----------
    values : Parameter
        ``(num_elements,)``.
    columns : Tensor
        uint8, or int16 or int32 where the dimension is above 2^8 or 2^15.
    starts : Tensor
        int32 ``(num_embeddings + 1,)``: first element of each row; or None.
    rows : Tensor
        int32 ``(num_elements,)``: row of each element; or None.
    """

    _specified = ("num_embeddings", "embedding_dim", "num_elements")
    num_embeddings: int
    columns: Tensor
    starts: Tensor | None
    rows: Tensor | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        num_elements: int,
        *,
        padding_id: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_id=padding_id)
        if not 0 <= num_elements < 2**31 or num_embeddings >= 2**31:
            raise ValueError(
                f"num_elements and num_embeddings must be below 2^31, got {num_elements} and "
                f"{num_embeddings}"
            )
        self.num_elements = num_elements
        self.values = nn.Parameter(torch.zeros(num_elements, device=device, dtype=dtype))
        narrow = torch.uint8 if embedding_dim <= 2**8 else torch.int16
        columns = narrow if embedding_dim <= 2**15 else torch.int32

        def buffer(name: str, size: int | None, dtype: torch.dtype) -> None:
            empty = None if size is None else torch.zeros(size, dtype=dtype, device=device)
            self.register_buffer(name, empty)

        compressed = num_embeddings + 1 <= num_elements
        buffer("columns", num_elements, columns)
        buffer("starts", num_embeddings + 1 if compressed else None, torch.int32)
        buffer("rows", None if compressed else num_elements, torch.int32)

    @classmethod
    def from_table(
        cls, table: Tensor, mask: Tensor | None = None, *, padding_id: int | None = None
    ) -> SparseEmbedding:
        """Store a table's nonzero elements.

        Parameters
        ----------
        table : Tensor
            ``(num_embeddings, embedding_dim)``.
        mask : Tensor, optional
            bool, of that shape: the elements to store; default: those that aren't zero.
        padding_id : int, optional
            An id that embeds to zeros.
        """
        if table.dim() != 2:
            raise ValueError(f"table must have 2 dimensions, got shape {tuple(table.shape)}")
        if mask is None:
            mask = table != 0
        elif mask.shape != table.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"mask must be bool of shape {tuple(table.shape)}, got {mask.dtype} of shape "
                f"{tuple(mask.shape)}"
            )
        size, dim = table.shape
        rows, columns = mask.nonzero().unbind(1)
        module = cls(
            size, dim, len(rows), padding_id=padding_id, device=table.device, dtype=table.dtype
        )
        with torch.no_grad():
            module.values.copy_(table[rows, columns])
            module.columns.copy_(columns)
            if module.starts is not None:
                module.starts[1:] = mask.sum(1).cumsum(0)
            if module.rows is not None:
                module.rows.copy_(rows)
        return module

    def vectors(self, ids: Tensor) -> Tensor:
        """Embed distinct ids, int64 ``(ids,)``, as ``(ids, embedding_dim)``."""
        if self.starts is not None:
            begin, end = self.starts[ids].long(), self.starts[ids + 1].long()
        else:
            assert self.rows is not None
            numbers = ids.int()
            begin = torch.searchsorted(self.rows, numbers)
            end = torch.searchsorted(self.rows, numbers, right=True)
        counts = end - begin
        row = torch.repeat_interleave(counts)
        element = begin[row] + torch.arange(len(row), device=ids.device)
        element = element - (counts.cumsum(0) - counts)[row]
        out = self.values.new_zeros(len(ids), self.embedding_dim)
        return out.index_put((row, self.columns[element].long()), self.values[element])


def density_bytes(num_embeddings: int, embedding_dim: int, num_elements: int) -> int:
    """Return the bytes of a :class:`SparseEmbedding` of float32 with so many elements."""
    return SparseEmbedding(num_embeddings, embedding_dim, num_elements, device="meta").num_bytes


def elements_for_budget(num_bytes: int, num_embeddings: int, embedding_dim: int) -> int:
    """Return the most float32 elements whose :class:`SparseEmbedding` fits a number of bytes.

    Raises
    ------
    ValueError
        If not even one fits.
    """
    low, high = 0, num_embeddings * embedding_dim + 1
    while high - low > 1:
        middle = (low + high) // 2
        fits = density_bytes(num_embeddings, embedding_dim, middle) <= num_bytes
        low, high = (middle, high) if fits else (low, middle)
    if low == 0:
        raise ValueError(f"num_bytes must be at least 9, the size of one element, got {num_bytes}")
    return low
