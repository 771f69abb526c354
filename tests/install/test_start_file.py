"""``sglang_injector.start`` (PEP 829), which Python 3.15 and later read beside the ``.pth``.

Where there is a 3.15 it is used; everywhere else a line of the file is run as PEP 829 says
that it is run, in an interpreter that has read the ``.pth`` already.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

import pytest

from .conftest import LIVE, ROOT, Target, make_target

START = "sglang_injector.start"
PTH = "sglang_injector.pth"


def entry_point() -> str:
    (line,) = (ROOT / START).read_bytes().decode("ascii").splitlines()
    return line


def test_it_names_the_callable_of_the_pth_and_of_the_plugin() -> None:
    module, _, function = entry_point().partition(":")
    assert (ROOT / PTH).read_text() == f"import {module}; {module}.{function}()\n"
    assert f'sglang_weight_hook = "{entry_point()}"\n' in (ROOT / "pyproject.toml").read_text()
    # PEP 829 wants exactly this form; pkgutil.resolve_name(strict=True) holds it to it.
    assert re.fullmatch(r"[a-z_]+:[a-z_]+", entry_point())


def test_the_two_together_activate_once(every_python: Target) -> None:
    # In every Python, whether it reads .start files itself or not.
    done = every_python.run(
        "-c", f"import pkgutil; pkgutil.resolve_name({entry_point()!r})(); {LIVE}"
    )
    assert (done.stdout, done.stderr) == ("1\n", "")


@pytest.fixture(scope="module")
def _python_3_15(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return make_target(tmp_path_factory.mktemp("start-"), "3.15")


@pytest.fixture
def python_3_15(_python_3_15: Target) -> Iterator[Target]:
    _python_3_15.install()
    yield _python_3_15
    _python_3_15.uninstall()


@pytest.mark.parametrize("absent", ["", PTH, START])
def test_python_3_15_activates_once_by_either_file(python_3_15: Target, absent: str) -> None:
    if absent:
        (python_3_15.purelib / absent).unlink()
    for flags in ((), ("-I",), ("-W", "error")):
        assert python_3_15.finders(*flags) == 1
    assert python_3_15.finders(environment={"SGLANG_WEIGHT_HOOK": "0"}) == 0


def test_python_3_15_passes_over_the_pth_beside_the_start(python_3_15: Target) -> None:
    done = python_3_15.run("-v", "-c", "pass")
    assert f"import lines in {python_3_15.purelib / PTH} are suppressed" in done.stderr
    loaded = re.findall(r"^import 'sglang_patch_loader'", done.stderr, re.MULTILINE)
    assert len(loaded) == 1


def test_older_pythons_do_not_read_it(target: Target) -> None:
    target.install()
    (target.purelib / PTH).unlink()
    assert target.finders() == (1 if target.version == "3.15" else 0)


def test_the_documented_hashes_are_those_of_the_files() -> None:
    text = (ROOT / "docs" / "installing.md").read_text()
    for name in (PTH, START):
        assert f"{hashlib.sha256((ROOT / name).read_bytes()).hexdigest()}  {name}\n" in text
