"""Mutants of the Triton kernels: their sources are changed as trees, in the interpreter's hands."""

from __future__ import annotations

import ast
import copy
import dataclasses
import importlib
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from emblas import _op
from mutation.record import digest
from triton.runtime.interpreter import InterpretedFunction

_COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
}  # fmt: skip
_OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Add, ast.Mod: ast.FloorDiv, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitOr, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
}  # fmt: skip
_CALLS = {"minimum": "maximum", "maximum": "minimum"}


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change of one kernel or device function."""

    number: int
    family: str
    kernel: str
    line: str  # as changed
    digest: str  # of the kernel and of what stands around it
    lines: range  # of its file, where the statement stands that is changed
    function: InterpretedFunction
    source: str  # as changed


def _changes(node: ast.AST) -> Iterator[Callable[[ast.AST], None]]:
    """Yield functions that change a copy of this node in place."""
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            if type(op) in _COMPARISONS:
                new = _COMPARISONS[type(op)]()
                yield lambda n, i=i, new=new: n.ops.__setitem__(i, new)
    elif isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in _OPERATORS:
        new = _OPERATORS[type(node.op)]()
        yield lambda n, new=new: setattr(n, "op", new)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr in _CALLS:
            yield lambda n: setattr(n.func, "attr", _CALLS[n.func.attr])
        for i, keyword in enumerate(node.keywords):
            if keyword.arg == "other":
                yield lambda n, i=i: n.keywords.pop(i)
            if keyword.arg == "mask":  # all lanes, in the shape of the mask
                same = ast.Compare(keyword.value, [ast.Eq()], [keyword.value])
                yield lambda n, i=i, same=same: setattr(n.keywords[i], "value", same)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield lambda n: setattr(n, "value", ast.Constant(None))  # a store or barrier less


def _tree(kernel: InterpretedFunction) -> tuple[ast.FunctionDef, str]:
    """Return a kernel as a tree, and a digest of it and of what stands around the kernels."""
    body = ast.parse(Path(kernel.fn.__code__.co_filename).read_text()).body
    module = vars(sys.modules[kernel.fn.__module__])
    around, tree = list[str](), None
    for node in body:
        name = getattr(node, "name", None)
        if name == kernel.fn.__name__:
            tree = node
        elif not isinstance(module.get(name), InterpretedFunction):
            around.append(ast.unparse(node))
    assert isinstance(tree, ast.FunctionDef)
    tree.decorator_list = []
    return tree, digest(ast.unparse(tree), *around)


def _lines(statement: ast.stmt) -> range:
    """Return the lines of a statement, without those of the statements inside."""
    inside = getattr(statement, "body", None)
    end = inside[0].lineno - 1 if inside else statement.end_lineno or 0
    return range(statement.lineno, max(end, statement.lineno) + 1)


def _mutants(tree: ast.FunctionDef) -> Iterator[tuple[str, range, str]]:
    """Yield the changed line, the lines of its statement and the source of every mutant."""
    original = ast.unparse(tree).splitlines()
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    lines = {node: _lines(outer) for outer in statements for node in ast.walk(outer)}
    for index, node in enumerate(ast.walk(tree)):
        for change in _changes(node):
            mutant = copy.deepcopy(tree)
            change(list(ast.walk(mutant))[index])
            text = ast.unparse(ast.fix_missing_locations(mutant))
            line = next(
                new for old, new in zip(original, text.splitlines(), strict=True) if old != new
            )
            yield line.strip(), lines[node], text


def _kernels(module: str) -> Iterator[InterpretedFunction]:
    """Yield the kernels of a module, or of a package's modules."""
    importlib.import_module(module)
    for name in sorted(sys.modules):
        if name == module or name.startswith(f"{module}."):
            for value in vars(sys.modules[name]).values():
                if isinstance(value, InterpretedFunction) and value.fn.__module__ == name:
                    yield value


class TritonMutants:
    """The mutants of the Triton kernels, one of which can be alive."""

    tests = ("test_executors.py", "interpreted/test_kernels.py")

    def __init__(self) -> None:
        self.all = list[Mutant]()
        self.ran = defaultdict[str, set[int]](set)  # lines of the kernels, by file
        modules = {"common": "emblas._triton"}
        modules |= {op.triton.split(".")[1]: op.triton for op in _op.ops().values() if op.triton}
        for family, name in modules.items():
            for function in _kernels(name):
                self._add(family, function)

    def _add(self, family: str, function: InterpretedFunction) -> None:
        tree, version = _tree(function)
        for line, lines, source in _mutants(tree):
            number = len(self.all)
            mutant = Mutant(number, family, tree.name, line, version, lines, function, source)
            self.all.append(mutant)

    def build(self) -> None:
        """Have the lines noted that run."""
        files = {mutant.function.fn.__code__.co_filename for mutant in self.all}

        def note(frame: FrameType, event: str, argument: object) -> Any:
            file = frame.f_code.co_filename
            if file not in files:
                return None
            self.ran[file].add(frame.f_lineno)
            return note

        sys.settrace(note)

    def switch(self, mutant: Mutant | None) -> None:
        """Let a mutant live; it can't be undone, as each lives in a process of its own."""
        if mutant:
            sys.settrace(None)
            mutant.function.rewriter._prepare_source = lambda lines: mutant.source
            InterpretedFunction.rewritten_fn.pop(mutant.function.fn, None)

    def reached(self) -> set[int]:
        """Return the numbers of the mutants whose lines ran since the last call."""
        ran = dict(self.ran)
        self.ran.clear()
        return {
            mutant.number
            for mutant in self.all
            if not ran.get(mutant.function.fn.__code__.co_filename, set()).isdisjoint(mutant.lines)
        }

    @staticmethod
    def files(family: str) -> list[Path]:
        """Return the tests of a family, and what they stand on."""
        tests = Path(__file__).parents[1]
        tools = [Path(__file__), tests / "interpreted", tests / "triton_check.py"]
        return [*tools, tests / "cases" / "case.py", tests / "cases" / f"{family}.py"]

    @staticmethod
    def concerns(item: pytest.Item) -> bool:
        """Say whether a test runs kernels in the interpreter: all that are collected do."""
        return True
