"""Rotary position embedding in Triton. The formulas stand in ``csrc/attention/rotary.h``.

A program owns some tokens: it reads their rows of cosines and sines once and turns one head after
the other. Heads are read whole and in order, interleaved pairs too, which are split in registers;
elements that belong to no pair are copied along.

Bytes: x once, the result once, and a row of each table for each token. Memory is the only limit.
"""

import triton
import triton.language as tl
from torch import Tensor

from emblas import _op
from emblas._triton import FLOATS


@triton.jit
def _turn(
    x,
    x_token: tl.int64,
    x_head: tl.int64,
    out,
    out_token: tl.int64,
    out_head: tl.int64,
    cos,
    sin,
    position_ids,
    tokens,
    rows,
    heads,
    head_dim,
    pairs,
    sign,
    INTERLEAVED: tl.constexpr,
    IN_PLACE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    here = t < tokens
    row = t.to(tl.int64)
    if position_ids is not None:
        row = tl.load(position_ids + t, mask=here, other=0)
    # Whatever position_ids hold, rows of the tables are read.
    row = tl.minimum(tl.maximum(row, 0), rows - 1)
    p = tl.arange(0, BLOCK_P)
    paired = here[:, None] & (p < pairs)[None, :]
    table = row[:, None] * pairs + p[None, :]
    c = tl.load(cos + table, mask=paired, other=0.0)
    s = sign * tl.load(sin + table, mask=paired, other=0.0)

    both = tl.arange(0, 2 * BLOCK_P)
    both_paired = here[:, None] & (both < 2 * pairs)[None, :]
    r = tl.arange(0, BLOCK_REST)
    rest = here[:, None] & (2 * pairs + r < head_dim)[None, :]
    from_token = x + t.to(tl.int64)[:, None] * x_token
    to_token = out + t.to(tl.int64)[:, None] * out_token
    for _head in range(heads):
        if INTERLEAVED:
            pair = tl.load(from_token + both[None, :], mask=both_paired, other=0.0)
            a, b = tl.split(tl.reshape(pair.to(tl.float32), [BLOCK_T, BLOCK_P, 2]))
            turned = tl.reshape(tl.join(a * c - b * s, b * c + a * s), [BLOCK_T, 2 * BLOCK_P])
            if IN_PLACE:
                tl.debug_barrier()  # no thread stores what another has still to read
            tl.store(to_token + both[None, :], turned.to(out.dtype.element_ty), mask=both_paired)
        else:
            a = tl.load(from_token + p[None, :], mask=paired, other=0.0).to(tl.float32)
            b = tl.load(from_token + pairs + p[None, :], mask=paired, other=0.0).to(tl.float32)
            if IN_PLACE:
                tl.debug_barrier()  # likewise
            tl.store(to_token + p[None, :], (a * c - b * s).to(out.dtype.element_ty), mask=paired)
            turned = (b * c + a * s).to(out.dtype.element_ty)
            tl.store(to_token + pairs + p[None, :], turned, mask=paired)
        if not IN_PLACE:
            kept = tl.load(from_token + 2 * pairs + r[None, :], mask=rest, other=0.0)
            tl.store(to_token + 2 * pairs + r[None, :], kept, mask=rest)
        from_token += x_head
        to_token += out_head


def _supports(
    x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool
) -> bool:
    rows, pairs = cos.shape
    return x.dtype in FLOATS and rows > 0 and 1 <= pairs <= 256 and x.shape[2] - 2 * pairs <= 512


def _run(
    x: Tensor,
    out: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    interleaved: bool,
    sign: float,
) -> None:
    tokens, heads, head_dim = x.shape
    rows, pairs = cos.shape
    block_p = triton.next_power_of_2(pairs)
    block_t = max(1, 512 // block_p)
    _turn[(triton.cdiv(tokens, block_t),)](
        x, x.stride(0), x.stride(1), out, out.stride(0), out.stride(1), cos, sin, position_ids,
        tokens, rows, heads, head_dim, pairs, sign, INTERLEAVED=interleaved, IN_PLACE=out is x,
        BLOCK_T=block_t, BLOCK_P=block_p,
        BLOCK_REST=triton.next_power_of_2(max(head_dim - 2 * pairs, 1)), num_warps=4,
    )  # fmt: skip


@_op.kernel(_supports)
def rotary(
    x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool
) -> Tensor:
    out = x.new_empty(x.shape)
    _run(x, out, cos, sin, position_ids, interleaved, 1.0)
    return out


@_op.kernel(_supports)
def rotary_(
    x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool
) -> None:
    _run(x, x, cos, sin, position_ids, interleaved, 1.0)


@_op.kernel(_supports)
def rotary_backward(
    grad_out: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool
) -> Tensor:
    grad = grad_out.new_empty(grad_out.shape)
    _run(grad_out, grad, cos, sin, position_ids, interleaved, -1.0)
    return grad
