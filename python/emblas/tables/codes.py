"""Codes of ids that are computed, not stored: random numbers that are functions of the id."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor

from emblas import _op
from emblas._philox import WORD, philox4x32
from emblas.tables.ids import id_pattern

CODES = ("normal", "uniform", "sparse")
_BLOCK = 2**18  # calls of Philox at once


@dataclasses.dataclass(frozen=True)
class CodeSpec:
    """Which random numbers an id is given.

    Parameters
    ----------
    kind : {"normal", "uniform", "sparse"}, default "normal"
        - ``"normal"``: standard normal.
        - ``"uniform"``: uniform on (-1, 1).
        - ``"sparse"``: a column of a very sparse random projection (Li, Hastie and Church, 2006,
          "Very Sparse Random Projections"): ``sqrt(sparsity)`` or its negative with probability
          ``1 / (2 sparsity)`` each, else 0.
    seed : int, default 0
        0 to 2^64 - 1.
    sparsity : int, default 1
        Of ``"sparse"``: one number in so many isn't zero, 1 to 2^31. 1 gives random signs, 3 the
        projection of Achlioptas (2003).

    Raises
    ------
    TypeError, ValueError
        If a value is of another type or out of range.
    """

    kind: str = "normal"
    seed: int = 0
    sparsity: int = 1

    def __post_init__(self) -> None:
        _op.check_choice("kind", self.kind, CODES)
        for name, low, high in (("seed", 0, 2**64 - 1), ("sparsity", 1, 2**31)):
            value = getattr(self, name)
            if not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
            if not low <= value <= high:
                raise ValueError(f"{name} must be {low} to {high}, got {value}")


def random_codes(
    ids: Tensor,
    dim: int,
    spec: CodeSpec | None = None,
    *,
    sequence: Tensor | int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Random numbers that are a function of the id: an embedding that needs no memory.

    Number ``4 b + j`` of an id is word ``j`` of Philox4x32-10 with counter
    ``(b, low half of id, high half of id, sequence)`` and key ``seed``. Normal numbers are made
    from words in pairs (Box and Muller, 1958), by arithmetic that IEEE 754 rounds exactly: any
    device gives the same bits.

    Parameters
    ----------
    ids : Tensor
        int64 or uint64 (64-bit patterns) of any shape.
    dim : int
        Numbers of each id, at least 1.
    spec : CodeSpec, optional
        Default ``CodeSpec()``: standard normal numbers of seed 0.
    sequence : int or Tensor, default 0
        0 to 2^32 - 1, of a shape that broadcasts to that of ``ids``: other numbers for the same id
        in each sequence (Huang et al., 2023, "Lexinvariant Language Models").
    dtype : torch.dtype, default float32
        float32, float64, bfloat16 or float16.

    Returns
    -------
    Tensor
        ``(*ids.shape, dim)``, computed in float64 and rounded once.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, dtype or value.

    Examples
    --------
    >>> random_codes(torch.tensor([0, 7, 0]), 3, CodeSpec("sparse", seed=1))
    tensor([[ 1.,  1.,  1.],
            [-1.,  1., -1.],
            [ 1.,  1.,  1.]])
    """
    spec = spec or CodeSpec()
    if not isinstance(spec, CodeSpec):
        raise TypeError(f"spec must be a CodeSpec, got {type(spec).__name__}")
    if dim < 1:
        raise ValueError(f"dim must be at least 1, got {dim}")
    if dtype not in _op.FLOATS:
        raise TypeError(f"dtype must be a floating type, got {dtype}")
    pattern = id_pattern(ids).contiguous()
    if isinstance(sequence, Tensor):
        _op.check_tensor("sequence", sequence, dtypes=(torch.int32, torch.int64), device=ids.device)
        number = sequence.long().expand(ids.shape).reshape(-1).contiguous()
    elif 0 <= sequence <= WORD:
        number = pattern.new_full((1,), sequence)
    else:
        raise ValueError(f"sequence must be 0 to {WORD}, got {sequence}")
    seed = spec.seed - 2**64 if spec.seed >= 2**63 else spec.seed
    numbers = (reference if _op.use_reference() else _random_codes)(
        pattern, number, dim, CODES.index(spec.kind), seed, spec.sparsity, _op.FLOATS.index(dtype)
    )
    return numbers.reshape(*ids.shape, dim)


# --- the operator ---------------------------------------------------------------------------------


def reference(
    ids: Tensor, sequence: Tensor, dim: int, kind: int, seed: int, sparsity: int, dtype: int
) -> Tensor:
    """Codes of ids ``(ids,)`` in sequences ``(ids,)`` or ``(1,)``; see ``csrc/tables/codes.h``."""
    spec = CodeSpec(CODES[kind], seed % 2**64, sparsity)
    rows = max(1, _BLOCK // -(-dim // 4))
    parts = [
        _numbers(some, number, dim, spec).to(_op.FLOATS[dtype])
        for some, number in zip(ids.split(rows), sequence.expand(len(ids)).split(rows), strict=True)
    ]
    return torch.cat(parts)


def _fake(
    ids: Tensor, sequence: Tensor, dim: int, kind: int, seed: int, sparsity: int, dtype: int
) -> Tensor:
    return ids.new_empty(ids.shape[0], dim, dtype=_op.FLOATS[dtype])


def _check_values(ids: Tensor, sequence: Tensor, *options: int) -> None:
    wrong = (sequence < 0) | (sequence > WORD)
    if wrong.any():
        raise ValueError(f"sequence must be 0 to {WORD}, got {int(sequence[wrong][0])}")


_random_codes = _op.Op(
    "random_codes",
    reference=reference,
    fake=_fake,
    triton="emblas.tables.triton",
    check_values=_check_values,
)


def _numbers(ids: Tensor, sequence: Tensor, dim: int, spec: CodeSpec) -> Tensor:
    """Codes of ids ``(ids,)``, float64 ``(ids, dim)``."""
    block = torch.arange(-(-dim // 4), device=ids.device)
    counter = [block, *(x[:, None] for x in (ids & WORD, ids >> 32 & WORD, sequence & WORD))]
    words = philox4x32(torch.broadcast_tensors(*counter), spec.seed)
    if spec.kind == "normal":
        numbers = [*_normal(*words[:2]), *_normal(*words[2:])]
    elif spec.kind == "uniform":
        numbers = [(word.double() + 0.5) * 2.0**-31 - 1 for word in words]
    else:
        # Words below `part` are negative, as many after them positive.
        part = round(2**31 / spec.sparsity)
        numbers = [
            ((word < 2 * part).double() - 2 * (word < part).double()) * math.sqrt(spec.sparsity)
            for word in words
        ]
    return torch.stack(numbers, 2).flatten(1)[:, :dim]


def _normal(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normal numbers from two uniform words, the same bits everywhere.

    Sums, products, quotients and square roots are rounded exactly on every machine; logarithms and
    sines of libraries are not, so they are series here, cut where float64 ends.
    """
    # ln(u), u = (first + 1) / 2^32 = mantissa 2^exponent with a mantissa of 1/2 to 1:
    # ln(m) = 2 artanh((m - 1) / (m + 1)), of m within a factor sqrt(2) of 1.
    mantissa, exponent = torch.frexp((first.double() + 1) * 2.0**-32)
    small = mantissa < math.sqrt(0.5)
    mantissa = torch.where(small, 2 * mantissa, mantissa)
    exponent = exponent.double() - small.double()
    s = (mantissa - 1) / (mantissa + 1)
    logarithm = exponent * math.log(2) + 2 * s * _series(s * s, [1 / k for k in range(1, 22, 2)])
    radius = _square_root(-2 * logarithm)
    # The angle 2 pi second / 2^32, as a multiple of pi / 2 and a rest of -pi/4 to pi/4.
    quadrant = (second + 2**29) >> 30
    x = (second - (quadrant << 30)).double() * (2 * math.pi * 2.0**-32)
    square = x * x
    cos = _series(square, [(-1) ** k / math.factorial(2 * k) for k in range(9)])
    sin = x * _series(square, [(-1) ** k / math.factorial(2 * k + 1) for k in range(9)])
    odd, half = (quadrant & 1).bool(), (quadrant & 2).bool()
    cos, sin = torch.where(odd, -sin, cos), torch.where(odd, cos, sin)
    radius = torch.where(half, -radius, radius)
    return radius * cos, radius * sin


def _square_root(x: Tensor) -> Tensor:
    """Square root, rounded exactly: that of torch on a CPU isn't, in the last bit."""
    return torch.from_numpy(np.sqrt(x.numpy())) if x.device.type == "cpu" else x.sqrt()


def _series(x: Tensor, coefficients: list[float]) -> Tensor:
    """Polynomial by Horner's rule, rounded after each step (no fused multiply-add)."""
    total = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * x + coefficient
    return total
