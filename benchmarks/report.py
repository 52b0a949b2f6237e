"""Turn pytest-benchmark's JSON into tables: ours, each peer, their ratio, share of the bound.

report.py RESULT ...            print the table of every row; of equal ones, that of the last result
report.py RESULT ... --write    write it to docs/benchmarks.md, and its summary into the README
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
_CONTEST = ("family", "op", "shape", "dtype", "threads")  # what rows have in common to compare
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


def by_machine(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one result for each kind of machine: of equal rows, that of the last result."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        groups[_machine(result)].append(result)
    return [_joined(group) for _, group in sorted(groups.items())]


def _joined(results: list[dict[str, Any]]) -> dict[str, Any]:
    rows = {
        tuple(row["extra_info"][k] for k in (*_CONTEST, "who")): row
        for result in results
        for row in result["benchmarks"]
    }
    dates = sorted({result["datetime"][:10] for result in results})
    return {**results[-1], "datetime": ", ".join(dates), "benchmarks": list(rows.values())}


def _machine(result: dict[str, Any]) -> str:
    cpu: str = result["machine_info"]["emblas"]["cpu"]
    return cpu.replace("(R)", "").removesuffix(" Processor")


def _details(result: dict[str, Any]) -> str:
    machine = result["machine_info"]["emblas"]
    return (
        f"{_machine(result)}: ISA {machine['isa']}, torch {machine['torch']}, {result['datetime']}"
    )


def _contests(result: dict[str, Any]) -> Iterator[tuple[Row, Row | None]]:
    """Yield our row and that of each peer (None without one) for every op, shape and dtype."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows_of(result):
        groups[tuple(row[k] for k in _CONTEST)].append(row)
    for _, rows in sorted(groups.items()):
        ours = next((row for row in rows if row["who"] == "emblas"), None)
        if ours is not None:
            peers: list[Row | None] = [row for row in rows if row is not ours]
            for peer in peers or [None]:
                yield ours, peer


def _quiet(ours: Row, peer: Row | None) -> bool:
    return min(ours["busy"], peer["busy"] if peer else 1) >= LEAST_BUSY


def table(result: dict[str, Any]) -> str:
    """Return the Markdown table of every row of one machine."""
    lines = [
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


def tables(results: list[dict[str, Any]]) -> str:
    """Return the table of each machine below its name, tools and dates."""
    return "\n\n".join(
        f"## {_details(result)}\n\nMedians. Ratio: peer's time over ours.\n\n{table(result)}"
        for result in results
    )


def _ratios(result: dict[str, Any]) -> Iterator[tuple[str, int, float, str]]:
    """Yield op, threads, ratio and name of the fastest peer of each shape and dtype."""
    fastest: dict[tuple[Any, ...], tuple[float, str]] = {}
    for ours, peer in _contests(result):
        # Our own other forms are no peers.
        if peer is not None and _quiet(ours, peer) and not peer["who"].startswith("emblas"):
            key = tuple(ours[k] for k in _CONTEST)
            found = (peer["median"] / ours["median"], peer["who"])
            fastest[key] = min(found, fastest.get(key, found))
    for (family, op, *_, threads), (ratio, who) in fastest.items():
        yield f"{family}: {op}", threads, ratio, who


def summary(results: list[dict[str, Any]]) -> str:
    """Return one line per op: on each machine, its lowest and highest ratio."""
    ratios: dict[str, dict[tuple[int, int], list[float]]] = defaultdict(lambda: defaultdict(list))
    peers: dict[str, set[str]] = defaultdict(set)
    for number, result in enumerate(results):
        for op, threads, ratio, who in _ratios(result):
            ratios[op][number, threads].append(ratio)
            peers[op].add(who)
    columns = sorted({column for cells in ratios.values() for column in cells})
    titles = [
        f"{_machine(results[number])}, {threads} thread{'s' * (threads > 1)}"
        for number, threads in columns
    ]
    lines = [
        *(f"{_details(result)}.  " for result in results),
        "Medians. Ratio: peer's time over ours.",
        "",
        f"| op | fastest peer | {' | '.join(titles)} |",
        f"|---|---|{'--:|' * len(columns)}",
    ]
    for op, cells in sorted(ratios.items()):
        ranges = [
            " to ".join(f"{ratio:.2f}" for ratio in sorted({*found[:1], *found[-1:]}))
            for found in (sorted(cells.get(column, [])) for column in columns)
        ]
        lines.append(f"| {op} | {', '.join(sorted(peers[op]))} | {' | '.join(ranges)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "results", type=Path, nargs="+", metavar="result", help="file written by --benchmark-json"
    )
    parser.add_argument("--write", action="store_true", help="write the documents")
    arguments = parser.parse_args()
    results = by_machine([json.loads(file.read_text()) for file in arguments.results])
    if not arguments.write:
        print(tables(results))
        return
    (ROOT / "docs" / "benchmarks.md").write_text(f"# Benchmarks\n\n{tables(results)}\n")
    readme = ROOT / "README.md"
    head, rest = readme.read_text().split(BEGIN)
    tail = rest.split(END)[1]
    readme.write_text(f"{head}{BEGIN}\n{summary(results)}\n{END}{tail}")


if __name__ == "__main__":
    main()
