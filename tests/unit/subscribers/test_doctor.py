"""What `doctor` says of engines and subscribers, here and in the servers of a directory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from fake_sglang import FakeRunner, load, settle

from sglang_weight_hook.commands import subscribed
from sglang_weight_hook.layout import files
from sglang_weight_hook.layout.engines import ENGINES

MOONCAKE, NIXL = ENGINES


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Which modules there are, in place of those of this interpreter; all libraries are there."""
    there: set[str] = set()
    monkeypatch.setattr(subscribed, "_has_module", lambda name: name in there)
    monkeypatch.setattr(subscribed, "_loads", lambda library: True)
    return there


def said() -> list[tuple[str, str]]:
    return list(subscribed.installed({}))


def test_engines_that_nobody_named_may_be_missing(modules: set[str]) -> None:
    assert {level for level, _ in said()} == {"good"}
    assert "pip install mooncake-transfer-engine-non-cuda" in said()[0][1]


def test_an_engine_that_is_named_and_missing_is_bad(
    modules: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_WEIGHT_HOOK_SUBSCRIBERS", "nixl")
    assert said()[1] == (
        "bad",
        "nixl is a subscriber and is not installed here: pip install nixl-cu12 "
        "(with a GPU: nixl-cu12 or nixl-cu13)",
    )


def test_missing_libraries_are_named_with_their_debian_packages(
    modules: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    modules.add("mooncake")
    monkeypatch.setattr(subscribed, "_loads", lambda library: "numa" not in library)
    monkeypatch.setenv("SGLANG_WEIGHT_HOOK_SUBSCRIBERS", "mooncake")
    level, text = said()[0]
    assert level == "bad"
    assert text.endswith("libnuma.so.1 (libnuma1)")
    monkeypatch.delenv("SGLANG_WEIGHT_HOOK_SUBSCRIBERS")
    assert said()[0][0] == "note"


def test_the_module_that_is_there_is_named(modules: set[str]) -> None:
    modules.add("nixl_cu12")
    assert said()[1][0] == "good"
    assert said()[1][1].endswith("module nixl_cu12")


def test_no_engine_is_imported(run_python: Any) -> None:
    code = (
        "import sys\n"
        "from sglang_weight_hook.commands import subscribed\n"
        "assert list(subscribed.installed({}))\n"
        "names = ('mooncake', 'nixl_cu12', 'nixl_cu13')\n"
        "print([module for module in sys.modules if module.split('.')[0] in names])"
    )
    assert run_python("-c", code).stdout == "[]\n"


@pytest.mark.parametrize(
    ("name", "level", "words"),
    [
        ("monocake", "bad", "there is no subscriber 'monocake'"),
        ("no_such_package.module:make", "bad", "no module no_such_package"),
        ("my_package.module:make", "good", "its package is here"),
    ],
)
def test_other_subscribers(
    name: str, level: str, words: str, modules: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    modules.add("my_package")
    monkeypatch.setenv("SGLANG_WEIGHT_HOOK_SUBSCRIBERS", name)
    found = said()[-1]
    assert found[0] == level
    assert words in found[1]


def test_what_failed_in_a_server_is_told(subscribe: Any, maps: Path) -> None:
    torch = pytest.importorskip("torch")
    subscribe.to("no_such_module_here:make")
    runner = FakeRunner(torch.nn.Linear(4, 4))
    load(runner)
    settle()
    ((level, text),) = subscribed.published(str(maps))
    assert level == "bad"
    assert text.startswith("slot 0, subscriber no_such_module_here:make: could not be loaded")


def test_a_failed_registration_and_what_is_slow_are_told(subscribe: Any, maps: Path) -> None:
    torch = pytest.importorskip("torch")
    runner = FakeRunner(torch.nn.Linear(4, 4))
    load(runner)
    settle()
    entry = {"state": "failed", "problem": "no memory may be locked", "warnings": ["it is slow"]}
    good = {"state": "registered", "problem": None, "warnings": [], "regions": 2, "bytes": 9}
    path = maps / files.TRANSPORT.format("0")
    path.write_text(json.dumps({"engines": {"mooncake": entry, "nixl": good, "odd": 3}}))
    os.chmod(path, 0o600)
    assert list(subscribed.published(str(maps))) == [
        ("bad", "slot 0, mooncake: failed: no memory may be locked"),
        ("note", "slot 0, mooncake: it is slow"),
        ("good", "slot 0, nixl: registered, 2 regions (9 bytes)"),
    ]
    assert runner.model is not None


def test_a_directory_without_servers_says_nothing(tmp_path: Path) -> None:
    assert list(subscribed.published(str(tmp_path))) == []
    assert list(subscribed.published(str(tmp_path / "none"))) == []
