"""The formulas of cost.py against what the SIMT emulator counts."""

from __future__ import annotations

import re

import cost
import pytest
import torch
from cost import MODELS, SMALL
from emblas import _op
from simt import emulator

pytestmark = pytest.mark.skipif(bool(emulator.why_not()), reason=emulator.why_not() or "")


def test_page_is_current():
    assert cost.FILE.read_text() == cost.page(), "run `make gpu-table`"


def served():
    """Return operators and shapes that CUDA C++ doesn't leave to Triton."""
    for name in (name for name, backend in MODELS if backend == "CUDA C++"):
        supports = _op.ops()[name].cuda_supports
        for shape in SMALL[name]:
            if supports is None or supports(*shape.arguments()):
                yield name, shape


@pytest.mark.parametrize(("operator", "shape"), list(served()), ids=str)
def test_emulator_counts_the_same(operator, shape):
    expected = MODELS[operator, "CUDA C++"](shape)
    arguments = shape.arguments()
    emulator.library()
    overload = getattr(torch.ops.emblas_simt, f"{operator}_cuda").default
    emulator.take_launches()
    overload(*arguments[: len(overload._schema.arguments)])
    launches = emulator.take_launches()
    assert len(launches) == len(expected)
    for (launched, counts), (kernel, work) in zip(launches, expected.items(), strict=True):
        assert kernel.partition(" ")[0] in re.sub(r"\w+::", "", launched)
        for count, formula in (
            ("distinct_read", work.read),
            ("distinct_write", work.written),
            ("popcounts", work.popcounts),
        ):
            assert formula <= counts[count] <= formula + work.slack, (kernel, count)
        assert counts["tensor_flops"] == work.tensor_flops + work.binary_flops, kernel


def test_every_kernel_has_a_formula():
    emulator.library()
    names = [name for name in dir(torch.ops.emblas_simt) if name.endswith("_cuda")]
    covered = {f"{name}_cuda" for name, backend in MODELS if backend == "CUDA C++"}
    assert set(names) == covered


def test_bounds():
    """Worked out by hand."""
    device = cost.Device("d", 100.0, 10.0, 1000.0, 5000.0, 1.0)
    assert cost._limit(cost.Work(150, 50), device) == (2.0, "memory")
    assert cost._limit(cost.Work(150, 50, flops=30), device) == (3.0, "float32")
    assert cost._limit(cost.Work(150, 50, tensor_flops=4000), device) == (4.0, "tensor cores")
    assert cost._limit(cost.Work(150, 50, binary_flops=30000), device) == (6.0, "tensor cores")
    assert cost._limit(cost.Work(150, 50, popcounts=5), device) == (5.0, "population counts")
