"""Rows of all processes, with their gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from emblas import _op


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, int]:
        # Processes may hold different numbers of rows, and gathering needs equal ones: the shorter
        # are filled up.
        count = torch.tensor([x.shape[0]], device=x.device)
        counts = [torch.empty_like(count) for _ in range(dist.get_world_size(group))]
        dist.all_gather(counts, count, group)
        rows = [int(c) for c in counts]
        padded = x.new_zeros(max(rows), *x.shape[1:])
        padded[: x.shape[0]] = x
        parts = [torch.empty_like(padded) for _ in rows]
        dist.all_gather(parts, padded, group)
        ctx.group = group
        ctx.begin = sum(rows[: dist.get_rank(group)])
        ctx.rows = x.shape[0]
        return torch.cat([part[:row] for part, row in zip(parts, rows, strict=True)]), ctx.begin

    @staticmethod
    @once_differentiable  # autograd doesn't see what all_reduce adds
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor, None]:
        # Every process has used this one's rows. (reduce_scatter would send less; gloo lacks it.)
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad[ctx.begin : ctx.begin + ctx.rows], None


def gather_rows(x: Tensor, group: dist.ProcessGroup | None = None) -> tuple[Tensor, int]:
    """Concatenate the rows of every process, in the order of their ranks.

    All processes of the group must call this, and backpropagate through it, together.

    Parameters
    ----------
    x : Tensor
        ``(rows, ...)``; the number of rows may differ between processes.
    group : torch.distributed.ProcessGroup, optional
        Default: all processes.

    Returns
    -------
    tuple of (Tensor, int)
        The rows of all processes, and the index of this one's first. The gradient of a row is the
        sum of what all processes send back to it.

    Raises
    ------
    RuntimeError
        If ``torch.distributed`` is not initialized, or in the backward pass of a gradient
        (``create_graph=True``), as there is no second derivative.
    """
    _op.check_tensor("x", x)
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("gather_rows needs torch.distributed.init_process_group() first")
    return _GatherRows.apply(x, group)
