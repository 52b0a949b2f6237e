"""Mutants of the CUDA C++ kernels: a copy of csrc/ in which each of them can be switched on.

Rewriting goes by tokens, which the formatting of clang-format makes safe: an operator with two
operands has a space on either side, what belongs to a type (``T*``, ``Vector<T>``) has none.
mutant.h says what the operators become.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import re
import shutil
from pathlib import Path

import pytest
from mutation.record import digest
from simt import emulator

CSRC = emulator.ROOT / "csrc"
# What simt.h has for both compilers begins here; above is the twin of the emulator's own.
_COMMON = "// --- built on the above"
# Of csrc/common, what no GPU kernel stands on.
_CPU_ONLY = ("aligned.h", "fetch.h", "isa.h", "simd.h")

_OPERATORS = {
    "<": "Less", "<=": "LessEqual", ">": "Greater", ">=": "GreaterEqual",
    "==": "Equal", "!=": "NotEqual",
    "+": "Plus", "-": "Minus", "*": "Times", "/": "Over", "%": "Modulo",
    "<<": "ShiftLeft", ">>": "ShiftRight", "&": "BitAnd", "|": "BitOr", "^": "BitXor",
    "+=": "AddTo", "-=": "TakeFrom", "*=": "ScaleBy", "/=": "DivideBy", "|=": "OrInto",
    "&=": "AndInto", "^=": "XorInto", "<<=": "ShiftLeftBy", ">>=": "ShiftRightBy",
}  # fmt: skip
_OPERATOR = r"(?<=[\w)\]>'\"])\s(?P<operator><<=|>>=|[-+*/|&^]=|[<>=!]=|<<|>>|[-+*/%<>&|^])\s"
_BARRIER = r"(?P<barrier>(?:simt::)?(?:__sync\w+|cp_async_\w+(?:<\d+>)?)\()"
_ATOMIC = r"(?P<atomic>\batomic\w+\()"
_SWAPPED = r"(?:(?:\w+::)?\b(?P<swapped>min|max)\()"
_CONDITION = r"(?P<condition>\b(?:if|while) \()"
_INDEX = r"(?P<index>(?<=[\w)\]])\[)"
_SPOT = re.compile("|".join([_OPERATOR, _BARRIER, _ATOMIC, _SWAPPED, _CONDITION, _INDEX]))
# What the compiler has to know, and what declares: not mutated.
_FIXED = re.compile(r"\bconstexpr\b|\bstatic_assert\b|\busing\b|SIMT_\w*SHARED")
_DECLARED_ARRAY = re.compile(
    r"(?!return|else)(?:const )?[\w:<>, ]*[\w>] \w+(?:\[[^=]*\])*(?:, \w+)?\[|.*\(&\w+\)\[|, \w+\[",
    re.DOTALL,
)


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change of one kernel or device function."""

    number: int
    family: str
    kernel: str
    line: str  # of the source, the mutated spot between double angles
    digest: str  # of the kernel and of what stands around it


def _closing(text: str, opening: int) -> int:
    """Return the place of the bracket that closes the one at ``opening``."""
    depth = 0
    for place in range(opening, len(text)):
        depth += text[place] in "([{"
        depth -= text[place] in ")]}"
        if depth == 0:
            return place
    raise ValueError(text[opening : opening + 80])


def _without_comments(text: str) -> str:
    """Blank the comments and preprocessor lines, every character at its place."""
    return re.sub(r"//[^\n]*|^#[^\n]*", lambda found: " " * len(found.group()), text, flags=re.M)


def _functions(code: str) -> list[tuple[str, int, int]]:
    """Return name, begin and end of the body of every device function and struct of such."""
    found = []
    # None of them is indented.
    block = r"^(?:__global__|__device__|template|struct|class)[^;{}]*\{$(.*?)^\}"
    for body in re.finditer(block, code, re.MULTILINE | re.DOTALL):
        head = code[body.start() : body.start(1)]
        if re.search(r"__(?:global|device)__", body.group()) and not _FIXED.search(head):
            head = head.replace("__launch_bounds__(", "")
            names = re.findall(r"(\w+)(?:<[^()]*>)?\(|(?:struct|class) (\w+) ?\{", head)
            found.append(("".join(names[0]), body.start(1), body.end(1)))
    return found


def _before(code: str, place: int) -> str:
    """Return the part of a statement that comes before a place."""
    begin = max(code.rfind(mark, 0, place) for mark in ";{}")
    return code[begin + 1 : place].strip()


def _statement(code: str, place: int) -> str:
    """Return the statement around a place."""
    ends = [end for mark in ";{" if (end := code.find(mark, place)) >= 0]
    return _before(code, place) + code[place : min(ends)]


class _Rewriter:
    """Rewrites one source file, numbering its mutants from ``first`` on."""

    def __init__(self, family: str, text: str, launch: str, first: int) -> None:
        self.family, self.text, self.code = family, text, _without_comments(text)
        self.launch = _without_comments(launch)
        self.first, self.mutants = first, list[Mutant]()
        self.changes = list[tuple[int, int, str]]()  # begin, end, replacement

    def run(self) -> str:
        functions = _functions(self.code)
        rest = self.code
        for _, begin, end in reversed(functions):
            rest = rest[:begin] + rest[end:]
        for kernel, begin, end in functions:
            self.digest = digest(self.code[begin:end], rest, self.launch)
            for spot in _SPOT.finditer(self.code, begin, end):
                if not _FIXED.search(_statement(self.code, spot.end())):
                    self._mutate(kernel, spot)
        text = self.text
        for begin, end, new in sorted(self.changes, reverse=True):
            text = text[:begin] + new + text[end:]
        return text

    def _declares(self, bracket: int) -> bool:
        """Tell whether a bracket gives the size of an array."""
        return bool(_DECLARED_ARRAY.fullmatch(_before(self.code, bracket + 1)))

    def _number(self, kernel: str, begin: int, end: int) -> int:
        left = self.text.rfind("\n", 0, begin) + 1
        right = self.text.find("\n", end)
        line = f"{self.text[left:begin]}«{self.text[begin:end]}»{self.text[end:right]}"
        number = self.first + len(self.mutants)
        self.mutants.append(
            Mutant(number, self.family, kernel, " ".join(line.split()), self.digest)
        )
        return number

    def _insert(self, place: int, text: str) -> None:
        self.changes.append((place, place, text))

    def _mutate(self, kernel: str, spot: re.Match[str]) -> None:
        kind = spot.lastgroup
        assert kind is not None
        begin, end = spot.span(kind)
        if kind == "operator":
            bracket = self.code.rfind("[", 0, begin)
            if _closing(self.code, bracket) > begin and self._declares(bracket):
                return
            operator = spot.group(kind)
            number = self._number(kernel, begin, end)
            self._insert(end, f" mutation::{_OPERATORS[operator]}<{number}>{{}} {operator}")
        elif kind == "barrier":
            number = self._number(kernel, begin, _closing(self.code, end - 1) + 1)
            self._insert(begin, f"if (!mutation::alive({number})) ")
        elif kind in ("atomic", "swapped"):
            name = spot.group(kind).rstrip("(")
            number = self._number(kernel, begin, begin + len(name))
            self.changes.append((spot.start(), spot.end() - 1, f"mutation::{name}<{number}>"))
        elif kind == "condition":
            closing = _closing(self.code, end - 1)
            number = self._number(kernel, end, closing)
            self._insert(end, "bool(")
            self._insert(closing, f") != bool(mutation::alive({number}))")
        elif not self._declares(begin):
            closing = _closing(self.code, begin)
            number = self._number(kernel, begin, closing + 1)
            self._insert(closing, f" + mutation::alive({number})")


class CudaMutants:
    """The library of all mutants of the CUDA C++ kernels, one of which can be alive."""

    tests = ("test_executors.py", "attention", "binary", "pooling", "tables")

    def __init__(self) -> None:
        self.all = list[Mutant]()
        self._rewritten = dict[Path, str]()
        sources = {CSRC / "common" / "cuda" / "simt.h": "common"}
        sources |= {path: path.parent.name for path in sorted(CSRC.glob("*/*_cuda.cuh"))}
        for path, family in sources.items():
            above, mark, text = path.read_text().rpartition(_COMMON)
            launch = path.with_suffix(".cu")
            launched = launch.read_text() if launch.exists() else ""
            rewriter = _Rewriter(family, text, launched, 1 + len(self.all))
            include = '#include "mutation/mutant.h"\n' if mark else ""
            self._rewritten[path.relative_to(CSRC)] = above + include + mark + rewriter.run()
            self.all += rewriter.mutants

    def build(self) -> None:
        """Build the library and let the emulator use it."""
        folder = emulator.ROOT / "build" / "mutants"
        csrc = folder / "csrc"
        shutil.copytree(CSRC, csrc, dirs_exist_ok=True)
        for path, text in self._rewritten.items():
            (csrc / path).write_text(text)
        library = emulator.build(folder / "build", csrc)
        os.environ["EMBLAS_SIMT_LIBRARY"] = str(library)
        self._library = ctypes.CDLL(str(library))

    def switch(self, mutant: Mutant | None) -> None:
        """Let a mutant live, or none."""
        self._library.emblas_set_mutant(mutant.number if mutant else 0)

    def reached(self) -> set[int]:
        """Return the numbers of the mutants whose places ran since the last call."""
        flags = (ctypes.c_ubyte * (1 + len(self.all)))()
        self._library.emblas_take_reached(flags, len(flags))
        return {number for number, flag in enumerate(flags) if flag}

    @staticmethod
    def files(family: str) -> list[Path]:
        """Return the tests of a family, and what they stand on."""
        tests, here = emulator.ROOT / "tests", Path(__file__)
        tools = [path for path in (CSRC / "common").rglob("*.*h") if path.name not in _CPU_ONLY]
        tools += [tests / "simt", tests / "executors.py"]
        tools += [here, here.with_name("mutant.h"), here.with_name("mutant.cpp")]
        calls = [tests / "cases" / "case.py", tests / "cases" / f"{family}.py"]
        emulated = (f for f in (tests / family).glob("*.py") if "executors" in f.read_text())
        return [*tools, *calls, *emulated, *(tests / family).glob("*_cuda.py")]

    @staticmethod
    def concerns(item: pytest.Item) -> bool:
        """Say whether a test runs kernels in the emulator."""
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        return "simt" in values or item.path.stem.endswith("_cuda")
