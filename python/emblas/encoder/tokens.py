"""Texts to token ids, and what was cut."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from emblas.integrations import transformers as hf

TRUNCATION = ("warn", "error", "ignore")
# A fast tokenizer keeps the truncation of a call as its state, which the calls of other threads
# would see. One lock for all, since copies of a tokenizer may share what they wrap.
_LOCK = threading.Lock()


class Tokens(NamedTuple):
    """Token ids of some texts."""

    ids: list[list[int]]
    cut: list[int]
    """Tokens that each text has lost."""


class Branches(NamedTuple):
    """Token ids of texts that are put behind other texts."""

    ids: list[list[int]]
    """Each with the special tokens that end a text."""
    end: int
    """Number of these special tokens."""

    @property
    def longest(self) -> int:
        """Tokens that the longest one adds to a text."""
        return max(map(len, self.ids)) - self.end


def token_ids(tokenizer: Any, texts: Sequence[str], **options: Any) -> list[list[int]]:
    """Return the ids of each text; whole texts with special tokens, unless ``options`` differ."""
    if not texts:
        return []
    with _LOCK:
        encoded = tokenizer(
            list(texts),
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
            **{"truncation": False, **options},
        )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def tokenize(
    tokenizer: Any, texts: Sequence[str], prompt: str, max_length: int, truncation: str, first: int
) -> Tokens:
    """Tokenize texts behind a prompt, and cut those of more than ``max_length`` tokens.

    Errors name texts by their number, of which that of ``texts[0]`` is ``first``.

    Raises
    ------
    ValueError
        If a text is too long and ``truncation`` is "error", or holds half a character.
    """
    whole = [prompt + text for text in texts]
    try:
        ids = token_ids(tokenizer, whole)
    except TypeError:  # of tokenizers, which says no more
        _check_characters(texts, first)
        raise
    cut = [0] * len(ids)
    long = [i for i, text in enumerate(ids) if len(text) > max_length]
    if long and truncation == "error":
        raise ValueError(
            f"texts[{first + long[0]}] has {len(ids[long[0]])} tokens, more than max_length = "
            f"{max_length}; {len(long)} of {len(ids)} texts are too long"
        )
    # By the tokenizer, which knows the special tokens at the end.
    short = token_ids(tokenizer, [whole[i] for i in long], truncation=True, max_length=max_length)
    for i, text in zip(long, short, strict=True):
        cut[i] = len(ids[i]) - len(text)
        ids[i] = text
    return Tokens(ids, cut)


def _check_characters(texts: Sequence[str], first: int) -> None:
    for i, text in enumerate(texts, first):
        if found := re.search("[\ud800-\udfff]", text):
            raise ValueError(
                f"texts[{i}] must hold whole characters, got half of one, {found[0]!r}, at "
                f"{found.start()}"
            )


def prompt_tokens(tokenizer: Any, prompt: str) -> int:
    """Return the number of tokens of a prompt at the begin of a text."""
    if not prompt:
        return 0
    ids = token_ids(tokenizer, [prompt])[0]
    return len(ids) - (bool(ids) and ids[-1] in tokenizer.all_special_ids)


def branch_tokens(tokenizer: Any, branches: Sequence[str]) -> Branches:
    """Tokenize texts that are put behind other texts.

    Raises
    ------
    ValueError
        If there is none, one has no tokens, or the tokenizer has another way to end a text than by
        special tokens.
    """
    if isinstance(branches, str) or not len(branches):
        raise ValueError(f"branches must be a list of at least one text, got {branches!r}")
    bare = token_ids(tokenizer, branches, add_special_tokens=False)
    whole = token_ids(tokenizer, branches)
    ends = set()
    for text, inside, outside in zip(branches, bare, whole, strict=True):
        if not inside:
            raise ValueError(f"branches must have tokens, got {text!r}")
        begins = range(len(outside) - len(inside) + 1)
        begin = next((i for i in begins if outside[i : i + len(inside)] == inside), None)
        if begin is None:
            raise ValueError("branches need a tokenizer that only adds tokens around a text")
        ends.add(tuple(outside[begin + len(inside) :]))
    if len(ends) != 1:
        raise ValueError("branches need a tokenizer that ends every text with the same tokens")
    end = ends.pop()
    return Branches([[*inside, *end] for inside in bare], len(end))


def most_positions(model: Any) -> int | None:
    """Return how many tokens of a text a model has positions for; None: any number."""
    for module in model.modules():
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, nn.Embedding):
            return table.num_embeddings - hf.position_start(model)
    return None


def special_tokens(tokenizer: Any) -> int:
    """Return how many special tokens a tokenizer adds to a text; 0 where it doesn't say."""
    count = getattr(tokenizer, "num_special_tokens_to_add", None)
    return count() if count is not None else 0


def token_limit(model: Any, tokenizer: Any, max_length: int | None) -> int:
    """Return the most tokens of a text: ``max_length``, or what tokenizer or model states.

    Raises
    ------
    ValueError
        If neither states one, the model has fewer positions, or special tokens take all of them.
    """
    most = most_positions(model)
    length = _stated(model, tokenizer, most) if max_length is None else max_length
    # Tokenizers don't cut at all to fewer tokens than the special ones.
    least = special_tokens(tokenizer) + 1
    if not least <= length <= (most or length):
        special = "" if least == 1 else f", one beside {least - 1} special ones"
        limit = "" if most is None else f" and at most {most}, for which model has positions"
        raise ValueError(
            f"max_length must be at least {least} tokens{special}{limit}, got {length}"
        )
    return length


def _stated(model: Any, tokenizer: Any, most: int | None) -> int:
    limit = getattr(tokenizer, "model_max_length", None)
    if limit is None or limit > 1 << 30:  # transformers writes 1e30 for "unknown"
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit is None:
            raise ValueError("max_length must be given: neither tokenizer nor model states one")
    return min(int(limit), most or int(limit))
