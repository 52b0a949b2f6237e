"""How a benchmark row is measured.

A benchmark function takes the fixture ``row`` and calls it once::

    def bench_something(row, who, ...):
        row("pooling", "segment_pool mean", who, shape="...", dtype="float32",
            call=function, inputs=[args, args, ...], bytes=..., flops=...)

``who`` is "emblas" or the name of a peer; rows of one op, shape, dtype and thread count stand
beside each other in the table.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture


def _last_level_cache() -> int:
    """Bytes, as Linux says; elsewhere more than most have."""
    size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return int(size.read_text().strip("K\n")) << 10 if size.exists() else 64 << 20


LAST_LEVEL_CACHE = _last_level_cache()  # inputs rotate through more than this
THREADS = [int(n) for n in os.environ.get("BENCH_THREADS", "1,2").split(",")]
SLOW = 0.5  # seconds: a call that is slower is made as seldom as a median allows
LEAST_BUSY = 0.95  # CPU time over wall time and threads; below it, the row is measured again


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "threads" in metafunc.fixturenames:
        metafunc.parametrize("threads", THREADS, ids=lambda n: f"{n}T")


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def rotate(make: Callable[[int], tuple[Any, ...]], bytes_per_call: int) -> list[tuple[Any, ...]]:
    """As many inputs as it takes to leave the last-level cache, at most 64."""
    count = max(1, min(64, -(-2 * LAST_LEVEL_CACHE // max(bytes_per_call, 1))))
    return [make(seed) for seed in range(count)]


def _extra_memory(call: Callable[[], Any]) -> int:
    """Peak resident bytes that one call adds (Linux; 0 elsewhere)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0

    def status(key: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) << 10
        return 0

    before = status("VmRSS")
    result = call()
    peak = status("VmHWM")
    del result
    return max(0, peak - before)


@pytest.fixture
def row(benchmark: BenchmarkFixture, threads: int, machine: dict[str, Any]) -> Callable[..., None]:
    """Measure one row; see the module's docstring."""

    def measure(
        family: str,
        op: str,
        who: str,
        *,
        shape: str,
        dtype: str,
        call: Callable[..., Any],
        inputs: Sequence[tuple[Any, ...]],
        bytes: float = 0,
        flops: float = 0,
        seconds: float = 1.0,
        single_thread: bool = False,
    ) -> None:
        if single_thread and threads != 1:
            pytest.skip(f"{who} uses one thread only")
        torch.set_num_threads(threads)
        arguments = itertools.cycle(inputs)
        extra = _extra_memory(lambda: call(*next(arguments)))
        busy = 0.0
        with torch.inference_mode():
            for _ in range(4):  # to warm up; a slow call needs less of it
                begin = time.perf_counter()
                call(*next(arguments))
                once = time.perf_counter() - begin
                if once > SLOW:
                    break
            rounds = max(5 if once > SLOW else 7, min(2000, int(seconds / max(once, 1e-7))))
            for _ in range(0 if once > SLOW else 10):
                # pytest-benchmark can't repeat a row: wait for a quiet moment
                wall, cpu = time.perf_counter(), time.process_time()
                for _ in range(max(1, rounds // 10)):
                    call(*next(arguments))
                if time.process_time() - cpu >= LEAST_BUSY * (time.perf_counter() - wall):
                    break
            wall, cpu = time.perf_counter(), time.process_time()
            benchmark.pedantic(call, setup=lambda: (next(arguments), {}), rounds=rounds)
            busy = (time.process_time() - cpu) / (time.perf_counter() - wall)
        benchmark.group = f"{family}: {op}, {shape}, {dtype}, {threads} threads"
        benchmark.extra_info.update(
            family=family, op=op, who=who, shape=shape, dtype=dtype, threads=threads, busy=busy,
            bytes=bytes, flops=flops, extra_bytes=extra,
            bandwidth=machine["read_bandwidth"][str(threads)],
            flop_rate=machine["sgemm"][str(threads)],
        )  # fmt: skip

    return measure


def _best(call: Callable[[], Any], repeats: int = 15) -> float:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


@pytest.fixture(scope="session")
def machine() -> dict[str, Any]:
    """Bytes per second that a plain sum reads and flops per second of sgemm, in this very run."""
    bandwidth, sgemm = {}, {}
    data = torch.ones(8 * LAST_LEVEL_CACHE // 4, dtype=torch.float32)
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    for threads in THREADS:
        torch.set_num_threads(threads)
        bandwidth[str(threads)] = data.numel() * 4 / _best(lambda: data.sum())
        sgemm[str(threads)] = 2 * 1024**3 / _best(lambda: a @ b)
    return {"read_bandwidth": bandwidth, "sgemm": sgemm}


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    from emblas import info

    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    facts = {key: value for key, value in info().items() if key != "ops"}
    machine_info["emblas"] = json.loads(json.dumps({"cpu": cpu, **facts}))
