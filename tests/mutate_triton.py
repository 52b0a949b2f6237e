"""Break the Triton kernels one spot at a time and see whether the tests notice.

    TRITON_INTERPRET=1 python tests/mutate_triton.py [FAMILY ...] [FAMILY.KERNEL ...]

Every comparison, mask, index, shift, minimum, maximum, sum and store of every kernel is changed
alone; then those of the family's calls of tests/cases.py that reach the kernel run in the checked
interpreter until one fails.
Prints killed/total for each kernel, and fails on a survivor without a reason in SURVIVORS.
"""

from __future__ import annotations

import ast
import copy
import importlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from cases import CASES
from emblas import _op
from test_executors import test_equals_oracle
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

# (kernel, mutated line): why no call can tell it from the original.
_EDGE = "differs only where the length is exactly the epsilon"
_MORE_WORK = "the same result by more work"
_UNUSED = "the lanes that the mask hides are not used"
_NO_ROW = "the interpreter's garbage, -1 or huge, is no row; a GPU's may be one"
_FIRST = "hidden lanes hold index 0, which may be read, and their values are not used"
SURVIVORS: dict[tuple[str, str], str] = {
    ("_normalize", "values = tl.load(mean + row * dim + d, mask=d < dim)"): _UNUSED,
    ("_hash_keys", "id = tl.load(ids + i * stride, mask=i < count).to(tl.uint64)"): _UNUSED,
    ("_load_ids", "id = tl.load(ids + i * stride, mask=inside)"): _UNUSED,
    ("_grad_rows", "i = tl.load(sources + position, mask=inside)"): _UNUSED,
    ("_grad_rows", "bag = tl.load(bag_of + i, mask=inside)"): _UNUSED,
    ("_grad_rows", "bag = tl.load(bag_of + i, mask=inside == inside, other=0)"): _FIRST,
    (
        "_grad_rows",
        "gradient *= tl.load(weights + i, mask=inside == inside, other=0.0)[:, None]",
    ): _FIRST,
    ("_mean_gradient", "removed = tl.where(length >= _EPSILON, tl.sum(products, 0), 0.0)"): _EDGE,
    ("_mean_gradient", "dot = tl.where(length >= _EPSILON, 0.0, dot)"): "m . dm is 0 but for "
    "rounding, unless the length is at most the epsilon, to which it was raised",
    ("_pack_sign", "limit = tl.load(threshold + d, mask=d < dim)"): "hidden lanes are 0, which is "
    "not above the interpreter's garbage, NaN or huge; a GPU's may be negative",
    ("rows_of", "row = tl.load(ids + position, mask=there)"): _NO_ROW,
    ("_collect_chunk", "limit = tl.load(limits + query, mask=exists)"): _UNUSED,
    ("_collect_chunk", "ties_left = tl.load(ties + at, mask=exists)"): _UNUSED,
    ("_collect_chunk", "free = tl.load(starts + at, mask=exists)"): _UNUSED,
    (
        "_gather_scores",
        "row = tl.load(ids + query * candidates + place, mask=place < candidates)",
    ): _NO_ROW,
    (
        "_rotate",
        "values = tl.load(x + row * row_stride + d, mask=d < dim).to(ACCUMULATOR)",
    ): _UNUSED,
    ("_rotate", "sign = tl.load(signs + round * dim + d, mask=d < dim).to(ACCUMULATOR)"): _UNUSED,
    (
        "_rotate",
        "turned = tl.gather(values, tl.where(d <= dim, (d + first) % dim, d), 0)",
    ): _UNUSED,
    (
        "_rotate",
        "values = tl.gather(turned, tl.where(d <= dim, (d + dim - first) % dim, d), 0)",
    ): _UNUSED,
    (
        "_grad_queries",
        "j = tl.load(argmax + i * num_documents + n, mask=n < num_documents).to(tl.int64)",
    ): _NO_ROW,
    ("_grad_documents", "n = tl.load(document_of + j, mask=j < document_tokens)"): _UNUSED,
    ("_grad_documents", "owner = tl.load(owners + i, mask=there)"): _UNUSED,
    ("_grad_documents", "won = tl.load(at, mask=inside) == j[:, None]"): _NO_ROW,
    ("_grad_documents", "inside = (j <= document_tokens)[:, None] & there[None, :]"): "reads of "
    "the first document's column, whose sums are not stored",
    (
        "keep_best",
        "if tl.max(tl.max((number > limit[:, None]).to(tl.int32), 1), 0) >= 0:",
    ): _MORE_WORK,
    (
        "keep_best",
        "if tl.max(tl.max((number >= limit[:, None]).to(tl.int32), 1), 0) > 0:",
    ): _MORE_WORK,
    ("_attend", "if first > queries:"): _MORE_WORK,
}


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


def mutants(kernel: InterpretedFunction) -> Iterator[tuple[str, str]]:
    """Yield the changed line and the source of every mutant of a kernel."""
    source = Path(kernel.fn.__code__.co_filename).read_text()
    tree = next(
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == kernel.fn.__name__
    )
    tree.decorator_list = []
    original = ast.unparse(tree).splitlines()
    for index, node in enumerate(ast.walk(tree)):
        for change in _changes(node):
            mutant = copy.deepcopy(tree)
            change(list(ast.walk(mutant))[index])
            text = ast.unparse(ast.fix_missing_locations(mutant))
            line = next(
                new for old, new in zip(original, text.splitlines(), strict=True) if old != new
            )
            yield line.strip(), text


def _checks(family: str) -> Iterator[Callable[[], None]]:
    """Yield the calls that may notice, all of which pass on the originals."""
    path = Path(__file__).parent / "interpreted" / "test_kernels.py"
    spec = importlib.util.spec_from_file_location("test_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, op in _op.ops().items():
        if op.triton == f"emblas.{family}.triton" or family == "common":
            for case in CASES[name]:
                yield lambda n=name, c=case: test_equals_oracle(n, "triton-interpreted", c)
    if family == "binary":
        yield module.check_wrong_ids
    if family in ("common", "pooling", "tables", "attention", "binary"):
        yield lambda: module.test_wrong_offsets_stay_in_bounds([5, 900, -3, 2])
    if family == "binary":
        for nearest in ("first", "last"):
            yield lambda n=nearest: _with_patches(module.check_hamming_topk, 16, 1, n)
        for programs, later_only in ((1, True), (1, False), (2048, False)):
            yield lambda a=(programs, later_only): _with_patches(module.check_range_search, *a)


def _with_patches(check: Callable[..., None], *args: Any) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        check(monkeypatch, *args)


def _killed(checks: list[Callable[[], None]]) -> bool:
    for i, check in enumerate(checks):
        torch.manual_seed(0)
        try:
            check()
        except Exception:
            checks.insert(0, checks.pop(i))  # likely to notice the next one too
            return True
    return False


def _kernels(module: str) -> list[InterpretedFunction]:
    """All kernels of a module, or of a package's modules."""
    importlib.import_module(module)
    names = [name for name in sys.modules if name == module or name.startswith(f"{module}.")]
    return [
        value
        for name in names
        for value in vars(sys.modules[name]).values()
        if isinstance(value, InterpretedFunction) and value.fn.__module__ == name
    ]


def _reached(checks: Iterator[Callable[[], None]]) -> dict[Callable, list[Callable[[], None]]]:
    """For each function of a kernel, the checks that run it, the fastest first."""
    rewrite, reached = InterpretedFunction.rewrite, set()

    def remember(self: InterpretedFunction) -> Callable:
        reached.add(self.fn)
        return rewrite(self)

    found: dict[Callable, list[tuple[float, Callable[[], None]]]] = {}
    for check in checks:
        reached.clear()
        torch.manual_seed(0)
        with mock.patch.object(InterpretedFunction, "rewrite", remember):
            start = time.perf_counter()
            check()
            seconds = time.perf_counter() - start
        for fn in reached:
            found.setdefault(fn, []).append((seconds, check))
    return {fn: [c for _, c in sorted(some, key=lambda x: x[0])] for fn, some in found.items()}


def main() -> None:
    """Mutate the kernels of the families named, or of all."""
    modules = {"common": "emblas._triton"}
    modules |= {op.triton.split(".")[1]: op.triton for op in _op.ops().values() if op.triton}
    unexplained = []
    for name in sys.argv[1:] or modules:
        family, _, only = name.partition(".")
        reached = _reached(_checks(family))
        for kernel in _kernels(modules[family]):
            if only not in ("", kernel.fn.__name__):
                continue
            checks = reached.get(kernel.fn, [])
            total = killed = 0
            for line, text in mutants(kernel):
                kernel.rewriter._prepare_source = lambda lines, text=text: text
                InterpretedFunction.rewritten_fn.pop(kernel.fn, None)
                total += 1
                if _killed(checks):
                    killed += 1
                elif (kernel.fn.__name__, line) not in SURVIVORS:
                    unexplained.append((kernel.fn.__name__, line))
                    print(f"    survived: {line}", flush=True)
            del kernel.rewriter._prepare_source
            InterpretedFunction.rewritten_fn.pop(kernel.fn, None)
            print(f"{family}.{kernel.fn.__name__}: {killed}/{total} killed", flush=True)
    if unexplained:
        sys.exit(f"{len(unexplained)} survivors without a reason")


if __name__ == "__main__":
    main()
