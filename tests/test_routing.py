"""Which backend serves a call. No GPU is needed: kernels for it are replaced by ones that tell."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from emblas import _op, use_backend
from emblas._op import Kernel
from emblas.pooling import segment_pool
from emblas.tables import Composition, Part

X, CU = torch.ones(4, 3), torch.tensor([0, 1, 4], dtype=torch.int32)


@pytest.fixture
def op(monkeypatch):
    """``segment_pool`` whose kernels return their backend's name; the test says what they serve."""
    op = _op.ops()["segment_pool"]
    kernels: dict[str, Kernel] = {}
    monkeypatch.setattr(op, "kernel", kernels.get)
    monkeypatch.setattr(op, "reference", lambda *args: "reference")
    monkeypatch.setattr(op, "_warned", False)
    op.test_kernels = kernels
    yield op
    del op.test_kernels


def kernel_named(name, supports=None):
    return _op.kernel(supports)(lambda x, cu_seqlens, weights, normalize: name)


def test_order_of_preference(op):
    with pytest.warns(UserWarning, match="no GPU kernel of emblas::segment_pool serves this call"):
        assert op._on_gpu(X, CU, None, False) == "reference"
    assert op._on_gpu(X, CU, None, False) == "reference"  # warns once only
    assert op.backend("cuda") == "reference"
    op.test_kernels["triton"] = kernel_named("triton")
    assert op._on_gpu(X, CU, None, False) == op.backend("cuda") == "triton"
    op.test_kernels["cuda"] = kernel_named("cuda", supports=lambda x, *others: x.shape[1] == 3)
    assert op._on_gpu(X, CU, None, False) == op.backend("cuda") == "cuda"
    assert op._on_gpu(X[:, :2], CU, None, False) == "triton"


def test_later_arguments_need_their_defaults(op, monkeypatch):
    """A kernel that knows three arguments serves calls whose fourth has its default value."""

    class Overload:
        class _schema:
            arguments = (*op.overload._schema.arguments[:3], type("", (), {"default_value": 1}))

    monkeypatch.setattr(op, "overload", Overload)
    op.test_kernels["triton"] = _op.kernel()(lambda x, cu_seqlens, weights: "triton")
    assert op._on_gpu(X, CU, None) == "triton"  # the dispatcher strips default values
    assert op._on_gpu(X, CU, None, 1) == "triton"
    assert not op.serves("triton", X, CU, None, 2)
    assert not op.serves("triton", X, CU, None, X)


def test_forced(op, monkeypatch):
    monkeypatch.setattr(_op, "_why_not", lambda backend: None)
    with use_backend("reference"):
        assert op._on_gpu(X, CU, None, False) == op(X, CU, None, False) == "reference"
    with use_backend("cpu"):
        assert op(X, CU, None, False)[0].shape == (2, 3)
    with use_backend("triton"):
        with pytest.raises(RuntimeError, match=r"'triton' can't run .* it has no such kernel"):
            op._on_gpu(X, CU, None, False)
        with pytest.raises(RuntimeError, match=r"'triton' can't run .* on device cpu"):
            op(X, CU, None, False)
        op.test_kernels["triton"] = kernel_named("triton", supports=lambda x, cu, w, n: w is None)
        assert op._on_gpu(X, CU, None, False) == "triton"
        with pytest.raises(RuntimeError, match="doesn't support these shapes"):
            op._on_gpu(X, CU, X[:, 0], False)
        monkeypatch.setattr(_op, "triton_is_interpreted", lambda: True)
        assert op(X, CU, None, False) == "triton"


def test_values_are_checked_on_gpus_when_debugging(op, monkeypatch):
    op.test_kernels["triton"] = kernel_named("triton")
    wrong = torch.tensor([0, 3, 1], dtype=torch.int32)
    assert op._on_gpu(X, wrong, None, False) == "triton"
    monkeypatch.setattr(_op, "_DEBUG", True)
    with pytest.raises(ValueError, match="cu_seqlens must start at 0"):
        op._on_gpu(X, wrong, None, False)
    assert op._on_gpu(X, CU, None, False) == "triton"


@pytest.mark.parametrize("name", sorted(_op.ops()))
def test_value_checks_agree_with_the_cpu_kernels(name):
    """Where an operator checks values on GPUs, it raises what its CPU kernel raises."""
    op = _op.ops()[name]
    if op.check_values is None:
        return
    q, ids = torch.zeros(4, 1, 16), torch.arange(4)
    parts = Composition((Part(*X.shape),)).fields
    angles, queries = torch.zeros(3, 8), torch.zeros(2, 1, 16)
    codes = torch.zeros(4, 3, dtype=torch.uint8)
    calls = {
        "rotary": lambda at: (q, angles, angles, at, False),
        "rotary_": lambda at: (q, angles, angles, at, False),
        "rotary_backward": lambda at: (q, angles, angles, at, False),
        "row_dots": lambda rows: (queries, q, rows, CU, 4),
        "row_sums": lambda rows: (torch.zeros(2, 1, 4), q, rows, CU),
        "segment_pool": lambda cu: (X, cu, None, False),
        "segment_pool_modes": lambda cu: (X, cu, None, [0, 6], None, None, None, False),
        "segment_max": lambda cu: (X, cu, None),
        "segment_gem": lambda cu: (X, cu, None, torch.ones(1), 1e-6),
        "attention_pool": lambda cu: (X, X, cu, 1.0),
        "vocab_max": lambda cu: (X, X, None, cu),
        "vocab_sum": lambda cu: (X, X, None, cu, 0),
        "lexical_index": lambda cu: (ids, X[:, 0].contiguous(), cu, []),
        "hash_bag": lambda cu: (ids, X, cu, None, 0, 0, 4, None),
        "compose_bag": lambda cu: (ids, X.flatten(), cu, None, parts, 0, 0, None),
        "quantized_bag": lambda cu: (ids, codes, torch.ones(len(codes)), cu, None, 8, 3, 0, None),
        "random_codes": lambda sequence: (ids, sequence, 3, 0, 1, 1, 0),
        "varlen_attention": lambda cu: (q, q, q, CU, cu, 4, 4, None, -1, -1, False),
    }
    offsets = [torch.tensor(x).int() for x in ([1, 1, 4], [0, 5, 4], [0, 1, 3])]
    positions = [torch.tensor(x) for x in ([0, 1, 2, 3], [-1, 0, 0, 0])]
    rows = [torch.tensor(x) for x in ([4, 0], [0, 9])]
    sequences = [torch.tensor(x) for x in ([0, -1, 0, 0], [2**32])]
    values = {"rotary": positions, "rotary_": positions, "rotary_backward": positions,
              "row_dots": rows, "row_sums": rows, "random_codes": sequences}  # fmt: skip
    for wrong in values.get(name, offsets):
        messages = []
        for run in (op, op.check_values):
            with pytest.raises(ValueError) as error:  # noqa: PT011  (the messages are compared)
                run(*calls[name](wrong))
            messages.append(str(error.value))
        assert messages[0] == messages[1]


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_import_leaves_triton_alone():
    code = "import sys, emblas; assert 'triton' not in sys.modules"
    assert run_python(code).returncode == 0


def test_environment_variable():
    code = "import emblas._op as op; assert op.use_reference()"
    assert run_python(code, EMBLAS_BACKEND="reference").returncode == 0
    assert "backend must be one of" in run_python("import emblas", EMBLAS_BACKEND="gpu").stderr


def test_fullgraph_and_backends():
    """A compiled function is guarded on the backend that is forced."""
    compiled = torch.compile(lambda x: segment_pool(x, CU), fullgraph=True, backend="aot_eager")
    expected = segment_pool(X, CU)
    for name in ("auto", "cpu", "reference"):
        with use_backend(name):
            assert torch.equal(compiled(X), expected)
