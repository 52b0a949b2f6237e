"""Gather the docstrings of the standard library of the running interpreter.

Every module, class, function, method and property that has a docstring of its own becomes one
`Document`. Nothing is downloaded or parsed: the modules are imported and looked at, so the answers
always fit the Python that is running.

The same object is often in sight at several places (`heapq.heappush` is also `_heapq.heappush`,
`asyncio.gather` is also `asyncio.tasks.gather`), so each place is noted as a `_Sighting`, the
sightings are ranked by how likely a programmer is to know the object by that name, and a docstring
is kept only where it is sighted best.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import pkgutil
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

from tqdm import tqdm

MAX_CHARACTERS = 2_000

# Modules that implement another one, which is the one that programs import.
_FRONTS = {
    "genericpath": "os.path",
    "nt": "os",
    "ntpath": "os.path",
    "posix": "os",
    "posixpath": "os.path",
    "pyexpat": "xml.parsers.expat",
}

_SKIPPED = frozenset(_FRONTS) | {
    # These print, open a browser or touch the terminal when they are imported.
    "antigravity",
    "readline",
    "rlcompleter",
    "this",
    # Programs, demonstrations and data rather than a library to call.
    "idlelib",
    "pydoc_data",
    "turtledemo",
    # Deprecated, and gone from newer Pythons; setuptools also replaces distutils by its own.
    "distutils",
    "lib2to3",
    "sre_compile",
    "sre_constants",
    "sre_parse",
    # Tests within packages.
    "test",
    "tests",
}

# Packages whose submodules are one table after another: their own docstring is enough.
_CLOSED = frozenset({"encodings"})


class Document(NamedTuple):
    """One thing to find: its full dotted name, and that name followed by its docstring."""

    name: str
    text: str


class _Sighting(NamedTuple):
    """A docstring seen under a name; the first in sorted order is under the best name."""

    rank: tuple[int, ...]
    name: str
    docstring: str


def collect() -> list[Document]:
    """Return the documented objects of the standard library, sorted by name."""
    names = sorted({*sys.stdlib_module_names, "os.path"})
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        sightings = sorted(
            sighting
            for top in tqdm(names, desc="Reading the standard library", unit=" modules")
            for name, module in _walk(top)
            for sighting in _sightings(name, module)
        )

    documents: dict[str, Document] = {}
    seen: set[str] = set()
    for _, name, docstring in sightings:
        if name not in documents and docstring not in seen:
            documents[name] = Document(name, f"{name}\n{docstring}"[:MAX_CHARACTERS].rstrip())
            seen.add(docstring)
    return sorted(documents.values())


def _walk(name: str) -> Iterator[tuple[str, ModuleType]]:
    """Import a public module and the public modules below it, passing over what fails."""
    last = name.rpartition(".")[2]
    if last.startswith("_") or last in _SKIPPED:
        return
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit):  # Missing on this platform or in this build.
        return
    yield name, module
    if name not in _CLOSED:
        for child in pkgutil.iter_modules(getattr(module, "__path__", ())):
            yield from _walk(f"{name}.{child.name}")


def _sightings(module_name: str, module: ModuleType) -> Iterator[_Sighting]:
    """Note the docstrings in sight from a module: its own, and those of what it holds."""
    if docstring := _docstring(module):
        yield _Sighting((), module_name, docstring)
    in_builtins = module_name == "builtins"
    listed = getattr(module, "__all__", None)
    # What is listed may be made on first use, and so be missing from the namespace until then.
    for attribute in {*vars(module), *(listed or ())}:
        if attribute.startswith("_"):
            continue
        try:
            target = getattr(module, attribute)
        except (AttributeError, ImportError):  # Not there on this platform after all.
            continue
        if not (inspect.isclass(target) or inspect.isroutine(target)):
            continue
        for distance, owner, suffix, part in _parts(target):
            home, docstring = _home(owner, module_name), _docstring(part)
            if home is None or not docstring:
                continue
            name = attribute + suffix if in_builtins else f"{module_name}.{attribute}{suffix}"
            is_listed = attribute in listed if listed is not None else home == module_name
            # Best are a builtin, a module at or above the home of the object, a module that lists
            # the object as its own, the object's own name, its own class and a short name.
            rank = (
                not in_builtins,
                not f"{home}.".startswith(f"{module_name}."),
                not is_listed,
                _is_alias(attribute, target),
                distance,
                name.count("."),
                _is_alias(name.rpartition(".")[2], part),
            )
            yield _Sighting(rank, name, docstring)


def _parts(target: object) -> Iterator[tuple[int, object, str, object]]:
    """Yield an object and, if it is a class, its public methods and properties.

    Each comes with its distance, the object whose home it shares and the suffix to its name.
    Inherited methods are yielded too, because the bases of a public class can be private (in Python
    3.13, `pathlib.Path` has many of its methods from one). The distance, which grows along the
    bases, makes sure that what a public base defines stays with that base.
    """
    yield 0, target, "", target
    if inspect.isclass(target):
        for distance, base in enumerate(target.__mro__, start=1):
            for name, member in vars(base).items():
                if not name.startswith("_") and (
                    inspect.isroutine(member) or isinstance(member, property)
                ):
                    yield distance, base, f".{name}", member


def _home(target: object, seen_in: str) -> str | None:
    """Return the public module that an object seems to come from; None if it is not of Python.

    Such objects are those that other libraries put in place, for example as hooks in `sys`.
    """
    # The methods of hidden instances, such as `random.random`, name no module.
    module_name: str = getattr(target, "__module__", None) or seen_in
    if module_name.partition(".")[0] not in sys.stdlib_module_names:
        return None
    # `_heapq` stands behind `heapq`, and `concurrent.futures._base` behind `concurrent.futures`.
    public = module_name.lstrip("_").partition("._")[0]
    return _FRONTS.get(public, public)


def _docstring(target: object) -> str:
    """Return the cleaned docstring of an object, or "" if it has none of its own."""
    docstring = target.__doc__
    if not isinstance(docstring, str):
        return ""
    # An instance without a docstring shows that of its class.
    if not inspect.isclass(target) and docstring == type(target).__doc__:
        return ""
    return inspect.cleandoc(docstring).strip()


def _is_alias(name: str, target: object) -> bool:
    """Tell whether an object is known to itself by another name."""
    return getattr(target, "__name__", name) != name
