"""A small packed encoder, and what each of several processes does with it."""

from __future__ import annotations

import numpy as np
import torch
import transformers
from emblas import packed
from emblas.encoder import Encoder
from emblas.integrations import transformers as hf
from emblas.losses import InfoNCE
from emblas.pooling import Pooling
from integrations.models import SIZES, TEXTS, make_tokenizer, tiny
from processes import process_group
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel


class PackedEncoder(nn.Module):
    """Packed token ids to unit vectors."""

    def __init__(self):
        super().__init__()
        hf.register()
        torch.manual_seed(0)
        config = transformers.BertConfig(
            **SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        self.model = transformers.BertModel(config, add_pooling_layer=False)
        self.model.set_attn_implementation(hf.NAME)
        self.pooling = Pooling("mean", normalize=True)

    def forward(self, input_ids, cu_seqlens):
        return self.pooling(hf.forward_packed(self.model, input_ids, cu_seqlens), cu_seqlens)


def texts(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (count,), generator=generator).tolist()
    return [torch.randint(5, 99, (length,), generator=generator) for length in lengths]


def encode(model, rows):
    return model(*packed.pack(rows))


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual, expected, tolerance=1e-4):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max()) + 1e-4
        assert float((actual[name] - value).abs().max()) <= tolerance * scale + 1e-6, name


def half_a_step(rank, expected_gradients, expected_vectors):
    torch.set_num_threads(1)
    model = PackedEncoder()
    parallel = DistributedDataParallel(model)
    at = slice(4 * rank, 4 * rank + 4)
    # Both sides in one call: a module of DDP runs once per step.
    vectors = encode(parallel, [*texts(8)[at], *texts(8, 1)[at]])
    InfoNCE(0.2, gather=True)(vectors[:4], vectors[4:]).backward()
    assert_same(gradients(model), expected_gradients)
    encoder = Encoder(tiny("bert"), make_tokenizer())
    out = encoder.encode_distributed(iter(TEXTS))
    np.testing.assert_allclose(out, expected_vectors, rtol=1e-4, atol=1e-5)
    for few in ([], TEXTS[:1]):
        assert encoder.encode_distributed(few).shape == (len(few), 32)


def half_a_sharded_step(rank, expected_gradients):
    """FSDP2: every process holds half of each parameter."""
    model = PackedEncoder()
    for layer in model.model.encoder.layer:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    at = slice(4 * rank, 4 * rank + 4)
    losses = []
    for step in range(2):
        vectors = encode(model, [*texts(8)[at], *texts(8, 1)[at]])
        loss = InfoNCE(0.2, gather=True)(vectors[:4], vectors[4:])
        loss.backward()
        if step == 0:
            whole = {n: p.grad.full_tensor() for n, p in model.named_parameters()
                     if p.grad is not None}  # fmt: skip
            assert_same(whole, expected_gradients)
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        losses.append(float(total))
    assert losses[1] < losses[0]


def run(rank, count, folder, *expected):
    """What one of several processes does: half of a training step, and half of the texts."""
    with process_group(rank, count, folder):
        half_a_step(rank, *expected)
        half_a_sharded_step(rank, expected[0])
