"""Who imports whom: written down in each file, and done by a fresh interpreter.

``make lint`` asks import-linter the same about the rooms of the package among themselves.  Here is
what it does not see: the two files that are no packages (loader and patch core), that layout and
reader go with the standard library, and what is in ``sys.modules`` after a real import.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "sglang_weight_hook"
# A published slot "0" whose owner has exited: there is no need for torch to read one.
SLOT = ROOT / "tests" / "compatibility" / "documents_0_1" / "after_load"

RunPython = Callable[..., "subprocess.CompletedProcess[str]"]


# --- as written ---------------------------------------------------------------------------


class Import(NamedTuple):
    """One name that a file imports, absolute."""

    name: str  # package.module.name; whether the last part is a module is not known
    late: bool  # inside a function, so not done when the file is imported
    only_typed: bool  # under ``if TYPE_CHECKING:``, so never done


def imports_in(source: str, package: str) -> Iterator[Import]:
    """Every import statement of ``source``, a file of ``package`` (empty: at the top)."""
    pending: list[tuple[ast.AST, bool, bool]] = [(ast.parse(source), False, False)]
    while pending:
        node, late, typed = pending.pop()
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, late, typed) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")
            above = base[: len(base) - node.level + 1] if node.level else []
            module = ".".join(above + ([node.module] if node.module else []))
            yield from (Import(f"{module}.{alias.name}", late, typed) for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            pending += [(child, late, True) for child in node.body]
            pending += [(child, late, typed) for child in node.orelse]
        else:
            late = late or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            pending += [(child, late, typed) for child in ast.iter_child_nodes(node)]


def imports_of(path: Path) -> list[Import]:
    package = ".".join(path.relative_to(ROOT).parent.parts)
    return list(imports_in(path.read_text("utf-8"), package))


def room_of(name: str) -> str:
    """``reader`` for ``sglang_weight_hook.reader.slot``; the name itself outside the package."""
    parts = name.split(".")
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 else parts[0]


def imports_by_file(room: str) -> dict[Path, list[Import]]:
    files = sorted((ROOT / PACKAGE / room).rglob("*.py"))
    assert files
    return {path: imports_of(path) for path in files}


def foreign(name: str) -> bool:
    """Neither of the package nor of Python."""
    return name.split(".")[0] not in {PACKAGE, *sys.stdlib_module_names}


def names_in(path: Path) -> set[str]:
    """Every name and attribute that the file speaks of."""
    nodes = ast.walk(ast.parse(path.read_text("utf-8")))
    return {str(getattr(node, "id", "") or getattr(node, "attr", "")) for node in nodes}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch.nn as nn", Import("torch.nn", False, False)),
        ("def f():\n  class C:\n    import torch", Import("torch", True, False)),
        ("try:\n  import torch\nexcept ImportError: pass", Import("torch", False, False)),
        ("if TYPE_CHECKING:\n  from .slot import Slot", Import("a.b.slot.Slot", False, True)),
        ("from ..layout import files", Import("a.layout.files", False, False)),
        ("from . import once", Import("a.b.once", False, False)),
    ],
)
def test_imports_are_found_wherever_they_stand(source: str, expected: Import) -> None:
    assert list(imports_in(source, "a.b")) == [expected]


# `Document.open_memory`, where one asks for the bytes behind a map, and `open_directory`, where one
# gives it the URL of an agent; imported when they are called.
UPWARDS = {
    ("document.py", f"{PACKAGE}.memory.Memory"),
    ("directory.py", f"{PACKAGE}.fleet.opening.open_url"),
}


@pytest.mark.parametrize(
    ("room", "allowed"),
    [
        ("layout", {"layout"}),
        ("reader", {"reader", "layout"}),
        ("publisher", {"publisher", "layout", "__version__"}),
    ],
)
def test_a_room_takes_only_layout_from_the_package(room: str, allowed: set[str]) -> None:
    wrong = [
        (path.name, found.name)
        for path, imports in imports_by_file(room).items()
        for found in imports
        if found.name.split(".")[0] == PACKAGE and room_of(found.name) not in allowed
        if not ((path.name, found.name) in UPWARDS and (found.late or found.only_typed))
    ]
    assert wrong == []


@pytest.mark.parametrize("room", ["layout", "reader"])
def test_the_format_and_its_reader_need_the_standard_library_alone(room: str) -> None:
    by_file = imports_by_file(room)
    assert [
        (path.name, found.name)
        for path, imports in by_file.items()
        for found in imports
        if foreign(found.name)
    ] == []
    # Nor is anything imported under a name that cannot be seen here.
    hidden = {"__import__", "import_module", "exec", "eval"}
    assert [path.name for path in by_file if names_in(path) & hidden] == []


def test_the_publisher_imports_torch_only_when_it_is_needed() -> None:
    assert [
        (path.name, found.name)
        for path, imports in imports_by_file("publisher").items()
        for found in imports
        if foreign(found.name) and not (found.late or found.only_typed)
    ] == []


def test_no_command_imports_what_runs_in_the_server() -> None:
    assert [
        (path.name, found.name)
        for path, imports in imports_by_file("commands").items()
        for found in imports
        if room_of(found.name) == "publisher"
    ] == []


def test_the_loader_names_three_modules_that_every_interpreter_has() -> None:
    found = imports_of(ROOT / "sglang_patch_loader.py")
    assert {one.name for one in found if not one.only_typed} == {"_thread", "os", "sys"}
    assert not any(foreign(one.name) or one.name.startswith(PACKAGE) for one in found)


def test_the_patch_core_imports_the_publisher_alone_and_late() -> None:
    found = imports_of(ROOT / "sglang_weight_hook_patch_core.py")
    ours = {one for one in found if foreign(one.name) or one.name.startswith(PACKAGE)}
    assert ours
    assert {one.name for one in ours if room_of(one.name) != "publisher"} == set()
    assert {one.name for one in ours if not one.late} == set()


# --- as done ------------------------------------------------------------------------------

NEW_MODULES = """
import json, sys
before = set(sys.modules)
exec(sys.argv[1], {"SLOT": sys.argv[2]})
json.dump(sorted(set(sys.modules) - before), sys.__stderr__)
"""


@pytest.fixture
def modules_after(run_python: RunPython) -> Callable[[str], set[str]]:
    """The modules that a new interpreter has got by running some code."""

    def run(code: str) -> set[str]:
        done = run_python("-c", NEW_MODULES, code, str(SLOT))
        return set(json.loads(done.stderr.splitlines()[-1]))

    return run


def rooms_in(modules: set[str]) -> set[str]:
    return {room_of(name) for name in modules if name.startswith(PACKAGE + ".")}


def foreign_in(modules: set[str]) -> set[str]:
    return {name for name in modules if foreign(name)}


def test_importing_the_package_imports_none_of_its_rooms(
    modules_after: Callable[[str], set[str]],
) -> None:
    modules = modules_after("import sglang_weight_hook; sglang_weight_hook.__version__")
    assert PACKAGE in modules
    assert rooms_in(modules) == set()
    assert foreign_in(modules) == set()


READ = """
import sglang_weight_hook.reader as reader
slot = reader.open_slot(SLOT, "0")
document = slot.read()
assert next(document.iter_tensors()) and next(document.iter_regions())
assert document.lookup(document.regions[0]["ptr"])
assert not document.changes_since(document).must_register_again
assert slot.owner_alive() is False
assert [other.name for other in reader.open_directory(SLOT).slots()] == ["0"]
assert slot.wait_for_change(timeout=0) is None
"""


@pytest.mark.parametrize("code", ["import sglang_weight_hook.reader", READ], ids=["import", "use"])
def test_reading_loads_reader_layout_and_the_standard_library(
    modules_after: Callable[[str], set[str]], code: str
) -> None:
    modules = modules_after(code)
    assert rooms_in(modules) == {"reader", "layout"}
    assert foreign_in(modules) == set()


def test_publishing_loads_nothing_of_the_reading_half_and_no_torch(
    modules_after: Callable[[str], set[str]],
) -> None:
    modules = modules_after("import sglang_weight_hook.publisher.recorder")
    assert rooms_in(modules) == {"publisher", "layout"}
    assert foreign_in(modules) == set()


def test_the_patch_core_loads_no_room_before_a_weight_changes(
    modules_after: Callable[[str], set[str]],
) -> None:
    modules = modules_after("import sglang_weight_hook_patch_core as core; core.ENTRY_POINTS")
    assert foreign_in(modules) == {"sglang_weight_hook_patch_core"}
    assert PACKAGE not in modules


def test_the_loader_loads_nothing_but_itself(
    modules_after: Callable[[str], set[str]],
) -> None:
    code = "import sglang_patch_loader; sglang_patch_loader.install()"
    assert modules_after(code) == {"sglang_patch_loader"}


SHOW = """
import sys
from sglang_weight_hook.commands import entry
sys.argv = ["sglang-weight-hook", "regions", "0", "--json", "--dir", SLOT]
entry.main()
"""


@pytest.mark.parametrize(
    "code", ["import sglang_weight_hook.commands.entry", SHOW], ids=["import", "use"]
)
def test_the_command_loads_nothing_of_the_publisher_and_no_torch(
    modules_after: Callable[[str], set[str]], code: str
) -> None:
    pytest.importorskip("typer")
    modules = modules_after(code)
    assert "commands" in rooms_in(modules)
    assert "publisher" not in rooms_in(modules)
    tops = {name.split(".")[0] for name in modules}
    assert tops.isdisjoint({"torch", "numpy", "safetensors", "sglang", "matplotlib"})
