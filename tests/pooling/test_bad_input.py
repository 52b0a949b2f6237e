"""What is wrong is named before anything is computed: on a CPU always, on a GPU when asked.

The checks of GPU tensors are functions of tensors on any device; here they see CPU tensors, and say
what the CPU kernels say.
"""

from __future__ import annotations

import pytest
import torch
from contract import packed
from emblas import _op
from emblas.pooling import (
    attention_pool,
    gather_pool,
    group_pool,
    segment_pool,
    span_pool,
    vocab_pool,
)
from emblas.pooling.op import Segments, check_segments

X, CU = torch.randn(6, 3), packed((2, 4))
MASK, PADDED = torch.ones(2, 3), X.view(2, 3, 3)
QUERIES, WEIGHT = torch.randn(2, 3), torch.randn(5, 3)
NAN = torch.tensor([1, torch.nan, 1, 1, 1, 1])
# Every function of tokens, as function(x, cu_seqlens=None, *, mask=None).
POOLS = {
    "segment_pool": segment_pool,
    "segment_pool max": lambda x, cu=None, **k: segment_pool(x, cu, "max", **k),
    "segment_pool modes": lambda x, cu=None, **k: segment_pool(x, cu, ("last", "max"), **k),
    "segment_pool gem": lambda x, cu=None, **k: segment_pool(x, cu, "gem", **k),
    "attention_pool": lambda x, cu=None, **k: attention_pool(x, QUERIES, cu, **k),
    "vocab_pool max": lambda x, cu=None, **k: vocab_pool(x, WEIGHT, None, cu, **k),
    "vocab_pool sum": lambda x, cu=None, **k: vocab_pool(x, WEIGHT, None, cu, mode="sum", **k),
}


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
def test_offsets_and_masks(pool):
    for wrong in ([1, 2, 6], [0, 2, 5], [0, 2, 7], [0, 8, 6], [0, -1, 6], [0, 2**33, 6]):
        with pytest.raises(ValueError, match="cu_seqlens must start at 0, never decrease and end"):
            pool(X, torch.tensor(wrong))
    for error, match, args, kwargs in (
        (ValueError, "either cu_seqlens .* or mask", (X, CU), {"mask": MASK}),
        (ValueError, "either cu_seqlens .* or mask", (X,), {}),
        (ValueError, "cu_seqlens must have 1 dim", (X, CU[None]), {}),
        (ValueError, "cu_seqlens must have at least one", (X, CU[:0]), {}),
        (TypeError, "cu_seqlens must have dtype", (X, CU.float()), {}),
        (TypeError, "cu_seqlens must be a torch.Tensor", (X, [0, 6]), {}),
        (ValueError, "cu_seqlens must be on device", (X, CU.to("meta")), {}),
        (ValueError, "mask must have the shape", (PADDED,), {"mask": MASK[:, :2]}),
        (ValueError, "mask must have 2 dim", (PADDED,), {"mask": MASK[0]}),
        (ValueError, "mask must be on device", (PADDED,), {"mask": MASK.to("meta")}),
        (ValueError, "mask must not hold NaN", (PADDED,), {"mask": NAN.view(2, 3)}),
        (ValueError, "x must have 2 dim", (PADDED, CU), {}),
        (ValueError, "x must have 3 dim", (X,), {"mask": MASK}),
        (TypeError, "x must have dtype", (X.long(), CU), {}),
    ):
        with pytest.raises(error, match=match):
            pool(*args, **kwargs)


@pytest.mark.parametrize("mode", ["mean", "cls", "weighted_mean", "max", "gem"])
def test_weights_spans_and_lists(mode):
    six = torch.arange(6)
    for error, match, call in (
        (ValueError, "weights must not hold NaN", lambda: segment_pool(X, CU, mode, weights=NAN)),
        (ValueError, "weights must have one value per token", lambda: segment_pool(
            X, CU, mode, weights=NAN[:5])),
        (ValueError, "weights must be on device", lambda: segment_pool(
            X, CU, mode, weights=NAN.to("meta"))),
        (ValueError, "starts and ends must hold", lambda: span_pool(X, int32(3), int32(2), mode)),
        (ValueError, "starts and ends must hold", lambda: span_pool(X, int32(3), int32(7), mode)),
        (ValueError, "starts and ends must hold", lambda: span_pool(X, int32(-1), int32(7), mode)),
        (ValueError, "starts and ends must have the same", lambda: span_pool(X, six, CU, mode)),
        (TypeError, "ends must have dtype", lambda: span_pool(X, six, six / 2, mode)),
        (ValueError, "index must hold rows", lambda: gather_pool(X, six + 1, CU, mode)),
        (ValueError, "cu_seqlens must start", lambda: gather_pool(X, six, CU + 1, mode)),
        (ValueError, "groups must be between 0 and", lambda: group_pool(X, six, 5, mode)),
        (ValueError, "groups must have the shape", lambda: group_pool(X, six[:5], 5, mode)),
        (IndexError, "token_ids must be between 0 and 5, got 1 to 6", lambda: segment_pool(
            X, CU, mode, weights=torch.ones(6), token_ids=six + 1)),
        (IndexError, "token_ids must be between 0 and 5, got -1 to 4", lambda: segment_pool(
            X, CU, mode, weights=torch.ones(6), token_ids=six - 1)),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            call()


@pytest.mark.parametrize(
    ("message", "segments"),
    [
        ("cu_seqlens must start at 0", Segments(X, int32(0, 3, 2))),
        ("starts and ends must hold", Segments(X, int32(3), ends=int32(2))),
        ("starts and ends must hold", Segments(X, int32(-1), ends=int32(2))),
        ("starts and ends must hold", Segments(X, int32(0), ends=int32(7))),
        ("skip_prefix must not be negative", Segments(X, CU, skip=int32(0, -1))),
        ("index must hold rows", Segments(X, CU, rows=int32(0, 1, 2, 3, 4, 6))),
        ("weights must not hold NaN", Segments(X, CU, NAN)),
        (None, Segments(PADDED, CU, 0 * MASK.view(-1), skip=int32(0, 9))),
        (None, Segments(X, int32(0, 0), ends=int32(6, 3), rows=int32(0, 5, 0, 1, 2, 2))),
        (None, Segments(X[:0], int32(0))),
    ],
)
def test_checks_for_gpus_say_what_cpus_say(message, segments):
    x, starts, weights, ends, skip, index = segments
    ops = _op.ops()
    calls = {
        "segment_pool": (x, starts, weights, False, 0, ends, skip, index),
        "segment_pool_modes": (x, starts, weights, [0, 6], ends, skip, index, False),
        "segment_max": tuple(segments._replace(rows=index)),
        "segment_gem": (x, starts, weights, torch.ones(1), 1e-6, ends, skip, index),
    }
    for name, args in calls.items():
        for run in (ops[name], ops[name].check_values):
            if message is None:
                run(*args)
                continue
            with pytest.raises(ValueError, match=message):
                run(*args)


def test_checks_for_gpus_of_disjoint_segments():
    overlapping = {"weights": None, "ends": int32(3, 6)}
    check_segments(Segments(X, int32(0, 2), **overlapping))
    ops = _op.ops()
    for name, args in (
        ("attention_pool", (X, QUERIES, int32(0, 2), 1.0)),
        ("vocab_max", (X, WEIGHT, None, int32(0, 2))),
        ("vocab_sum", (X, WEIGHT, None, int32(0, 2), 0)),
    ):
        for run in (ops[name], ops[name].check_values):
            with pytest.raises(ValueError, match="segments must be in order and disjoint"):
                run(*args, *overlapping.values())
