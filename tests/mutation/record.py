"""What is known of the mutants, and for how long it holds.

record.json says for each kernel how many of its mutants were killed, beside a digest of its text
and of what stands around it in its file: with another digest, the kernel is tested anew. One with
a digest alone has been put off: `make mutate-changed` passes over it and says so, `make mutate`
tests it. The tests may grow, as more tests kill no fewer mutants. Thus the record keeps what they
consisted of, piece by piece: where a piece is gone or changed, all kernels of the family are tested
anew.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_name("record.json")


def load(kind: str) -> dict[str, Any]:
    """Return what is recorded of one kind of kernels, by family."""
    records: dict[str, Any] = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    found: dict[str, Any] = records.get(kind, {})
    return found


def save(kind: str, family: str, found: dict[str, Any]) -> None:
    """Write what was found of a family, and keep the rest."""
    records = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    records[kind] = records.get(kind, {}) | {family: found}
    new = RECORD.with_suffix(".new")
    new.write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n")
    new.rename(RECORD)


def digest(*texts: str) -> str:
    """Return a digest of texts, whatever the spaces between their words."""
    words = "\n".join(" ".join(text.split()) for text in texts)
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def _pieces(node: ast.AST) -> Iterator[str]:
    """Yield the statements of a module, its functions and classes, entries of a dict apart."""
    match node:
        case ast.Module(body=body):
            for statement in body:
                yield from _pieces(statement)
        case ast.FunctionDef(body=body) | ast.ClassDef(body=body):
            whole = ast.unparse(node)
            yield whole[: whole.find("\n")]
            yield from map(ast.unparse, body)
        case ast.AnnAssign(value=ast.Dict(keys=keys, values=values)):
            entries = zip(keys, values, strict=True)
            yield from (
                f"{key and ast.unparse(key)}: {ast.unparse(value)}" for key, value in entries
            )
        case ast.Import() | ast.ImportFrom():
            pass
        case _:
            yield ast.unparse(node)


def pieces(files: list[Path]) -> set[str]:
    """Return digests of what files and folders consist of: statements, paragraphs of C++."""
    found = {f for file in files for f in (file, *file.rglob("*")) if f.is_file()}
    texts = set[str]()
    for file in found:
        if file.suffix == ".py":
            texts.update(_pieces(ast.parse(file.read_text())))
        elif file.suffix in (".h", ".cpp", ".cuh", ".cu"):
            texts.update(file.read_text().split("\n\n"))
    return {digest(text)[:6] for text in texts}
