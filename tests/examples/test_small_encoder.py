"""The student of the small encoder example: it learns, and texts don't see each other."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from emblas import packed
from emblas.losses import distill

FOLDER = Path(__file__).parents[2] / "examples" / "small_encoder"
TEXTS = ["Return the absolute value of x.", "Rain", "", "A small fast C compiler, and its docs",
         "Return the value of the key"]  # fmt: skip


@pytest.fixture(scope="module")
def module():
    spec = importlib.util.spec_from_file_location("small_encoder_student", FOLDER / "student.py")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def test_texts_do_not_see_each_other(module):
    torch.manual_seed(0)
    student = module.Student(16, width=32, layers=2).eval()
    together = student.encode(TEXTS)
    for text, vector in zip(TEXTS, together, strict=True):
        torch.testing.assert_close(student.encode([text])[0], vector, rtol=1e-5, atol=1e-6)
    assert student.encode(["b a"]).sub(student.encode(["a b"])).abs().max() > 1e-6
    ids = module.word_ids(TEXTS)
    assert [len(text) for text in ids] == [7, 1, 0, 9, 6]


def test_it_learns(module):
    torch.manual_seed(0)
    student = module.Student(16, width=32, layers=1)
    teacher = torch.nn.functional.normalize(torch.randn(len(TEXTS), 16))
    batch = packed.pack(module.word_ids(TEXTS))
    optimizer = torch.optim.Adam(student.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        loss = distill(student(*batch), teacher) + distill(student(*batch), teacher, "similarity")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None for p in student.parameters())
    assert losses[-1] < 0.2 * losses[0]
