"""The page keeps what other runs have written, and shows a row that failed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.real_sglang.truth.comparison import Moment
from tests.real_sglang.truth.page import Page
from tests.real_sglang.truth.report import OtherProcess, other_process, record_server
from tests.real_sglang.truth.rows import ROWS


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRUTH_TABLE", str(tmp_path / "page.md"))
    return tmp_path / "page.md"


def a_moment(size: int) -> Moment:
    moment = Moment(values={"0": {"w": b"x" * size}}, compared_bytes=size, probe_alone=["l.3.w"])
    moment.confirmed.update({"probe": 1})
    return moment


def test_rows_of_an_earlier_run_stay_and_a_row_is_replaced_by_its_next_run(path: Path) -> None:
    first, second = ROWS[:2]
    record_server(second, {"load": a_moment(3)}, [])
    with other_process("a program", "sglang.Engine") as row:
        row.look_by_probe("load", a_moment(4))
    earlier = Page.parse(path.read_text())

    record_server(first, {"load": a_moment(1_000)}, [])
    record_server(first, {"load": a_moment(2_000), "requests": a_moment(2_000)}, [])
    page = Page.parse(path.read_text())
    assert list(page.servers) == [first.name, second.name]  # in the order of the rows
    assert page.servers[second.name] == earlier.servers[second.name]
    assert page.others == earlier.others
    assert page.alone == dict.fromkeys((first.name, second.name), "`l.N.w` (1).")
    cells = page.servers[first.name]
    assert (cells["bytes a look"], cells["looks"]) == ("2,000", "2")
    assert cells["result"] == "true at every look"
    assert page.text() == path.read_text()


def test_bytes_are_of_all_looks_and_tensors_of_the_last(path: Path) -> None:
    with other_process("a program", "sglang.Engine", "a GPU: there is none") as row:
        row.look("load", [b"12", b"3"], "the checkpoint")
        row.look("update", [b"1234"], "the checkpoint", "torch")
    cells = Page.parse(path.read_text()).others["a program"]
    assert (cells["tensors"], cells["bytes compared"]) == ("1", "7")
    assert cells["confirmed by"] == "the checkpoint, torch"
    assert cells["looks"] == "2: load, update"
    assert cells["what stands in, and why"] == "a GPU: there is none"


def test_a_row_that_fails_is_on_the_page_as_one_that_failed(path: Path) -> None:
    with (  # noqa: PT012
        pytest.raises(ValueError, match="elsewhere"),
        other_process("a program", "sglang.Engine") as row,
    ):
        row.look("load", [b"12"], "torch")
        raise ValueError("elsewhere | than said\nand more")
    cells = Page.parse(path.read_text()).others["a program"]
    assert cells["result"] == "**not**: elsewhere / than said"


def test_what_sglang_refuses_is_on_the_page_in_its_words(path: Path) -> None:
    with other_process("a program", "sglang.Engine") as row:
        row.refused("needs a GPU")
    cells = Page.parse(path.read_text()).others["a program"]
    assert cells["result"] == "does not run here; SGLang says: `needs a GPU`"


def test_a_row_that_has_compared_nothing_is_no_true_row(path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="nothing was compared"),
        other_process("a program", "sglang.Engine"),
    ):
        pass
    cells = Page.parse(path.read_text()).others["a program"]
    assert cells["result"] == "**not**: nothing was compared"


def test_an_untrue_tensor_is_no_look() -> None:
    moment = a_moment(3)
    moment.untrue.append("slot 0: w: probe says otherwise")
    row = OtherProcess()
    with pytest.raises(AssertionError, match="probe says otherwise"):
        row.look_by_probe("load", moment)
    assert row.looks == []


def test_without_a_page_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRUTH_TABLE", raising=False)
    monkeypatch.chdir(tmp_path)
    with other_process("a program", "sglang.Engine") as row:
        row.look("load", [b"12"], "torch")
    assert list(tmp_path.iterdir()) == []
