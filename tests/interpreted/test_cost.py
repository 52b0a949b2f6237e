"""The formulas of tests/gpu/cost.py against what the checked interpreter counts."""

from __future__ import annotations

import pytest
from cost import MODELS, SMALL
from emblas import _op
from triton_check import checked_interpreter


@pytest.mark.parametrize(
    ("operator", "shape"),
    [(name, s) for name, backend in MODELS if backend == "Triton" for s in SMALL[name]],
    ids=str,
)
def test_interpreter_counts_the_same(operator, shape):
    expected = MODELS[operator, "Triton"](shape)
    kernel = _op.ops()[operator].kernel("triton")
    arguments = shape.arguments()[: kernel.arity]
    with checked_interpreter() as launches:
        kernel.run(*arguments)
    assert [launch.kernel for launch in launches] == [k.partition(" ")[0] for k in expected]
    for launch, work in zip(launches, expected.values(), strict=True):
        assert work.read <= launch.read <= work.read + work.slack, launch.kernel
        assert work.written <= launch.written <= work.written + work.slack, launch.kernel
        if work.slack == 0:
            assert launch.tensor_flops == work.tensor_flops, launch.kernel
        assert work.tensor_flops <= launch.tensor_flops, launch.kernel


def test_every_operator_has_a_formula():
    covered = {name for name, backend in MODELS if backend == "Triton"}
    assert {name for name, op in _op.ops().items() if op.triton} == covered
