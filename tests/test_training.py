"""A whole training step over packed texts, in all the ways in which steps are made larger."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
import torch._inductor
from emblas import packed
from emblas.losses import CachedLoss, InfoNCE
from emblas.tables import HashEmbedding
from emblas.tables import optim as table_optim
from torch import nn
from torch.utils.data import DataLoader

pytest.importorskip("transformers", reason="needs emblas[hf]")

from emblas.encoder import Encoder
from emblas.integrations import transformers as hf
from integrations.models import TEXTS, make_tokenizer, tiny
from integrations.training import (
    PackedEncoder,
    assert_same,
    encode,
    gradients,
    run,
    texts,
)
from processes import run_processes


@pytest.fixture
def reference():
    """Gradients of the plain step: 8 pairs in one batch."""
    model = PackedEncoder()
    InfoNCE(0.2)(encode(model, texts(8)), encode(model, texts(8, 1))).backward()
    return gradients(model)


def test_two_passes_of_small_batches(reference):
    model = PackedEncoder()
    loss = CachedLoss(lambda rows: encode(model, rows), InfoNCE(0.2), mini_batch=3)
    loss(texts(8), texts(8, 1)).backward()
    assert_same(gradients(model), reference)


def test_activation_checkpointing(reference):
    model = PackedEncoder()
    model.model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    InfoNCE(0.2)(encode(model, texts(8)), encode(model, texts(8, 1))).backward()
    assert_same(gradients(model), reference)


def test_accumulation_and_clipping():
    """Two halves of a batch whose loss is a sum over texts make the step of the whole."""
    rows, targets = texts(8), torch.randn(8, 32)
    states = []
    for parts in (1, 2):
        model = PackedEncoder()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        for part in range(parts):
            at = slice(8 * part // parts, 8 * (part + 1) // parts)
            (encode(model, rows[at]) - targets[at]).square().sum().div(8).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        assert norm > 0.1
        clipped = torch.cat([g.flatten() for g in gradients(model).values()]).norm()
        torch.testing.assert_close(clipped, torch.tensor(0.1), rtol=1e-3, atol=0)
        states.append(gradients(model))
        optimizer.step()
    assert_same(states[1], states[0])


def test_bf16_autocast(reference):
    model = PackedEncoder()
    with torch.autocast("cpu", torch.bfloat16):
        vectors = encode(model, texts(8)), encode(model, texts(8, 1))
        loss = InfoNCE(0.2)(*vectors)
    loss.backward()
    assert loss.dtype == torch.float32
    flat = [torch.cat([g.flatten() for g in x.values()]) for x in (gradients(model), reference)]
    assert nn.functional.cosine_similarity(*flat, dim=0) > 0.99


def test_training_learns():
    model = PackedEncoder()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        loss = InfoNCE(0.1)(encode(model, texts(16)), encode(model, texts(16, 1)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


class TableEncoder(nn.Module):
    """A hashed table, trained by a fused optimizer, under a layer that torch's own trains."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = HashEmbedding(50, 8)
        self.layer = nn.Linear(8, 4)
        self.optimizers = {
            "table": table_optim.AdamW(self.table, lr=1e-2),
            "layer": torch.optim.AdamW(self.layer.parameters(), lr=1e-2),
        }

    def step(self, seed):
        ids = torch.randint(0, 1000, (20,), generator=torch.Generator().manual_seed(seed))
        self.layer(self.table(ids)).square().mean().backward()
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad()


def test_fused_and_plain_optimizers_in_one_checkpoint(tmp_path):
    """A run that is stopped and goes on is, bit for bit, the run that was not."""
    whole = TableEncoder()
    for seed in range(6):
        whole.step(seed)
        if seed == 2:
            optimizers = {name: o.state_dict() for name, o in whole.optimizers.items()}
            torch.save({"model": whole.state_dict(), **optimizers}, tmp_path / "checkpoint.pt")
    again = TableEncoder()
    again.step(9)  # what it has learned before must not show
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    again.load_state_dict(saved["model"])
    for name, optimizer in again.optimizers.items():
        optimizer.load_state_dict(saved[name])
    for seed in range(3, 6):
        again.step(seed)
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.slow
def test_workers_of_a_dataloader():
    """Workers that are spawned; forked after use of torch's threads they may hang, as in torch."""
    rows = texts(20)
    batches = DataLoader(
        rows, batch_size=6, collate_fn=packed.pack, num_workers=1, multiprocessing_context="spawn"
    )
    found = [text for batch in batches for text in packed.split(*batch)]
    assert all(torch.equal(a, b) for a, b in zip(found, rows, strict=True))


class Fixed(nn.Module):
    """A packed encoder with an upper bound of the lengths, so that no size depends on values."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = copy.deepcopy(encoder)

    def forward(self, input_ids, cu_seqlens):
        hidden = hf.forward_packed(self.encoder.model, input_ids, cu_seqlens, max_seqlen=64)
        return self.encoder.pooling(hidden, cu_seqlens)


@pytest.fixture
def exported():
    """A model, and its exported graph for any number of tokens and texts."""
    model = PackedEncoder().eval()
    shapes = ({0: torch.export.Dim("tokens", min=2)}, {0: torch.export.Dim("offsets", min=3)})
    with torch.no_grad():
        graph = torch.export.export(Fixed(model), packed.pack(texts(5)), dynamic_shapes=shapes)
    return model, graph


def assert_serves_every_batch(function, model):
    with torch.no_grad():
        for seed, count in ((1, 3), (2, 9)):
            rows = texts(count, seed)
            actual = function(*packed.pack(rows))
            torch.testing.assert_close(actual, encode(model, rows), rtol=1e-5, atol=1e-6)


def test_export(exported):
    """One exported graph of a whole packed encoder serves every batch."""
    model, graph = exported
    assert_serves_every_batch(graph.module(), model)


@pytest.mark.slow
def test_ahead_of_time(exported, tmp_path):
    """A shared library of the whole packed encoder: compiled, loaded and run."""
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("AOTInductor needs a C++ compiler")
    model, graph = exported
    with torch.no_grad():
        path = torch._inductor.aoti_compile_and_package(
            graph, package_path=str(tmp_path / "encoder.pt2")
        )
    assert_serves_every_batch(torch._inductor.aoti_load_package(path), model)


@pytest.mark.slow
def test_two_processes(reference, tmp_path):
    vectors = Encoder(tiny("bert"), make_tokenizer()).encode(TEXTS)
    run_processes(run, 2, tmp_path, reference, vectors)
