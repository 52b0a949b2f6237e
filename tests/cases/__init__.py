"""Calls of every operator, over odd and degenerate shapes, for tests/test_executors.py.

``CASES[operator][case]`` makes the arguments; all but few are small, as emulators run them too.
"""

from __future__ import annotations

from cases import attention, binary, pooling, tables

CASES = pooling.CASES | tables.CASES | binary.CASES | attention.CASES
