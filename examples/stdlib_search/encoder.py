"""all-MiniLM-L6-v2 over packed batches: no padding from the tokenizer to the pooled vector."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import torch
from emblas import packed
from emblas.integrations import transformers as hf
from emblas.pooling import Pooling
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

MAX_LENGTH = 256
BUDGETS = (512, 1024, 2048, 4096, 8192)


class PackedEncoder:
    """Texts to unit vectors.

    Parameters
    ----------
    folder : str
        A sentence-transformers model on disk that is pooled by the mean.
    budget : int
        Most tokens in a batch.
    """

    def __init__(self, folder: str, budget: int = BUDGETS[2]) -> None:
        hf.register()
        self.budget = budget
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model = AutoModel.from_pretrained(
            folder, local_files_only=True, attn_implementation=hf.NAME
        ).eval()
        self.pooling = Pooling("mean", normalize=True)

    def tokenize(self, texts: Sequence[str]) -> list[Tensor]:
        """Token ids of each text, cut to what the model was trained for."""
        encoded = self.tokenizer(list(texts), truncation=True, max_length=MAX_LENGTH)
        return [torch.tensor(ids) for ids in encoded["input_ids"]]

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], progress: str = "") -> Tensor:
        """Unit vectors (texts, hidden); with a progress bar if it is given a label."""
        token_ids = self.tokenize(texts)
        lengths = [len(ids) for ids in token_ids]
        out = torch.empty(len(texts), self.model.config.hidden_size)
        with tqdm(total=sum(lengths), desc=progress, unit=" tokens", disable=not progress) as bar:
            for batch in packed.token_budget_batches(lengths, self.budget):
                tokens, cu_seqlens = packed.pack([token_ids[i] for i in batch])
                hidden = hf.forward_packed(self.model, tokens, cu_seqlens)
                out[batch] = self.pooling(hidden, cu_seqlens)
                bar.update(len(tokens))
        return out

    def sweep_budget(self, texts: Sequence[str], repeats: int = 3) -> dict[int, float]:
        """Measure tokens per second for each budget, interleaved, and keep the fastest."""
        tokens = sum(map(len, self.tokenize(texts)))
        best = dict.fromkeys(BUDGETS, float("inf"))
        runs = list(itertools.product(range(repeats), BUDGETS))
        for _, self.budget in tqdm(runs, desc="Sweeping the token budget", unit=" runs"):
            begin = time.perf_counter()
            self.encode(texts)
            best[self.budget] = min(best[self.budget], time.perf_counter() - begin)
        self.budget = min(best, key=best.__getitem__)
        return {budget: tokens / seconds for budget, seconds in best.items()}
