"""Compile every Triton kernel for GPUs that aren't there.

The operators run on CPU tensors, but each launch is only compiled, for an architecture of choice,
and remembered. So what is compiled is what users launch: tile shapes, warps, and what triton infers
from the arguments (pointers and strides divisible by 16, absent tensors). Contents don't matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from emblas import _op
from emblas.attention.op import Shaping
from emblas.pooling.reference import MAX, Mode
from emblas.tables import Composition, Part
from emblas.tables.codes import CODES
from emblas.tables.compose_op import MODES
from emblas.tables.composition import COMBINES
from sass import Binary
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _pooling() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    tokens, dim, batch = 512, 384, 4
    cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32)
    for dtype in DTYPES:
        x, out = torch.empty(tokens, dim, dtype=dtype), torch.empty(batch, dim, dtype=dtype)
        for weights in (None, torch.empty(tokens)):
            for normalize in (False, True):
                words = f"{_short(dtype)}{'' if weights is None else ', weights'}"
                words += ", normalize" * normalize
                yield "segment_pool", words, (x, cu_seqlens, weights, normalize)
                norm = torch.empty(batch * normalize)
                needs = (normalize, True, weights is not None)
                args = (out, x, out, norm, cu_seqlens, weights, *needs)
                yield "segment_pool_backward", words, args


def _forms() -> Iterator[tuple[str, Tensor, list[Tensor | None]]]:
    """x, and starts, weights, ends, skip and index of segments of every form."""
    starts, index = torch.zeros(5, dtype=torch.int32), torch.zeros(512, dtype=torch.int32)
    ends, weights, padded = starts[1:], torch.empty(512), torch.empty(4, 256, 384)[:, :128]
    yield "float32, lists, weights", torch.empty(512, 384), [starts, weights, None, None, index]
    yield "float32, spans, skip", torch.empty(512, 384), [ends, None, ends, ends, None]
    yield "float32, padded, weights", padded, [ends, weights, ends, None, None]


def _linear_modes() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    for words, x, (starts, weights, *form) in _forms():
        for mode in (Mode.weighted_mean, Mode.last) if "lists" in words else (Mode.mean_sqrt_len,):
            options = (int(mode), *form, True)
            yield "segment_pool", f"{words}, {mode.name}", (x, starts, weights, False, *options)
            out = torch.empty(4, 384)
            args = (out, x, out, out[:0, 0], starts, weights, False, True, True, *options)
            yield "segment_pool_backward", f"{words}, {mode.name}", args


def _several_modes() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    starts, argmax = torch.zeros(5, dtype=torch.int32), torch.zeros(4, 384, dtype=torch.int32)
    calls = [(_short(dtype), torch.empty(512, 384, dtype=dtype), [starts]) for dtype in DTYPES]
    for words, x, (starts, weights, *form) in (
        *((words, x, [*starts, None, None, None, None]) for words, x, starts in calls),
        *_forms(),
    ):
        for modes in ((Mode.mean, MAX), (MAX, *Mode)):
            numbers, out = tuple(map(int, modes)), torch.empty(4, 384 * len(modes), dtype=x.dtype)
            options = (starts, weights, numbers)
            name = f"{words}, {len(modes)} modes"
            yield "segment_pool_modes", name, (x, *options, *form, False)
            args = (out, x, out, argmax, *options, True, weights is not None, *form, False)
            yield "segment_pool_modes_backward", name, args


def _generalized_means() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    out, power, starts = torch.empty(4, 384), torch.empty(1), torch.zeros(5, dtype=torch.int32)
    calls = [(_short(dtype), torch.empty(512, 384, dtype=dtype), [starts]) for dtype in DTYPES]
    for words, x, (starts, weights, *form) in (
        *((words, x, [*starts, None, None, None, None]) for words, x, starts in calls),
        *_forms(),
    ):
        args = (starts, weights, power, 1e-6, *form)
        yield "segment_gem", words, (x, *args)
        yield "segment_gem_backward", words, (out, x, out, *args, weights is not None)


def _maxima() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    starts, index = torch.zeros(5, dtype=torch.int32), torch.zeros(512, dtype=torch.int32)
    skip, weights = starts[1:], torch.empty(512)
    padded = torch.empty(4, 256, 384)[:, :128]
    for dtype in DTYPES:
        x = torch.empty(512, 384, dtype=dtype)
        yield "segment_max", _short(dtype), (x, starts, None, None, None, None)
        args = (x[:4], torch.zeros(4, 384, dtype=torch.int32), 512)
        yield "segment_max_backward", _short(dtype), args
    x = torch.empty(512, 384)
    args = (x, skip, weights, skip, skip, index)
    yield "segment_max", "float32, lists, weights, skip", args
    yield "segment_max", "float32, padded", (padded, skip, None, skip, None, None)


def _finish() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    x, ranges = torch.empty(64, 384), torch.empty(2, 384)
    for words, normalize, noise, kind, dtype in (
        *((_short(dtype), True, 0.0, 0, dtype) for dtype in DTYPES),
        ("float32, noise", False, 1.0, 0, torch.float32),
        ("int8", True, 0.0, 1, torch.float32),
        ("bits", True, 0.0, 2, torch.float32),
    ):
        given = ranges if kind == 1 else None
        yield "finish", words, (x, (384,), normalize, noise, 5, kind, dtype, given)
    for normalize in (False, True):
        words = "normalize" if normalize else ""
        yield "finish_backward", words, (torch.empty(64, 768), x, (384, 384), normalize)


def _attention_pooling() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    starts, queries, out = torch.zeros(5, dtype=torch.int32), torch.empty(2, 384), torch.empty(4, 2)
    for dtype in DTYPES:
        for weights in (None, torch.empty(512)):
            x = torch.empty(512, 384, dtype=dtype)
            words = f"{_short(dtype)}{'' if weights is None else ', weights'}"
            others = (starts, 0.5, weights, None)
            yield "attention_pool", words, (x, queries, *others)
            wide = out[:, :, None].expand(4, 2, 384).contiguous()
            yield "attention_pool_backward", words, (wide, x, queries, wide, out, *others)
    padded = torch.empty(4, 256, 384)[:, :128]
    args = (padded, queries, starts[1:], 0.5, None, starts[1:])
    yield "attention_pool", "float32, padded", args


def _vocabulary_pooling() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    starts, argmax = torch.zeros(5, dtype=torch.int32), torch.zeros(4, 1024, dtype=torch.int32)
    for dtype in DTYPES:
        x, weight = torch.empty(512, 384, dtype=dtype), torch.empty(1024, 384, dtype=dtype)
        yield "vocab_max", _short(dtype), (x, weight, torch.empty(1024), starts, None, None)
        args = (torch.empty(4, 1024), x, weight, argmax, starts, None, True, True)
        yield "vocab_max_backward", _short(dtype), args
    args = (x, weight, None, starts, torch.empty(512), None)
    yield "vocab_max", "float16, weights", args
    ids = torch.zeros(512, dtype=torch.int64)
    yield "lexical_index", "", (ids, torch.empty(512), starts, [0])


def _vocabulary_sums() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    starts, bias, grad = torch.zeros(5, dtype=torch.int32), torch.empty(1024), torch.empty(4, 1024)
    # The activation is applied to logits in float32: it makes no difference to another dtype.
    for dtype in DTYPES:
        for activation in range(4) if dtype == DTYPES[0] else (2,):
            x, weight = torch.empty(512, 384, dtype=dtype), torch.empty(1024, 384, dtype=dtype)
            args = (x, weight, bias, starts, activation, None, None)
            words = f"{_short(dtype)}, activation {activation}"
            yield "vocab_sum", words, args
            yield "vocab_sum_backward", words, (grad, *args, True, True, True)
    args = (x, weight, None, starts, 2, torch.empty(512), None)
    yield "vocab_sum", "float16, weights", args
    yield "vocab_sum_backward", "float16, weights", (grad, *args, True, True, False)


def _tables() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    ids, offsets, weights = torch.zeros(64, dtype=torch.int64), torch.zeros(9).int(), torch.ones(64)
    for family, name in enumerate(("murmur3", "splitmix64")):
        yield "hash_keys", name, (ids, family, 0, 4, 1008)
        # The hash is inlined: it makes no difference to what another dtype changes.
        for dtype in DTYPES if family == 0 else DTYPES[:1]:
            table = torch.empty(1008, 128, dtype=dtype)
            for words, bags, w, padding in (
                ("", None, None, None),
                (", bags, weights, padding", offsets, weights, 2),
            ):
                args = (ids, table, bags, w, family, 0, 4, padding)
                yield "hash_bag", f"{name}, {_short(dtype)}{words}", args
                grad = torch.empty(64 if bags is None else 8, 128, dtype=dtype)
                args = (grad, *args, True, True)
                yield "hash_bag_backward", f"{name}, {_short(dtype)}{words}", args


def _compositions() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    ids, offsets = torch.zeros(64, dtype=torch.int64), torch.zeros(9).int()
    parts = Composition((Part(1008, 128, a=1), Part(1008, 128, "linear", a=1, b=1))).fields
    per_id, per_part = torch.empty(64), torch.empty(64, 2)
    # Dtypes, ways to combine, modes of bags and weights don't meet: each is tried alone.
    for dtype, combine, mode, weights in (
        *((dtype, "sum", None, None) for dtype in DTYPES),
        *((dtype, "sum", "sum", None) for dtype in DTYPES),
        (torch.float32, "sum", None, per_part),
        (torch.float32, "mean", "mean", None),
        (torch.float32, "product", "max", None),
        (torch.float32, "product", None, per_id),
    ):
        table = torch.empty(1008 * 128, dtype=dtype)
        grad = torch.empty(8 if mode else 64, 128, dtype=dtype)
        how = (parts, COMBINES.index(combine), MODES.index(mode or "sum"), None if mode else 2)
        words = f"{combine}, {_short(dtype)}{f', bags, {mode}' if mode else ''}"
        if weights is not None:
            words += f", {weights[0].numel()} weights"
        args = (ids, table, offsets if mode else None, weights)
        yield "compose_bag", words, (*args, *how)
        winners = torch.zeros(8, 128, dtype=torch.int32) if mode == "max" else None
        wanted = (True, weights is not None)
        yield "compose_bag_backward", words, (grad, *args, winners, *how, *wanted)


def _optimizers() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    ids, settings = torch.zeros(64, dtype=torch.int64), (0.1, 1e-8, 0.9, 0.999, 0.1)
    parts = Composition((Part(1008, 128, a=1),)).fields
    for dtype in DTYPES:
        table, grad = torch.empty(1008 * 128, dtype=dtype), torch.empty(64, 128, dtype=dtype)
        args = (grad, ids, table, None, None, None, parts, 0, 0, None)
        yield "compose_bag_backward_rows", _short(dtype), args
        for number, name in enumerate(("SGD", "row-wise Adagrad", "Adagrad", "Adam")):
            state = (torch.empty(1008 * 128), torch.empty(1008 * 128), *torch.zeros(2, 1008).long())
            update = (*args, *state, number, *settings)
            yield "compose_bag_update_", f"{_short(dtype)}, {name}", update


def _codes() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    ids = torch.zeros(64, dtype=torch.int64)
    for kind, name in enumerate(CODES):
        for number, dtype in enumerate(_op.FLOATS):
            if kind == 0 or dtype == torch.float32:
                yield "random_codes", f"{name}, {_short(dtype)}", (ids, ids, 96, kind, 5, 3, number)


def _quantized() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    ids, offsets, weights = torch.zeros(64, dtype=torch.int64), torch.zeros(9).int(), torch.ones(64)
    zeros = torch.empty(1008)
    # Bits, dtypes, modes and zero points don't meet: each is tried alone.
    for bits, dim, dtype, mode, zero in (
        *((bits, 128, torch.float32, None, None) for bits in (2, 4, 8, 16)),
        *((bits, 128, torch.float32, "sum", None) for bits in (2, 4, 8, 16)),
        (8, 64, torch.float32, "sum", None),
        (8, 128, torch.bfloat16, "mean", zeros),
        (4, 128, torch.float16, "max", zeros),
    ):
        packed = torch.empty(1008, dim * bits // 8, dtype=torch.uint8)
        scale = torch.empty(1008, dtype=dtype)
        bags, own = (offsets, weights) if mode == "sum" else (offsets if mode else None, None)
        words = f"{bits} bits, dim {dim}, {_short(dtype)}{f', bags, {mode}' if mode else ''}"
        padding = 2 if mode else None
        args = (ids, packed, scale, bags, own, bits, dim, MODES.index(mode or "sum"), padding, zero)
        yield "quantized_bag", words, args
        grad = torch.empty(8 if mode else 64, dim, dtype=dtype)
        yield (
            "quantized_bag_backward", words,
            (grad, ids, packed, scale, bags, bits, dim, padding, zero),
        )  # fmt: skip


def _binary() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    for dtype in _op.FLOATS:
        x = torch.empty(64, 384, dtype=dtype)
        yield "pack_sign", _short(dtype), (x, None)
        threshold = x[0] if dtype == torch.float64 else x[0].float()
        yield "pack_sign", f"{_short(dtype)}, threshold", (x, threshold)
        yield "unpack_planes", _short(dtype), (torch.empty(64, 96, dtype=torch.uint8), 384, dtype)
    for dim in (384, 1024, 3072):
        signs = torch.ones(4, dim, dtype=torch.int8)
        for dtype in _op.FLOATS if dim == 384 else (torch.float32,):
            words = f"{_short(dtype)}, dim {dim}"
            yield "hadamard_rotate", words, (torch.empty(64, dim, dtype=dtype), signs)
    # Its kernel differs by the order of the rounds only.
    yield (
        "hadamard_unrotate",
        "float32, dim 384",
        (torch.empty(64, 384), signs[:, :384].contiguous()),
    )
    codes = torch.empty(4096, 128, dtype=torch.uint8)
    for queries in (1, 16):
        for k in (16, 64, 256):
            yield "hamming_topk", f"{queries} queries, k = {k}", (codes[:queries], codes, k, None)
    odd = torch.empty(4096, 127, dtype=torch.uint8)
    yield "hamming_topk", "16 queries, k = 16, odd width", (odd[:16], odd, 16, None)
    bitmaps, ids = torch.empty(16, 512, dtype=torch.uint8), torch.empty(512, dtype=torch.int64)
    for words, filter in (("bitmaps", bitmaps), ("ids", ids)):
        yield "hamming_topk", f"16 queries, k = 64, {words}", (codes[:16], codes, 64, filter)
        args = (codes[:16], codes, 99, 100, filter, False)
        yield "range_search", f"16 queries, {words}", args
    for queries in (1, 16):
        yield "hamming_distance", f"{queries} queries", (codes[:queries], codes)
        yield "range_search", f"{queries} queries", (codes[:queries], codes, 99, 100, None, False)
    yield "hamming_distance", "16 queries, odd width", (odd[:16], odd)
    yield "range_search", "self join", (codes, codes, 99, 100, None, True)
    # Its kernels are those of range_search.
    yield "range_search_csr", "16 queries", (codes[:16], codes, 99, None, False)


def _scores() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    queries, scale = torch.empty(16, 256), torch.empty(512)
    codes = torch.empty(512, 64, dtype=torch.uint8)
    bitmaps, ids = torch.empty(16, 64, dtype=torch.uint8), torch.empty(256, dtype=torch.int64)
    for k in (16, 64, 100):
        yield "asymmetric_topk", f"two planes, k = {k}", (queries, codes, k, None, None)
    for k in (64, 100):
        yield "dense_topk", f"float32, dot, k = {k}", (queries, torch.empty(512, 256), k, 0, None)
    args = (queries, codes[:, :32].contiguous(), 16, bitmaps, scale)
    yield "asymmetric_topk", "one plane, k = 16, bitmaps, scale", args
    candidates = ids[:64].repeat(16, 1)
    for dtype in (*DTYPES, torch.int8):
        documents = torch.empty(512, 256, dtype=dtype)
        # The metric is applied to sums in float32: it makes no difference to another dtype.
        for metric, name in enumerate(("dot", "cosine", "l2")[: 3 if dtype == DTYPES[0] else 1]):
            words = f"{_short(dtype)}, {name}"
            yield "dense_topk", f"{words}, k = 16", (queries, documents, 16, metric, None)
            yield "gather_scores", words, (queries, documents, candidates, metric)
    yield "dense_topk", "int8, dot, k = 64, ids", (queries, documents, 64, 0, ids)


def _late_interaction() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    starts = torch.zeros(5, dtype=torch.int32)
    queries = torch.empty(64, 128)
    codes = torch.empty(512, 16, dtype=torch.uint8)
    documents = {_short(dtype): torch.empty(512, 128, dtype=dtype) for dtype in DTYPES}
    for words, some in documents.items():
        yield "maxsim", words, (some[:64], starts, some, starts, 128, False)
    yield "maxsim", "floats and bits", (queries, starts, codes, starts, 128, False)
    yield "maxsim", "bits", (codes, starts, codes, starts, 128, False)
    some = documents["float32"]
    yield "maxsim", "float32, argmax", (queries, starts, some, starts, 128, True)
    grad, argmax = torch.empty(4, 4), torch.empty(64, 4, dtype=torch.int32)
    yield "maxsim_backward", "", (grad, queries, starts, some, starts, argmax)


def _attention() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    cu_seqlens = torch.zeros(5, dtype=torch.int32)
    for dtype in DTYPES:
        for head_dim in (32, 64, 128, 256, 512):
            x = torch.empty(1024, 3, 4, head_dim, dtype=dtype)
            q, k, v = x.unbind(1)
            words, numbers = f"{_short(dtype)}, head_dim {head_dim}", (512, 512, None, -1, -1)
            args = (q, k, v, cu_seqlens, cu_seqlens, *numbers)
            yield "varlen_attention", words, (*args, True)
            if head_dim == 512:
                continue  # has no gradient kernel
            lse = torch.empty(4, 1024)
            out = torch.empty(1024, 4, head_dim, dtype=dtype)
            yield "varlen_attention_backward", words, (out, None, q, k, v, out, lse, *args[3:])
    yield from _shaped_attention(cu_seqlens)


def _shaped_attention(cu_seqlens: Tensor) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """What shapes scores, each for itself: it makes little difference to another dtype or width."""
    ids, heads, tokens = torch.zeros(1024, dtype=torch.int32), 4, 1024
    q, k = torch.empty(2, tokens, heads, 64, dtype=torch.bfloat16)
    slots, lookup = torch.empty(512, heads, 64), torch.zeros(1025, dtype=torch.int32)
    for words, dim, shaping in (
        ("softcap, slopes", 128, Shaping(30.0, torch.empty(4, heads))),
        ("masks", 64, Shaping(prefix_len=ids[:4], branch=ids, block_ids=ids)),
        ("distances", 64, Shaping(distance_bias=torch.empty(heads, 255))),
        ("pairs", 64, Shaping(pair_bias=torch.empty(4, heads, 512, 512))),
        ("disentangled", 64, Shaping(position_keys=slots, position_queries=slots,
                                     position_lookup=lookup)),
        ("dropout", 64, Shaping(dropout_p=0.1, dropout_seeds=torch.zeros(4, dtype=torch.int64))),
    ):  # fmt: skip
        v = torch.empty(tokens, heads, dim, dtype=torch.bfloat16)
        words = f"bfloat16, head_dim 64, {words}"
        numbers = (cu_seqlens, cu_seqlens, 512, 512, None, -1, -1)
        yield "varlen_attention", words, (q, k, v, *numbers, True, *shaping)
        given = (v, None, q, k, v, v, torch.empty(heads, tokens), *numbers)
        if shaping.beyond():
            yield "varlen_attention_biases_backward", words, (*given, *shaping, *[True] * 3)
        else:
            args = (*given, *shaping.of_distance(), True)
            yield "varlen_attention_backward", words, args


def _rotary() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    ids = torch.zeros(1024, dtype=torch.int64)
    for interleaved in (False, True):
        for head_dim, pairs in ((64, 32), (128, 64), (96, 16)):
            tables = torch.empty(2, 1024, pairs)
            for dtype in DTYPES if pairs == 32 else DTYPES[:1]:
                x = torch.empty(1024, 4, head_dim, dtype=dtype)
                words = f"{_short(dtype)}, {2 * pairs} of {head_dim}"
                words += ", interleaved" * interleaved
                yield "rotary", words, (x, *tables, ids, interleaved)
                yield "rotary_backward", words, (x, *tables, ids, interleaved)
                if pairs == 32:
                    yield "rotary_", words, (x, *tables, ids, interleaved)


def _attention_rows() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    rows, cu_seqlens = torch.zeros(16, dtype=torch.int64), torch.zeros(5, dtype=torch.int32)
    s, where = torch.empty(16, 4, 512), (rows, cu_seqlens)
    for dtype in DTYPES:
        x, y = torch.empty(16, 4, 64, dtype=dtype), torch.empty(1024, 4, 64, dtype=dtype)
        yield "row_dots", _short(dtype), (x, y, *where, 512)
        yield "row_sums", _short(dtype), (s, y, *where)
        yield "row_outer", _short(dtype), (s, x, *where, 1024, 4)
    yield "row_sums", "float32, dim 1", (s, torch.empty(1024, 1, 1), *where)


def calls() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """Operator, words and arguments of calls that take every configuration of every kernel."""
    families = (
        _pooling, _linear_modes, _several_modes, _generalized_means, _maxima, _finish,
        _attention_pooling, _vocabulary_pooling, _vocabulary_sums, _tables, _compositions,
        _optimizers, _codes, _quantized, _binary, _scores, _late_interaction, _attention,
        _attention_rows, _rotary,
    )  # fmt: skip
    for family in families:
        yield from family()


class _NoGpu:
    """A driver of triton that knows its target and can't launch."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # what triton caches by

    def get_current_stream(self, device: int) -> int:
        return 0


def binaries(architecture: int) -> list[Binary]:
    """Compile all kernels of all calls for sm_<architecture>; each distinct binary once."""
    found: dict[tuple[str, str, str], Binary] = {}
    compile_or_run: Callable[..., Any] = JITFunction.run
    operator = words = ""

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = compile_or_run(self, *args, grid=grid, warmup=True, **kwargs)
        facts = kernel.metadata
        found.setdefault(
            (operator, facts.name, kernel.hash),
            Binary(operator, words, kernel.asm["cubin"], facts.shared),
        )
        return kernel

    with (
        mock.patch.object(driver, "_active", _NoGpu(architecture)),
        mock.patch.object(JITFunction, "run", compile_only),
    ):
        for operator, words, args in calls():  # noqa: B007  (compile_only reads words)
            kernel = _op.ops()[operator].kernel("triton")
            assert kernel is not None
            kernel.run(*args)
    return list(found.values())
