"""Change the kernels one spot at a time and see whether the tests notice.

    python -m mutation.run cuda [KERNEL ...]                       CUDA C++, in the emulator
    TRITON_INTERPRET=1 python -m mutation.run triton [KERNEL ...]  Triton, in the interpreter
    ... --changed                                                  what record.json doesn't know

with tests/ and tests/gpu/ on the PYTHONPATH; `make mutate` does both. The tests that run the
kernels are collected once and run once unchanged, which tells the mutants that each of them
reaches. Then every mutant lives in a forked process of its own, where those tests run until one
fails, those first that noticed most others in their time. Prints killed/total for each kernel, and
fails on a survivor without a reason in survivors_cuda.py or survivors_triton.py, and on a reason
whose mutant is gone. What it finds goes to record.json, kernel by kernel: a run that was ended goes
on with --changed.
"""

from __future__ import annotations

import importlib
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
from emblas import _op
from mutation import record

TESTS = Path(__file__).parents[1]


class Plugin:
    """Collects like any run of pytest, and tests the mutants instead."""

    def __init__(self, kind: str, mutants: Any, kernels: list[str], changed_only: bool) -> None:
        self.kind, self.mutants, self.kernels = kind, mutants, kernels
        reasons = importlib.import_module(f"mutation.survivors_{kind}").REASONS
        self.reasons = {mutant: reason for reason, found in reasons.items() for mutant in found}
        texts: dict[tuple[str, str], set[str]] = defaultdict(set)
        for mutant in mutants.all:
            texts[mutant.family, mutant.kernel].add(mutant.digest)
        self.digests = {kernel: record.digest(*sorted(text)) for kernel, text in texts.items()}
        self.record = {family: self._recorded(family) for family, _ in texts}
        known = {(f, k) for f, found in self.record.items() for k in found["kernels"]}
        self.known = known if changed_only else set()
        wanted = [m for m in mutants.all if not kernels or m.kernel in kernels]
        self.wanted = [m for m in wanted if (m.family, m.kernel) not in self.known]
        self.kills: Counter[int] = Counter()  # of each test
        self.seconds: list[float] = []
        self.reach: dict[int, list[int]] = defaultdict(list)  # tests that reach a mutant

    def _recorded(self, family: str) -> dict[str, Any]:
        """Return what is recorded of a family and still holds."""
        pieces = record.pieces(self.mutants.files(family))
        kernels, survivors = {}, []
        old = record.load(self.kind).get(family)
        if old and pieces.issuperset(old["tests"].split()):
            kernels = {
                kernel: found
                for kernel, found in old["kernels"].items()
                if found["digest"] == self.digests.get((family, kernel))
            }
            survivors = [entry for entry in old["survivors"] if entry[0] in kernels]
        return {"tests": " ".join(sorted(pieces)), "kernels": kernels, "survivors": survivors}

    def needs(self, family: str) -> bool:
        """Say whether tests of a family can tell anything of the mutants that are wanted."""
        families = {mutant.family for mutant in self.wanted}
        return family not in self.record or family in families or "common" in families

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep the tests that run the kernels."""
        items[:] = [item for item in items if self.mutants.concerns(item) and self._needs(item)]

    def _needs(self, item: pytest.Item) -> bool:
        """Say the same of one test, which may name its operator."""
        name = item.callspec.params.get("name") if hasattr(item, "callspec") else None
        operator = _op.ops().get(name)
        return operator is None or self.needs(operator.reference.__module__.split(".")[1])

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run the tests on the original, then on every mutant."""
        if session.testsfailed:
            return False
        self.items = session.items
        self._original()
        kernels: dict[tuple[str, str], list[Any]] = defaultdict(list)
        for mutant in self.wanted:
            kernels[mutant.family, mutant.kernel].append(mutant)
        for (family, kernel), mutants in kernels.items():
            self._remember(family, kernel, mutants, self._dead(mutants))
        return True

    def _remember(self, family: str, kernel: str, mutants: list[Any], dead: set[int]) -> None:
        found = self.record[family]
        version = self.digests[family, kernel]
        result = {"killed": len(dead), "mutants": len(mutants), "digest": version}
        found["kernels"][kernel] = result
        alive = [[m.kernel, m.line] for m in mutants if m.number not in dead]
        others = [entry for entry in found["survivors"] if entry[0] != kernel]
        found["survivors"] = others + alive
        self._print(family, kernel)
        record.save(self.kind, family, found)

    def _print(self, family: str, kernel: str, remark: str = "") -> None:
        found = self.record[family]["kernels"][kernel]
        if "killed" not in found:
            print(f"{family}.{kernel}: not tested yet", flush=True)
        else:
            killed = f"{found['killed']}/{found['mutants']} killed"
            print(f"{family}.{kernel}: {killed}{remark}", flush=True)

    def unexplained(self) -> list[tuple[str, str]]:
        """Return the survivors without a reason, the recorded ones included."""
        for family, kernel in sorted(self.known):
            self._print(family, kernel, " (recorded)")
        survivors = (tuple(s) for found in self.record.values() for s in found["survivors"])
        return [survivor for survivor in survivors if survivor not in self.reasons]

    def gone(self) -> list[tuple[str, str]]:
        """Return what has a reason and is no mutant any longer, of the kernels asked for."""
        gone = set(self.reasons) - {(m.kernel, m.line) for m in self.mutants.all}
        return sorted(mutant for mutant in gone if not self.kernels or mutant[0] in self.kernels)

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
        order = sorted(
            self.reach[mutant.number], key=lambda i: self.seconds[i] / (1 + self.kills[i])
        )
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
        tests = [str(TESTS / name) for name in plugin.mutants.tests if plugin.needs(name)]
        options = ["-s", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
        options += ["-W", "ignore::pytest.PytestConfigWarning"]  # faulthandler has options
        if code := pytest.main([*options, *tests], plugins=[plugin]):
            sys.exit(code)
    if survivors := plugin.unexplained():
        sys.exit(_lines("survivors without a reason", survivors))


if __name__ == "__main__":
    main()
