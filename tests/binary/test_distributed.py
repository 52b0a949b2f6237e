from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from binary.sharded import check
from emblas.binary import BinaryIndex, ShardedIndex, merge_topk
from emblas.binary.distributed import _as_integers, _from_integers
from processes import process_group, run_processes

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo"
)


@needs_gloo
def test_two_processes_find_what_one_does(tmp_path):
    run_processes(check, 2, tmp_path)


@pytest.fixture
def alone(tmp_path):
    """A group of this process only."""
    with process_group(0, 1, tmp_path):
        yield


@needs_gloo
def test_one_process(alone):
    index = BinaryIndex(12)
    index.add(torch.randn(30, 12))
    queries = torch.randn(4, 12)
    for one, other in zip(
        ShardedIndex(index).search(queries, 5), index.search(queries, 5), strict=True
    ):
        assert torch.equal(one, other)
    with pytest.raises(TypeError, match="index must be a BinaryIndex, got list"):
        ShardedIndex([])
    with pytest.raises(ValueError, match="12 dimensions, got 11"):
        ShardedIndex(index).search(queries[:, :11], 5)
    with pytest.raises(TypeError, match="filter must have dtype"):
        ShardedIndex(index).search(queries, 5, filter=torch.ones(2))


def test_bits_of_scores():
    scores = torch.tensor([1.5, -0.0, -torch.inf, 3e38])
    low = torch.tensor([-2.5, 1.0, torch.inf, -1e-40])
    both = _as_integers(scores) << 32 | _as_integers(low) & 0xFFFFFFFF
    assert torch.equal(_from_integers(both >> 32, torch.float32), scores)
    assert torch.equal(_from_integers(both, torch.float32), low)


X, IDS = torch.zeros(2, 3), torch.zeros(2, 3).long()


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (RuntimeError, "must be initialized", lambda: merge_topk(X, IDS)),
        (RuntimeError, "must be initialized", lambda: ShardedIndex(BinaryIndex(4))),
        (TypeError, "scores must have dtype", lambda: merge_topk(X.double(), IDS)),
        (TypeError, "ids must have dtype", lambda: merge_topk(X, IDS.int())),
        (ValueError, "same shape", lambda: merge_topk(X, IDS[:1])),
        (ValueError, "scores must have 2", lambda: merge_topk(X[0], IDS)),
    ],
)
def test_bad_arguments(error, message, call):
    with pytest.raises(error, match=message):
        call()
