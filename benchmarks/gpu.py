"""Time every operator that has GPU kernels on a real GPU, by device events: `make gpu-test`.

The calls are those that docs/gpu_bounds.md gives bounds for, on each backend that serves them and,
as the peer, on the reference in plain torch. Between two runs a write of twice the second-level
cache drives out what the run before left there. Writes benchmarks/results/<date>-<gpu>.json and
prints a table; the bound is the formula's bytes over the bandwidth of a copy in the same process.

Without a GPU nothing is timed, and nothing pretends to be: the script says so and fails.
"""

from __future__ import annotations

import datetime
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cost  # tests/gpu, on the PYTHONPATH
import torch
from emblas import _op, use_backend

RESULTS = Path(__file__).parent / "results"
RUNS = 20


def event_timer() -> Callable[[Callable[[], Any]], float]:
    """Make a function that returns the seconds of one run on the GPU."""
    properties = torch.cuda.get_device_properties(0)
    flush = torch.empty(2 * properties.L2_cache_size, dtype=torch.uint8, device="cuda")

    def seconds(call: Callable[[], Any]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    return seconds


def bandwidth(device: str, seconds: Callable[[Callable[[], Any]], float], size: int) -> float:
    """Measure the bytes that a copy moves in a second, read and written."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / min(seconds(lambda: target.copy_(source)) for _ in range(5))


def rows(
    device: str,
    shapes: dict[str, tuple[Any, ...]],
    backends: Sequence[str],
    seconds: Callable[[Callable[[], Any]], float],
    runs: int = RUNS,
) -> Iterator[dict[str, Any]]:
    """Time the calls; one that a backend doesn't serve or has no memory for is left out."""
    for name, calls in shapes.items():
        op = _op.ops()[name]
        for shape in calls:
            arguments = [a.to(device) if isinstance(a, torch.Tensor) else a
                         for a in shape.arguments()]  # fmt: skip
            for backend in backends:
                if backend != "reference" and not op.serves(backend, *arguments):
                    continue
                try:
                    with use_backend(backend):
                        for _ in range(3):
                            op(*arguments)
                        times = [seconds(lambda: op(*arguments)) for _ in range(runs)]  # noqa: B023
                except torch.OutOfMemoryError:
                    continue
                section = "CUDA C++" if backend == "cuda" else "Triton"
                model = cost.MODELS.get((name, section))
                works = model(shape).values() if model and backend != "reference" else ()
                yield {
                    "operator": name,
                    "call": str(shape),
                    "backend": backend,
                    "median_us": 1e6 * statistics.median(times),
                    "least_us": 1e6 * min(times),
                    "bytes": sum(work.read + work.written for work in works) or None,
                }


def table(found: list[dict[str, Any]], bytes_per_second: float) -> str:
    """Lay out the rows, each beside its bound and the reference."""
    lines = [
        "| operator, call | backend | median, us | bound by bytes, us | against reference |",
        "|---|---|---|---|---|",
    ]
    peers = {(r["operator"], r["call"]): r["median_us"] for r in found
             if r["backend"] == "reference"}  # fmt: skip
    for r in found:
        peer = peers.get((r["operator"], r["call"]))
        bound = f"{1e6 * r['bytes'] / bytes_per_second:,.1f}" if r["bytes"] else "-"
        ratio = f"{peer / r['median_us']:.2f}x" if peer else "-"
        lines.append(
            f"| {r['operator']}: {r['call']} | {r['backend']} | {r['median_us']:,.1f} "
            f"| {bound} | {ratio} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Time everything and write it down."""
    if not torch.cuda.is_available():
        sys.exit("no GPU: nothing can be measured")
    seconds = event_timer()
    speed = bandwidth("cuda", seconds, 1 << 30)
    found = list(rows("cuda", cost.LARGE, ("cuda", "triton", "reference"), seconds))
    gpu = torch.cuda.get_device_name().replace(" ", "-")
    result = {"gpu": gpu, "torch": torch.__version__, "copy_bytes_per_second": speed, "rows": found}
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{datetime.date.today()}-{gpu}.json"
    file.write_text(json.dumps(result, indent=1))
    print(table(found, speed))
    print(f"written to {file}")


if __name__ == "__main__":
    main()
