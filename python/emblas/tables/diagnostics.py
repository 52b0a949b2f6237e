"""How crowded a hashed table is, and how many rows a vocabulary needs."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from emblas.tables.functions import hash_keys
from emblas.tables.spec import TableSpec


@dataclasses.dataclass(frozen=True)
class Collisions:
    """What :func:`collisions` counts.

    Attributes
    ----------
    num_ids : int
        Distinct ids.
    indistinct : int
        Ids whose rows, as a multiset (signs aside), are those of another id too: the two have the
        same vector whatever is trained.
    sharing : int
        Ids that share at least one row with another id.
    repeating : int
        Ids of which two rows coincide.
    row_loads : Tensor
        int64 ``(rows,)``: ids that use each row, counted once per hash.
    load_histogram : Tensor
        int64: how many rows have each load, from 0 up.
    """

    num_ids: int
    indistinct: int
    sharing: int
    repeating: int
    row_loads: Tensor
    load_histogram: Tensor

    def hot_rows(self, count: int = 10) -> list[tuple[int, int]]:
        """Return the fullest rows and their loads, fullest first."""
        loads, rows = self.row_loads.sort(descending=True, stable=True)
        pairs = zip(rows[:count].tolist(), loads[:count].tolist(), strict=True)
        return list(pairs)


def collisions(ids: Tensor, spec: TableSpec) -> Collisions:
    """Count exactly how the ids of a vocabulary collide in a table.

    Parameters
    ----------
    ids : Tensor
        int64 or uint64; repeated ids count once.
    spec : TableSpec
        How ids become rows.

    Returns
    -------
    Collisions
    """
    rows = hash_keys(ids.reshape(-1).view(torch.int64).unique(), spec)
    loads = torch.bincount(rows.flatten(), minlength=spec.num_embeddings)
    ordered = rows.sort(1).values
    _, where, counts = ordered.unique(dim=0, return_inverse=True, return_counts=True)
    repeats = (ordered[:, 1:] == ordered[:, :-1]).any(1)
    own = (rows[:, :, None] == rows[:, None, :]).sum(2)  # how often an id itself uses its row
    return Collisions(
        num_ids=len(rows),
        indistinct=int((counts[where] > 1).sum()),
        sharing=int((loads[rows] > own).any(1).sum()),
        repeating=int(repeats.sum()),
        row_loads=loads,
        load_histogram=torch.bincount(loads),
    )


def effective_rank(table: Tensor) -> float:
    """Effective rank of a table: the exponential of the entropy of its singular values.

    Roy and Vetterli (2007), "The effective rank: a measure of effective dimensionality". It is at
    most the number of columns, and falls when a table's rows lie in few directions.

    Parameters
    ----------
    table : Tensor
        ``(rows, dim)``.
    """
    if table.dim() != 2:
        raise ValueError(f"table must have 2 dimensions, got shape {tuple(table.shape)}")
    wide = table.detach().double()
    values = torch.linalg.eigvalsh(wide.t() @ wide).clamp(min=0).sqrt()
    share = values / values.sum()
    return float(torch.special.entr(share).sum().exp())


def rows_needed(frequencies: Tensor, share: float = 0.01, num_hashes: int = 4) -> int:
    """How many rows keep the updates of a row mostly its own id's.

    A row is disturbed by traffic, not by the number of ids that share it: a thousand rare ids do
    less than one frequent one. So this asks that, of the updates of the rows that a random
    occurrence looks up, at most ``share`` come from other ids.

    For ids with frequencies ``f`` that sum to 1, a row of id ``i`` gets updates ``f_i`` from it and
    an expected ``num_hashes (1 - f_i) / rows`` from the others; the part of the others is taken as
    the quotient of these expectations.

    Parameters
    ----------
    frequencies : Tensor
        How often each distinct id occurs; counts or shares.
    share : float, default 0.01
        Allowed part of foreign updates, between 0 and 1.
    num_hashes : int, default 4
        Rows of each id.

    Returns
    -------
    int
        The smallest such number of rows.

    Raises
    ------
    ValueError
        If an argument is out of range.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must be between 0 and 1, got {share}")
    if num_hashes < 1:
        raise ValueError(f"num_hashes must be at least 1, got {num_hashes}")
    f = frequencies.double()
    if f.dim() != 1 or len(f) == 0 or not bool((f > 0).all()):
        raise ValueError("frequencies must be a vector of at least one number, all above 0")
    f = f / f.sum()

    def foreign(rows: int) -> float:
        others = num_hashes * (1 - f) / rows
        return float((f * others / (f + others)).sum())

    low, high = 0, 1
    while foreign(high) > share:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if foreign(middle) > share else (low, middle)
    return high
