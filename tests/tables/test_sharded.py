"""Tables spread over processes: the same results as in one, and checkpoints for any number."""

from __future__ import annotations

import json

import pytest
import torch
from emblas.tables import HashEmbedding, ShardedEmbedding, TableSpec
from processes import process_group, run_processes
from torch import distributed as dist

ROWS, DIM = 50, 7
SPEC = TableSpec(ROWS, 3, seed=2)


def whole_table():
    return torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(1))


def batches(world_size):
    """Ids of each process; one has none."""
    generator = torch.Generator().manual_seed(2)
    counts = [9, 4, 0][:world_size]
    return [torch.randint(0, ROWS, (count,), generator=generator) for count in counts]


def check_lookups(rank, world_size, by, spec):
    """Vectors, bags and gradients against one table that a single process holds."""
    module = ShardedEmbedding(ROWS, DIM, spec=spec, by=by)
    table = whole_table()
    cut = (slice(module.begin, module.end), slice(None))
    cut = cut if by == "rows" else cut[::-1]
    with torch.no_grad():
        module.weight.copy_(table[cut])
    reference = HashEmbedding(ROWS, DIM, num_hashes=3, seed=2)
    reference.weight.data.copy_(table)

    def single(ids):
        return reference(ids) if spec else torch.nn.functional.embedding(ids, reference.weight)

    everyone = batches(world_size)
    ids = everyone[rank]
    out = module(ids)
    assert torch.equal(out, single(ids)), (by, spec)
    out.square().sum().backward()
    sum((single(part) ** 2).sum() for part in everyone).backward()
    torch.testing.assert_close(module.weight.grad, reference.weight.grad[cut])
    half = len(ids) // 2
    weights = torch.rand(len(ids))
    bags = module(ids, torch.tensor([0, half, half, len(ids)]), weights)
    vectors = single(ids) * weights[:, None]
    expected = torch.stack([vectors[:half].sum(0), vectors[:0].sum(0), vectors[half:].sum(0)])
    torch.testing.assert_close(bags, expected, rtol=1e-5, atol=1e-5)


def check_checkpoints(rank, folder, by):
    module = ShardedEmbedding(ROWS, DIM, spec=SPEC, by=by)
    with torch.no_grad():
        cut = (slice(module.begin, module.end), slice(None))
        cut = cut if by == "rows" else cut[::-1]
        module.weight.copy_(whole_table()[cut])
    module.save(folder / by, sums=module.weight * 2)
    for other in ("rows", "columns"):
        twin = ShardedEmbedding(ROWS, DIM, spec=SPEC, by=other)
        sums = torch.zeros_like(twin.weight)
        twin.load(folder / by, sums=sums)
        cut = (slice(twin.begin, twin.end), slice(None))
        cut = cut if other == "rows" else cut[::-1]
        assert torch.equal(twin.weight, whole_table()[cut])
        assert torch.equal(sums, 2 * whole_table()[cut])


def worker(rank, world_size, folder, before):
    with process_group(rank, world_size, folder):
        for by in ("rows", "columns"):
            for spec in (None, SPEC):
                check_lookups(rank, world_size, by, spec)
            check_checkpoints(rank, folder / str(world_size), by)
            for earlier in before:
                module = ShardedEmbedding(ROWS, DIM, spec=SPEC)
                module.load(folder / str(earlier) / by)
                assert torch.equal(module.weight, whole_table()[module.begin : module.end])
        with pytest.raises(ValueError, match="at least as many columns as the"):
            ShardedEmbedding(ROWS, 1, by="columns")


@pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed package")
def test_two_and_three_processes(tmp_path):
    """Three load what two have written, and one what both have."""
    for world_size, before in ((2, ()), (3, (2,))):
        (tmp_path / str(world_size)).mkdir()
        run_processes(worker, world_size, tmp_path, before)
    for world_size in (2, 3):
        for by in ("rows", "columns"):
            module = ShardedEmbedding(ROWS, DIM, spec=SPEC)
            module.load(tmp_path / str(world_size) / by)
            assert torch.equal(module.weight, whole_table())


@pytest.mark.parametrize("by", ["rows", "columns"])
@pytest.mark.parametrize("spec", [None, SPEC])
def test_one_process(tmp_path, by, spec):
    check_lookups(0, 1, by, spec)
    check_checkpoints(0, tmp_path, by)
    module = ShardedEmbedding(ROWS, DIM, spec=spec, by=by, dtype=torch.bfloat16)
    module.save(tmp_path / "half")
    twin = ShardedEmbedding(ROWS, DIM, spec=spec, dtype=torch.bfloat16)
    twin.load(tmp_path / "half")
    assert torch.equal(twin.weight, module.weight)
    ids = torch.tensor([[3, 4], [3, 0]])
    assert module(ids).shape == (2, 2, DIM)
    assert module(ids[:0]).shape == (0, 2, DIM)


def test_bad_checkpoints(tmp_path):
    module = ShardedEmbedding(ROWS, DIM)
    module.save(tmp_path, sums=torch.ones(ROWS, DIM))
    for message, other, state in (
        ("holds a table of", ShardedEmbedding(ROWS, DIM, spec=SPEC), {}),
        ("holds a table of", ShardedEmbedding(ROWS + 1, DIM), {}),
        ("has no 'moments'", module, {"moments": torch.ones(ROWS, DIM)}),
        ("sums must have the shape of weight", module, {"sums": torch.ones(ROWS)}),
        ("must have dtype torch.float32", ShardedEmbedding(ROWS, DIM, dtype=torch.float64), {}),
    ):
        with pytest.raises(ValueError, match=message):
            other.load(tmp_path, **state)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    file = tmp_path / manifest["files"]["weight"][0]["file"]
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="is damaged"):
        module.load(tmp_path)


def test_bad_arguments():
    for message, call in (
        ("by must be one of", lambda: ShardedEmbedding(5, 2, by="tables")),
        ("spec must be unsigned, for 5 rows", lambda: ShardedEmbedding(5, 2, spec=SPEC)),
        ("ids must be 0 to 4", lambda: ShardedEmbedding(5, 2)(torch.tensor([5]))),
        ("num_embeddings must be at least 1", lambda: ShardedEmbedding(0, 2)),
        ("mode must be 'sum'", lambda: ShardedEmbedding(ROWS, 2, spec=SPEC)(
            torch.arange(3), torch.tensor([0, 3]), mode="mean")),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
