"""The documentation that ships with Python, as plain text.

Knows where the running Python keeps its help topics and its docstrings.  The text depends on the
Python version, so only training uses it, never an evaluation.
"""

import ast
import importlib
import inspect
import pydoc
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Not documentation: tests, the packages that hold other people's code, and generated tables.
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "ensurepip"}
SHORTEST = 80  # characters; below that a docstring says little more than its name
PAGE = 2500  # characters, so that a page fits into the model's context


def _topics() -> Iterator[str]:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        yield topics[name].strip()


def _source_docstrings() -> Iterator[str]:
    """Docstrings of the library's Python files, read and not imported: importing runs code."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for path in sorted(root.rglob("*.py")):
        if SKIPPED.intersection(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, documented):
                text = ast.get_docstring(node)
                if text:
                    name = path.stem if isinstance(node, ast.Module) else node.name
                    yield f"{name}: {text}"


def _builtin_docstrings() -> Iterator[str]:
    """Docstrings of the modules written in C, which have no source file to read."""
    for name in sorted(sys.builtin_module_names):
        module = importlib.import_module(name)
        for member, value in sorted(inspect.getmembers(module), key=lambda pair: pair[0]):
            text = inspect.getdoc(value)
            if text and not member.startswith("__"):
                yield f"{name}.{member}: {text}"
            if inspect.isclass(value):
                for method, function in sorted(vars(value).items()):
                    text = pydoc.getdoc(function) if callable(function) else ""
                    if text and not method.startswith("__"):
                        yield f"{name}.{member}.{method}: {text}"


def _pages(text: str) -> Iterator[str]:
    """The text cut between paragraphs into pages of about ``PAGE`` characters."""
    page = ""
    for paragraph in text.split("\n\n"):
        if page and len(page) + len(paragraph) > PAGE:
            yield page
            page = ""
        page += f"\n\n{paragraph}" if page else paragraph
    yield page


def python_docs() -> list[str]:
    """All pages, each once, in an order that depends only on the Python installation."""
    texts: dict[str, None] = {}
    for source in (_topics(), _source_docstrings(), _builtin_docstrings()):
        for text in source:
            for page in _pages(text):
                if len(page) >= SHORTEST and page.isascii():
                    texts[page] = None
    return list(texts)
