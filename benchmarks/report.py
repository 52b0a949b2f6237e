"""Turn pytest-benchmark's JSON into a table: ours, each peer, their ratio, share of the bound."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
LEAST_BUSY = 0.95

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


def table(result: dict[str, Any]) -> str:
    """Return the Markdown table of a result file, with the machine and date above it."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows_of(result):
        key = tuple(row[k] for k in ("family", "op", "shape", "dtype", "threads"))
        groups[key].append(row)
    machine = result["machine_info"]["emblas"]
    lines = [
        f"{machine['cpu']}, ISA {machine['isa']}, torch {machine['torch']}, "
        f"{result['datetime'][:10]}. Medians. Ratio: peer's time over ours.",
        "",
        "| op | shape | dtype | threads | emblas | bound | memory | peer | its time | ratio |",
        "|---|---|---|--:|--:|--:|--:|---|--:|--:|",
    ]
    for (family, op, shape, dtype, threads), rows in sorted(groups.items()):
        ours = next((row for row in rows if row["who"] == "emblas"), None)
        if ours is None:
            continue
        peers: list[Row | None] = [row for row in rows if row is not ours]
        for peer in peers or [None]:
            busy = min(ours["busy"], peer["busy"] if peer else 1)
            if busy < LEAST_BUSY:
                verdict = ["the machine was busy", "", ""]
            elif peer is None:
                verdict = ["", "", ""]
            else:
                ratio = peer["median"] / ours["median"]
                verdict = [peer["who"], _time(peer["median"]), f"**{ratio:.2f}**"]
            lines.append(
                f"| {family}: {op} | {shape} | {dtype} | {threads} | {_time(ours['median'])} | "
                f"{_share(ours)} | {ours['extra_bytes'] / 2**20:.1f} MiB | {' | '.join(verdict)} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path, help="file written by --benchmark-json")
    parser.add_argument("--readme", type=Path, help="replace the table between its markers")
    arguments = parser.parse_args()
    text = table(json.loads(arguments.result.read_text()))
    if arguments.readme:
        readme = arguments.readme.read_text()
        head, rest = readme.split(BEGIN)
        tail = rest.split(END)[1]
        arguments.readme.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}")
    else:
        print(text)


if __name__ == "__main__":
    main()
