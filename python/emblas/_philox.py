"""The counter-based generator of random words, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

_WORD = 0xFFFFFFFF


def philox4x32(counter: Sequence[Tensor], key: int) -> list[Tensor]:
    """Philox4x32-10 of four int64 tensors of 32-bit words; see ``csrc/common/philox.h``."""
    words = list(counter)
    low, high = key & _WORD, key >> 32 & _WORD
    for _ in range(10):
        first, second = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        words = [
            second >> 32 & _WORD ^ words[1] ^ low,
            second & _WORD,
            first >> 32 & _WORD ^ words[3] ^ high,
            first & _WORD,
        ]
        low, high = low + 0x9E3779B9 & _WORD, high + 0xBB67AE85 & _WORD
    return words
