"""Runs of encode_file that are killed, for test_files.py.

Children are forked and use a single thread, so that none of them has to load torch again.
"""

import contextlib
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from emblas.encoder import Encoder, encode_file, load_embeddings
from integrations.models import TEXTS, make_tokenizer, tiny

KILLS, SHARD = 12, 20


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


def main() -> None:
    torch.set_num_threads(1)
    folder, dice = Path(sys.argv[1]), random.Random(0)
    texts = [" ".join(dice.choices(TEXTS, k=dice.randint(1, 4))) for _ in range(400)]
    encoder = Encoder(tiny("bert"), make_tokenizer(), token_budget=256)

    def run(name: str) -> None:
        encode_file(encoder, texts, folder / name, outputs=["dense", "int8"], shard_size=SHARD)

    begin = time.perf_counter()
    run("whole")
    whole = time.perf_counter() - begin
    interrupted = 0
    for _ in range(KILLS):
        done = set((folder / "killed").glob("shard-*.npz"))
        child = fork(lambda: run("killed"))
        time.sleep(dice.uniform(0, 0.4 * whole))  # what is tested: any moment of a run
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        interrupted += os.WIFSIGNALED(status)
        assert done <= set((folder / "killed").glob("shard-*.npz"))
        for path in (folder / "killed").glob("shard-*.npz"):
            with np.load(path) as shard:  # whatever is there, is whole
                assert len(shard["dense"]) == SHARD
    assert interrupted
    assert os.waitpid(fork(lambda: run("killed")), 0)[1] == 0
    for name in ("dense", "int8", "num_tokens"):
        expected = load_embeddings(folder / "whole", name)
        np.testing.assert_array_equal(load_embeddings(folder / "killed", name), expected)
    assert not list((folder / "killed").glob("*.part"))
    print(f"{interrupted} of {KILLS} runs were killed")


if __name__ == "__main__":
    main()
