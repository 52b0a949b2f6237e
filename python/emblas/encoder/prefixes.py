"""Several vectors of a text, each from behind a prefix that is learned.

A prefix changes all that a model reads behind it, so that nothing is shared: a text goes through
the model once per prefix. It does so in one packed batch, without padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from emblas import packed
from emblas.integrations import transformers as hf


class ParallelPrefixes(nn.Module):
    """Learned vectors in front of every text: ``count`` prefixes, and as many views of the text.

    The output "prefixes" of an :class:`emblas.Encoder` that is given them. In training, they are
    parameters like others, with or without those of the model:

    >>> hidden, offsets = prefixes(model, *packed.pack(texts))  # doctest: +SKIP
    >>> vectors = segment_pool(hidden, offsets, "last").unflatten(0, (-1, 4))  # doctest: +SKIP

    Parameters
    ----------
    count : int
        Number of prefixes.
    dim : int
        ``hidden_size`` of the model.
    length : int, default 1
        Vectors in each, in the place of tokens.
    std : float, default 0.02
        Of the normal distribution that they are drawn from, as small as words' vectors.

    Attributes
    ----------
    vectors : Parameter
        ``(count, length, dim)``.

    Raises
    ------
    ValueError
        If a size isn't positive.

    Notes
    -----
    The parallel paths of PDF (Parallel Decoupling Framework, arXiv 2511.01588), which are driven
    apart by :func:`emblas.losses.information_bound` between any two of them.
    """

    def __init__(self, count: int, dim: int, length: int = 1, *, std: float = 0.02) -> None:
        super().__init__()
        for name, size in (("count", count), ("dim", dim), ("length", length)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.vectors = nn.Parameter(torch.randn(count, length, dim) * std)

    @property
    def count(self) -> int:
        """Number of prefixes."""
        return self.vectors.shape[0]

    @property
    def length(self) -> int:
        """Vectors in each."""
        return self.vectors.shape[1]

    def forward(self, model: Any, token_ids: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """Run a model over every text behind every prefix.

        Parameters
        ----------
        model : transformers.PreTrainedModel
            Without a head, whose attention implementation is "emblas".
        token_ids, cu_seqlens : Tensor
            A packed batch of texts: ids ``(tokens,)`` and offsets ``(texts + 1,)``.

        Returns
        -------
        tuple of Tensor
            Last hidden states of the ``texts * count`` extended sequences, the first text behind
            every prefix coming first, and their offsets ``(texts * count + 1,)``.

        Raises
        ------
        ValueError
            If the model has another hidden size or uses another attention implementation.
        """
        words: Tensor = model.get_input_embeddings()(token_ids)
        if words.shape[1] != self.vectors.shape[2]:
            raise ValueError(
                f"prefixes have vectors of dimension {self.vectors.shape[2]}, model of "
                f"{words.shape[1]}"
            )
        table = torch.cat([self.vectors.flatten(0, 1).to(words.dtype), words])
        lengths = (cu_seqlens.diff().long() + self.length).repeat_interleave(self.count)
        offsets = packed.offsets(lengths)
        if not len(lengths):  # models don't take batches without a token
            return words, offsets
        sequence = torch.arange(len(lengths), device=words.device).repeat_interleave(lengths)
        at = packed.positions(offsets)
        own = sequence % self.count * self.length + at
        word = cu_seqlens[:-1].long()[sequence // self.count] + at - self.length
        index = torch.where(at < self.length, own, word + self.count * self.length)
        return hf.forward_packed(model, None, offsets, inputs_embeds=table[index]), offsets

    def extra_repr(self) -> str:
        """Return the settings that ``repr`` shows."""
        count, length, dim = self.vectors.shape
        return f"{count}, {dim}, length={length}"
