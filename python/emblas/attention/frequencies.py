"""Frequencies of rotary position embeddings, and how they stretch to longer texts.

Each function returns the angles ``(pairs,)``, float64, by which the pairs of a head turn at each
step of the position, where ``pairs = dim / 2``. :func:`emblas.attention.rotary_tables` makes the
cosines and sines of them that :func:`emblas.attention.rotary` takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


def plain(dim: int, *, base: float = 10000.0) -> Tensor:
    """Return the frequencies ``base ** (-2 i / dim)`` of the original embedding.

    Parameters
    ----------
    dim : int
        Elements of a head that are turned; even.
    base : float, default 10000.0
        Models for long texts are trained with larger ones.

    Returns
    -------
    Tensor
        float64 ``(dim / 2,)``.

    Raises
    ------
    ValueError
        If ``dim`` is odd or not positive, or ``base`` isn't positive.

    Notes
    -----
    Su et al., 2021 (arXiv 2104.09864), section 3.2.2.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"dim must be even and positive, got {dim}")
    if base <= 0:
        raise ValueError(f"base must be positive, got {base}")
    return base ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def position_interpolation(dim: int, factor: float, *, base: float = 10000.0) -> Tensor:
    """Return frequencies for texts ``factor`` times as long: all ``factor`` times as slow.

    Parameters
    ----------
    dim, base
        As in :func:`plain`.
    factor : float
        Length over the length in training, at least 1.

    Returns
    -------
    Tensor
        float64 ``(dim / 2,)``.

    Raises
    ------
    ValueError
        If an argument is out of range.

    Notes
    -----
    Chen et al., 2023 (arXiv 2306.15595), equation 4.
    """
    return plain(dim, base=base) / _at_least_one("factor", factor)


def ntk(dim: int, factor: float, *, base: float = 10000.0) -> Tensor:
    """Return frequencies for texts ``factor`` times as long, the slowest alone ``factor`` as slow.

    The base becomes ``base * factor ** (dim / (dim - 2))``: fast pairs keep their resolution of
    neighbouring positions.

    Parameters
    ----------
    dim, base
        As in :func:`plain`; ``dim`` is at least 4.
    factor : float
        Length over the length in training, at least 1. The dynamic form, for a text of ``L`` tokens
        in a model trained with ``M``, is a factor ``f * L / M - (f - 1)`` where L passes M, and 1
        before.

    Returns
    -------
    Tensor
        float64 ``(dim / 2,)``.

    Raises
    ------
    ValueError
        If an argument is out of range.

    Notes
    -----
    Known as NTK-aware scaling; Peng et al., 2023 (arXiv 2309.00071), section 3.1.
    """
    if dim < 4:
        raise ValueError(f"dim must be at least 4, got {dim}")
    return plain(dim, base=base * _at_least_one("factor", factor) ** (dim / (dim - 2)))


class Yarn(NamedTuple):
    """Frequencies, and the ``scale`` of :func:`emblas.attention.rotary_tables` that goes along."""

    inverse_frequencies: Tensor
    scale: float


def yarn(
    dim: int,
    factor: float,
    original_length: int,
    *,
    base: float = 10000.0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> Yarn:
    """Return YaRN's frequencies and scale for texts ``factor`` times as long.

    Pairs that turn more than ``beta_fast`` times within ``original_length`` positions stay, those
    that turn less than ``beta_slow`` times are interpolated, and a ramp over the numbers of the
    pairs lies between.

    Parameters
    ----------
    dim, base
        As in :func:`plain`.
    factor : float
        Length over the length in training, at least 1.
    original_length : int
        Length in training.
    beta_fast, beta_slow : float, default 32.0 and 1.0
        Turns at the ends of the ramp.

    Returns
    -------
    Yarn
        float64 ``(dim / 2,)`` and the scale ``0.1 ln(factor) + 1``.

    Raises
    ------
    ValueError
        If an argument is out of range.

    Notes
    -----
    Peng et al., 2023 (arXiv 2309.00071), definition 3 and its public code, which rounds the ends of
    the ramp to whole pairs, outwards.
    """
    if original_length < 1:
        raise ValueError(f"original_length must be positive, got {original_length}")
    if not beta_fast > beta_slow > 0:
        raise ValueError(f"beta_fast must pass beta_slow > 0, got {beta_fast} and {beta_slow}")
    unscaled = plain(dim, base=base)
    interpolated = unscaled / _at_least_one("factor", factor)

    def pair_of(turns: float) -> float:
        """Return the pair, with a fraction, that makes so many turns in training."""
        return dim * math.log(original_length / (turns * 2 * math.pi)) / (2 * math.log(base))

    first = max(math.floor(pair_of(beta_fast)), 0)
    last = min(math.ceil(pair_of(beta_slow)), dim - 1)
    pair = torch.arange(dim // 2, dtype=torch.float64)
    # Of no width, the ramp is a step.
    ramp = ((pair - first) / max(last - first, 1e-3)).clamp(0, 1)
    return Yarn(unscaled + ramp * (interpolated - unscaled), 0.1 * math.log(factor) + 1)


def clex(
    dim: int,
    dynamics: Callable[[float, Tensor], Tensor],
    max_factor: int,
    *,
    base: float = 10000.0,
    step: float = 0.01,
) -> Tensor:
    """Return the frequencies for every whole factor of length, along a learned curve.

    The logarithms of the frequencies follow an ordinary differential equation in the factor t, from
    those of :func:`plain` at t = 1.

    Parameters
    ----------
    dim, base
        As in :func:`plain`.
    dynamics : callable
        Takes t and log-frequencies ``(dim / 2,)``, float64, and returns their derivative by t: a
        trained network. Gradients flow through it.
    max_factor : int
        Largest factor, at least 1.
    step : float, default 0.01
        Longest step of the integration.

    Returns
    -------
    Tensor
        float64 ``(max_factor, dim / 2)``; row ``t - 1`` is for texts of ``t`` times the length in
        training. A sequence of L tokens takes row ``ceil(L / length in training) - 1``, at most the
        last: one table for each in :func:`emblas.attention.rotary_tables`.

    Raises
    ------
    ValueError
        If an argument is out of range.

    Notes
    -----
    CLEX, Chen et al., 2023 (arXiv 2310.16450), equation 7. Integrated by the 3/8 rule of Kutta, of
    fourth order, as its public code does.
    """
    if max_factor < 1:
        raise ValueError(f"max_factor must be at least 1, got {max_factor}")
    if step <= 0:
        raise ValueError(f"step must be positive, got {step}")
    log = plain(dim, base=base).log()
    solution = [log]
    steps = math.ceil(1 / step - 1e-9)
    h = 1 / steps
    for factor in range(1, max_factor):
        for i in range(steps):
            t = factor + i * h
            first = dynamics(t, log)
            second = dynamics(t + h / 3, log + h * first / 3)
            third = dynamics(t + 2 * h / 3, log + h * (second - first / 3))
            fourth = dynamics(t + h, log + h * (first - second + third))
            log = log + h * (first + 3 * (second + third) + fourth) / 8
        solution.append(log)
    return torch.stack(solution).exp()


def _at_least_one(name: str, value: float) -> float:
    if not value >= 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value
