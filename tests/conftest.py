"""Fixtures of all tests: seeds, instruction sets, thread counts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from emblas._load import _C

# Needs a process of its own, which test_interpreted.py starts.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]

hypothesis.settings.register_profile("default", deadline=None, max_examples=40)
hypothesis.settings.register_profile("full", deadline=None, max_examples=400)
# For tests/mutation: the same examples every time, and the first one that fails is enough.
hypothesis.settings.register_profile(
    "mutation",
    deadline=None,
    max_examples=20,
    derandomize=True,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


_LONGEST = ("test_interpreted.py", "test_compiled.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that several processes end together."""
    items.sort(key=lambda item: [item.path.name != name for name in _LONGEST])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=_C.compiled_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once with each instruction set in the binary.

    One that this CPU can't run is covered by tests/native, which compiles the same sources for an
    emulator.
    """
    if request.param not in _C.supported_isas():
        pytest.skip(f"this CPU can't run {request.param}; tests/native emulates it")
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture
def data() -> Path:
    """Folder of the real data sets, named by EMBLAS_DATA."""
    folder = os.environ.get("EMBLAS_DATA")
    if not folder:
        pytest.skip("EMBLAS_DATA is not set")
    return Path(folder)
