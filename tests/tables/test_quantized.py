"""Tables of integers: storage, lookup, and training that never makes a table of floats."""

from __future__ import annotations

import math

import pytest
import torch
from contract import packed
from emblas._philox import philox4x32
from emblas.tables import ALPT, LearnedStepEmbedding, QuantizedEmbedding
from emblas.tables.packed_codes import pack_codes, row_bytes, unpack_codes
from emblas.tables.quantized import learned_step, stochastic_round


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 7, 8, 11, 16])
@pytest.mark.parametrize("count", [1, 3, 8, 13])
def test_packed_codes(bits, count):
    codes = torch.randint(0, 2**bits, (6, count))
    rows = pack_codes(codes, bits)
    assert rows.shape == (6, row_bytes(count, bits))
    for row, numbers in zip(rows.tolist(), codes.tolist(), strict=True):
        whole = sum(number << i * bits for i, number in enumerate(numbers))
        assert int.from_bytes(row, "little") == whole
    assert torch.equal(unpack_codes(rows, bits, count), codes)
    assert pack_codes(codes[:0], bits).shape == (0, row_bytes(count, bits))


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_quantized_table(bits):
    table = torch.randn(9, 5)
    table[3] = 0
    module = QuantizedEmbedding.from_table(table, bits, padding_id=2)
    largest = 2 ** (bits - 1) - 1
    scale = table.abs().amax(1, keepdim=True) / largest
    error = (module.table() - table).abs()
    assert bool((error <= scale * 0.5001).all())
    assert module.table()[3].tolist() == [0.0] * 5
    codes = module.codes(torch.arange(9))
    assert torch.equal(module.table(), codes * module.scale)
    assert codes.abs().amax(1).tolist() == [largest if i != 3 else 0 for i in range(9)]
    ids = torch.tensor([0, 2, 8, 8])
    expected = module.table()[ids] * (ids != 2)[:, None]
    torch.testing.assert_close(module(ids), expected)
    bags = torch.stack([expected[:2].sum(0), expected[0] * 0, expected[2:].sum(0)])
    torch.testing.assert_close(module(ids, packed((2, 0, 2))), bags)
    assert module.num_bytes == 9 * (row_bytes(5, bits) + 4)
    assert module.num_parameters == 9 * 6
    twin = QuantizedEmbedding(9, 5, bits)
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin.table(), module.table())


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_asymmetric_table(bits):
    """Rows that lie far from zero lose nothing to it; constant and zero rows are exact."""
    table = torch.rand(9, 5) * torch.logspace(-3, 3, 9)[:, None] + 5
    table[3], table[4] = 0, -2.5
    table[5] = torch.tensor([1.0, 1, 1, 1, 1 + 2**-23])
    table[6] = torch.tensor([0, 0, 1e-42, 0, 0])
    module = QuantizedEmbedding.from_table(table, bits, asymmetric=True, padding_id=2)
    step = (table.amax(1) - table.amin(1)) / (2**bits - 1)
    error = (module.table() - table).abs().amax(1)
    assert bool((error <= 0.51 * step + table.abs().amax(1) * 2.0**-21 + 1e-38).all())
    assert module.table()[[3, 4]].tolist() == [[0.0] * 5, [-2.5] * 5]
    symmetric = QuantizedEmbedding.from_table(table, bits).table()
    assert bool((error[[0, 1]] < (symmetric - table).abs().amax(1)[[0, 1]]).all())
    assert module.num_bytes == 9 * (row_bytes(5, bits) + 8)
    codes = module.codes(torch.arange(9))
    assert torch.equal(module.table(), (codes - module.zero_point) * module.scale)
    twin = QuantizedEmbedding(9, 5, bits, asymmetric=True)
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin.eval()(torch.arange(9)), module.table())
    trained = module.train()(torch.tensor([1, 2, 1]), packed((3,)))
    torch.testing.assert_close(module.eval()(torch.tensor([1, 2, 1]), packed((3,))), trained)
    for wrong in (QuantizedEmbedding(9, 5, bits), QuantizedEmbedding(9, 4, bits, asymmetric=True)):
        with pytest.raises((ValueError, RuntimeError), match=r"zero_point|holds a table of"):
            wrong.load_state_dict(module.state_dict())
    with pytest.raises(ValueError, match="modules must have no zero points"):
        ALPT(module)
    fitted = QuantizedEmbedding.from_budget(9 * (row_bytes(5, bits) + 8), 9, 5, asymmetric=True)
    assert fitted.bits == bits


def test_extremes_of_integers():
    """Clipped, never wrapped."""
    module = QuantizedEmbedding(2, 3, 8, scale=1.0)
    module.write(torch.tensor([0, 1]), torch.tensor([[-500.0, 127.4, 500], [-128, 0.4, -0.6]]))
    assert module.table().tolist() == [[-128, 127, 127], [-128, 0, -1]]


def test_stochastic_rounding():
    elements = torch.tensor([3, 2**40 + 1])
    uniform = [
        int(philox4x32([torch.tensor(n) for n in (e % 2**32, e >> 32, 5, 2)], 9)[0]) / 2**32
        for e in elements.tolist()
    ]
    for x in (-1.75, -0.25, 0.0, 2.5, 3.0):
        rounded = stochastic_round(torch.full((2,), x), elements, 5 + 2**33, 9)
        expected = [math.floor(x) + (u < x - math.floor(x)) for u in uniform]
        assert rounded.tolist() == expected
    x = torch.full((100_000,), -0.3)
    mean = float(stochastic_round(x, torch.arange(len(x)), 0, 0).mean())
    assert abs(mean + 0.3) < 5 * math.sqrt(0.21 / len(x))


@pytest.mark.parametrize("bits", [2, 8])
def test_learned_step_by_hand(bits):
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    scale = torch.rand(4, 1, dtype=torch.float64).add(0.02).requires_grad_()
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    out = learned_step(x, scale, bits)
    grad = torch.randn(4, 6, dtype=torch.float64)
    dx, dscale = torch.autograd.grad(out, (x, scale), grad)
    for i in range(4):
        s, total = float(scale[i].detach()), 0.0
        for j in range(6):
            r = float(x[i, j].detach()) / s
            assert float(out[i, j].detach()) == pytest.approx(min(max(round(r), low), high) * s)
            inside = low <= r <= high
            assert float(dx[i, j]) == (float(grad[i, j]) if inside else 0)
            slope = round(r) - r if inside else (low if r < low else high)
            total += float(grad[i, j]) * slope
        assert float(dscale[i]) == pytest.approx(total / math.sqrt(24 * high))
    with pytest.raises(ValueError, match="bits must be one of"):
        learned_step(x, scale, 3)


def steps(module, optimizer, with_closure, count=300):
    """Fit the vectors of ten ids to fixed targets; returns the squared error at the end."""
    torch.manual_seed(3)
    targets = torch.randn(10, 4) * 0.5
    for _ in range(count):
        ids = torch.randint(0, 10, (8,))

        def closure(ids=ids):
            optimizer.zero_grad()
            loss = (module(ids) - targets[ids]).square().sum()
            loss.backward()
            return loss

        closure()
        optimizer.step(closure if with_closure else None)
    return float((module.table().detach() - targets).square().mean())


def test_training_without_floats():
    """Steps far below one integer still arrive; scales learn if there is a closure."""
    fixed = QuantizedEmbedding(10, 4, 8, scale=0.02)
    before = fixed.scale.clone()
    assert steps(fixed, ALPT(fixed, lr=0.05), False) < 1e-3
    assert torch.equal(fixed.scale, before)
    # 4 bits of 0.02 reach 0.14 only: the scales have to grow.
    torch.manual_seed(0)
    learning = QuantizedEmbedding(10, 4, 4, scale=0.02)
    error = steps(learning, ALPT(learning, lr=0.05, scale_lr=0.02), True)
    torch.manual_seed(0)
    clipped = QuantizedEmbedding(10, 4, 4, scale=0.02)
    assert error < 0.1 * steps(clipped, ALPT(clipped, lr=0.05), False)
    assert float(learning.scale.detach().mean()) > 0.05
    again = QuantizedEmbedding(10, 4, 8, scale=0.02)
    again.load_state_dict(fixed.state_dict())
    optimizer = ALPT(again)
    again(torch.arange(3)).sum().backward()
    with pytest.raises(ValueError, match="closure must look up the ids"):
        optimizer.step(lambda: again(torch.arange(4)).sum().backward())


def test_lost_gradients_are_noticed():
    module = QuantizedEmbedding(3, 2)
    optimizer = ALPT(module)
    module(torch.tensor([1]))  # never differentiated
    module(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="the gradient of the last lookup is not applied"):
        module(torch.tensor([1]))
    optimizer.zero_grad()
    module(torch.tensor([1]))


def test_one_step_by_hand():
    module = QuantizedEmbedding(3, 2, 8, scale=0.5)
    module.write(torch.arange(3), torch.tensor([[1.0, -1], [2, 2], [3, 0]]))
    optimizer = ALPT(module, lr=0.1, seed=4)
    (module(torch.tensor([2, 0, 2])) * torch.tensor([[1.0, 2]])).sum().backward()
    optimizer.step()
    for row, start, grad in ((0, [1.0, -1], [1.0, 2]), (2, [3.0, 0], [2.0, 4])):
        rms = math.sqrt(sum(g * g for g in grad) / 2)
        wanted = torch.tensor([(w - 0.1 * g / rms) / 0.5 for w, g in zip(start, grad, strict=True)])
        codes = stochastic_round(wanted, torch.tensor([2 * row, 2 * row + 1]), 0, 4)
        assert torch.equal(module.codes(torch.tensor([row]))[0], codes.long())
    assert module.table()[1].tolist() == [2, 2]
    module.eval()
    assert not module(torch.tensor([0])).requires_grad


@pytest.mark.parametrize("bits", [4, 8])
def test_learned_step_embedding(bits):
    module = LearnedStepEmbedding(20, 6, bits)
    ids = torch.randint(0, 20, (7,))
    torch.testing.assert_close(module(ids), learned_step(module.weight, module.scale, bits)[ids])
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    target = torch.randn(20, 6) * 0.2
    for _ in range(300):
        optimizer.zero_grad()
        loss = (module(torch.arange(20)) - target).square().mean()
        loss.backward()
        optimizer.step()
        module.advance()
    assert float(loss.detach()) < (4e-3 if bits == 4 else 1e-3)
    frozen = module.freeze()
    torch.testing.assert_close(frozen.table(), module.table(), rtol=1e-6, atol=1e-7)
    assert frozen.num_bytes == 20 * (row_bytes(6, bits) + 4)


def test_bad_arguments():
    table = torch.randn(4, 3)
    for error, message, call in (
        (ValueError, "bits must be one of", lambda: QuantizedEmbedding(4, 3, 5)),
        (ValueError, "bits must be one of", lambda: LearnedStepEmbedding(4, 3, 5)),
        (ValueError, "scale must be above 0", lambda: QuantizedEmbedding(4, 3, scale=0.0)),
        (ValueError, "table must have 2 dim", lambda: QuantizedEmbedding.from_table(table[0])),
        (ValueError, "ids must be 0 to 3", lambda: QuantizedEmbedding(4, 3)(torch.tensor([4]))),
        (ValueError, "num_embeddings must be", lambda: QuantizedEmbedding(0, 3)),
        (TypeError, "modules must be Quantized", lambda: ALPT([torch.nn.Linear(2, 2)])),
        (ValueError, "lr must not be", lambda: ALPT(QuantizedEmbedding(4, 3), -1.0)),
        (ValueError, "num_bytes must be at least 500",
         lambda: QuantizedEmbedding.from_budget(499, 100, 4)),
        (ValueError, "holds a table of",
         lambda: QuantizedEmbedding(4, 4, 4).load_state_dict(
             QuantizedEmbedding(4, 2, 8).state_dict(), strict=False)),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()
    assert QuantizedEmbedding.from_budget(600, 100, 4).bits == 4
    assert QuantizedEmbedding.from_budget(10**6, 100, 4).bits == 16
