"""Texts that are read once and go on in several ways.

A causal model reads a text the same way whatever follows. Several instructions behind one text are
therefore branches of one packed sequence: their tokens see the text and their own branch, and stand
at the positions that they would have if they came alone. With t tokens of text and k branches of b
tokens, t + k b tokens go through the model instead of k (t + b).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emblas import packed
from emblas.encoder.tokens import Branches
from emblas.integrations import transformers as hf


class PackedBranches(NamedTuple):
    """A packed batch of texts, each followed by all branches."""

    token_ids: Tensor
    """int64 ``(tokens,)``."""
    positions: Tensor
    """int64 ``(tokens,)``: every branch counts on from its text."""
    branch: Tensor
    """int64 ``(tokens,)``: number of the branch, -1 in a text."""
    cu_seqlens: Tensor
    """int32 ``(texts + 1,)``."""
    last: Tensor
    """int64 ``(texts, branches)``: last token of each branch."""


def pack_branches(texts: Sequence[list[int]], branches: Branches) -> PackedBranches:
    """Lay texts and branches end to end.

    Parameters
    ----------
    texts : sequence of list of int
        Token ids, with the special tokens that end a text; these move to the end of each branch.
    branches : Branches
        From :func:`emblas.encoder.tokens.branch_tokens`.

    Returns
    -------
    PackedBranches
    """
    tokens: list[int] = []
    positions: list[int] = []
    branch: list[int] = []
    last: list[int] = []
    lengths: list[int] = []
    for ids in texts:
        begin = len(tokens)
        shared = ids[: len(ids) - branches.end]
        tokens += shared
        positions += range(len(shared))
        branch += [-1] * len(shared)
        for number, tail in enumerate(branches.ids):
            tokens += tail
            positions += range(len(shared), len(shared) + len(tail))
            branch += [number] * len(tail)
            last.append(len(tokens) - 1)
        lengths.append(len(tokens) - begin)
    return PackedBranches(
        torch.tensor(tokens, dtype=torch.int64),
        torch.tensor(positions, dtype=torch.int64),
        torch.tensor(branch, dtype=torch.int64),
        packed.offsets(lengths),
        torch.tensor(last, dtype=torch.int64).view(len(texts), len(branches.ids)),
    )


def check_branches(model: Any, modes: Sequence[str]) -> None:
    """Raise where branches would not be what they are alone.

    Raises
    ------
    ValueError
        If a layer isn't causal, has a window or re-routes the last token (which is that of the last
        branch), or vectors are pooled from more than last tokens.
    """
    if tuple(modes) != ("last",):
        raise ValueError(f"the output 'branches' needs pooling='last', got {tuple(modes)}")
    if not hf.is_causal(model):
        raise ValueError(
            "the output 'branches' needs a model whose layers all have causal attention, "
            f"got {type(model).__name__}"
        )
    if getattr(model.config, "sliding_window", None):
        raise ValueError("the output 'branches' needs a model without sliding windows")
    if any("reroute_last" in getattr(m, hf.KEYS, {}) for m in hf.attentions(model)):
        raise ValueError("the output 'branches' needs a model without a re-routed last token")
