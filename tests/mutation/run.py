"""Change the kernels one spot at a time and see whether the tests notice.

    python -m mutation.run cuda [KERNEL ...]                       CUDA C++, in the emulator
    TRITON_INTERPRET=1 python -m mutation.run triton [KERNEL ...]  Triton, in the interpreter
    ... --changed                                                  what record.json doesn't know

with tests/ and tests/gpu/ on the PYTHONPATH; `make mutate` does both. The tests that run the
kernels are collected once and run once unchanged, which tells the mutants that each of them
reaches. Then every mutant lives in a forked process of its own, where those tests run until one
fails, those that noticed others first. Prints killed/total for each kernel, and fails on a survivor
without a reason in survivors_cuda.py or survivors_triton.py, and on a reason whose mutant is gone.

record.json keeps the results of the last whole run, with a digest of the kernels and tests of each
family, and of later runs of single kernels while that digest holds. CI tests the mutants of the
families whose digest has changed since.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import select
import signal
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from _pytest.runner import runtestprotocol

TESTS = Path(__file__).parents[1]
RECORD = Path(__file__).with_name("record.json")


def digest(files: list[Path]) -> str:
    """Return a digest of the files that exist, and of folders with all that they hold."""
    found = {f for file in files for f in (file, *file.rglob("*")) if f.is_file()}
    hash = hashlib.sha256()
    for file in sorted(f for f in found if f.suffix in (".py", ".h", ".cpp", ".cu", ".cuh")):
        hash.update(f"{file.relative_to(TESTS.parent)}\n".encode() + file.read_bytes())
    return hash.hexdigest()


def _records() -> dict[str, Any]:
    """Return the results of both kinds of kernels."""
    records: dict[str, Any] = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    return records


class Plugin:
    """Collects like any run of pytest, and tests the mutants instead."""

    def __init__(self, kind: str, mutants: Any, kernels: list[str], changed_only: bool) -> None:
        self.kind, self.mutants, self.kernels = kind, mutants, kernels
        reasons = importlib.import_module(f"mutation.survivors_{kind}").REASONS
        self.reasons = {mutant: reason for reason, found in reasons.items() for mutant in found}
        self.record = _records().get(kind, {})
        families = sorted({mutant.family for mutant in mutants.all})
        self.digests = {family: digest(mutants.files(family)) for family in families}
        old = self.record
        same = {f for f in families if f in old and old[f]["digest"] == self.digests[f]}
        self.known = same if changed_only else set()
        wanted = [m for m in mutants.all if not kernels or m.kernel in kernels]
        self.wanted = [m for m in wanted if m.family not in self.known]
        self.kills: Counter[int] = Counter()  # of each test
        self.seconds: list[float] = []
        self.reach: dict[int, list[int]] = defaultdict(list)  # tests that reach a mutant

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep the tests that run the kernels."""
        items[:] = [item for item in items if self.mutants.concerns(item)]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run the tests on the original, then on every mutant."""
        if session.testsfailed:
            return False
        self.items = session.items
        self._original()
        for family in self.digests:
            mutants = [mutant for mutant in self.wanted if mutant.family == family]
            if mutants:
                self._remember(family, mutants, self._dead(mutants))
        return True

    def _remember(self, family: str, mutants: list[Any], dead: set[int]) -> None:
        alive = [mutant for mutant in mutants if mutant.number not in dead]
        totals = Counter(mutant.kernel for mutant in mutants)
        survived = Counter(mutant.kernel for mutant in alive)
        kernels = {k: [n - survived[k], n] for k, n in totals.items()}
        survivors = [[mutant.kernel, mutant.line] for mutant in alive]
        digest, old = self.digests[family], self.record.get(family, {})
        known = old.get("digest") == digest
        if self.kernels and known:
            kernels = old["kernels"] | kernels
            survivors += [entry for entry in old["survivors"] if entry[0] not in totals]
        found = {"digest": digest, "kernels": kernels, "survivors": survivors}
        self.record[family] = found
        self._print(family)
        if known or not self.kernels:
            records = _records()
            records[self.kind] = records.get(self.kind, {}) | {family: found}
            RECORD.write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n")

    def _print(self, family: str, remark: str = "") -> None:
        for kernel, (killed, total) in self.record[family]["kernels"].items():
            print(f"{family}.{kernel}: {killed}/{total} killed{remark}", flush=True)

    def unexplained(self) -> list[tuple[str, str]]:
        """Return the survivors without a reason, the recorded ones included."""
        for family in self.known:
            self._print(family, " (recorded)")
        record = self.record
        families = self.known | {mutant.family for mutant in self.wanted}
        survivors = (tuple(s) for family in sorted(families) for s in record[family]["survivors"])
        return [survivor for survivor in survivors if survivor not in self.reasons]

    def gone(self) -> list[tuple[str, str]]:
        """Return what has a reason and is no mutant any longer."""
        return sorted(set(self.reasons) - {(m.kernel, m.line) for m in self.mutants.all})

    def _fails(self, index: int) -> bool:
        item = self.items[index]
        return any(report.failed for report in runtestprotocol(item, log=False, nextitem=None))

    def _original(self) -> None:
        self.mutants.switch(None)
        self.mutants.reached()
        for index, item in enumerate(self.items):
            start = time.perf_counter()
            if self._fails(index):
                raise pytest.UsageError(f"fails without any mutant: {item.nodeid}")
            self.seconds.append(time.perf_counter() - start)
            for number in self.mutants.reached():
                self.reach[number].append(index)
        print(f"{len(self.items)} tests in {sum(self.seconds):.0f} s", flush=True)

    def _dead(self, mutants: list[Any]) -> set[int]:
        """Test the mutants, one process for each, as many at once as there are processors."""
        waiting, running, dead = mutants[::-1], dict[int, tuple[int, Any]](), set[int]()
        while waiting or running:
            while waiting and len(running) < (os.cpu_count() or 1):
                mutant = waiting.pop()
                pipe, pid = self._start(mutant)
                running[pipe] = pid, mutant
            for pipe in select.select(list(running), [], [])[0]:
                pid, mutant = running.pop(pipe)
                answer = os.read(pipe, 16)
                os.close(pipe)
                _, status = os.waitpid(pid, 0)
                if answer:
                    self.kills[int(answer)] += 1
                if answer or status:  # a crash or a timeout is noticed too
                    dead.add(mutant.number)
                else:
                    reason = self.reasons.get((mutant.kernel, mutant.line))
                    reached = "" if mutant.number in self.reach else " (no test reaches it)"
                    print(f"    survived{reached}: {mutant.kernel}: {mutant.line}"
                          f"{f'  # {reason}' if reason else ''}", flush=True)  # fmt: skip
        return dead

    def _start(self, mutant: Any) -> tuple[int, int]:
        ours, theirs = os.pipe()
        order = sorted(self.reach[mutant.number], key=lambda i: (-self.kills[i], self.seconds[i]))
        pid = os.fork()
        if pid:
            os.close(theirs)
            return ours, pid
        try:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            self.mutants.switch(mutant)
            for index in order:
                signal.alarm(20 + int(20 * self.seconds[index]))
                if self._fails(index):
                    os.write(theirs, str(index).encode())
                    break
        finally:
            os._exit(0)


def _lines(what: str, mutants: list[tuple[str, str]]) -> str:
    listed = "".join(f"\n    {kernel}: {line}" for kernel, line in mutants)
    return f"{len(mutants)} {what}:{listed}"


def main() -> None:
    """Test the mutants of one kind of kernels, all or the named ones."""
    kind, *kernels = (argument for argument in sys.argv[1:] if argument != "--changed")
    torch.set_num_threads(1)  # what forks must not have threads
    if kind == "cuda":
        from mutation.cuda import CudaMutants as Mutants
    else:
        from mutation.triton import TritonMutants as Mutants
    plugin = Plugin(kind, Mutants(), kernels, "--changed" in sys.argv)
    if gone := plugin.gone():
        sys.exit(_lines("reasons without a mutant", gone))
    if plugin.wanted:
        plugin.mutants.build()
        os.environ["HYPOTHESIS_PROFILE"] = "mutation"
        tests = [str(TESTS / name) for name in plugin.mutants.tests]
        options = ["-s", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
        options += ["-W", "ignore::pytest.PytestConfigWarning"]  # faulthandler has options
        if code := pytest.main([*options, *tests], plugins=[plugin]):
            sys.exit(code)
    if survivors := plugin.unexplained():
        sys.exit(_lines("survivors without a reason", survivors))


if __name__ == "__main__":
    main()
