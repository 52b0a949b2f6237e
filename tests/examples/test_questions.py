"""The questions of the standard library search example, held against its corpus."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "stdlib_search"

STOPWORDS = """
    a all also am an and another any anything are as at be been being both but by can could did do
    does each else every everything for from had has have how i if in into is it its me mine more
    most my no nobody none not nothing of off on one only or other others out over own same should
    so some somebody something than that the their them themselves then there these they this those
    to too up us was were what when where whether which while who whose why will with without would
    you
"""

# What a name may hold for short, and the word that it stands for.
ABBREVIATIONS = {
    "addr": "address",
    "arg": "argument",
    "attr": "attribute",
    "char": "character",
    "chr": "character",
    "cmp": "compare",
    "comb": "combination",
    "cwd": "directory",
    "del": "delete",
    "dict": "dictionary",
    "dir": "directory",
    "doc": "document",
    "env": "environment",
    "exc": "exception",
    "exec": "execute",
    "func": "function",
    "iter": "iterate",
    "lib": "library",
    "mk": "make",
    "mod": "module",
    "obj": "object",
    "param": "parameter",
    "pkg": "package",
    "prod": "product",
    "proc": "process",
    "rand": "random",
    "rel": "relative",
    "rm": "remove",
    "spec": "specification",
    "sqrt": "root",
    "std": "standard",
    "stdev": "deviation",
    "stor": "store",
    "str": "string",
    "sub": "substitute",
    "temp": "temporary",
    "tmp": "temporary",
    "var": "variable",
}

SUFFIXES = (
    *("ations", "ation", "ings", "ing", "ies", "ied", "ions", "ion"),
    *("est", "ers", "er", "ed", "ly", "es", "s", "e", "y"),
)


def load(name: str) -> ModuleType:
    """Import a module of the example, which is a folder of scripts rather than a package."""
    spec = importlib.util.spec_from_file_location(f"stdlib_search_{name}", EXAMPLE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


QUESTIONS = load("questions").QUESTIONS


@pytest.fixture(scope="session")
def names() -> list[str]:
    """The names of the documents of the corpus, in its order."""
    return [document.name for document in load("corpus").collect()]


def stem(word: str) -> str:
    """Cut the ending off a word, and the doubling of the consonant before it."""
    for suffix in SUFFIXES:
        if word.endswith(suffix) and len(word) - len(suffix) >= 3:
            word = word.removesuffix(suffix)
            break
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] else word


def content_words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower())) - set(STOPWORDS.split())


def name_words(name: str) -> set[str]:
    """Split a dotted name at dots, underscores, digits and changes of case."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


def clash(word: str, part: str) -> bool:
    """Tell whether a word of a question gives away a part of a name, which may be a compound."""
    if len(word) < 3 or len(part) < 3:
        return word == part
    return (
        stem(word) in part
        or stem(part) == stem(word)
        or word.startswith(part)
        or any(
            short in part and stem(word).startswith(stem(long))
            for short, long in ABBREVIATIONS.items()
        )
    )


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("tree", "shutil.rmtree"),
        ("removing", "shutil.rmtree"),
        ("directories", "os.makedirs"),
        ("temporary", "tempfile.mkdtemp"),
        ("zipped", "zipfile.ZipFile"),
        ("copies", "copy.copy"),
        ("logarithm", "math.log"),
        ("parsing", "html.parser.HTMLParser"),
        ("strings", "str.join"),
    ],
)
def test_clash_sees_through_forms_compounds_and_abbreviations(word: str, name: str) -> None:
    assert any(clash(word, part) for part in name_words(name))


def test_there_are_enough_questions() -> None:
    assert len(QUESTIONS) >= 60


def test_questions_are_unique() -> None:
    assert len({question.text for question in QUESTIONS}) == len(QUESTIONS)


def test_documents_are_sorted_and_their_names_unique(names: list[str]) -> None:
    assert names == sorted(set(names))


@pytest.mark.parametrize(
    "name",
    [
        "asyncio.gather",
        "collections.OrderedDict.move_to_end",
        "heapq.heappush",
        "os.listdir",
        "os.path.join",
        "random.random",
        "shutil.rmtree",
        "sorted",
        "str.split",
    ],
)
def test_documents_go_by_their_best_known_name(name: str, names: list[str]) -> None:
    assert name in names


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.answers[0])
def test_answers_are_documents(question: tuple[str, tuple[str, ...]], names: list[str]) -> None:
    _, answers = question
    assert answers
    assert set(answers) - set(names) == set()


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.answers[0])
def test_question_shares_no_word_with_its_answers(question: tuple[str, tuple[str, ...]]) -> None:
    text, answers = question
    clashes = [
        (word, name)
        for word in sorted(content_words(text))
        for name in answers
        if any(clash(word, part) for part in name_words(name))
    ]
    assert clashes == []
