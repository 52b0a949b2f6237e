"""Groups of a few processes on one machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
import torch.multiprocessing


@contextmanager
def process_group(rank: int, size: int, folder: Path | str) -> Iterator[None]:
    """A group of this process and those that name the same folder, until the block ends.

    What refers to the group, such as a module of DistributedDataParallel, must be gone by then.
    """
    dist.init_process_group("gloo", f"file://{folder}/group-{size}", rank=rank, world_size=size)
    yield
    # Whoever drops the group holds the interpreter's lock and waits for gloo's threads, which need
    # the lock to let go of their last tensors: they get it while this thread waits for the others.
    dist.barrier()
    dist.destroy_process_group()


def run_processes(
    function: Callable[..., None], count: int, *args: object, timeout: float = 240
) -> None:
    """Call ``function(rank, count, *args)`` in new processes; an error or a hang of one fails."""
    context = torch.multiprocessing.spawn(function, (count, *args), nprocs=count, join=False)
    end = time.monotonic() + timeout
    try:
        while not context.join(timeout=5):
            assert time.monotonic() < end, f"{function.__name__} still runs after {timeout} s"
    finally:
        for process in context.processes:
            process.kill()
