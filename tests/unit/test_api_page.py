"""``docs/api.md``, as ``python -m tools.api`` makes it: on a small package of its own."""

from __future__ import annotations

import ast
import doctest
from pathlib import Path

import pytest

from tools import api

SLOT = '''
class Broken(HookError):
    """It cannot be read."""


class Slot:
    """One runner's files; made by `open_slot`."""

    def __init__(self, path: str, size: int) -> None:
        self.path = path
        self.size = size  # in bytes
        self._hidden = 0

    def read(self, timeout: float = 10.0, *names: str, only: bool = False, **more: int) -> bytes:
        """Waits ``timeout`` seconds.

        >>> slot.read()
        b''
        """

    @property
    def end(self) -> int:
        """One past the last byte."""

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold it."""

    def _inside(self) -> None:
        """Nobody's business."""


class Place(NamedTuple):
    # From the beginning,
    # in bytes.
    offset: int
    length: int  # ``a | b``
'''


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    reader = tmp_path / api.PACKAGE / "reader"
    reader.mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    (tmp_path / api.PACKAGE / "__init__.py").write_text(
        '__all__ = ["Slot", "__version__", "open_slot"]\n'
        "if TYPE_CHECKING:\n    from .reader import Slot, open_slot\n"
    )
    (reader / "__init__.py").write_text(
        '__all__ = ["Broken", "Place", "Slot", "open_slot"]\n'
        "from .slot import Broken, Place, Slot\nfrom .opening import open_slot\n"
    )
    (reader / "slot.py").write_text(SLOT)
    (reader / "opening.py").write_text(
        "def open_slot(path: str) -> Slot:\n    def Place(): pass\n    return Slot(path)\n"
    )
    chapters = {"Opening": ("open_slot",), api.ERRORS: (), api.MORE: ()}
    monkeypatch.setattr(api, "CHAPTERS", chapters)
    return tmp_path


def chapter(text: str, name: str) -> str:
    return text.partition(f"\n## {name}\n")[2].partition("\n## ")[0]


def test_every_public_name_is_on_the_page_and_no_other(root: Path) -> None:
    text = api.page(root)
    headings = [line for line in text.splitlines() if line.startswith("###")]
    assert headings == [
        *("### open_slot", "### Broken", "### Slot"),
        *("#### Slot.read", "#### Slot.end", "#### Slot.held", "### Place"),
    ]
    assert "### Broken" in chapter(text, api.ERRORS)
    assert "_hidden" not in text
    assert "business" not in text


def test_it_says_how_each_is_called(root: Path) -> None:
    text = api.page(root)
    assert (
        "```python\nslot.read(timeout: float = 10.0, *names: str, only: bool = False, "
        "**more: int) -> bytes\n```\n\nWaits `timeout` seconds.\n\n"
        "```pycon\n>>> slot.read()\nb''\n```\n"
    ) in text
    assert "slot.end -> int\n" in text
    assert "with slot.held()\n" in text
    assert "One runner's files; made by [`open_slot`](#open_slot)." in text


def test_it_says_what_an_object_holds_and_in_which_unit(root: Path) -> None:
    text = api.page(root)
    assert "| `path` | `str` | |\n| `size` | `int` | in bytes |\n" in text
    assert "| `offset` | `int` | From the beginning, in bytes. |\n" in text
    assert "| `length` | `int` | `a \\| b` |\n" in text


def test_it_says_where_to_import_what_the_package_itself_does_not_have(root: Path) -> None:
    text = api.page(root)
    assert "### Place\n\nFrom `sglang_weight_hook.reader`.\n" in text
    assert text.count("From `sglang_weight_hook.reader`.") == 2


def test_check_tells_an_old_page_and_leaves_it(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = root / api.PAGE
    assert api.main(["--check"], root) == 1
    assert not page.exists()
    assert api.main([], root) == 0
    assert api.main(["--check"], root) == 0
    page.write_text("old")
    assert api.main(["--check"], root) == 1
    assert page.read_text() == "old"
    assert "python -m tools.api" in capsys.readouterr().err


def test_a_public_name_that_is_defined_nowhere_is_refused(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slot = root / api.PACKAGE / "reader" / "slot.py"
    slot.write_text(SLOT.replace("class Place", "class Elsewhere"))
    assert api.main([], root) == 1
    assert "Place" in capsys.readouterr().err


def test_a_chapter_that_names_what_is_not_public_is_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(api, "CHAPTERS", {**api.CHAPTERS, "Opening": ("open_sesame",)})
    assert api.main([], root) == 1
    assert "open_sesame" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        "def f(a, b=1, /, c: int = 2, *, d, e: str = 'x', **g)",
        "def f(*a, b)",
        "def f()",
    ],
)
def test_a_signature_is_the_one_that_was_written(line: str) -> None:
    node = ast.parse(f"{line}: pass").body[0]
    assert isinstance(node, ast.FunctionDef)
    assert api._signature(node) == line.removeprefix("def ")


def test_the_examples_hold() -> None:
    assert doctest.testmod(api).failed == 0
