"""benchmarks/gpu.py needs a GPU; that it walks through all calls is seen without one."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

import cost

FILE = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def test_every_call_is_timed():
    spec = importlib.util.spec_from_file_location("gpu_benchmark", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def seconds(call):
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    found = list(module.rows("cpu", cost.SMALL, ("reference",), seconds, runs=1))
    assert [row["operator"] for row in found] == [
        n for n, calls in cost.SMALL.items() for _ in calls
    ]
    assert module.bandwidth("cpu", seconds, 1 << 20) > 0
    found.append({**found[0], "backend": "cuda", "bytes": 3_000_000})
    lines = module.table(found, 1e12).splitlines()
    assert len(lines) == 2 + len(found)
    assert "| cuda |" in lines[-1]
    assert "| 3.0 | 1.00x |" in lines[-1]
