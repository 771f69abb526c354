"""docs/security.md claims nothing without a test that exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py(?:::\w+)?)`", PAGE)))


def rows() -> list[tuple[str, list[str]]]:
    """The section and the cells of each row of a table whose last column names tests."""
    found: list[tuple[str, list[str]]] = []
    section, has_tests = "", False
    for line in PAGE.splitlines():
        if line.startswith("#"):
            section = line.strip("# ")
        cells = [cell.strip() for cell in line.split(" | ")]
        if not line.startswith("| "):
            has_tests = has_tests and line.startswith("|--")
        elif cells[-1] == "test |":
            has_tests = True
        elif has_tests:
            found.append((section, cells))
    return found


def functions_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("named", NAMED)
def test_what_the_page_names_exists(named: str) -> None:
    path, _, name = named.partition("::")
    assert (ROOT / path).is_file()
    assert not name or (name.startswith("test_") and name in functions_of(ROOT / path))


def test_every_row_names_a_test_or_claims_nothing() -> None:
    found = rows()
    assert len(found) > 40
    for section, cells in found:
        assert len(cells) == 4, (section, cells)
        last = cells[-1]
        assert re.search(r"`tests/[\w/]+\.py::test_\w+`", last) or last.startswith("none: "), cells
    assert {section for section, _ in found} == {
        "Attackers of a server",
        "Attackers of a reader",
        "Attackers of a node agent",
        "Who may read the weights themselves",
        "Attackers of an installation",
    }


def test_each_refusal_is_quoted_as_its_test_has_it() -> None:
    tested = (ROOT / "tests/unit/memory/test_permissions.py").read_text(encoding="utf-8")
    quoted = [
        words
        for section, cells in rows()
        if section == "Who may read the weights themselves"
        for words in re.findall(r'"([^"]+)"', " ".join(cells[1:3]))
    ]
    assert len(quoted) > 4
    for words in quoted:
        assert f'"{words}"' in tested or words in tested


def test_every_permission_that_is_tested_is_in_the_table() -> None:
    path = "tests/unit/memory/test_permissions.py"
    assert {
        f"{path}::{name}" for name in functions_of(ROOT / path) if name.startswith("test_")
    } <= set(NAMED)


def test_it_says_where_to_report() -> None:
    assert "](../SECURITY.md)" in PAGE
    assert "Report a vulnerability" in (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def test_limits_are_those_of_the_code() -> None:
    from sglang_weight_hook.publisher import control
    from sglang_weight_hook.reader.files import MAX_DOCUMENT_BYTES

    assert f"above {MAX_DOCUMENT_BYTES // 1024**2} MiB" in PAGE
    assert f"at most {control.MAX_CONNECTIONS} connections" in PAGE
    assert f"lines of {control.MAX_REQUEST // 1024} KB, {control.IDLE_SECONDS:g} s" in PAGE
    c = (ROOT / "examples" / "print_regions.c").read_text(encoding="utf-8")
    assert "#define MAX_DOCUMENT_BYTES (256L * 1024 * 1024)" in c
    assert "#define MAX_DEPTH 64" in c


def test_the_agents_limits_are_those_of_the_code() -> None:
    limits = pytest.importorskip("sglang_weight_hook.fleet.limits")
    agent = " ".join((ROOT / "docs" / "agent.md").read_text(encoding="utf-8").split())
    assert f"a request has {limits.REQUEST_SECONDS:g} s" in PAGE
    assert f"a client that takes nothing {limits.STALLED_SECONDS:g} s" in PAGE
    most = limits.Limits()
    for told in (
        f"within {limits.REQUEST_SECONDS:g} s and in {limits.MAX_HEADER // 1024} KB",
        f"takes nothing for {limits.STALLED_SECONDS:g} s",
        f"{most.connections} connections ({most.connections_each} of one address)",
        f"{most.streams} event streams ({most.streams_each})",
        f"{limits.MAX_WAITING} may wait",
    ):
        assert told in agent, told
