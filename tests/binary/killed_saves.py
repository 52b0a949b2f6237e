"""Processes that are killed while they save, and one that reads, for test_index.py.

Children are forked and use a single thread, so that none of them has to load torch again.
"""

import contextlib
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from emblas.binary import BinaryIndex, storage

DIM, ROWS, KILLS = 16, 40, 40


def fork(work) -> int:
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(type(error).__name__, error, file=sys.stderr, flush=True)
            os._exit(1)
    return child


def save_more(folder: Path) -> None:
    index = BinaryIndex.open(folder)
    number = len(index) // ROWS
    index.add(torch.full((ROWS, DIM), float(number)))
    index.save(folder)


def read(folder: Path) -> None:
    """Open and search until killed: the number of rows only ever grows, by whole saves."""
    before = 0
    while True:
        index = BinaryIndex.open(folder, verify="full")
        assert len(index) % ROWS == 0
        assert len(index) >= before
        before = len(index)
        _, ids = index.search(torch.ones(1, DIM), before)
        assert ids.sort().values.tolist() == [list(range(before))]


def main() -> None:
    torch.set_num_threads(1)
    folder, dice = Path(sys.argv[1]), random.Random(0)
    index = BinaryIndex(DIM, second_level="float32")
    index.add(torch.zeros(ROWS, DIM))
    index.save(folder)
    reader = fork(lambda: read(folder))
    begin = time.perf_counter()
    os.waitpid(fork(lambda: save_more(folder)), 0)
    whole = time.perf_counter() - begin
    assert len(BinaryIndex.open(folder)) == 2 * ROWS
    outcomes = []
    for _ in range(KILLS):
        before = len(BinaryIndex.open(folder))
        writer = fork(lambda: save_more(folder))
        time.sleep(dice.uniform(0, 1.2 * whole))  # what is tested: any moment of a save
        with contextlib.suppress(ProcessLookupError):
            os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        after = BinaryIndex.open(folder, verify="full")
        assert len(after) in (before, before + ROWS)
        outcomes.append(len(after) > before)
    # Two at the same time: one of them sees the other's rows, or is told that it has not.
    before = len(BinaryIndex.open(folder))
    writers = [fork(lambda: save_more(folder)) for _ in range(2)]
    fine = sum(os.waitpid(writer, 0)[1] == 0 for writer in writers)
    assert 1 <= fine <= 2
    assert len(BinaryIndex.open(folder, verify="full")) == before + fine * ROWS
    assert os.waitpid(reader, os.WNOHANG) == (0, 0), "the reader has failed"
    os.kill(reader, signal.SIGKILL)
    os.waitpid(reader, 0)
    shards = len(list(folder.glob("shard-*")))
    save_more(folder)
    assert len(list(folder.glob("shard-*"))) <= shards + 1
    assert {path.name for path in folder.iterdir()} == {
        storage.MANIFEST,
        *(segment.entry["file"] for segment in BinaryIndex.open(folder)._segments),
    }
    print(f"{sum(outcomes)} of {KILLS} saves were whole")


if __name__ == "__main__":
    main()
