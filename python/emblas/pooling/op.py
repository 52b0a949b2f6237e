"""The pooling operators: tracing, gradient, routing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emblas._op import Op, check_offsets, needs_grad, use_reference
from emblas.pooling import reference
from emblas.pooling.reference import Mode, accumulator


class Segments(NamedTuple):
    """Tokens and the segments that they are pooled by; the fields of the operators' schemas."""

    x: Tensor
    """``(tokens, dim)`` or ``(batch, length, dim)``, with a contiguous last dimension."""
    starts: Tensor
    """int32: offsets ``(batch + 1,)`` or, with ``ends``, the first positions ``(batch,)``."""
    weights: Tensor | None = None
    """``(positions,)``, in the accumulator's dtype."""
    ends: Tensor | None = None
    """int32 ``(batch,)``."""
    skip: Tensor | None = None
    """int32 ``(batch,)``: positions at the start of each segment that aren't pooled."""
    rows: Tensor | None = None
    """int32, the operators' ``index``: the row of each position; None where positions are rows."""

    @property
    def batch(self) -> int:
        """Number of segments."""
        return self.starts.shape[0] - 1 if self.ends is None else self.ends.shape[0]


def check_segments(segments: Segments, *, disjoint: bool = False) -> None:
    """Raise what the CPU kernels raise for values that are out of range; waits for a GPU."""
    x, starts, weights, ends, skip, index = segments
    rows = math.prod(x.shape[:-1])
    positions = rows if index is None else index.shape[0]
    if index is not None and ((index < 0) | (index >= rows)).any():
        raise ValueError("index must hold rows of x, 0 to the number of tokens - 1")
    if ends is None:
        check_offsets("cu_seqlens", starts, positions, "tokens")
    elif ((starts < 0) | (starts > ends) | (ends > positions)).any():
        raise ValueError("starts and ends must hold 0 <= start <= end <= number of tokens")
    if skip is not None and (skip < 0).any():
        raise ValueError("skip_prefix must not be negative")
    if weights is not None and weights.isnan().any():
        raise ValueError("weights must not hold NaN")
    if disjoint and ends is not None and (starts[1:] < ends[:-1]).any():
        raise ValueError("segments must be in order and disjoint")


# --- linear modes --------------------------------------------------------------------------------


def _segment_pool_fake(
    x: Tensor,
    cu_seqlens: Tensor,
    weights: Tensor | None,
    normalize: bool,
    mode: int = 0,
    ends: Tensor | None = None,
    skip: Tensor | None = None,
    index: Tensor | None = None,
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    batch = Segments(x, cu_seqlens, ends=ends).batch
    dtype = accumulator(x.dtype)
    norm = x.new_empty(batch if normalize else 0, dtype=dtype)
    return x.new_empty(batch, x.shape[-1], dtype=dtype if wide else x.dtype), norm


def _segment_pool_backward_fake(
    grad_out: Tensor,
    x: Tensor,
    out: Tensor,
    norm: Tensor,
    cu_seqlens: Tensor,
    weights: Tensor | None,
    normalize: bool,
    need_x: bool,
    need_weights: bool,
    mode: int = 0,
    ends: Tensor | None = None,
    skip: Tensor | None = None,
    index: Tensor | None = None,
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    positions = math.prod(x.shape[:-1]) if index is None else index.shape[0]
    grad_weights = x.new_empty(positions if need_weights else 0, dtype=accumulator(x.dtype))
    return x.new_empty(x.shape if need_x else (0,)), grad_weights


def _check_segment_pool(
    x: Tensor,
    cu_seqlens: Tensor,
    weights: Tensor | None,
    normalize: bool,
    mode: int = 0,
    ends: Tensor | None = None,
    skip: Tensor | None = None,
    index: Tensor | None = None,
    wide: bool = False,
) -> None:
    check_segments(Segments(x, cu_seqlens, weights, ends, skip, index))


_segment_pool = Op(
    "segment_pool",
    reference=reference.segment_pool,
    fake=_segment_pool_fake,
    backward="segment_pool_backward",
    triton="emblas.pooling.triton",
    check_values=_check_segment_pool,
)
_segment_pool_backward = Op(
    "segment_pool_backward",
    reference=reference.segment_pool_backward,
    fake=_segment_pool_backward_fake,
    triton="emblas.pooling.triton",
)


class _SegmentPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor | None,
        starts: Tensor,
        ends: Tensor | None,
        skip: Tensor | None,
        index: Tensor | None,
        normalize: bool,
        mode: int,
        wide: bool,
    ) -> Tensor:
        out, norm = _segment_pool(x, starts, weights, normalize, mode, ends, skip, index, wide)
        ctx.save_for_backward(x, out, norm, starts, weights, ends, skip, index)
        ctx.settings = normalize, mode, wide
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, out, norm, starts, weights, ends, skip, index = ctx.saved_tensors
        normalize, mode, wide = ctx.settings
        need_x, need_weights = ctx.needs_input_grad[:2]
        grad_x, grad_weights = _segment_pool_backward(
            grad_out.contiguous(), x, out, norm, starts, weights, normalize, need_x, need_weights,
            mode, ends, skip, index, wide,
        )  # fmt: skip
        grads = grad_x if need_x else None, grad_weights if need_weights else None
        return *grads, *[None] * 7


def segment_pool(segments: Segments, mode: Mode, normalize: bool, wide: bool) -> Tensor:
    """Pool checked arguments in a linear mode."""
    x, starts, weights, ends, skip, index = segments
    if needs_grad(x, weights) and not use_reference():
        return _SegmentPool.apply(x, weights, starts, ends, skip, index, normalize, int(mode), wide)
    function = reference.segment_pool if use_reference() else _segment_pool
    return function(x, starts, weights, normalize, int(mode), ends, skip, index, wide)[0]


# --- several modes -------------------------------------------------------------------------------


def _segment_pool_modes_fake(
    x: Tensor,
    cu_seqlens: Tensor,
    weights: Tensor | None,
    modes: Sequence[int],
    ends: Tensor | None = None,
    skip: Tensor | None = None,
    index: Tensor | None = None,
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    batch, dim = Segments(x, cu_seqlens, ends=ends).batch, x.shape[-1]
    argmax = x.new_empty(batch if reference.MAX in modes else 0, dim, dtype=torch.int32)
    dtype = accumulator(x.dtype) if wide else x.dtype
    return x.new_empty(batch, len(modes) * dim, dtype=dtype), argmax


def _segment_pool_modes_backward_fake(
    grad_out: Tensor,
    x: Tensor,
    out: Tensor,
    argmax: Tensor,
    cu_seqlens: Tensor,
    weights: Tensor | None,
    modes: Sequence[int],
    need_x: bool,
    need_weights: bool,
    ends: Tensor | None = None,
    skip: Tensor | None = None,
    index: Tensor | None = None,
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    positions = math.prod(x.shape[:-1]) if index is None else index.shape[0]
    grad_weights = x.new_empty(positions if need_weights else 0, dtype=accumulator(x.dtype))
    return x.new_empty(x.shape if need_x else (0,)), grad_weights


_segment_pool_modes = Op(
    "segment_pool_modes",
    reference=reference.segment_pool_modes,
    fake=_segment_pool_modes_fake,
    backward="segment_pool_modes_backward",
    check_values=lambda x, starts, weights, modes, ends, skip, index, wide: check_segments(
        Segments(x, starts, weights, ends, skip, index)
    ),
    triton="emblas.pooling.triton",
)
_segment_pool_modes_backward = Op(
    "segment_pool_modes_backward",
    reference=reference.segment_pool_modes_backward,
    fake=_segment_pool_modes_backward_fake,
    triton="emblas.pooling.triton",
)


class _SegmentPoolModes(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor | None,
        starts: Tensor,
        ends: Tensor | None,
        skip: Tensor | None,
        index: Tensor | None,
        modes: tuple[int, ...],
        wide: bool,
    ) -> Tensor:
        out, argmax = _segment_pool_modes(x, starts, weights, modes, ends, skip, index, wide)
        ctx.save_for_backward(x, out, argmax, starts, weights, ends, skip, index)
        ctx.settings = modes, wide
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, out, argmax, starts, weights, ends, skip, index = ctx.saved_tensors
        modes, wide = ctx.settings
        need_x, need_weights = ctx.needs_input_grad[:2]
        grad_x, grad_weights = _segment_pool_modes_backward(
            grad_out.contiguous(), x, out, argmax, starts, weights, modes, need_x, need_weights,
            ends, skip, index, wide,
        )  # fmt: skip
        grads = grad_x if need_x else None, grad_weights if need_weights else None
        return *grads, *[None] * 6


def segment_pool_modes(segments: Segments, modes: tuple[int, ...], wide: bool) -> Tensor:
    """Pool checked arguments in several modes, linear ones and ``reference.MAX``, each once."""
    x, starts, weights, ends, skip, index = segments
    if needs_grad(x, weights) and not use_reference():
        return _SegmentPoolModes.apply(x, weights, starts, ends, skip, index, modes, wide)
    function = reference.segment_pool_modes if use_reference() else _segment_pool_modes
    return function(x, starts, weights, modes, ends, skip, index, wide)[0]


# --- maximum -------------------------------------------------------------------------------------


def _segment_max_fake(
    x: Tensor,
    cu_seqlens: Tensor,
    weights: Tensor | None,
    ends: Tensor | None = None,
    skip: Tensor | None = None,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    out = x.new_empty(Segments(x, cu_seqlens, ends=ends).batch, x.shape[-1])
    return out, torch.empty_like(out, dtype=torch.int32)


def _segment_max_backward_fake(grad_out: Tensor, argmax: Tensor, rows: int) -> Tensor:
    return grad_out.new_empty(rows, grad_out.shape[1])


_segment_max = Op(
    "segment_max",
    reference=reference.segment_max,
    fake=_segment_max_fake,
    backward="segment_max_backward",
    check_values=lambda *fields: check_segments(Segments(*fields)),
    triton="emblas.pooling.triton",
)
_segment_max_backward = Op(
    "segment_max_backward",
    reference=reference.segment_max_backward,
    fake=_segment_max_backward_fake,
    triton="emblas.pooling.triton",
)


class _SegmentMax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        starts: Tensor,
        weights: Tensor | None,
        ends: Tensor | None,
        skip: Tensor | None,
        index: Tensor | None,
    ) -> Tensor:
        out, argmax = _segment_max(x, starts, weights, ends, skip, index)
        # Not x, which may be freed then; not its shape, which torch.compile would specialize.
        ctx.save_for_backward(argmax, x.new_empty(()).expand(x.shape))
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        argmax, like_x = ctx.saved_tensors
        rows = math.prod(like_x.shape[:-1])
        grad_x = _segment_max_backward(grad_out.contiguous(), argmax, rows)
        return grad_x.reshape(like_x.shape), None, None, None, None, None


def segment_max(segments: Segments) -> Tensor:
    """Take the maximum of checked arguments."""
    if needs_grad(segments.x) and not use_reference():
        return _SegmentMax.apply(*segments)
    return (reference.segment_max if use_reference() else _segment_max)(*segments)[0]


# --- generalized mean ----------------------------------------------------------------------------


def _segment_gem_fake(
    x: Tensor,
    cu_seqlens: Tensor,
    weights: Tensor | None,
    power: Tensor,
    epsilon: float,
    ends: Tensor | None = None,
    skip: Tensor | None = None,
    index: Tensor | None = None,
) -> Tensor:
    batch = Segments(x, cu_seqlens, ends=ends).batch
    return x.new_empty(batch, x.shape[-1], dtype=accumulator(x.dtype))


def _segment_gem_backward_fake(
    grad_out: Tensor,
    x: Tensor,
    out: Tensor,
    cu_seqlens: Tensor,
    weights: Tensor | None,
    power: Tensor,
    epsilon: float,
    ends: Tensor | None = None,
    skip: Tensor | None = None,
    index: Tensor | None = None,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    positions = math.prod(x.shape[:-1]) if index is None else index.shape[0]
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        grad_out.new_empty(grad_out.shape[0]),
        grad_out.new_empty(positions if need_weights else 0),
    )


_segment_gem = Op(
    "segment_gem",
    reference=reference.segment_gem,
    fake=_segment_gem_fake,
    backward="segment_gem_backward",
    check_values=lambda x, starts, weights, power, epsilon, *others: check_segments(
        Segments(x, starts, weights, *others)
    ),
    triton="emblas.pooling.triton",
)
_segment_gem_backward = Op(
    "segment_gem_backward",
    reference=reference.segment_gem_backward,
    fake=_segment_gem_backward_fake,
    triton="emblas.pooling.triton",
)


class _SegmentGem(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        power: Tensor,
        starts: Tensor,
        weights: Tensor | None,
        ends: Tensor | None,
        skip: Tensor | None,
        index: Tensor | None,
        epsilon: float,
    ) -> Tensor:
        out = _segment_gem(x, starts, weights, power, epsilon, ends, skip, index)
        ctx.save_for_backward(x, out, power, starts, weights, ends, skip, index)
        ctx.epsilon = epsilon
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, out, power, starts, weights, ends, skip, index = ctx.saved_tensors
        need_weights = ctx.needs_input_grad[3]
        grad_x, grad_power, grad_weights = _segment_gem_backward(
            grad_out.contiguous(), x, out, starts, weights, power, ctx.epsilon, ends, skip, index,
            need_weights,
        )  # fmt: skip
        grad_power = grad_power.sum(0, keepdim=True)
        return grad_x, grad_power, None, grad_weights if need_weights else None, *[None] * 4


def segment_gem(segments: Segments, power: Tensor, epsilon: float) -> Tensor:
    """Take the generalized mean of checked arguments; ``power`` has one element."""
    x, starts, weights, ends, skip, index = segments
    if needs_grad(x, power, weights) and not use_reference():
        return _SegmentGem.apply(x, power, starts, weights, ends, skip, index, epsilon)
    function = reference.segment_gem if use_reference() else _segment_gem
    return function(x, starts, weights, power, epsilon, ends, skip, index)


# --- finishing -----------------------------------------------------------------------------------


def _finish_fake(
    x: Tensor,
    dims: Sequence[int],
    normalize: bool,
    noise: float,
    seed: int,
    kind: int,
    dtype: torch.dtype,
    ranges: Tensor | None,
) -> Tensor:
    width = sum((k + 7) // 8 for k in dims) if kind == 2 else sum(dims)
    return x.new_empty(x.shape[0], width, dtype=(dtype, torch.int8, torch.uint8)[kind])


def _finish_backward_fake(
    grad_out: Tensor, x: Tensor, dims: Sequence[int], normalize: bool
) -> Tensor:
    return torch.empty_like(x)


_MOST_DIMS = 32  # that the CUDA C++ kernels take

_finish = Op(
    "finish",
    reference=reference.finish,
    fake=_finish_fake,
    backward="finish_backward",
    triton="emblas.pooling.triton",
    cuda_supports=lambda x, dims, *_: len(dims) <= _MOST_DIMS,
)
_finish_backward = Op(
    "finish_backward",
    reference=reference.finish_backward,
    fake=_finish_backward_fake,
    triton="emblas.pooling.triton",
    cuda_supports=lambda grad_out, x, dims, *_: len(dims) <= _MOST_DIMS,
)


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dims: tuple[int, ...],
        normalize: bool,
        noise: float,
        seed: int,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(x)
        # The compiler of torch 2.10 confuses sizes of tensors that a context keeps.
        ctx.dims = None if dims == (x.shape[1],) else dims
        ctx.normalize = normalize
        return _finish(x, dims, normalize, noise, seed, 0, dtype, None)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        dims = (x.shape[1],) if ctx.dims is None else ctx.dims
        grad_x = _finish_backward(grad_out.to(x.dtype).contiguous(), x, dims, ctx.normalize)
        return grad_x, *[None] * 5


def finish(
    x: Tensor,
    dims: tuple[int, ...],
    normalize: bool,
    *,
    noise: float = 0.0,
    seed: int = 0,
    kind: int = 0,
    dtype: torch.dtype | None = None,
    ranges: Tensor | None = None,
) -> Tensor:
    """Finish checked arguments; see :class:`emblas.pooling.Epilogue`."""
    dtype = dtype or x.dtype
    x = x.to(accumulator(dtype)).contiguous()
    if kind == 0 and needs_grad(x) and not use_reference():
        return _Finish.apply(x, dims, normalize, noise, seed, dtype)
    function = reference.finish if use_reference() else _finish
    return function(x, dims, normalize, noise, seed, kind, dtype, ranges)
