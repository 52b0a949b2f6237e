"""Turn pytest-benchmark's JSON into tables: ours, each peer, their ratio, share of the bound.

report.py RESULT            print the table of every row
report.py RESULT --write    write it to docs/benchmarks.md, and its summary into the README
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
LEAST_BUSY = 0.95
ROOT = Path(__file__).resolve().parents[1]

Row = dict[str, Any]


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def _share(row: Row) -> str:
    """Share of what this machine was measured to do in the same run, of the tighter bound."""
    if row["flops"]:
        return f"{row['flops'] / row['median'] / row['flop_rate']:.0%} of sgemm"
    if row["bytes"]:
        return f"{row['bytes'] / row['median'] / row['bandwidth']:.0%} of read bandwidth"
    return ""


def rows_of(result: dict[str, Any]) -> list[Row]:
    """Return one row per benchmark of a result file."""
    return [
        {**b["extra_info"], "median": b["stats"]["median"], "min": b["stats"]["min"]}
        for b in result["benchmarks"]
    ]


def _machine(result: dict[str, Any]) -> str:
    machine = result["machine_info"]["emblas"]
    return (
        f"{machine['cpu']}, ISA {machine['isa']}, torch {machine['torch']}, "
        f"{result['datetime'][:10]}. Medians. Ratio: peer's time over ours."
    )


def _contests(result: dict[str, Any]) -> Iterator[tuple[Row, Row | None]]:
    """Yield our row and that of each peer (None without one) for every op, shape and dtype."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows_of(result):
        key = tuple(row[k] for k in ("family", "op", "shape", "dtype", "threads"))
        groups[key].append(row)
    for _, rows in sorted(groups.items()):
        ours = next((row for row in rows if row["who"] == "emblas"), None)
        if ours is not None:
            peers: list[Row | None] = [row for row in rows if row is not ours]
            for peer in peers or [None]:
                yield ours, peer


def _quiet(ours: Row, peer: Row | None) -> bool:
    return min(ours["busy"], peer["busy"] if peer else 1) >= LEAST_BUSY


def table(result: dict[str, Any]) -> str:
    """Return the Markdown table of every row, with the machine and date above it."""
    lines = [
        _machine(result),
        "",
        "| op | shape | dtype | threads | emblas | bound | memory | peer | its time | ratio |",
        "|---|---|---|--:|--:|--:|--:|---|--:|--:|",
    ]
    for ours, peer in _contests(result):
        if not _quiet(ours, peer):
            verdict = ["the machine was busy", "", ""]
        elif peer is None:
            verdict = ["", "", ""]
        else:
            ratio = peer["median"] / ours["median"]
            verdict = [peer["who"], _time(peer["median"]), f"**{ratio:.2f}**"]
        lines.append(
            f"| {ours['family']}: {ours['op']} | {ours['shape']} | {ours['dtype']} | "
            f"{ours['threads']} | {_time(ours['median'])} | {_share(ours)} | "
            f"{ours['extra_bytes'] / 2**20:.1f} MiB | {' | '.join(verdict)} |"
        )
    return "\n".join(lines)


def summary(result: dict[str, Any]) -> str:
    """Return one line per op and peer: the lowest and highest ratio over the shapes measured."""
    ratios: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for ours, peer in _contests(result):
        if peer is not None and _quiet(ours, peer):
            key = (f"{ours['family']}: {ours['op']}", peer["who"])
            ratios[key][ours["threads"]].append(peer["median"] / ours["median"])
    threads = sorted({count for by_threads in ratios.values() for count in by_threads})
    titles = [f"{count} thread{'s' * (count > 1)}" for count in threads]
    lines = [
        _machine(result),
        "",
        f"| op | peer | rows | {' | '.join(titles)} |",
        f"|---|---|--:|{'--:|' * len(threads)}",
    ]
    for (op, who), by_threads in ratios.items():
        cells = [
            f"{min(by_threads[n]):.2f} to {max(by_threads[n]):.2f}" if by_threads[n] else ""
            for n in threads
        ]
        lines.append(
            f"| {op} | {who} | {sum(map(len, by_threads.values()))} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("result", type=Path, help="file written by --benchmark-json")
    parser.add_argument("--write", action="store_true", help="write the documents")
    arguments = parser.parse_args()
    result = json.loads(arguments.result.read_text())
    if not arguments.write:
        print(table(result))
        return
    (ROOT / "docs" / "benchmarks.md").write_text(f"# Benchmarks\n\n{table(result)}\n")
    readme = ROOT / "README.md"
    head, rest = readme.read_text().split(BEGIN)
    tail = rest.split(END)[1]
    readme.write_text(f"{head}{BEGIN}\n{summary(result)}\n{END}{tail}")


if __name__ == "__main__":
    main()
