"""Tables whose rows or columns are spread over the processes of torch.distributed."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist

from emblas import _op
from emblas.tables.base import check_at_least
from emblas.tables.compose import compose_bag
from emblas.tables.composition import Composition, Part
from emblas.tables.functions import hash_keys
from emblas.tables.ids import checked_ids
from emblas.tables.spec import TableSpec

FORMAT = 1  # of a checkpoint's manifest
MANIFEST = "manifest.json"
Group = Any  # a process group of torch.distributed


class _Exchange(torch.autograd.Function):
    """Send rows to processes and receive theirs; gradients take the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
        ctx.how = received, sent, group
        return _exchange(x, sent, received, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _exchange(grad.contiguous(), *ctx.how), None, None, None


def _exchange(x: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
    return out


class ShardedEmbedding(nn.Module):
    """A table that no process holds whole: each has a range of its rows, or of its columns.

    A lookup sends each distinct row number to the process that has the row (all of them, for
    columns) and gets vectors back; a backward pass sends their gradients the same way. Every
    process embeds its own ids, and all must call the module equally often. The gradient of a
    shard is that of the sum of all processes' losses. Vectors are the same bits as in one process;
    gradients of rows that several processes use are added in the order of the processes.

    Without an initialized torch.distributed, one process holds all.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
        Shape of the whole table.
    spec : TableSpec, optional
        Take any ids and sum their hashed rows, as :class:`HashEmbedding`; not signed, and for
        ``num_embeddings`` rows. Default: ids are row numbers.
    by : {"rows", "columns"}, default "rows"
        What is spread. Rows take less traffic where they are wide, columns balance hot rows.
    group : ProcessGroup, optional
        Default: all processes.
    device, dtype : optional
        Of the shard.

    Attributes
    ----------
    weight : Parameter
        The shard: rows (or columns) ``begin`` to ``end`` of the table. Drawn from the uniform
        distribution on (-0.05, 0.05); each process must seed torch differently.
    begin, end : int
        Process ``r`` of ``w`` has ``r * size // w`` to ``(r + 1) * size // w``.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        spec: TableSpec | None = None,
        by: str = "rows",
        group: Group = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least(1, num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        self.by = _op.check_choice("by", by, ("rows", "columns"))
        if spec is not None and (spec.signed or spec.num_embeddings != num_embeddings):
            raise ValueError(f"spec must be unsigned, for {num_embeddings} rows, got {spec}")
        self.num_embeddings, self.embedding_dim, self.spec = num_embeddings, embedding_dim, spec
        self.group = group
        distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if distributed else 0
        self.world_size = dist.get_world_size(group) if distributed else 1
        size = num_embeddings if by == "rows" else embedding_dim
        if size < self.world_size:
            raise ValueError(
                f"there must be at least as many {by} as the {self.world_size} processes, "
                f"got {size}"
            )
        self._bounds = [rank * size // self.world_size for rank in range(self.world_size + 1)]
        self.begin, self.end = self._bounds[self.rank : self.rank + 2]
        own = self.end - self.begin
        shape = (own, embedding_dim) if by == "rows" else (num_embeddings, own)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the shard anew."""
        nn.init.uniform_(self.weight, -0.05, 0.05)

    def rows(self, numbers: Tensor) -> Tensor:
        """Return rows of the whole table.

        Parameters
        ----------
        numbers : Tensor
            int64 ``(rows,)``, ascending.

        Returns
        -------
        Tensor
            ``(rows, embedding_dim)``.
        """
        if self.world_size == 1:
            return nn.functional.embedding(numbers, self.weight)
        if self.by == "rows":
            edges = torch.tensor(self._bounds, device=numbers.device)
            sent = torch.searchsorted(numbers, edges).diff()
            asked = numbers
        else:
            sent = numbers.new_full((self.world_size,), len(numbers))
            asked = numbers.repeat(self.world_size)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        ask, answer = sent.tolist(), received.tolist()
        wanted = _exchange(asked, ask, answer, self.group)
        own = wanted - self.begin if self.by == "rows" else wanted
        vectors = nn.functional.embedding(own, self.weight)
        if self.by == "rows":
            return _Exchange.apply(vectors, answer, ask, self.group)
        # Slices differ in width, so they travel as numbers.
        width = self.end - self.begin
        widths = [b - a for a, b in zip(self._bounds, self._bounds[1:], strict=False)]
        flat = _Exchange.apply(
            vectors.reshape(-1), [count * width for count in answer],
            [len(numbers) * own_width for own_width in widths], self.group,
        )  # fmt: skip
        parts = flat.split([len(numbers) * own_width for own_width in widths])
        return torch.cat([p.view(len(numbers), w) for p, w in zip(parts, widths, strict=True)], 1)

    def forward(
        self,
        ids: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
        *,
        mode: str = "sum",
    ) -> Tensor:
        """Embed ids, or the bags of ids that ``offsets`` delimit; see :func:`compose_bag`."""
        shape, bagged, weights = ids.shape, offsets is not None, per_sample_weights
        if self.spec is None:
            numbers = checked_ids(ids, self.num_embeddings)
        else:
            # An id is a bag of its rows.
            count = self.spec.num_hashes
            if mode != "sum":
                raise ValueError(f"mode must be 'sum' for hashed rows, got {mode!r}")
            numbers = hash_keys(ids, self.spec).reshape(-1)
            if offsets is None:
                offsets = torch.arange(0, len(numbers) + 1, count, device=ids.device)
            else:
                offsets = offsets.long() * count
            if weights is not None:
                weights = weights.reshape(-1).repeat_interleave(count)
        distinct, where = numbers.unique(return_inverse=True)
        vectors = self.rows(distinct)
        if len(distinct) == 0:  # a table needs a row
            vectors = torch.cat([vectors, vectors.new_zeros(1, self.embedding_dim)])
        table = Composition((Part(len(vectors), self.embedding_dim, "radix", a=1),))
        if offsets is None and weights is not None:
            weights = weights.reshape(-1)
        out = compose_bag(where, vectors.contiguous(), table, offsets, weights, mode=mode)
        return out if bagged else out.reshape(*shape, self.embedding_dim)

    # --- checkpoints, of any number of processes -------------------------------------------------

    def _description(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "spec": None if self.spec is None else json.loads(self.spec.to_json()),
        }

    @torch.no_grad()
    def save(self, folder: str | os.PathLike[str], **state: Tensor) -> None:
        """Write a checkpoint: one file for each process and tensor, and a manifest.

        The manifest is written last, when all files are whole. All processes call it.

        Parameters
        ----------
        folder : path-like
            On a file system that all processes see; made if it isn't there. A checkpoint that it
            holds is replaced.
        **state : Tensor
            More tensors of the shape of :attr:`weight`, such as an optimizer's accumulators.
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        tensors = {"weight": self.weight, **self._checked(state)}
        own = {}
        for name, tensor in tensors.items():
            file = f"{name}-{self.by}-{self.begin}-{self.end}-of-{self.world_size}.npy"
            array = _as_array(tensor)
            with (path / file).open("wb") as stream:
                np.save(stream, array, allow_pickle=False)
                stream.flush()
                os.fsync(stream.fileno())
            crc = _checksum(array)
            own[name] = {"file": file, "begin": self.begin, "end": self.end, "crc32": crc}
        everyone: list[Any] = [own]
        if self.world_size > 1:
            everyone = [None] * self.world_size
            dist.all_gather_object(everyone, own, group=self.group)
        if self.rank == 0:
            files = {name: [shards[name] for shards in everyone] for name in tensors}
            dtypes = {name: str(tensor.dtype) for name, tensor in tensors.items()}
            text = json.dumps({**self._description(), "by": self.by, "dtypes": dtypes,
                               "files": files}, indent=1)  # fmt: skip
            temporary = path / f".{MANIFEST}"
            temporary.write_text(text + "\n")
            os.replace(temporary, path / MANIFEST)
        if self.world_size > 1:
            dist.barrier(self.group)

    @torch.no_grad()
    def load(self, folder: str | os.PathLike[str], **state: Tensor) -> None:
        """Read this process's part of a checkpoint, written by any number of processes.

        Parameters
        ----------
        folder : path-like
            Of :meth:`save`, by rows or by columns.
        **state : Tensor
            Tensors to be filled, as they were given to :meth:`save`.

        Raises
        ------
        ValueError
            If the checkpoint is of another table, has no such tensor, or is damaged.
        """
        path = Path(folder)
        manifest = json.loads((path / MANIFEST).read_text())
        own = self._description()
        saved = {name: manifest.get(name) for name in own}
        if saved != own:
            raise ValueError(f"the checkpoint holds a table of {saved}, this module is {own}")
        for name, tensor in {"weight": self.weight, **self._checked(state)}.items():
            if name not in manifest["files"]:
                names = ", ".join(manifest["files"])
                raise ValueError(f"the checkpoint has no {name!r}, it has {names}")
            if manifest["dtypes"][name] != str(tensor.dtype):
                raise ValueError(
                    f"{name} must have dtype {manifest['dtypes'][name]} as in the checkpoint, "
                    f"got {tensor.dtype}"
                )
            for shard in manifest["files"][name]:
                self._read(path, manifest["by"], shard, tensor)

    def _read(self, path: Path, by: str, shard: Mapping[str, Any], tensor: Tensor) -> None:
        """Copy what a file and this process's shard have in common."""
        # Row and column ranges of the file and of this shard.
        whole = [(0, self.num_embeddings), (0, self.embedding_dim)]
        theirs, ours = whole.copy(), whole.copy()
        theirs[by == "columns"] = shard["begin"], shard["end"]
        ours[self.by == "columns"] = self.begin, self.end
        common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(theirs, ours, strict=True)]
        if any(begin >= end for begin, end in common):
            return
        array = np.load(path / shard["file"], mmap_mode="r", allow_pickle=False)
        shape = tuple(end - begin for begin, end in theirs)
        if array.shape != shape:
            raise ValueError(f"{shard['file']} must have shape {shape}, got {array.shape}")
        if _checksum(array) != shard["crc32"]:
            raise ValueError(f"{shard['file']} is damaged: its checksum differs")
        source = [slice(b - t[0], e - t[0]) for (b, e), t in zip(common, theirs, strict=True)]
        target = [slice(b - o[0], e - o[0]) for (b, e), o in zip(common, ours, strict=True)]
        values = torch.from_numpy(np.array(array[tuple(source)]))
        if values.dtype == torch.int16:  # bfloat16, which numpy doesn't know
            values = values.view(torch.bfloat16)
        tensor[tuple(target)] = values.to(tensor.device)

    def _checked(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        for name, tensor in state.items():
            if tensor.shape != self.weight.shape:
                raise ValueError(
                    f"{name} must have the shape of weight, {tuple(self.weight.shape)}, "
                    f"got {tuple(tensor.shape)}"
                )
        return state


def _as_array(tensor: Tensor) -> Any:
    host = tensor.detach().cpu().contiguous()
    return (host.view(torch.int16) if host.dtype == torch.bfloat16 else host).numpy()


def _checksum(array: Any) -> int:
    return zlib.crc32(np.ascontiguousarray(array).data.cast("B"))
