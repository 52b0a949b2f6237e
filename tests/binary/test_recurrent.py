from __future__ import annotations

import pytest
import torch
from emblas.binary import (
    RecurrentBinarizer,
    inverse_norms,
    pack_sign,
    recurrent_binary_loss,
    symmetric_topk,
    unpack_planes,
)

normalize = torch.nn.functional.normalize


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize(("hidden", "blocks"), [(0, 1), (16, 2)])
def test_codes_hold_the_values(bits, hidden, blocks):
    module = RecurrentBinarizer(12, 21, bits=bits, hidden=hidden, blocks=blocks)
    x = normalize(torch.randn(30, 12), dim=1)
    module(x)  # in training: batch norm learns its statistics
    module.eval()
    codes = module.encode(x)
    assert codes.shape == (30, bits * 3)
    assert not codes.requires_grad
    assert torch.equal(unpack_planes(codes, 21), module(x))
    assert torch.equal(codes[:, :3], pack_sign(module.encoder(x)))
    values = module(x).abs()
    assert values.max() <= 2 - 2.0 ** (1 - bits)
    assert values.min() >= 2.0 ** (1 - bits)


def test_one_residual_step_by_hand():
    module = RecurrentBinarizer(4, 5, bits=2)
    x = normalize(torch.randn(6, 4), dim=1)
    first = torch.where(module.encoder(x) > 0, 1.0, -1.0)
    rebuilt = normalize(module.decoders[0](first), dim=1)
    second = torch.where(module.residuals[0](x - rebuilt) > 0, 1.0, -1.0)
    assert torch.equal(module(x), first + second / 2)


def test_every_part_learns():
    module = RecurrentBinarizer(12, 16, bits=3, hidden=8)
    x = normalize(torch.randn(20, 12), dim=1)
    recurrent_binary_loss(module(x), module(x + 0.1 * torch.randn(20, 12))).backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_training_beats_its_start():
    """A few steps on clusters: neighbours found by codes become those of the embeddings."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(40, 32, generator=generator) * torch.linspace(1, 0.05, 32)

    def sample(items):
        noise = torch.randn(len(items), 32, generator=generator)
        return normalize(centres[items] + 0.3 * noise, dim=1)

    module = RecurrentBinarizer(32, 16, bits=2)

    def accuracy():
        module.eval()
        items = torch.arange(40).repeat(3)
        codes = module.encode(sample(items))
        scale = inverse_norms(codes[40:], 16)
        _, ids = symmetric_topk(codes[:40], codes[40:], 1, dim=16, scale=scale)
        module.train()
        return (items[40:][ids[:, 0]] == items[:40]).float().mean().item()

    before = accuracy()
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    for _ in range(300):
        items = torch.randint(0, 40, (64,), generator=generator)
        loss = recurrent_binary_loss(module(sample(items)), module(sample(items)), items)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert accuracy() > before + 0.2


def test_loss_by_hand():
    queries, documents = torch.randn(6, 5), torch.randn(6, 5)
    items = torch.tensor([0, 1, 1, 2, 3, 4])
    cosines = normalize(queries, dim=1) @ normalize(documents, dim=1).T / 0.1
    total = 0.0
    for logits in (cosines, cosines.T):
        for i in range(6):
            others = sorted(
                (float(logits[i, j]) for j in range(6) if items[j] != items[i]), reverse=True
            )[:2]
            terms = torch.tensor([float(logits[i, i]), *others])
            total += float(terms.logsumexp(0) - logits[i, i]) / 12
    actual = recurrent_binary_loss(queries, documents, items, temperature=0.1, hard_negatives=2)
    assert float(actual) == pytest.approx(total, rel=1e-5)
    # A batch of one item has no negatives: nothing to learn, and no NaN.
    leaf = queries.clone().requires_grad_()
    loss = recurrent_binary_loss(leaf, documents, torch.zeros(6))
    loss.backward()
    assert float(loss) == 0
    assert (leaf.grad == 0).all()


X = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "must be at least 1 and hidden 0", lambda: RecurrentBinarizer(0, 4)),
        (ValueError, "bits must be between 1 and 4", lambda: RecurrentBinarizer(4, 4, bits=5)),
        (ValueError, "x must have 2 dim", lambda: RecurrentBinarizer(4, 4)(X[0])),
        (ValueError, "same shape", lambda: recurrent_binary_loss(X, X[:2])),
        (ValueError, "at least 2 rows", lambda: recurrent_binary_loss(X[:1], X[:1])),
        (ValueError, "items must have 3", lambda: recurrent_binary_loss(X, X, torch.zeros(2))),
        (ValueError, "temperature must", lambda: recurrent_binary_loss(X, X, temperature=0)),
    ],
)
def test_bad_arguments(error, message, call):
    with pytest.raises(error, match=message):
        call()
