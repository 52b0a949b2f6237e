"""Row surgery: resized tables, new vocabularies, shared tables."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from emblas.tables import (
    GradientDisentangledEmbedding,
    HashEmbedding,
    MemComEmbedding,
    MultiHashEmbedding,
    QuotientRemainderEmbedding,
    RobeEmbedding,
    UnifiedEmbedding,
    WeightedHashEmbedding,
    fit_rows,
    match_tokens,
    matching_pursuit,
    transfer_rows,
)


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_resize_is_exact(factor):
    ids = torch.randint(-(2**62), 2**62, (50, 2))
    multi = MultiHashEmbedding([30, 17], 4, seed=20, hash="splitmix64", num_hashes=3)
    unified = UnifiedEmbedding(23, 4, [2, 1], seed=3, padding_id=int(ids[0, 0]))
    for module in (multi, unified):
        grown = module.resize(factor)
        assert torch.equal(grown(ids), module(ids))
        assert grown.num_parameters == factor * module.num_parameters
    weighted = WeightedHashEmbedding(30, 4, 70, append_weights=True, seed=1)
    grown = weighted.resize(factor, factor)
    assert torch.equal(grown(ids), weighted(ids))
    assert len(grown.importance) == 70 * factor
    for module in (multi, unified, weighted):
        with pytest.raises(ValueError, match="factor must be at least 1"):
            module.resize(0)


@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize("combine", ["product", "sum", "concat"])
@pytest.mark.parametrize("moduli", [None, 7, (3, 5, 8)])
def test_larger_vocabulary(factor, combine, moduli):
    """Old ids keep their vectors; new ones can be told apart by training."""
    module = QuotientRemainderEmbedding(101, 6, moduli, combine=combine, padding_id=4)
    grown = module.resize(factor)
    ids = torch.arange(101)
    assert torch.equal(grown(ids), module(ids))
    assert grown.num_embeddings == 101 * factor
    with torch.no_grad():
        grown.weight.copy_(torch.randn_like(grown.weight))
    assert len(grown(torch.arange(101 * factor)).unique(dim=0)) == 101 * factor
    with pytest.raises(ValueError, match="factor must be at least 1"):
        module.resize(0)


def test_larger_vocabulary_of_coprime_moduli():
    module = QuotientRemainderEmbedding(101, 6, (3, 5, 8), combine="sum", coprime=True)
    ids = torch.arange(101)
    for factor, moduli in ((2, (3, 5, 16)), (5, (3, 25, 8)), (7, (21, 5, 8))):
        grown = module.resize(factor)
        assert grown.moduli == moduli
        assert torch.equal(grown(ids), module(ids))
    with pytest.raises(ValueError, match="common factors with at most one of the moduli"):
        module.resize(6)


def test_larger_memory():
    """Of single numbers; longer chunks overlap, which an error says."""
    ids = torch.randint(-(2**62), 2**62, (50,))
    module = RobeEmbedding(37, 5, 1, offset=3, padding_id=int(ids[0]))
    grown = module.resize(4)
    assert grown.weight.numel() == 4 * 37
    assert torch.equal(grown(ids), module(ids))
    chunks = RobeEmbedding(37, 6, 3)
    assert torch.equal(chunks.resize(1)(ids), chunks(ids))
    with pytest.raises(ValueError, match="chunk_size must be 1 for an exact resize, got 3"):
        chunks.resize(2)
    larger = RobeEmbedding(100_000, 6, 3)
    assert fit_rows(larger, ids[:10], chunks(ids[:10]).detach()) < 1e-4


def test_more_shared_rows():
    module = MemComEmbedding(100, 3, 7, bias=True)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    ids = torch.arange(100)
    assert torch.equal(module.resize(3)(ids), module(ids))
    assert module.resize(3).num_rows == 21


def test_match_tokens():
    assert match_tokens(["a", "b", "c"], ["c", "x", "a"]).tolist() == [2, -1, 0]
    assert match_tokens(["a"], []).shape == (0,)


def test_copied_and_mean():
    table = torch.randn(5, 3)
    index = torch.tensor([3, -1, 0, -1])
    new = transfer_rows(table, index)
    assert torch.equal(new[[0, 2]], table[[3, 0]])
    torch.testing.assert_close(new[1], (table[3] + table[0]) / 2)
    assert torch.equal(new[1], new[3])


def test_least_squares_finds_an_affine_map():
    donor = torch.randn(60, 5, dtype=torch.float64)
    true = donor @ torch.randn(5, 7, dtype=torch.float64) + torch.randn(7, dtype=torch.float64)
    index = torch.where(torch.arange(60) < 20, torch.arange(60).flip(0) - 40, -1)
    table = torch.zeros(20, 7, dtype=torch.float64)
    table[index[:20]] = true[:20]
    new = transfer_rows(table, index, donor, method="least_squares")
    torch.testing.assert_close(new, true)
    # Fewer shared tokens than unknowns: of least norm, as numpy's.
    index[3:] = -1
    new = transfer_rows(table, index, donor, method="least_squares")
    design = np.concatenate([donor.numpy(), np.ones((60, 1))], 1)
    solution = np.linalg.lstsq(design[:3], true[:3].numpy(), rcond=None)[0]
    np.testing.assert_allclose(new[3:], design[3:] @ solution, rtol=1e-8, atol=1e-8)


def test_matching_pursuit_by_hand():
    dictionary = torch.randn(12, 6, dtype=torch.float64)
    targets = torch.randn(5, 6, dtype=torch.float64)
    atoms, coefficients = matching_pursuit(targets, dictionary, 3)
    for row in range(5):
        chosen, rest = [], targets[row].numpy()
        for _ in range(3):
            cosines = np.abs(dictionary.numpy() @ rest) / dictionary.norm(dim=1).numpy()
            cosines[chosen] = -1
            chosen.append(int(cosines.argmax()))
            basis = dictionary[chosen].numpy().T
            solution = np.linalg.lstsq(basis, targets[row].numpy(), rcond=None)[0]
            rest = targets[row].numpy() - basis @ solution
        assert atoms[row].tolist() == chosen
        np.testing.assert_allclose(coefficients[row], solution)


def test_matching_pursuit_of_sparse_sums():
    dictionary = torch.randn(30, 40, dtype=torch.float64)
    targets = torch.stack([2 * dictionary[3] - dictionary[20], dictionary[7], dictionary[0] * 0])
    atoms, coefficients = matching_pursuit(targets, dictionary, 5)
    torch.testing.assert_close(torch.einsum("nk,nkd->nd", coefficients, dictionary[atoms]), targets)
    assert dict(zip(atoms[1].tolist(), coefficients[1].tolist(), strict=True))[7] == pytest.approx(
        1
    )
    assert coefficients[1].count_nonzero() == 1
    assert coefficients[2].count_nonzero() == 0
    assert all(len(set(row)) == 5 for row in atoms.tolist())
    # A dictionary with equal and zero rows.
    twice = torch.cat([dictionary[:2], dictionary[:2], dictionary[:1] * 0])
    atoms, coefficients = matching_pursuit(targets[2:] + dictionary[:1], twice, 99)
    assert coefficients.isfinite().all()
    # The model's rows are summed like the donor's.
    own = torch.randn(30, 4, dtype=torch.float64)
    donor = torch.cat([dictionary, targets])
    index = torch.cat([torch.arange(30), torch.full((3,), -1)])
    new = transfer_rows(own, index, donor, method="matching_pursuit", num_atoms=2)
    torch.testing.assert_close(new[30:], torch.stack([2 * own[3] - own[20], own[7], own[0] * 0]))


def test_fit_rows():
    """Fewer ids than rows: exact; more: as lstsq."""
    for count, seed in itertools.product((40, 400), (0, 1)):
        ids = torch.arange(count)
        vectors = torch.randn(count, 3, dtype=torch.float64)
        module = HashEmbedding(100, 3, seed=seed, dtype=torch.float64)
        start = module.weight.detach().clone()
        error = fit_rows(module, ids, vectors, iterations=300, tolerance=1e-12)
        out = module(ids).detach()
        assert error == pytest.approx(float((out - vectors).square().mean().sqrt()))
        if count == 40:
            assert error < 1e-6
            continue
        eye = HashEmbedding(100, 100, seed=seed, dtype=torch.float64)
        with torch.no_grad():
            eye.weight.copy_(torch.eye(100))
        design = eye(ids).detach()
        best = design @ torch.linalg.lstsq(design, vectors).solution
        torch.testing.assert_close(out, best, rtol=1e-5, atol=1e-5)
        assert not torch.equal(start, module.weight)
    sparse = HashEmbedding(50, 4, sparse=True)
    assert fit_rows(sparse, torch.arange(10), torch.ones(10, 4)) < 1e-4
    unified = UnifiedEmbedding(50, 4, [1, 2])
    ids = torch.arange(12).view(6, 2)
    assert fit_rows(unified, ids, torch.ones(6, 12)) < 1e-4


def test_gradient_disentangled():
    shared, difference = torch.nn.Embedding(9, 4), HashEmbedding(5, 4)
    module = GradientDisentangledEmbedding(shared, difference)
    ids = torch.tensor([[1, 2], [8, 1]])
    assert torch.equal(module(ids), shared(ids))
    assert [name for name, _ in module.named_parameters()] == ["difference.weight"]
    module(ids).square().sum().backward()
    assert shared.weight.grad is None
    assert difference.weight.grad.count_nonzero() > 0
    shared(ids).sum().backward()
    with torch.no_grad():
        shared.weight += 1  # the generator's step is seen
        difference.weight += 0.5
    torch.testing.assert_close(module(ids), shared(ids) + difference(ids))
    for bad in (torch.nn.ReLU(), QuotientRemainderEmbedding(9, 4)):
        with pytest.raises(TypeError, match="difference must be an embedding with a table"):
            GradientDisentangledEmbedding(shared, bad)


def test_bad_arguments():
    table, index = torch.randn(4, 3), torch.tensor([0, -1])
    for error, message, call in (
        (ValueError, "method must be one of", lambda: transfer_rows(table, index, method="x")),
        (ValueError, "needs a donor", lambda: transfer_rows(table, index, method="least_squares")),
        (ValueError, "donor must have a row for each of 2",
         lambda: transfer_rows(table, index, table, method="matching_pursuit")),
        (ValueError, "index must be -1 to 3", lambda: transfer_rows(table, index + 4)),
        (ValueError, "at least one token", lambda: transfer_rows(table, index * 0 - 1)),
        (TypeError, "index must have dtype", lambda: transfer_rows(table, index.float())),
        (ValueError, "num_atoms must be at least 1", lambda: matching_pursuit(table, table, 0)),
        (ValueError, "dictionary must have rows of 3",
         lambda: matching_pursuit(table, table[:, :2], 1)),
        (TypeError, "module must be a table whose rows",
         lambda: fit_rows(QuotientRemainderEmbedding(9, 4), index, table)),
        (ValueError, "vectors must have shape",
         lambda: fit_rows(HashEmbedding(9, 4), torch.arange(3), table)),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()
