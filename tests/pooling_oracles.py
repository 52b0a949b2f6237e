"""The definitions of pooling, one segment at a time, in float64."""

from __future__ import annotations

import torch

MODES = ("mean", "sum", "mean_sqrt_len", "weighted_mean", "cls", "last", "max", "gem")


def pool(tokens, mode, weights=None, positions=None, p=3.0):
    """One vector from the tokens (n, dim) of one segment; positions count from 1."""
    tokens = tokens.double()
    n, dim = tokens.shape
    w = torch.ones(n).double() if weights is None else weights.double()
    steps = (torch.arange(n) + 1 if positions is None else positions).double()
    keep = w != 0
    tokens, w, steps = tokens[keep], w[keep], steps[keep]
    zero = torch.zeros(dim, dtype=torch.float64)
    if len(tokens) == 0:
        return zero
    if mode in ("cls", "last", "max"):
        return {"cls": tokens[0], "last": tokens[-1], "max": tokens.max(0).values}[mode]
    if mode == "weighted_mean":
        w = w * steps
    if mode == "sum":
        return (w[:, None] * tokens).sum(0)
    if w.sum() == 0:
        return zero
    if mode == "mean_sqrt_len":
        return (w[:, None] * tokens).sum(0) / w.sum().abs() ** 0.5
    if mode == "gem":
        raised = tokens.clamp_min(1e-6) ** p
        return ((w[:, None] * raised).sum(0) / w.sum()) ** (1 / p)
    return (w[:, None] * tokens).sum(0) / w.sum()


def pool_spans(x, spans, mode, weights=None, skip=0):
    """Pool spans [(start, end), ...] of ``x`` (tokens, dim)."""
    out = torch.zeros(len(spans), x.shape[1], dtype=torch.float64)
    for s, (start, end) in enumerate(spans):
        begin = min(start + skip, end)
        w = None if weights is None else weights[begin:end]
        positions = torch.arange(begin, end) - start + 1
        out[s] = pool(x[begin:end], mode, w, positions)
    return out
