"""What a Python file documents, read with `ast` and never imported: docstrings, pages of them, and its public names."""

from __future__ import annotations

import ast
import inspect
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MIN_DOCSTRING_CHARS = 40
MIN_PAGE_CHARS = 200
MAX_SIGNATURE_CHARS = 160
SELF = re.compile(r"^(self|cls)(, |$)")
MIN_SUMMARY_CHARS, MAX_SUMMARY_CHARS = 20, 160
UNLIKE_PROSE = re.compile(r"->|>>>|::|[{}|]|--|[:,;]\.$")
FIRST_SENTENCE = re.compile(r"(.+?[.!?])(?:\s+(?=[A-Z`'\"(])|$)", re.DOTALL)

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Symbol:
    """A public function or class, its call (None where that is long, or inherited), and what it does in a sentence."""

    name: str
    signature: str | None
    summary: str


@dataclass(frozen=True)
class Documentation:
    """A module's docstrings by name: as they stand in the file, and cleaned, as pages of a module or class."""

    raw: list[tuple[str, str]]
    pages: list[tuple[str, str]]
    symbols: list[Symbol]


def read_module(path: Path, name: str) -> Documentation:
    """The documentation of the Python file of module `name`; empty where Python can't parse it."""
    try:
        with warnings.catch_warnings(action="ignore"):  # a library's odd escapes are not ours to report
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return Documentation([], [], [])
    raw, pages, symbols = [], [], []
    if text := _docstring(tree):
        raw.append((name, text))
    chapters = [inspect.cleandoc(text)] if text else []
    for node in _public(tree):
        own = f"{name}.{node.name}"
        raw += [(entry, text) for entry, text in _docstrings_below(node, own) if len(text) >= MIN_DOCSTRING_CHARS]
        if (symbol := _symbol(node, own)) is not None:
            symbols.append(symbol)
        entries = list(_entries(node, own))
        if isinstance(node, ast.ClassDef):
            pages.append((own, "\n\n".join(entries)))
        else:
            chapters += entries
    pages.insert(0, (name, "\n\n".join([name, *chapters])))
    return Documentation(raw, [(url, text) for url, text in pages if len(text) >= MIN_PAGE_CHARS], symbols)


def _public(node: ast.Module | ast.ClassDef) -> Iterator[Definition]:
    for child in node.body:
        if isinstance(child, Definition) and not child.name.startswith("_"):
            yield child


def _docstring(node: ast.Module | Definition) -> str:
    """The docstring as written, with its indentation."""
    return ast.get_docstring(node, clean=False) or ""


def _docstrings_below(node: Definition, name: str) -> Iterator[tuple[str, str]]:
    yield name, _docstring(node)
    if isinstance(node, ast.ClassDef):
        for child in _public(node):
            yield from _docstrings_below(child, f"{name}.{child.name}")


def _entries(node: Definition, name: str) -> Iterator[str]:
    """A definition's part of a page: signature and docstring, then those of a class's methods."""
    if text := inspect.cleandoc(_docstring(node)):
        yield f"{_signature(node, name)}\n\n{text}"
    if isinstance(node, ast.ClassDef):
        for child in _public(node):
            yield from _entries(child, f"{node.name}.{child.name}")


def _signature(node: Definition, name: str) -> str:
    """`name(arguments)` without annotations nor `self`; a class has those of its own `__init__`, or none."""
    if isinstance(node, ast.ClassDef):
        makers = (child for child in node.body if isinstance(child, ast.FunctionDef) and child.name == "__init__")
        maker = next(makers, None)
        return _signature(maker, name) if maker else name
    for argument in ast.walk(node.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return f"{name}({SELF.sub('', ast.unparse(node.args))})"


def _symbol(node: Definition, name: str) -> Symbol | None:
    """A definition whose docstring starts with a sentence that can stand alone."""
    paragraph = " ".join(inspect.cleandoc(_docstring(node)).split("\n\n")[0].split())
    sentence = FIRST_SENTENCE.match(paragraph)
    summary = sentence[1] if sentence else f"{paragraph}."
    stands_alone = MIN_SUMMARY_CHARS <= len(summary) <= MAX_SUMMARY_CHARS and summary[0].isupper()
    if not stands_alone or not summary.isascii() or UNLIKE_PROSE.search(summary):
        return None
    signature = _signature(node, name)
    is_short = signature.endswith(")") and len(signature) <= MAX_SIGNATURE_CHARS
    return Symbol(name, signature if is_short else None, summary)
