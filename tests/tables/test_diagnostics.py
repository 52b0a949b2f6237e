from __future__ import annotations

from collections import Counter

import pytest
import torch
from emblas.tables import TableSpec, hash_keys
from emblas.tables.diagnostics import collisions, effective_rank, rows_needed


@pytest.mark.parametrize("num_hashes", [1, 2, 4])
def test_collisions_by_counting(num_hashes):
    spec, ids = TableSpec(30, num_hashes, seed=1), torch.arange(40)
    rows = {i: hash_keys(torch.tensor(i), spec).tolist() for i in range(40)}
    loads = Counter(row for own in rows.values() for row in own)
    users = {row: {i for i, own in rows.items() if row in own} for row in range(30)}
    sets = Counter(tuple(sorted(own)) for own in rows.values())
    found = collisions(torch.cat([ids, ids]), spec)
    assert found.num_ids == 40
    assert found.row_loads.tolist() == [loads[row] for row in range(30)]
    assert found.load_histogram.tolist() == [
        sum(loads[row] == load for row in range(30)) for load in range(max(loads.values()) + 1)
    ]
    assert found.indistinct == sum(sets[tuple(sorted(own))] > 1 for own in rows.values())
    assert found.sharing == sum(any(len(users[r]) > 1 for r in own) for own in rows.values())
    assert found.repeating == sum(len(set(own)) < num_hashes for own in rows.values())
    row, load = found.hot_rows(1)[0]
    assert load == max(loads.values()) == loads[row]


def test_degenerate_seed_shows():
    """The exact count for spaCy's first table is far above that for other seeds."""
    ids = torch.arange(100_000) * 0x1E3779B97F4A7C15
    bad = collisions(ids, TableSpec(1000, seed=8, allow_degenerate_seed=True)).indistinct
    assert bad > 100
    assert collisions(ids, TableSpec(1000, seed=9)).indistinct < 10


def test_effective_rank():
    assert effective_rank(torch.eye(6)) == pytest.approx(6)
    assert effective_rank(torch.ones(9, 4)) == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.diag(torch.tensor([1.0, 1.0, 0.0]))) == pytest.approx(2)
    with pytest.raises(ValueError, match="table must have 2 dimensions"):
        effective_rank(torch.ones(3))


def test_rows_needed():
    even = torch.ones(1000)
    rows = rows_needed(even, 0.1, num_hashes=1)
    # Each row: 1/1000 of its own and (999/1000) / rows of others: 0.1 foreign at 9 * 999 rows.
    assert abs(rows - 9 * 999) <= 1
    zipf = 1 / torch.arange(1.0, 1001)
    assert rows_needed(zipf, 0.1) < rows_needed(even, 0.1)
    assert rows_needed(zipf, 0.01) > rows_needed(zipf, 0.1)
    assert rows_needed(torch.ones(1)) == 1
    for arguments, message in (
        ((even, 0.0), "share must be between 0 and 1"),
        ((even, 0.1, 0), "num_hashes must be at least 1"),
        ((torch.zeros(3),), "frequencies must be a vector"),
    ):
        with pytest.raises(ValueError, match=message):
            rows_needed(*arguments)
