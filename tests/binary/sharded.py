"""What one of several processes does in test_distributed.py."""

import torch
import torch.distributed as dist
from emblas.binary import (
    BinaryIndex,
    ShardedIndex,
    asymmetric_topk,
    dense_topk,
    hamming_topk,
    merge_topk,
    pack_sign,
)
from processes import process_group

DIM = 20


def vectors(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, DIM, generator=torch.Generator().manual_seed(seed))


def check_functions() -> None:
    """Every search over the rows of all processes, ties and too few rows included."""
    x, queries = vectors(90, 0), vectors(5, 1)
    codes = pack_sign(x)
    rank, size = dist.get_rank(), dist.get_world_size()
    first, last = (len(x) * number // size for number in (rank, rank + 1))
    for k in (1, 12, 70, 100):
        for search, documents, asked in (
            (hamming_topk, codes, pack_sign(queries)),
            (asymmetric_topk, codes, queries),
            (dense_topk, x, queries),
        ):
            scores, ids = search(asked, documents[first:last], k)
            found = merge_topk(scores, torch.where(ids < 0, -1, ids + first))
            for one, other in zip(found, search(asked, documents, k), strict=True):
                assert torch.equal(one, other), (search, k)


def check_index(folder: str) -> None:
    x, queries = vectors(120, 2), vectors(6, 3)
    x[60:] = x[:60] + 0.001  # equal codes in different processes
    for number, options in enumerate(
        ({}, {"second_level": "float32"}, {"second_level": "int8"}, {"correction": "rabitq"},
         {"correction": "rabitq", "second_level": "float16"})
    ):  # fmt: skip
        index = BinaryIndex(DIM, **options)
        ids = torch.arange(1000, 880, -1)
        for part in (slice(0, 50), slice(50, 51), slice(51, 120)):
            index.add(x[part], ids[part])
        index.remove(torch.tensor([1000, 930]))
        path = f"{folder}/{number}"
        if dist.get_rank() == 0:
            index.save(path)
        dist.barrier()
        for sharded in (ShardedIndex(index), ShardedIndex.open(path)):
            for k, multiplier, chosen in ((1, 1, None), (7, 3, None), (9, 2, ids[40:70]),
                                          (150, 1, None)):  # fmt: skip
                kept = chosen
                if chosen is not None:
                    kept = chosen[~torch.isin(chosen, torch.tensor([1000, 930]))]
                expected = index.search(queries, k, multiplier=multiplier, filter=kept)
                actual = sharded.search(queries, k, multiplier=multiplier, filter=chosen)
                for one, other in zip(actual, expected, strict=True):
                    assert torch.equal(one, other), (options, k)
    empty = ShardedIndex(BinaryIndex(DIM))
    assert empty.search(queries, 2)[1].tolist() == [[-1, -1]] * 6


def check(rank: int, count: int, folder: str) -> None:
    with process_group(rank, count, folder):
        check_functions()
        check_index(folder)
