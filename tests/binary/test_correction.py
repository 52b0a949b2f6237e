from __future__ import annotations

import numpy as np
import pytest
import torch
from emblas.binary import (
    HadamardRotation,
    asymmetric_topk,
    correction,
    pack_planes,
    pack_rabitq,
    pack_sign,
    unpack_planes,
)

unit = torch.nn.functional.normalize


def vectors(rows, dim, seed=0):
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_factors(bits, dtype):
    """Scale and error by their definitions, from the codes as they are unpacked."""
    x = (vectors(50, 43) * torch.rand(50, 1).exp()).to(dtype)
    codes, scale, error = pack_rabitq(x, bits)
    assert codes.shape == (50, bits * 6)
    v, rows = unpack_planes(codes, 43, dtype=torch.float64), x.double()
    dots = (v * rows).sum(1)
    r = dots / v.norm(dim=1) / rows.norm(dim=1)
    torch.testing.assert_close(scale.double(), rows.square().sum(1) / dots, rtol=1e-6, atol=0)
    expected = rows.norm(dim=1) * (1 / r**2 - 1).sqrt() / 42**0.5
    torch.testing.assert_close(error.double(), expected, rtol=1e-5, atol=1e-7)


def test_one_bit_is_the_sign_code():
    x = unit(vectors(30, 44), dim=1)
    codes, scale, error = pack_rabitq(x)
    assert torch.equal(codes, pack_sign(x))
    torch.testing.assert_close(scale, 1 / x.abs().sum(1))
    torch.testing.assert_close(error, ((scale**2 * 44 - 1) / 43).sqrt())


def test_values_without_packing():
    x = torch.cat((vectors(20, 9) * 2, torch.tensor([[0.0, 0.5, -0.5, 1, -1, 1.5, 2, -2, 9]])))
    for bits in (1, 2, 3, 4):
        expected = unpack_planes(pack_planes(x, bits, scale=1.0), 9)
        assert torch.equal(correction._values(x, bits), expected)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_unbiased_and_bounded(bits):
    """Over many random rotations: right on average, and as far off as is said."""
    x, queries = unit(vectors(8, 60), dim=1), unit(vectors(6, 60, seed=1), dim=1)
    x[0, 2:] *= 0.01  # without a rotation, signs would say nothing of this
    exact = (queries @ x.T).double()
    off, bound = [], []
    for seed in range(300):
        rotation = torch.linalg.qr(vectors(60, 60, seed=seed)).Q
        codes, scale, error = pack_rabitq(x @ rotation, bits)
        estimate = (queries @ rotation).double() @ unpack_planes(codes, 60).double().T * scale
        off.append((estimate - exact).numpy())
        bound.append((error.double() * queries.norm(dim=1, keepdim=True)).numpy())
    off, bound = np.stack(off), np.stack(bound)
    spread = bound.mean(0)
    np.testing.assert_array_less(np.abs(off.mean(0)), 4.5 * spread / 300**0.5)
    ratio = off / bound
    assert 0.7 < ratio.std() < 1.05
    assert (np.abs(ratio) < 2).mean() > 0.94
    assert np.abs(ratio).max() < 5


def test_fast_rotation_will_do():
    x, queries = unit(vectors(400, 96), dim=1), unit(vectors(50, 96, seed=1), dim=1)
    x[:200, 10:] *= 0.1
    rotation = HadamardRotation(96)
    codes, scale, error = pack_rabitq(rotation(x))
    estimate = rotation(queries) @ unpack_planes(codes, 96).T * scale
    ratio = (estimate - queries @ x.T) / error
    assert abs(float(ratio.mean())) < 0.05
    assert 0.8 < float(ratio.std()) < 1.1
    assert (ratio.abs() < 2).float().mean() > 0.94


def test_better_than_uncorrected():
    """Nearer inner products than sign bits with one factor for all, and better ranks."""
    x = vectors(3000, 64) * torch.rand(3000, 1).add(0.2)
    queries = vectors(50, 64, seed=1)
    exact = queries @ x.T
    best = exact.topk(10, 1).indices

    def recall(ids):
        return (ids[:, :, None] == best[:, None]).any(1).float().mean()

    plain = recall(asymmetric_topk(queries, pack_sign(x), 10)[1])
    recalls = [plain]
    for bits in (1, 2, 4):
        codes, scale, error = pack_rabitq(x, bits)
        scores, ids = asymmetric_topk(queries, codes, 10, scale=scale)
        recalls.append(recall(ids))
        limit = 5 * error[ids] * queries.norm(dim=1, keepdim=True)
        assert ((scores - exact.gather(1, ids)).abs() < limit).all()
    assert recalls == sorted(recalls)
    assert recalls[1] > plain + 0.2


def test_width_of_each_row():
    """The chosen width is at least as good as one for all, for rows of any shape."""
    x = vectors(200, 48)
    x[:100] = x[:100] ** 3
    for bits in (2, 3, 4):
        codes, _, error = pack_rabitq(x, bits)
        v = unpack_planes(pack_planes(x, bits), 48, dtype=torch.float64)
        r = (v * x).sum(1) / v.norm(dim=1) / x.double().norm(dim=1)
        common = x.norm(dim=1) * (1 / r**2 - 1).sqrt() / 47**0.5
        assert (error <= common * 1.02).all()
        assert error[:100].mean() < 0.97 * common[:100].mean()
        scaled = pack_rabitq(x * torch.rand(200, 1).exp(), bits).codes
        assert (scaled == codes).float().mean() > 0.999  # a row's own length doesn't matter


def test_degenerate(monkeypatch):
    codes, scale, error = pack_rabitq(torch.zeros(2, 12))
    assert (codes == 0).all()
    assert (scale > 0).all()
    assert (error < 1e-30).all()
    assert asymmetric_topk(vectors(1, 12), codes, 2, scale=scale)[0].abs().max() < 1e-30
    assert pack_rabitq(torch.ones(3, 1) * 5).scale.tolist() == [5.0] * 3
    x = vectors(90, 20)
    together = pack_rabitq(x, 2)
    monkeypatch.setattr(correction, "_ROWS", 32)
    for one, other in zip(pack_rabitq(x, 2), together, strict=True):
        assert torch.equal(one, other)
    assert pack_rabitq(x[:0], 2).codes.shape == (0, 6)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "x must have dtype", lambda: pack_rabitq(torch.ones(2, 3).long())),
        (ValueError, "x must have 2", lambda: pack_rabitq(torch.ones(3))),
        (ValueError, "bits must be between 1 and 4, got 5", lambda: pack_rabitq(vectors(1, 2), 5)),
        (ValueError, "x must be finite", lambda: pack_rabitq(vectors(1, 2) / 0)),
    ],
)
def test_bad_arguments(error, message, call):
    with pytest.raises(error, match=message):
        call()
