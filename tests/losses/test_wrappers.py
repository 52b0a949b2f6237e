"""Training wrappers: Matryoshka prefixes, two-pass training, several processes."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from emblas.losses import (
    CachedLoss,
    InfoNCE,
    MatryoshkaLoss,
    cosine_loss,
    gather_rows,
    info_nce,
)
from processes import process_group, run_processes
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def test_matryoshka():
    q, d, negatives = torch.randn(6, 16), torch.randn(8, 16), torch.randn(6, 2, 16)
    loss = MatryoshkaLoss(InfoNCE(0.1), [16, 8, 3], [1, 0.5, 0.25])
    grads = []
    for run in (
        lambda q: loss(q, d, negatives=negatives, focal=0.5),
        lambda q: sum(
            w * info_nce(q[:, :k].contiguous(), d[:, :k], temperature=0.1, focal=0.5,
                         negatives=negatives[..., :k])
            for k, w in ((16, 1), (8, 0.5), (3, 0.25))
        ),
    ):  # fmt: skip
        leaf = q.clone().requires_grad_()
        value = run(leaf)
        value.backward()
        grads.append((value.detach(), leaf.grad))
    torch.testing.assert_close(*grads)
    labels = torch.rand(16)  # not cut, though there are as many of them as dimensions
    of_pairs = MatryoshkaLoss(cosine_loss, [8])(torch.ones(16, 16), torch.ones(16, 16), labels)
    torch.testing.assert_close(of_pairs, (1 - labels).square().mean())
    some = MatryoshkaLoss(lambda x: x.new_tensor(float(x.shape[-1])), [1, 2, 4], samples=1)
    assert {some(q).item() for _ in range(40)} == {1, 2, 4}
    assert repr(loss).startswith("MatryoshkaLoss(\n  dims=[16, 8, 3], weights=[1, 0.5, 0.25]")


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("dims must hold positive", lambda: MatryoshkaLoss(info_nce, [])),
        ("weights must have 2 values", lambda: MatryoshkaLoss(info_nce, [4, 2], [1])),
        ("samples must lie between", lambda: MatryoshkaLoss(info_nce, [4], samples=2)),
        ("at least 9 dims, got 4", lambda: MatryoshkaLoss(info_nce, [9])(torch.ones(2, 4))),
        ("at least one tensor", lambda: MatryoshkaLoss(info_nce, [9])()),
        ("mini_batch must be", lambda: CachedLoss(nn.Linear(2, 2), info_nce, 0)),
        ("batches must not be empty",
         lambda: CachedLoss(nn.Linear(2, 2), info_nce)(torch.ones(0, 2))),
        ("same number of rows", lambda: CachedLoss(nn.Linear(2, 2), info_nce)(
            {"a": torch.ones(2), "b": torch.ones(3)})),
        ("temperature must be positive", lambda: InfoNCE(-1)),
    ],
)  # fmt: skip
def test_bad_arguments(message, call):
    with pytest.raises(ValueError, match=message):
        call()


class Encoder(nn.Module):
    """Remembers how many rows it saw; takes tensors, lists and mappings."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(
            nn.Linear(5, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 4)
        )
        self.seen = []

    def forward(self, batch):
        if isinstance(batch, dict):
            batch = batch["x"] * batch["mask"][:, None]
        if isinstance(batch, list):
            batch = torch.tensor(batch)
        self.seen.append(len(batch))
        return self.layers(batch)


def gradients(module):
    return [p.grad.clone() for p in module.parameters()]


def test_cached_equals_plain():
    x, y = torch.randn(11, 5), torch.randn(11, 5)
    plain = Encoder()
    expected = info_nce(plain(x), plain(y), temperature=0.2)
    (expected * 3).backward()
    for batches in (
        (x, y),
        (x.tolist(), y.tolist()),
        ({"x": x, "mask": torch.ones(11)}, {"x": y, "mask": torch.ones(11)}),
    ):
        encoder = Encoder()
        loss = CachedLoss(encoder, InfoNCE(0.2), mini_batch=4)(*batches)
        (loss * 3).backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradients(encoder), gradients(plain))
        assert max(encoder.seen) == 4
        assert sum(encoder.seen) == 44  # each row twice


def test_cached_draws_dropout_once():
    """The second pass repeats the dropout of the first."""
    encoder = Encoder(dropout=0.5)
    cached = CachedLoss(encoder, InfoNCE(0.2), mini_batch=4)
    x, y = torch.randn(8, 5), torch.randn(8, 5)
    torch.manual_seed(7)
    cached(x, y).backward()
    grads = gradients(encoder)
    encoder.zero_grad()
    torch.manual_seed(7)
    a = torch.cat([encoder(x[i : i + 4]) for i in (0, 4)])
    b = torch.cat([encoder(y[i : i + 4]) for i in (0, 4)])
    info_nce(a, b, temperature=0.2).backward()
    torch.testing.assert_close(grads, gradients(encoder))


def test_cached_autocast_and_learned_temperature():
    encoder, loss = Encoder(), InfoNCE(0.2, learn_temperature=True)
    cached = CachedLoss(encoder, MatryoshkaLoss(loss, [4, 2]), mini_batch=3)
    with torch.autocast("cpu", torch.bfloat16):
        value = cached(torch.randn(8, 5), torch.randn(8, 5))
    value.backward()
    assert value.dtype == torch.float32
    assert loss.log_temperature.grad != 0
    assert all(g.isfinite().all() for g in gradients(encoder))


def test_cached_keeps_no_activations():
    """What is saved for the backward pass doesn't grow with the encoder."""

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 5000), nn.Linear(5000, 4)

        def forward(self, x):
            return self.down(self.up(x).relu())

    encoder = Wide()
    cached = CachedLoss(encoder, InfoNCE(), mini_batch=16)
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    x, y = torch.randn(64, 4), torch.randn(64, 4)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = cached(x, y)
    assert max(sizes) <= 64 * 4
    loss.backward()


def _check(rank):
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(10, 5, generator=generator) for _ in range(2))
    mine = slice(rank * 5, rank * 5 + 5)

    # Unequal numbers of rows, and the gradient of each: what both processes send back.
    part = x[: 3 + rank].clone().requires_grad_()
    rows, begin = gather_rows(part)
    assert begin == (0, 3)[rank]
    assert torch.equal(rows.detach(), torch.cat([x[:3], x[:4]]))
    (rows * (rank + 1)).sum().backward()
    assert (part.grad == 3).all()
    loss = gather_rows(part)[0].square().sum()
    (gradient,) = torch.autograd.grad(loss, part, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()

    # Two processes with half a batch each train as one with the whole batch.
    ids = torch.tensor([0, 1, 2, 3, 4, 0, 1, 5, 6, 7])  # some are false negatives of each other
    guide = torch.randn(2, 10, 3, generator=generator)
    for symmetric, left_out in itertools.product((False, True), repeat=2):
        options, own = {}, {}
        if left_out:
            options = {"query_ids": ids, "document_ids": ids}
            own = {name: x[mine] for name, x in options.items()}
            if not symmetric:
                options["guide"], own["guide"] = tuple(guide), tuple(guide[:, mine])
        one = Encoder()
        expected = info_nce(one(x), one(y), temperature=0.2, symmetric=symmetric, **options)
        expected.backward()
        encoder = Encoder()
        cached = CachedLoss(encoder, InfoNCE(0.2, gather=True, symmetric=symmetric), mini_batch=2)
        model = DistributedDataParallel(cached)
        for _ in range(2):  # DDP's second step differs from its first
            model.zero_grad()
            loss = model(x[mine], y[mine], **own)
            loss.backward()
            total = loss.detach().clone()
            dist.all_reduce(total)
            torch.testing.assert_close(total / 2, expected.detach())
            torch.testing.assert_close(gradients(encoder), gradients(one))
    # Processes whose random states differ must still gather the same prefixes.
    torch.manual_seed(rank)
    sampled = MatryoshkaLoss(InfoNCE(gather=True), [1, 2, 3, 4, 5], samples=2)
    for _ in range(5):
        leaf = x[mine].clone().requires_grad_()
        sampled(leaf, y[mine]).backward()
        dims, _ = gather_rows(leaf.grad.any(0).sum()[None])
        assert dims[0] == dims[1]
    with pytest.raises(ValueError, match="mask is not supported"):
        InfoNCE(gather=True)(x, y, mask=torch.ones(10, 10) > 0)
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum'"):
        InfoNCE(gather=True, symmetric=True, reduction="none")(x, y)
    with pytest.raises(ValueError, match="no margin and no guide"):
        InfoNCE(gather=True, symmetric=True, margin=0.1)(x, y)


def _process(rank, count, folder):
    with process_group(rank, count, folder):
        _check(rank)


def test_two_processes(tmp_path):
    run_processes(_process, 2, tmp_path)


def test_gather_needs_processes():
    with pytest.raises(RuntimeError, match="init_process_group"):
        gather_rows(torch.ones(2, 2))
