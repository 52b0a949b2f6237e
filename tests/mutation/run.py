"""Change the kernels one spot at a time and see whether the tests notice.

    python -m mutation.run cuda [KERNEL ...]                       CUDA C++, in the emulator
    TRITON_INTERPRET=1 python -m mutation.run triton [KERNEL ...]  Triton, in the interpreter

with tests/ and tests/gpu/ on the PYTHONPATH; `make mutate` does both. The tests that run the
kernels are collected once and run once unchanged, which tells the mutants that each of them
reaches. Then every mutant lives in a forked process of its own, where those tests run until one
fails, those that noticed others first. Prints killed/total for each kernel, and fails on a survivor
without a reason in survivors.py.
"""

from __future__ import annotations

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
from mutation.survivors import SURVIVORS

TESTS = Path(__file__).parents[1]


class Plugin:
    """Collects like any run of pytest, and tests the mutants instead."""

    def __init__(self, mutants: Any, kernels: list[str]) -> None:
        self.mutants, self.kernels = mutants, kernels
        self.kills: Counter[int] = Counter()  # of each test
        self.seconds: list[float] = []
        self.reach: dict[int, list[int]] = defaultdict(list)  # tests that reach a mutant
        self.survivors: list[Any] = []

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
        wanted = [m for m in self.mutants.all if not self.kernels or m.kernel in self.kernels]
        dead = self._all(wanted)
        totals: dict[tuple[str, str], list[int]] = {}
        for mutant in wanted:
            row = totals.setdefault((mutant.family, mutant.kernel), [0, 0])
            row[0] += mutant.number in dead
            row[1] += 1
            if mutant.number not in dead and (mutant.kernel, mutant.line) not in SURVIVORS:
                self.survivors.append(mutant)
        for (family, kernel), (killed, total) in totals.items():
            print(f"{family}.{kernel}: {killed}/{total} killed")
        return True

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

    def _all(self, wanted: list[Any]) -> set[int]:
        """Test the mutants, one process for each, as many at once as there are processors."""
        waiting, running, dead = wanted[::-1], dict[int, tuple[int, Any]](), set[int]()
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
                    reason = SURVIVORS.get((mutant.kernel, mutant.line))
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


def main() -> None:
    """Test the mutants of one kind of kernels, all or the named ones."""
    kind, *kernels = sys.argv[1:]
    torch.set_num_threads(1)  # what forks must not have threads
    if kind == "cuda":
        from mutation.cuda import CudaMutants as Mutants
    else:
        from mutation.triton import TritonMutants as Mutants
    plugin = Plugin(Mutants(), kernels)
    os.environ["HYPOTHESIS_PROFILE"] = "mutation"
    tests = [str(TESTS / name) for name in plugin.mutants.tests]
    code = pytest.main(
        ["-s", "-p", "no:cacheprovider", "-p", "no:faulthandler", *tests], plugins=[plugin]
    )
    if code or plugin.survivors:
        sys.exit(f"{len(plugin.survivors)} survivors without a reason")


if __name__ == "__main__":
    main()
