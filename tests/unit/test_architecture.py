"""How long a file and a function may be: 500 and 60 lines, unless the docstring says why.

An exception says so in its own docstring: "Longer than 60 lines because …" (500 for a file).
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILE_LINES, FUNCTION_LINES = 500, 60

# Still to be divided.  A row goes as soon as its file or function is short enough.
PENDING: set[str] = set()


def is_explained(node: ast.Module | ast.FunctionDef | ast.AsyncFunctionDef, most: int) -> bool:
    docstring = " ".join((ast.get_docstring(node) or "").split())
    return re.search(rf"\bLonger than {most} lines because \w+", docstring) is not None


def too_long(name: str, text: str) -> Iterator[tuple[str, int]]:
    """The file and the functions in it that are too long, with their numbers of lines."""
    tree = ast.parse(text)
    lines = len(text.splitlines())
    if lines > FILE_LINES and not is_explained(tree, FILE_LINES):
        yield name, lines
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES and not is_explained(node, FUNCTION_LINES):
                yield f"{name}::{node.name}", lines


def python_files() -> list[Path]:
    """Every Python file that git tracks, as it is in the working tree."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("no git checkout: which files are the repository's own is not known")
    done = subprocess.run(
        [git, "ls-files", "-z", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    tracked = (ROOT / name for name in done.stdout.split("\0") if name)
    return [path for path in tracked if path.exists()]


def test_no_file_and_no_function_is_too_long() -> None:
    found: dict[str, int] = {}
    files = python_files()
    for path in files:
        name = path.relative_to(ROOT).as_posix()
        found.update(too_long(name, path.read_text(encoding="utf-8")))
    assert len(files) > 100
    offenders = [
        f"{place}: {lines} lines" for place, lines in found.items() if place not in PENDING
    ]
    assert not offenders, (
        f"more than {FILE_LINES} lines a file or {FUNCTION_LINES} a function:\n"
        + "\n".join(offenders)
    )
    assert set(found) >= PENDING, "short enough by now: take it out of PENDING"


def a_function(lines: int, docstring: str) -> str:
    return f'def f():\n    """{docstring}"""\n' + "    pass\n" * (lines - 2)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (a_function(60, ""), []),
        (a_function(61, ""), [("x.py::f", 61)]),
        (a_function(61, "It has many lines."), [("x.py::f", 61)]),
        (a_function(61, "Longer than 60 lines because."), [("x.py::f", 61)]),
        (a_function(61, "Longer than 60 lines because one table is one place."), []),
        ("class A:\n    async def g(self):\n" + "        pass\n" * 60, [("x.py::g", 61)]),
        ("pass\n" * 500, []),
        ("pass\n" * 501, [("x.py", 501)]),
        ('"""Longer than 500 lines because it is generated."""\n' + "pass\n" * 500, []),
        ('"""Longer than 60 lines because it is generated."""\n' + "pass\n" * 500, [("x.py", 501)]),
    ],
)
def test_what_is_too_long_is_found(text: str, found: list[tuple[str, int]]) -> None:
    assert list(too_long("x.py", text)) == found
