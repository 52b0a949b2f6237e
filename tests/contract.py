"""The checks that every operator owes. A test file of a family calls them with its own inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from emblas import _op
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode


def tolerance(dtype: torch.dtype, length: int) -> dict[str, float]:
    """Error allowed in a sum of ``length`` products of numbers of order one, stored as ``dtype``.

    Accumulating n rounded terms in any order errs by at most n half-units of the accumulator, and
    by about sqrt(n) for terms of random sign; storing adds half a unit of the dtype.
    """
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    error = 8 * max(length, 1) ** 0.5 * torch.finfo(accumulator).eps + torch.finfo(dtype).eps
    return {"rtol": error, "atol": error}


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("emblas", "emblas_simt"):
            self.names.add(func._schema.name.partition("::")[2].removesuffix("_cuda"))
        return func(*args, **(kwargs or {}))


@contextmanager
def only_kernels(*names: str) -> Iterator[None]:
    """Fail unless the block runs all these operators natively: no reference, none left out."""

    def refuse(*args: Any) -> Any:
        raise AssertionError("a reference ran although nobody asked for it")

    ops = _op.ops()
    references = {name: op.reference for name, op in ops.items()}
    recorder = _Recorder()
    try:
        for op in ops.values():
            op.reference = refuse
        with recorder:
            yield
    finally:
        for name, op in ops.items():
            op.reference = references[name]
    missing = set(names) - recorder.names
    assert not missing, f"these operators did not run: {sorted(missing)}"


def check_op(name: str, *args: Any) -> None:
    """Schema, fake kernel, tracing and aliasing of ``torch.ops.emblas.<name>``."""
    torch.library.opcheck(_op.ops()[name].overload, args)


def check_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], names: Sequence[str]
) -> None:
    """Gradient in float64 against finite differences, through the kernels ``names``."""
    inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    with only_kernels(*names):
        assert torch.autograd.gradcheck(function, inputs)


def _shape(value: object) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else value


def check_compiled(
    function: Callable[..., Tensor], calls: Sequence[tuple[Any, ...]], *, backward: bool
) -> None:
    """One graph without breaks, compiled once, serves ragged sizes; equal to eager.

    Sizes of 0 and 1 are specialized by torch.compile itself and don't belong in ``calls``.
    """
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    compilations = 0
    for args in calls:
        results = []
        for run in (function, compiled):
            leaves = [
                a.detach().requires_grad_(backward)
                if isinstance(a, Tensor) and a.is_floating_point()
                else a
                for a in args
            ]
            outputs = run(*leaves)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            grads = []
            if backward:
                torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])
                grads = [a.grad for a in leaves if isinstance(a, Tensor) and a.requires_grad]
            results.append([*outputs, *grads])
        for expected, actual in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
        # Dynamo may trace the first call twice, when it meets a value that it has to specialize.
        compilations = compilations or counter.frame_count
        assert counter.frame_count == compilations, f"recompiled for {[*map(_shape, args)]}"


def check_threads(function: Callable[[], Tensor | tuple[Tensor, ...]]) -> None:
    """Same bits with 1, 2, 3 and 7 threads."""
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            result = function()
            results.append(result if isinstance(result, tuple) else (result,))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for expected, actual in zip(results[0], result, strict=True):
            assert torch.equal(actual, expected)


def peak_memory(call: Callable[[], Any]) -> int:
    """Most resident bytes that a call adds (Linux)."""

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))

    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the kernel does not reset the peak of resident memory")
    before = status("VmRSS")
    result = call()
    peak = status("VmHWM")
    del result
    return peak - before


def packed(lengths: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
    """Offsets of sequences of these lengths."""
    return torch.tensor([0, *torch.tensor(list(lengths), dtype=torch.long).cumsum(0)], dtype=dtype)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """Return the same 2-D values in several memory layouts."""
    rows, columns = x.shape
    wide = torch.full((rows, columns + 3), float("nan"), dtype=x.dtype)
    wide[:, 1 : columns + 1] = x
    return {
        "contiguous": x.contiguous(),
        "wide rows, unaligned": wide[:, 1 : columns + 1],
        "columns first": x.t().contiguous().t(),
        "every other row": x.repeat_interleave(2, 0)[::2],
    }
