"""What is left to act on in a release, what it answers with, and how well it would have done."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

import sglang_weight_hook_patch_core as core
from tests.unit.sglang_release.release_trees import RUNNER, make_tree, row, runner, summary
from tools.sglang_release import __main__ as command
from tools.sglang_release import check as checking
from tools.sglang_release import findings, history, signatures
from tools.sglang_release.findings import Finding
from tools.sglang_release.judged import JUDGED, Judgement
from tools.sglang_release.paths import Paths
from tools.sglang_release.reliances import RELIANCES, Defined, missing
from tools.sglang_release.sources import NoRelease, open_release, released
from tools.sglang_release.summaries import summary_of

ROOT = Path(__file__).resolve().parents[3]
UPDATE = "def update(self, named):\n    self.model.load_weights(named)"


# --- what the table has and the release has not ---------------------------------------------


def test_a_row_whose_method_moved_is_told_of_with_the_place_of_that_name(tmp_path: Path) -> None:
    text = "class WeightUpdater:\n    def update(self, named):\n        m.load_weights(named)\n"
    paths = Paths(summary(tmp_path, {"model_executor/updater.py": text}))
    found = list(findings.uncovered(paths, [], []))
    (gone,) = findings.went(paths, [row("update")], found)
    assert gone.place == RUNNER + "update"
    assert "srt.model_executor.updater:WeightUpdater.update" in gone.what


def test_a_method_that_a_base_class_has_is_not_gone(tmp_path: Path) -> None:
    files = {
        "base.py": "class Loading:\n    def update(self, named):\n        m.load_weights(named)\n",
        "model_executor/model_runner.py": (
            "from sglang.srt.base import Loading\nclass ModelRunner(Loading):\n    weights = 1\n"
        ),
    }
    paths = Paths(summary(tmp_path, files))
    assert list(findings.went(paths, [row("update")], [])) == []


def test_a_wrapped_method_that_writes_no_more_is_told_of(tmp_path: Path) -> None:
    text = UPDATE + "\n\ndef receive(self, weights):\n    return self.group.receive(weights)"
    paths = Paths(summary(tmp_path, runner(text)))
    (found,) = findings.empty(paths, [row("update"), row("receive")])
    assert found.place == RUNNER + "receive"


def test_a_signature_that_no_release_had_is_told_of(tmp_path: Path) -> None:
    paths = Paths(summary(tmp_path, runner(UPDATE)))
    known = {RUNNER + "update": {"(self, named)": "0.4.7"}}
    assert list(signatures.changed(paths, [row("update")], known)) == []
    (found,) = signatures.changed(
        paths, [row("update")], {RUNNER + "update": {"(self, names, dtypes)": "0.4.7"}}
    )
    assert "(self, named)" in found.what
    assert "(self, names, dtypes)" in found.what


def test_annotations_are_no_part_of_a_signature(tmp_path: Path) -> None:
    text = "def update(self: R, names: list[str], *, flush: bool = True, **rest: int) -> bool:"
    paths = Paths(summary(tmp_path, runner(text + "\n    pass  # weights")))
    (function,) = paths.functions.values()
    assert function.signature == "(self, names, *, flush=True, **rest)"


def test_an_attribute_that_the_hook_reads_and_the_release_lacks_is_told_of(tmp_path: Path) -> None:
    with_pool = runner("def __init__(self):\n    self.token_to_kv_pool = None  # weights")
    without = runner("def __init__(self):\n    self.pool = None  # weights")
    places = []
    for number, files in enumerate((with_pool, without)):
        release = summary(tmp_path / str(number), files)
        places.append({each.place for each in missing(release, Paths(release))})
    assert places[1] - places[0] == {"ModelRunner.token_to_kv_pool"}


def test_what_a_release_had_not_yet_is_not_missed_in_it(tmp_path: Path) -> None:
    places = []
    for version in ("0.5.20", "0.5.21"):
        release = summary(tmp_path / version, runner("weights = 1"), version)
        places.append({each.place for each in missing(release, Paths(release))})
    assert "ModelRunner._weight_checker" in places[1] - places[0]
    assert "ModelRunner.ps" in places[0] - places[1]


def test_a_file_that_is_no_python_is_told_of(tmp_path: Path) -> None:
    release = summary(tmp_path, {"managers/new.py": "def weights(:\n"})
    assert [each.place for each in findings.unreadable(release)] == ["sglang/srt/managers/new.py"]


# --- the table of what is relied upon -------------------------------------------------------

# Read by name from what is not SGLang's: torch, Python, the driver's library, the hook itself.
NOT_SGLANGS = {
    "__annotations__", "__dict__", "__module__", "__name__", "__path__", "__spec__",
    "__version__", "_initializing", "stack", "strerror", "inside",
}  # fmt: skip


def names_read(path: Path) -> set[str]:
    """Attributes that a file reads by name, and SGLang's modules that it names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
            name = node.args[1]
            if isinstance(name, ast.Constant) and not re.match(r"cu[A-Z]", str(name.value)):
                found.add(str(name.value))
        if isinstance(node, ast.Constant) and str(node.value).startswith("sglang.srt."):
            found.add(str(node.value))
    return found


def test_every_attribute_of_sglang_that_is_read_by_name_is_in_the_table() -> None:
    relied = set()
    for reliance in RELIANCES:
        for place in reliance.any_of:
            relied |= {place.name} | ({place.module} if isinstance(place, Defined) else set())
    files = ["identity", "kv_cache", "capture", "volatile", "memory", "walk", "metrics", "events"]
    sources = [ROOT / "sglang_weight_hook" / "publisher" / f"{name}.py" for name in files]
    sources.append(ROOT / "sglang_weight_hook_patch_core.py")
    read = set().union(*map(names_read, sources))
    assert len(read & relied) > 25
    rows = {entry.module for entry in (*core.ENTRY_POINTS, *core.REQUESTS)}
    rows |= {module.rpartition(".")[0] for module in rows}
    unknown = read - relied - rows - NOT_SGLANGS
    assert not unknown, (
        f"read of SGLang and not in tools/sglang_release/reliances.py: {sorted(unknown)}; "
        "what is not SGLang's goes to NOT_SGLANGS here"
    )


def test_a_reliance_says_which_of_our_files_reads_it() -> None:
    for reliance in RELIANCES:
        folder = ROOT if "/" not in reliance.where else ROOT / "sglang_weight_hook"
        text = (folder / reliance.where).read_text("utf-8")
        names = [place.name for place in reliance.any_of]
        parts = [name.rpartition("sglang.srt.")[2] for name in names]
        assert any(part in text for part in parts), reliance


# --- the answer -----------------------------------------------------------------------------


@pytest.fixture
def small_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of one row, and nothing judged, recorded or relied upon."""
    monkeypatch.setattr(checking, "ENTRY_POINTS", (row("update"),))
    monkeypatch.setattr(checking, "REQUESTS", ())
    monkeypatch.setattr(checking, "JUDGED", ())
    monkeypatch.setattr(checking, "missing", lambda *arguments: ())
    monkeypatch.setattr(
        signatures, "known", lambda: {RUNNER + "update": {"(self, named)": "0.4.7"}}
    )


@pytest.mark.usefixtures("small_table")
def test_exit_status_says_whether_there_is_something_to_act_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = make_tree(tmp_path / "right", runner(UPDATE))
    assert command.main(["check", str(right)]) == 0
    assert "0 findings to act on" in capsys.readouterr().out
    text = UPDATE + "\n\ndef refit(self, named):\n    self.model.load_weights(named)"
    wrong = make_tree(tmp_path / "wrong" / "python", runner(text))
    assert command.main(["check", str(wrong.parent)]) == 3  # a checkout has it below python/
    out = capsys.readouterr().out
    assert "SGLang 0.5.99" in out
    assert RUNNER + "refit (line 6)" in out


@pytest.mark.usefixtures("small_table")
def test_json_has_every_finding_with_its_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = """
def update(self, named):
    self.model.load_weights(named)

def refit(self, named):
    self._write(named)

def _write(self, named):
    self.model.load_weights(named)
"""
    assert command.main(["check", "--json", str(make_tree(tmp_path, runner(text)))]) == 3
    document = json.loads(capsys.readouterr().out)
    (found,) = document["to_act_on"]
    assert found["place"] == RUNNER + "_write"
    assert found["way"] == [RUNNER + "refit", RUNNER + "_write"]
    assert (document["sglang"], document["wrapped"]) == ("0.5.99", 1)


@pytest.mark.usefixtures("small_table")
def test_what_was_judged_is_nothing_to_act_on_until_it_is_found_by_another_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = UPDATE + "\n\ndef refit(self, named):\n    self.model.load_weights(named)"
    release = summary(tmp_path, runner(text))
    judgement = Judgement(findings.WRITER, RUNNER + "refit", "only in a test")
    gone = Judgement(findings.WRITER, RUNNER + "nothing", "was there once")
    monkeypatch.setattr(checking, "JUDGED", (judgement, gone))
    found = checking.check(release)
    assert found.to_act_on == ()
    assert [reason for _, reason in found.judged] == ["only in a test"]
    assert found.idle == (gone,)
    monkeypatch.setattr(checking, "JUDGED", (judgement._replace(kind=findings.REQUEST),))
    assert [each.place for each in checking.check(release).to_act_on] == [RUNNER + "refit"]


@pytest.mark.parametrize("named", ["0.5", "nonsense", "/does/not/exist"])
def test_no_release_is_no_answer(
    named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def no_index(*arguments: str) -> str:
        raise NoRelease("pip download failed: no index here")

    monkeypatch.setattr("tools.sglang_release.sources._pip", no_index)
    monkeypatch.setattr("tools.sglang_release.sources.CACHE", tmp_path)
    assert command.main(["check", named]) == 1
    assert capsys.readouterr().err.startswith("no answer: ")


def test_wrong_usage_is_status_two(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["check"])
    assert ended.value.code == 2


def test_every_judgement_has_a_reason_and_is_there_once() -> None:
    assert len({each[:2] for each in JUDGED}) == len(JUDGED)
    assert all(len(each.reason.split()) > 3 for each in JUDGED)


def test_signatures_of_all_rows_are_recorded() -> None:
    rows = (*core.ENTRY_POINTS, *core.REQUESTS)
    recorded = signatures.known()
    missing_rows = {findings.title(findings.place_of(entry)) for entry in rows} - set(recorded)
    assert not missing_rows, "run: python -m tools.sglang_release record"


# --- history --------------------------------------------------------------------------------


def test_history_takes_each_release_with_the_table_of_the_ones_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = (row("update"), row("outer"), row("inner"), row("settled"), row("unseen"))
    monkeypatch.setattr(history, "ENTRY_POINTS", table)
    monkeypatch.setattr(history, "REQUESTS", ())
    second = """
def update(self, named):
    self.model.load_weights(named)
    self.inner(named)

def inner(self, named):
    self.model.load_weights(named)

def outer(self, named):
    self._write(named)

def _write(self, named):
    self.model.load_weights(named)

def unseen(self, weights):
    self.pipe.send(weights)

def refit(self, named):
    self.model.load_weights(named)
"""
    releases = [
        summary(tmp_path / "1", runner(UPDATE), "0.5.97"),
        summary(tmp_path / "2", runner(second), "0.5.98"),
        summary(tmp_path / "3", runner("weights = 1"), "0.5.99"),
    ]
    steps = list(history.steps(releases))
    results = {each.entry.method: (each.release, each.result) for s in steps for each in s.rows}
    assert results == {
        "update": ("0.5.97", history.FOUND),
        "outer": ("0.5.98", history.ON_THE_WAY),
        "inner": ("0.5.98", history.INSIDE),
        "unseen": ("0.5.98", history.MISSED),
    }
    assert [each.place for each in steps[1].others] == [RUNNER + "refit"]
    assert steps[2].went == tuple(RUNNER + name for name in ("update", "outer", "inner", "unseen"))
    ranges = {each.entry.method: (each.first, each.last) for each in history.ranges(steps)}
    assert ranges["update"] == ("0.5.97", "0.5.98")


# --- real releases --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_releases() -> tuple[Any, Any]:
    """0.5.20 and 0.5.21, between which update sessions came."""
    try:
        return tuple(summary_of(open_release(version)) for version in ("0.5.20", "0.5.21"))  # type: ignore[return-value]
    except NoRelease as error:
        pytest.skip(str(error))


@pytest.mark.registry
def test_the_split_of_0_5_21_is_found_with_the_table_of_0_5_20(
    two_releases: tuple[Any, Any],
) -> None:
    before, after = two_releases
    table = [each for each in core.ENTRY_POINTS if findings.is_expected(each, before.version)]
    requests = [each for each in core.REQUESTS if findings.is_expected(each, before.version)]
    paths = Paths(after)
    found = list(findings.uncovered(paths, table, requests))
    places = {each.place for each in found}
    updater = "srt.model_executor.model_runner_components.weight_updater:WeightUpdater."
    assert {
        updater + "load_weights_from_distributed",
        updater + "begin_weight_update",
        updater + "end_weight_update",
        "srt.managers.scheduler_components.weight_updater:"
        "SchedulerWeightUpdaterManager.begin_weight_update",
    } <= places
    gone = {each.place for each in findings.went(paths, [*table, *requests], found)}
    assert gone == {updater + "update_weights_from_distributed"}
    # Nothing but a word to read: what 0.5.20 had already was judged there.
    old = {each.place for each in findings.uncovered(Paths(before), table, requests)}
    assert len(places - old) < 15


@pytest.mark.registry
def test_the_newest_release_of_the_table_has_nothing_to_act_on() -> None:
    """It is the one that was judged."""
    try:
        newest = summary_of(open_release(core.NEWEST))
    except NoRelease as error:
        pytest.skip(str(error))
    found = checking.check(newest)
    assert [each.place for each in found.to_act_on] == []
    assert found.wrapped > 25


@pytest.mark.registry
def test_the_index_lists_the_releases_of_the_table() -> None:
    try:
        versions = released()
    except NoRelease as error:
        pytest.skip(str(error))
    assert versions[0] == core.OLDEST
    assert core.NEWEST in versions


def test_findings_are_plain_values() -> None:
    found = Finding("writer", "srt.a:B.c", 3, "what", "todo")
    assert json.loads(json.dumps(found._asdict()))["place"] == "srt.a:B.c"
