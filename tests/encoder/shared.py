"""What each process of test_encoder.py does, in a module that is quickly imported."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from emblas.encoder import Encoder
from integrations.models import TEXTS, make_tokenizer, tiny


def encode_shared(rank, world, port, expected):
    dist.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=world)
    torch.set_num_threads(1)
    out = Encoder(tiny("bert"), make_tokenizer(), token_budget=24).encode_distributed(TEXTS)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    dist.destroy_process_group()
