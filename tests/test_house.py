"""The house's rules that no linter knows: how long files and functions get, and what is never loaded."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
CODE = sorted(path for folder in ("danube_ray", "jobs", "tests") for path in (REPOSITORY / folder).rglob("*.py"))
PACKAGE = [path for path in CODE if path.is_relative_to(REPOSITORY / "danube_ray")]


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_no_file_is_over_400_lines():
    lengths = {str(path.relative_to(REPOSITORY)): len(path.read_text().splitlines()) for path in CODE}
    assert {path: length for path, length in lengths.items() if length > 400} == {}


def test_no_function_is_over_80_lines():
    lengths = {
        f"{path.relative_to(REPOSITORY)}:{node.lineno} {node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for path in PACKAGE
        for node in functions(path)
    }
    assert {name: length for name, length in lengths.items() if length > 80} == {}


def test_nothing_is_unpickled_and_no_remote_code_is_trusted():
    unsafe = re.compile(r"pickle\.load|torch\.load\(|trust_remote_code\s*=\s*True|allow_pickle\s*=\s*True")
    found = [f"{path}:{n}" for path in PACKAGE for n, line in enumerate(path.read_text().splitlines(), 1)
             if unsafe.search(line)]  # fmt: skip
    assert found == []


def test_every_public_function_of_the_package_has_its_types():
    untyped = []
    for path in PACKAGE:
        for node in functions(path):
            arguments = [*node.args.args, *node.args.kwonlyargs]
            named = [argument for argument in arguments if argument.arg not in ("self", "cls")]
            if node.returns is None or any(argument.annotation is None for argument in named):
                untyped.append(f"{path.relative_to(REPOSITORY)}:{node.lineno} {node.name}")
    assert untyped == []
