"""Product-quantized tables: what is trained, what is stored, and that the two agree."""

from __future__ import annotations

import pytest
import torch
from contract import packed
from emblas.tables import (
    MultiGranularQuantizedEmbedding,
    ProductQuantizedEmbedding,
    SubspaceEmbedding,
)
from emblas.tables.clustering import k_means, nearest


def test_k_means():
    centers = torch.tensor([[0.0, 0], [10, 0], [0, 10]])
    points = centers.repeat(20, 1) + torch.randn(60, 2) * 0.1
    centroids, assignment = k_means(points, 3)
    assert (centroids[:, None] - centers).norm(dim=2).amin(0).max() < 0.1
    assert torch.equal(assignment, nearest(points, centroids))
    for cluster in range(3):
        torch.testing.assert_close(centroids[cluster], points[assignment == cluster].mean(0))
    again = k_means(points, 3)
    assert torch.equal(again[0], centroids)
    few, own = k_means(points[:2], 4)
    assert torch.equal(few[:2], points[:2])
    assert few[2:].count_nonzero() == 0
    assert own.tolist() == [0, 1]
    # Fewer distinct points than clusters: the empty ones don't hurt.
    same, assignment = k_means(torch.ones(9, 2), 3)
    assert torch.equal(same[assignment], torch.ones(9, 2))


def test_subspace_digits():
    module = SubspaceEmbedding(60, 6, 3, 4, padding_id=5)
    ids = torch.arange(60)
    codes = module.codes(ids)
    assert codes.tolist() == [[i % 4, i // 4 % 4, i // 16] for i in range(60)]
    vectors = torch.stack([
        torch.cat([module.codebooks[p, int(c)] for p, c in enumerate(row)]) for row in codes
    ])  # fmt: skip
    assert torch.equal(module.table(), vectors)
    expected = torch.where((ids == 5)[:, None], 0, vectors)
    assert torch.equal(module(ids.view(5, 12)), expected.view(5, 12, 6))
    bags = module(ids[:7], packed((3, 0, 4)), torch.arange(7.0))
    weighted = expected[:7] * torch.arange(7.0)[:, None]
    torch.testing.assert_close(
        bags, torch.stack([weighted[:3].sum(0), weighted[0] * 0, weighted[3:].sum(0)])
    )
    assert module.num_bytes == 60 * 1 + 3 * 4 * 2 * 4
    fitted = SubspaceEmbedding.from_budget(500, num_embeddings=60, embedding_dim=6, num_parts=3)
    assert fitted.num_bytes <= 500
    assert SubspaceEmbedding(60, 6, 3, fitted.num_centroids + 1).num_bytes > 500


def test_subspace_of_a_table():
    """Rows that are made of few parts are kept exactly; others lose what k-means loses."""
    books = torch.randn(2, 3, 4)
    table = torch.cat([books[0][torch.arange(50) % 3], books[1][torch.arange(50) // 3 % 3]], 1)
    module = SubspaceEmbedding.from_table(table, 2, 3)
    torch.testing.assert_close(module.table(), table)
    noisy = torch.randn(50, 8)
    few, many = (SubspaceEmbedding.from_table(noisy, 4, k).table() for k in (2, 32))
    assert (many - noisy).norm() < 0.5 * (few - noisy).norm()


@pytest.mark.parametrize("kind", ["vq", "sx"])
def test_product_quantized_by_hand(kind):
    module = ProductQuantizedEmbedding(12, 6, 3, 5, kind=kind, dtype=torch.float64)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    ids = torch.arange(12)
    out = module(ids)
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, list(module.parameters()), grad, allow_unused=True)
    keys = module.centroids if kind == "vq" else module.keys
    wanted = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    for i in range(12):
        for p in range(3):
            span = slice(2 * p, 2 * p + 2)
            q, g = module.queries[i, span], grad[i, span]
            scores = -(q - keys[p]).square().sum(1) if kind == "vq" else keys[p] @ q
            assert torch.equal(out[i, span], module.centroids[p, scores.argmax()])
            if kind == "vq":
                wanted["queries"][i, span] += g
                continue
            soft = scores.softmax(0)
            for k in range(5):  # of softmax(scores) @ centroids, and the value that was taken
                hard = float(k == int(scores.argmax()))
                wanted["centroids"][p, k] += g * hard
                slope = soft[k] * (module.centroids[p, k] - soft @ module.centroids[p]) @ g
                wanted["queries"][i, span] += slope * keys[p, k]
                wanted["keys"][p, k] += slope * q
    for (name, _), gradient in zip(module.named_parameters(), got, strict=True):
        if kind == "vq" and name == "centroids":
            assert gradient is None
        else:
            torch.testing.assert_close(gradient, wanted[name])
    if kind == "vq":
        module(ids[:4])
        loss = module.auxiliary_loss()
        expected = (module(ids[:4]).detach() - module.queries[:4].detach()).square().mean()
        torch.testing.assert_close(loss, expected)
        (gradient,) = torch.autograd.grad(loss, module.centroids)
        assert gradient.count_nonzero() > 0
    assert float(ProductQuantizedEmbedding(3, 2, 1, 2).auxiliary_loss()) == 0


@pytest.mark.parametrize("kind", ["vq", "sx"])
@pytest.mark.parametrize("granular", [False, True])
def test_frozen_form(kind, granular):
    if granular:
        module = MultiGranularQuantizedEmbedding(200, 8, 2, 20, num_frequent=30, kind=kind)
        assert module.rare_centroids == 5
        assert bool((module.scores(torch.arange(30, 200)).argmax(2) < 5).all())
        assert bool((module.scores(torch.arange(30)).argmax(2) >= 5).any())
        size = 30 * 2 + 170 * 1 + 20 * 8 * 4  # 2 codes of 5 and of 3 bits
    else:
        module = ProductQuantizedEmbedding(200, 8, 2, 20, kind=kind)
        size = 200 * 2 + 20 * 8 * 4
    frozen = module.freeze()
    assert torch.equal(frozen.table(), module.table())
    assert frozen.num_bytes == size
    assert type(module)._frozen_bytes(
        200, 8, 2, 20, **({"num_frequent": 30} if granular else {})
    ) == size  # fmt: skip
    twin = SubspaceEmbedding(
        200, 8, 2, 20, num_frequent=frozen.num_frequent, rare_centroids=frozen.rare_centroids
    )
    twin.load_state_dict(frozen.state_dict())
    assert torch.equal(twin.table(), frozen.table())


def test_training_lowers_the_error():
    target = torch.randn(4, 8)[torch.arange(40) % 4] * 0.3
    for kind in ("vq", "sx"):
        module = ProductQuantizedEmbedding(40, 8, 2, 6, kind=kind)
        optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
        first = None
        for _ in range(80):
            optimizer.zero_grad()
            loss = (module(torch.arange(40)) - target).square().mean()
            first = first or float(loss.detach())
            (loss + module.auxiliary_loss()).backward()
            optimizer.step()
        assert float(loss.detach()) < 0.3 * first


def test_budget():
    module = ProductQuantizedEmbedding.from_budget(3000, 1000, 16, 4)
    assert module.freeze().num_bytes <= 3000
    more = module.num_centroids + 1
    assert ProductQuantizedEmbedding._frozen_bytes(1000, 16, 4, more) > 3000
    granular = MultiGranularQuantizedEmbedding.from_budget(4000, 1000, 16, 4)
    assert 3000 < granular.freeze().num_bytes <= 4000
    with pytest.raises(ValueError, match="num_bytes must be at least"):
        ProductQuantizedEmbedding.from_budget(100, 1000, 16, 4)


def test_bad_arguments():
    module = SubspaceEmbedding(6, 4, 2, 3)
    for message, call in (
        ("embedding_dim must be a multiple of num_parts", lambda: SubspaceEmbedding(6, 5, 2, 3)),
        ("num_centroids must be 1 to 65536", lambda: ProductQuantizedEmbedding(6, 4, 2, 0)),
        ("kind must be one of", lambda: ProductQuantizedEmbedding(6, 4, 2, 3, kind="x")),
        ("num_frequent must be 0 to 6",
         lambda: MultiGranularQuantizedEmbedding(6, 4, 2, 3, num_frequent=7)),
        ("rare_centroids must be 1 to 3", lambda: SubspaceEmbedding(6, 4, 2, 3, rare_centroids=4)),
        ("codes must have shape", lambda: module.set_codes(torch.zeros(5, 2).long())),
        ("codes must be 0 to 2", lambda: module.set_codes(torch.full((6, 2), 3))),
        ("table must have 2 dimensions", lambda: SubspaceEmbedding.from_table(torch.ones(4), 2, 3)),
        ("ids must be 0 to 5, got -1 to 2", lambda: module(torch.tensor([-1, 2]))),
        ("holds a table of", lambda: SubspaceEmbedding(6, 4, 1, 9).load_state_dict(
            module.state_dict(), strict=False)),
    ):  # fmt: skip
        with pytest.raises((ValueError, RuntimeError), match=message):
            call()
