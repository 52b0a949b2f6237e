"""Triton kernels on the CPU, in a process of their own: triton reads the variable on import.

There run tests/interpreted and tests/test_executors.py, the latter with the interpreted kernels as
one more executor.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from emblas._op import has_triton


@pytest.mark.skipif(not has_triton(), reason="triton is not installed")
@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="this is the process of its own")
def test_interpreted():
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", here / "interpreted", here / "test_executors.py"]
    run = subprocess.run(
        [*map(str, command), "-p", "no:cacheprovider", "--durations=5"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=here.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    print(run.stdout, run.stderr)
    assert run.returncode == 0
