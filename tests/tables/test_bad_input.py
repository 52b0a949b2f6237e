"""Every module refuses ids and offsets that it can't serve, by name."""

from __future__ import annotations

import pytest
import torch
from emblas import tables
from emblas.tables import QuantizedEmbedding, TensorTrainEmbedding

# Of 12 ids; forward takes ids.
VOCABULARY = {
    "QuotientRemainderEmbedding": lambda: tables.QuotientRemainderEmbedding(12, 4),
    "MemComEmbedding": lambda: tables.MemComEmbedding(12, 4, 3),
    "TensorTrainEmbedding": lambda: TensorTrainEmbedding((3, 4), (2, 2), 2),
    "AdaptiveEmbedding": lambda: tables.AdaptiveEmbedding(12, 4, 3, 4),
    "QuantizedEmbedding": lambda: QuantizedEmbedding(12, 4),
    "LearnedStepEmbedding": lambda: tables.LearnedStepEmbedding(12, 4),
    "ProductQuantizedEmbedding": lambda: tables.ProductQuantizedEmbedding(12, 4, 2, 3),
    "SubspaceEmbedding": lambda: tables.SubspaceEmbedding(12, 4, 2, 4),
    "DeepLightEmbedding": lambda: tables.DeepLightEmbedding(12, 4, 0.5),
    "PepEmbedding": lambda: tables.PepEmbedding(12, 4),
}
ANY_ID = {
    "HashEmbedding": lambda: tables.HashEmbedding(5, 4),
    "UnifiedEmbedding": lambda: tables.UnifiedEmbedding(5, 4, [1]),
    "RobeEmbedding": lambda: tables.RobeEmbedding(20, 4, 2),
    "WeightedHashEmbedding": lambda: tables.WeightedHashEmbedding(5, 4, 9),
    "DeepHashEmbedding": lambda: tables.DeepHashEmbedding(4, 3, code_dim=8),
}


@pytest.mark.parametrize("name", [*VOCABULARY, *ANY_ID])
def test_ids_of_another_dtype(name):
    module = {**VOCABULARY, **ANY_ID}[name]()
    for ids in (torch.tensor([1, 2], dtype=torch.int32), torch.tensor([1.0])):
        with pytest.raises(TypeError, match="ids must have dtype int64, uint64, got"):
            module(ids)


@pytest.mark.parametrize("name", VOCABULARY)
def test_ids_outside_of_the_vocabulary(name):
    for train in (True, False):
        module = VOCABULARY[name]().train(train)
        for wrong in (-1, 12, 2**40):
            with pytest.raises(ValueError, match=r"ids .*must be 0 to 11"):
                module(torch.tensor([3, wrong]))


@pytest.mark.parametrize("name", [*VOCABULARY, *ANY_ID])
def test_offsets(name):
    for train in (True, False):
        module = {**VOCABULARY, **ANY_ID}[name]().train(train)
        for wrong in ([0, 2, 1, 3], [0, 4], [1, 3], [0, 2]):
            with pytest.raises(ValueError, match="offsets must start at 0, never decrease and end"):
                module(torch.tensor([1, 2, 3]), torch.tensor(wrong))
        with pytest.raises(TypeError, match="offsets must have dtype"):
            module(torch.tensor([1, 2, 3]), torch.tensor([0.0, 3.0]))
