from __future__ import annotations

import pytest
import torch
from emblas import packed
from hypothesis import given
from hypothesis import strategies as st


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=9))
def test_pack_and_split(lengths):
    sequences = [torch.randn(n, 3) for n in lengths]
    tokens, cu_seqlens = packed.pack(sequences)
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens.diff().tolist() == lengths
    for actual, expected in zip(packed.split(tokens, cu_seqlens), sequences, strict=True):
        assert torch.equal(actual, expected)
    expected = [position for n in lengths for position in range(n)]
    assert packed.positions(cu_seqlens).tolist() == expected


@given(lengths=st.lists(st.integers(0, 50), max_size=60), budget=st.integers(1, 120))
def test_token_budget(lengths, budget):
    batches = list(packed.token_budget_batches(lengths, budget))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or sum(lengths[i] for i in batch) <= budget


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("lengths must not be negative", lambda: packed.offsets([3, -1])),
        ("less than 2.31 tokens", lambda: packed.offsets([2**30, 2**30])),
        ("sequences must hold at least one", lambda: packed.pack([])),
        ("budget must be at least 1", lambda: next(packed.token_budget_batches([1], 0))),
    ],
)
def test_bad_arguments(message, call):
    with pytest.raises(ValueError, match=message):
        call()
