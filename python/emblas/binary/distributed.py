"""Search over processes: each holds some rows, one collective makes the answer of all rows."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor

from emblas import _op
from emblas.binary.dense import best_order
from emblas.binary.index import BinaryIndex


def _check_group(group: dist.ProcessGroup | None) -> None:
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "torch.distributed must be initialized: call torch.distributed.init_process_group"
        )


def _gather(columns: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Put the columns ``(Q, candidates, n)`` of all processes side by side, in rank order."""
    parts = [torch.empty_like(columns) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, columns.contiguous(), group=group)
    return torch.cat(parts, 1)


def _as_integers(scores: Tensor) -> Tensor:
    """Bits of float32 or int32 values, as int64."""
    return scores.contiguous().view(torch.int32).long()


def _from_integers(bits: Tensor, dtype: torch.dtype) -> Tensor:
    return bits.int().view(dtype)


def merge_topk(
    scores: Tensor, ids: Tensor, *, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """Merge what the processes of a group have found, each in its own rows.

    Every process calls it with the same number of queries and results, and every process gets the
    answer, with one all-gather of 16 bytes for each result.

    Parameters
    ----------
    scores : Tensor
        ``(Q, k)`` of a search over the process' rows: float32 scores, descending, or int32 Hamming
        distances, ascending.
    ids : Tensor
        int64 ``(Q, k)``: rows of the whole, so shards add the number of their first row; -1 where
        there is none.
    group : ProcessGroup, optional
        The default group by default.

    Returns
    -------
    scores, ids : Tensor
        ``(Q, k)``: the same as one search over all rows.

    Raises
    ------
    RuntimeError
        If torch.distributed isn't initialized.
    TypeError
        If an argument has a wrong type.
    ValueError
        If shapes or devices don't fit together.

    Examples
    --------
    ::

        distances, ids = hamming_topk(queries, codes[first:last], 10)
        merge_topk(distances, torch.where(ids < 0, -1, ids + first))
    """
    _op.check_tensor("scores", scores, ndim=2, dtypes=(torch.float32, torch.int32))
    _op.check_tensor("ids", ids, ndim=2, dtypes=(torch.int64,), device=scores.device)
    if scores.shape != ids.shape:
        raise ValueError(
            f"scores and ids must have the same shape, got {tuple(scores.shape)} and "
            f"{tuple(ids.shape)}"
        )
    _check_group(group)
    gathered = _gather(torch.stack((_as_integers(scores), ids), 2), group)
    found, rows = _from_integers(gathered[:, :, 0], scores.dtype), gathered[:, :, 1]
    best = found if scores.dtype == torch.float32 else -found.long()
    order = best_order(best, rows)[:, : scores.shape[1]]
    return found.gather(1, order), rows.gather(1, order)


class ShardedIndex:
    """An index whose rows are divided among the processes of a group; the answers are the same.

    Every process opens or builds the index, keeps its part of the rows and calls :meth:`search`
    with the same arguments. Scanning and rescoring are divided, and so are the bytes that are read;
    one all-gather of 24 bytes for each candidate brings the answer to every process.

    Parameters
    ----------
    index : BinaryIndex
        The whole index, the same in every process; memory-mapped, only this process' part of it is
        read.
    group : ProcessGroup, optional
        The default group by default; gloo for tensors in main memory. With other backends, such as
        NCCL, results travel over the device of the process.

    Raises
    ------
    RuntimeError
        If torch.distributed isn't initialized.
    TypeError
        If ``index`` is no BinaryIndex.
    """

    def __init__(self, index: BinaryIndex, *, group: dist.ProcessGroup | None = None) -> None:
        if not isinstance(index, BinaryIndex):
            raise TypeError(f"index must be a BinaryIndex, got {type(index).__name__}")
        _check_group(group)
        self.group = group
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        self.local = index.shard(rank, size)
        self._first = index._starts()[-1] * rank // size
        backend = dist.get_backend(group)
        self._device = torch.device("cuda" if backend == "nccl" else "cpu")

    @classmethod
    def open(
        cls, folder: str | os.PathLike[str], *, group: dist.ProcessGroup | None = None
    ) -> ShardedIndex:
        """Open a saved index that every process can read; see :meth:`BinaryIndex.open`."""
        return cls(BinaryIndex.open(folder), group=group)

    def search(
        self, queries: Tensor, k: int, *, multiplier: int = 4, filter: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Find the vectors nearest to each query in the rows of all processes.

        Parameters, results and errors are those of :meth:`BinaryIndex.search`, but ids of the
        filter that are not in the index are ignored: no process knows all ids.
        """
        self.local._check_search(queries, k, multiplier)
        if filter is not None:
            _op.check_tensor("filter", filter, ndim=1, dtypes=(torch.int64, torch.int32))
            filter = filter.long()
        coarse, fine, rows = self.local._candidates(queries, k, multiplier, filter)
        ids = self.local._ids(rows)
        rows = torch.where(rows < 0, -1, rows + self._first)
        both = _as_integers(coarse) << 32 | _as_integers(fine) & 0xFFFFFFFF
        columns = torch.stack((both, rows, ids), 2).to(self._device)
        gathered = _gather(columns, self.group).to(queries.device)
        both, rows, ids = gathered.unbind(2)
        coarse, fine = (_from_integers(part, torch.float32) for part in (both >> 32, both))
        # The candidates that one index would have had, then the best of them.
        kept = best_order(coarse, rows)[:, : columns.shape[1]]
        fine, rows, ids = (values.gather(1, kept) for values in (fine, rows, ids))
        best = best_order(fine, rows)[:, :k]
        return fine.gather(1, best), ids.gather(1, best)
