"""Triton's interpreter, made to compute what a GPU computes and to notice what it would punish.

``TRITON_INTERPRET=1`` runs kernels program by program on numpy arrays. Inside
:func:`checked_interpreter`, it moreover

- computes in bfloat16 (arithmetic and dots: unpatched, it multiplies bit patterns), rounds casts to
  nearest even (it truncates) and multiplies float32 in TF32 or 3xTF32 where a dot asks for it;
- passes integers annotated ``tl.int64`` as 64 bits, as the compiler does;
- gives lanes that a load masks out, without a value of their own, garbage: NaN, huge or zero;
- fills new tensors with garbage;
- runs the programs of a launch in random order;

and raises :class:`KernelFault`, with kernel, program, line and buffer, for

- an access outside of the elements of the tensors that the launch was given, or misaligned;
- a read of memory that nobody has written, by a kernel or afterwards by a torch operator;
- two programs of a launch that touch the same byte, one of them writing, not both by atomics;
- a read of what the same program has stored, without ``tl.debug_barrier()`` in between;
- one store of different values to one address.

Not modelled: number of warps and stages, layouts, shared memory, time, the rounding of approximate
exp2 and log2, atomics of 16-bit floats. Private parts of triton are replaced, so this works with
one version only, :data:`TRITON_VERSION`.
"""

from __future__ import annotations

import ctypes
import dataclasses
import inspect
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn
from unittest import mock

import numpy as np
import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

TRITON_VERSION = "3.9.0"
# In every byte: NaN as a float and -1 as an integer; a huge float and a large integer; zero.
_GARBAGE = (0xFF, 0x7F, 0)
_NOBODY, _SEVERAL = -1, -2  # beside numbers of programs
_OWN_FILES = (os.path.dirname(triton.__file__) + os.sep, __file__)


class KernelFault(AssertionError):
    """What a GPU would have answered with a crash or with wrong results."""


# --- memory --------------------------------------------------------------------------------------


def _bytes_of(tensor: torch.Tensor, per_byte: np.ndarray) -> np.ndarray:
    """View those entries of an array with one entry per byte of the storage that belong here."""
    size = tensor.element_size()
    strides = (
        *(stride * size * per_byte.itemsize for stride in tensor.stride()),
        per_byte.itemsize,
    )
    return np.lib.stride_tricks.as_strided(
        per_byte[tensor.storage_offset() * size :], (*tensor.shape, size), strides
    )


@dataclasses.dataclass
class _Buffer:
    """One storage that a launch may touch, with what is known of each of its bytes."""

    name: str
    base: int
    given: np.ndarray  # belongs to a tensor that was passed
    written: np.ndarray  # ever
    writer: np.ndarray  # program, in this launch
    wrote_atomically: np.ndarray
    wrote_in: np.ndarray  # number of barriers that the writer had passed
    reader: np.ndarray


class _Memory:
    """Which bytes of tensors made inside the context were written; others count as written."""

    def __init__(self) -> None:
        self._written: dict[int, np.ndarray] = {}
        self._alive: list[torch.Tensor] = []  # an address must not be used twice

    def allocated(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            ctypes.memset(storage.data_ptr(), _GARBAGE[0], storage.nbytes())
            self._written[storage.data_ptr()] = np.zeros(storage.nbytes(), bool)
            self._alive.append(tensor)

    def written(self, tensor: torch.Tensor) -> np.ndarray | None:
        return self._written.get(tensor.untyped_storage().data_ptr())

    def buffers(self, tensors: dict[str, torch.Tensor]) -> list[_Buffer]:
        found: dict[int, _Buffer] = {}
        for name, tensor in tensors.items():
            storage = tensor.untyped_storage()
            size, base = storage.nbytes(), storage.data_ptr()
            if not tensor.numel():
                continue
            if base not in found:
                written = self.written(tensor)
                found[base] = _Buffer(
                    name,
                    base,
                    given=np.zeros(size, bool),
                    written=np.ones(size, bool) if written is None else written,
                    writer=np.full(size, _NOBODY, np.int32),
                    wrote_atomically=np.zeros(size, bool),
                    wrote_in=np.zeros(size, np.int32),
                    reader=np.full(size, _NOBODY, np.int32),
                )
            elif name not in found[base].name:
                found[base].name += f"/{name}"
            _bytes_of(tensor, found[base].given)[...] = True
        return sorted(found.values(), key=lambda buffer: buffer.base)


class _TorchCalls(TorchDispatchMode):
    """Watches allocations, and what torch operators read and write between launches."""

    def __init__(self, memory: _Memory) -> None:
        super().__init__()
        self._memory = memory

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided"):
            self._memory.allocated(result)
            return result
        aliases = [r.alias_info for r in func._schema.returns if r.alias_info is not None]
        is_view = any(not alias.is_write for alias in aliases)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if not isinstance(value, torch.Tensor) or self._memory.written(value) is None:
                continue
            written = _bytes_of(value, self._memory.written(value))
            if argument.alias_info is not None and argument.alias_info.is_write:
                written[...] = True
            elif not is_view and not written.all():
                raise KernelFault(
                    f"{name} reads a tensor of shape {tuple(value.shape)} of which nobody has "
                    f"written {(~written.all(-1)).sum()} elements"
                )
        return result


# --- launches ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a launch has read and written, in distinct bytes, and computed by dots."""

    kernel: str
    read: int
    written: int
    tensor_flops: int


class _Launch:
    """The launch in progress: where its programs are and what they have touched."""

    current: _Launch | None = None

    def __init__(self, kernel: str, buffers: list[_Buffer], order: random.Random) -> None:
        self.kernel = kernel
        self.buffers = buffers
        self.bases = np.array([buffer.base for buffer in buffers], np.int64)
        self.order = order
        self.program = 0
        self.place: tuple[int, ...] = ()
        self.barriers = 0
        self.tensor_flops = 0

    def traffic(self) -> Traffic:
        read = sum(int((buffer.reader != _NOBODY).sum()) for buffer in self.buffers)
        written = sum(int((buffer.writer != _NOBODY).sum()) for buffer in self.buffers)
        return Traffic(self.kernel, read, written, self.tensor_flops)

    def fault(self, message: str) -> NoReturn:
        frame = sys._getframe()
        while frame.f_back is not None and frame.f_code.co_filename.startswith(_OWN_FILES):
            frame = frame.f_back
        raise KernelFault(f"{self.kernel}, program {self.place}, line {frame.f_lineno}: {message}")

    def touch(self, kind: str, pointers: TensorHandle, mask: np.ndarray) -> None:
        """Check an access of the lanes in ``mask`` and remember it; kind: load, store, atomic."""
        size = pointers.get_element_ty().primitive_bitwidth // 8 or 1
        data, mask = np.broadcast_arrays(pointers.data, mask)
        address = data[mask].astype(np.int64)
        if not address.size:
            return
        if (address % size).any():
            self.fault(f"misaligned {kind} of {size} bytes")
        if not self.buffers:
            self.fault(f"{kind} although no tensor was passed")
        owner = np.searchsorted(self.bases, address, "right") - 1
        for index in np.unique(owner):
            buffer = self.buffers[max(index, 0)]
            start = address[owner == index] - buffer.base
            outside = (start < 0) | (start + size > len(buffer.given))
            outside[~outside] = ~buffer.given[start[~outside]]
            if outside.any():
                self.fault(
                    f"{kind} out of bounds, {start[outside][0]} bytes from the start of "
                    f"{buffer.name} ({len(buffer.given)} bytes), {outside.sum()} lanes"
                )
            self._touch(kind, buffer, (start[:, None] + np.arange(size)).ravel())

    def _touch(self, kind: str, buffer: _Buffer, at: np.ndarray) -> None:
        writer, reader = buffer.writer[at], buffer.reader[at]
        if kind != "store" and not buffer.written[at].all():
            self.fault(f"{kind} of uninitialised memory of {buffer.name}")
        others_wrote = (writer != _NOBODY) & (writer != self.program)
        if kind == "atomic":
            others_wrote &= ~buffer.wrote_atomically[at]
        others_read = (reader != _NOBODY) & (reader != self.program) & (kind != "load")
        if (others_wrote | others_read).any():
            did = "written" if others_wrote.any() else "read"
            self.fault(f"race: {kind} of what another program has {did} in {buffer.name}")
        if kind == "load":
            if ((writer == self.program) & (buffer.wrote_in[at] == self.barriers)).any():
                self.fault(f"load of what this program has stored in {buffer.name}, no barrier")
            alone = (reader == _NOBODY) | (reader == self.program)
            buffer.reader[at] = np.where(alone, self.program, _SEVERAL)
            return
        buffer.written[at] = True
        several = (writer != _NOBODY) & (writer != self.program)
        buffer.writer[at] = np.where(several, _SEVERAL, self.program)
        buffer.wrote_atomically[at] = kind == "atomic"
        buffer.wrote_in[at] = self.barriers


def _scalar(annotation: str, value: Any) -> Any:
    """Convert an argument as the compiler types it: by its annotation, else by its value."""
    if annotation == "i64":
        return tl.tensor(TensorHandle(np.array([value], np.int64), tl.int64), tl.int64)
    return interpreter._implicit_cvt(value)


class _Grid:
    """In place of triton.runtime.interpreter.GridExecutor."""

    memory: _Memory
    order: random.Random
    launches: list[Traffic]

    def __init__(self, fn: Callable, arg_names: Sequence[str], grid: Any, hooks: Any = ()) -> None:
        self.fn = fn
        self.grid = grid
        annotations = inspect.get_annotations(fn)
        self.types = {
            name: triton.runtime.jit._normalize_ty(annotations.get(name, "")) for name in arg_names
        }

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        named = {k: v for k, v in kwargs.items() if k in self.types}
        given = inspect.getcallargs(self.fn, *args, **named)
        tensors = {k: v for k, v in given.items() if isinstance(v, torch.Tensor)}
        launch = _Launch(self.fn.__name__, self.memory.buffers(tensors), self.order)
        patches = interpreter._patch_lang(self.fn)
        _Launch.current = launch
        try:
            values = {
                name: value if self.types[name] == "constexpr" else _scalar(self.types[name], value)
                for name, value in given.items()
            }
            grid = self.grid(given) if callable(self.grid) else self.grid
            if not 1 <= len(grid) <= 3 or any(size > 65535 for size in grid[1:]):
                launch.fault(f"no GPU takes the grid {grid}")
            grid = (*grid, 1, 1)[:3]
            interpreter.interpreter_builder.set_grid_dim(*grid)
            programs = list(np.ndindex(*grid))
            self.order.shuffle(programs)
            with np.errstate(all="ignore"):
                for launch.program, launch.place in enumerate(programs):
                    launch.barriers = 0
                    interpreter.interpreter_builder.set_grid_idx(*launch.place)
                    self.fn(**values)
            self.launches.append(launch.traffic())
        finally:
            _Launch.current = None
            patches.restore()


# --- the builder's operations --------------------------------------------------------------------


def _launch() -> _Launch:
    assert _Launch.current is not None
    return _Launch.current


def _masked_load(
    self: Any, ptrs: TensorHandle, mask: TensorHandle, other: Any, policy: Any, volatile: Any
) -> TensorHandle:
    _launch().touch("load", ptrs, mask.data)
    dtype = ptrs.get_element_ty()
    numpy_dtype = interpreter._get_np_dtype(dtype)
    if other is None:
        size = ptrs.data.size * numpy_dtype.itemsize
        garbage = np.full(size, _launch().order.choice(_GARBAGE), np.uint8).view(numpy_dtype)
        other = TensorHandle(garbage.reshape(ptrs.data.shape), dtype)
    data = interpreter._interpreter.load(ptrs.data, mask.data, other.data, numpy_dtype)
    return TensorHandle(data, dtype)


def _masked_store(self: Any, ptrs: TensorHandle, value: Any, mask: Any, policy: Any) -> Any:
    launch = _launch()
    launch.touch("store", ptrs, mask.data)
    address, values, kept = np.broadcast_arrays(ptrs.data, value.data, mask.data)
    address, values = address[kept], values[kept]
    unique, first, inverse = np.unique(address, return_index=True, return_inverse=True)
    if len(unique) < len(address):
        same = np.ascontiguousarray(values).view(f"V{values.dtype.itemsize}")
        if (same[first][inverse] != same).any():
            launch.fault("one store puts different values at one address")
    return interpreter._interpreter.store(ptrs.data, value.data, mask.data)


def _atomic(original: Callable) -> Callable:
    def patched(self: Any, *args: Any) -> Any:
        # atomic_rmw(op, ptr, val, mask, ...) and atomic_cas(ptr, cmp, val, ...)
        ptr, mask = (args[1], args[3].data) if len(args) == 6 else (args[0], np.True_)
        if ptr.get_element_ty() in (tl.bfloat16, tl.float16):
            _launch().fault("atomics of 16-bit floats are not modelled")
        _launch().touch("atomic", ptr, mask)
        return original(self, *args)

    return patched


def _barrier(self: Any) -> None:
    _launch().barriers += 1


# --- arithmetic ----------------------------------------------------------------------------------


def _to_float32(data: np.ndarray) -> np.ndarray:
    """Widen bfloat16, stored as uint16."""
    return (data.astype(np.uint32) << 16).view(np.float32)


def _to_bfloat16(data: np.ndarray) -> np.ndarray:
    """Round float32 to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(data, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(data), 0x7FFF, rounded).astype(np.uint16)


def _to_tf32(data: np.ndarray) -> np.ndarray:
    """Drop the bits that tensor cores ignore."""
    return (np.ascontiguousarray(data, np.float32).view(np.uint32) & 0xFFFFE000).view(np.float32)


def _cast(original: Callable) -> Callable:
    def patched(self: Any, src: TensorHandle, dst_type: Any, *rounding: Any) -> TensorHandle:
        source, target = src.dtype.scalar, dst_type.scalar
        if tl.bfloat16 not in (source, target):
            if target == tl.float16 and source in (tl.float32, tl.float64):
                return TensorHandle(src.data.astype(np.float16), target)  # to nearest even
            return original(self, src, dst_type, *rounding)
        data = _to_float32(src.data) if source == tl.bfloat16 else src.data.astype(np.float32)
        if target == tl.bfloat16:
            return TensorHandle(_to_bfloat16(data), target)
        return TensorHandle(data.astype(interpreter._get_np_dtype(target)), target)

    return patched


def _in_float32(original: Callable) -> Callable:
    """Compute an operation of bfloat16 in float32 and round its result once."""

    def patched(self: Any, *args: Any) -> TensorHandle:
        handles = [a for a in args if isinstance(a, TensorHandle)]
        if all(handle.dtype.scalar != tl.bfloat16 for handle in handles):
            return original(self, *args)
        wide = [
            TensorHandle(_to_float32(a.data), tl.float32) if isinstance(a, TensorHandle) else a
            for a in args
        ]
        result = original(self, *wide)
        if result.data.dtype == np.bool_:
            return result
        return TensorHandle(_to_bfloat16(result.data), tl.bfloat16)

    return patched


def _binary(original: Callable) -> Callable:
    """Type what a comparison returns, which the interpreter gives the type of its operands."""

    def patched(self: Any, lhs: TensorHandle, rhs: TensorHandle, op: Any) -> TensorHandle:
        result = original(self, lhs, rhs, op)
        is_bool = result.data.dtype == np.bool_
        return TensorHandle(result.data, tl.int1) if is_bool else result

    return _in_float32(patched)


def _dot(
    self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, precision: Any, imprecise: Any
) -> TensorHandle:
    left, right = (_to_float32(x.data) if x.dtype.scalar == tl.bfloat16 else x.data for x in (a, b))
    accumulator = d.data.dtype
    _launch().tensor_flops += 2 * d.data.size * left.shape[-1]
    if left.dtype != np.float32 or a.dtype.scalar == tl.bfloat16 or precision.name == "IEEE":
        product = np.matmul(left, right, dtype=accumulator)
    else:
        high = _to_tf32(left), _to_tf32(right)
        product = high[0] @ high[1]
        if precision.name == "TF32x3":
            low = _to_tf32(left - high[0]), _to_tf32(right - high[1])
            product = (low[0] @ high[1] + high[0] @ low[1]) + product
        elif precision.name != "TF32":
            _launch().fault(f"dots in {precision.name} are not modelled")
    return TensorHandle((product + d.data).astype(accumulator), d.dtype.scalar)


def _reduce(original: Callable) -> Callable:
    def patched(self: Any, inputs: Any) -> Any:
        if any(x.dtype.scalar == tl.bfloat16 for x in inputs):
            _launch().fault("reductions and scans in bfloat16 are not modelled: cast to float32")
        if self.combine_fn is tl.standard._xor_combine:  # of tl.sort and tl.topk
            (x,) = inputs
            data = np.bitwise_xor.reduce(x.handle.data, axis=self.axis, keepdims=self.keep_dims)
            return self.to_tensor(data, x.dtype)
        return original(self, inputs)

    return patched


@contextmanager
def checked_interpreter(seed: int = 0) -> Iterator[list[Traffic]]:
    """Interpret Triton kernels launched in this block with all checks; ``seed`` orders programs.

    The list that it gives grows by each launch.
    """
    if triton.__version__ != TRITON_VERSION:
        raise RuntimeError(
            f"triton_check replaces private parts of triton {TRITON_VERSION}, not of "
            f"{triton.__version__}"
        )
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("start the process with TRITON_INTERPRET=1")
    builder = InterpreterBuilder
    memory = _Memory()
    methods = {
        "create_masked_load": _masked_load,
        "create_masked_store": _masked_store,
        "create_atomic_rmw": _atomic(builder.create_atomic_rmw),
        "create_atomic_cas": _atomic(builder.create_atomic_cas),
        "create_barrier": _barrier,
        "create_dot": _dot,
        "cast_impl": _cast(builder.cast_impl),
        "create_fp_to_fp": _cast(builder.create_fp_to_fp),
        "binary_op": _binary(builder.binary_op),
        "unary_op": _in_float32(builder.unary_op),
        "create_fma": _in_float32(builder.create_fma),
    }
    launches: list[Traffic] = []
    state = {"memory": memory, "order": random.Random(seed), "launches": launches}
    grid = type("Grid", (_Grid,), state)
    with (
        mock.patch.multiple(builder, **methods),
        mock.patch.object(interpreter, "GridExecutor", grid),
        mock.patch.object(
            interpreter.ReduceOps, "apply_impl", _reduce(interpreter.ReduceOps.apply_impl)
        ),
        mock.patch.object(
            interpreter.ScanOps, "apply_impl", _reduce(interpreter.ScanOps.apply_impl)
        ),
        _TorchCalls(memory),
    ):
        yield launches
