"""Who publishes, in each of the shapes in which SGLang's releases keep their ranks.

The runners are fakes with the attributes that SGLang's releases give theirs;
``tests/real_sglang`` asks the real ones.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from typing import Any

import pytest
from fake_sglang import FakeConfig, FakeRunner

from sglang_weight_hook import __version__
from sglang_weight_hook.layout import process
from sglang_weight_hook.publisher import identity

RANKS = {
    "tp_rank": 3,
    "tp_size": 8,
    "pp_rank": 1,
    "pp_size": 2,
    "dp_rank": 0,
    "dp_size": 1,
    "moe_ep_rank": 5,
    "moe_ep_size": 8,
}
PUBLISHED = {
    "tp_rank": 3,
    "tp_size": 8,
    "pp_rank": 1,
    "pp_size": 2,
    "dp_rank": 0,
    "dp_size": 1,
    "ep_rank": 5,
    "ep_size": 8,
    "node_rank": None,
}


def on_the_runner(runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vars(runner).update(RANKS)


def on_the_parallel_state(runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runner.ps = types.SimpleNamespace(**RANKS)


def in_the_runtime_context(runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("sglang.srt.runtime_context")
    module.get_parallel = lambda: types.SimpleNamespace(**RANKS)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize("place", [on_the_runner, on_the_parallel_state, in_the_runtime_context])
def test_ranks_are_found_wherever_a_release_keeps_them(
    place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = FakeRunner()
    place(runner, monkeypatch)
    assert identity.ranks(runner) == PUBLISHED


def test_the_weight_checkers_data_parallel_numbers_are_not_taken() -> None:
    # SGLang 0.5.23, utils/weight_checker.py: its dp_size is the attention's, its dp_rank 0
    # where there is none.
    runner: Any = FakeRunner()
    runner._weight_checker = types.SimpleNamespace(_placement=dict(RANKS))
    assert identity.ranks(runner) == {**PUBLISHED, "dp_rank": None, "dp_size": None}


def test_a_rank_that_a_release_lacks_is_null_and_never_guessed() -> None:
    assert set(identity.ranks(FakeRunner()).values()) == {None}


def test_sizes_may_come_from_the_launch_arguments_and_ranks_may_not() -> None:
    runner: Any = FakeRunner()
    runner.server_args = types.SimpleNamespace(tp_size=4, tp_rank=2, ep_size=4, node_rank=1)
    found = identity.ranks(runner)
    assert (found["tp_size"], found["ep_size"], found["node_rank"]) == (4, 4, 1)
    assert found["tp_rank"] is None


def test_a_rank_that_is_no_number_is_null() -> None:
    runner: Any = FakeRunner()
    runner.tp_rank, runner.dp_rank = "0", None
    assert (identity.ranks(runner)["tp_rank"], identity.ranks(runner)["dp_rank"]) == (None, None)


def test_a_source_that_raises_leaves_the_others_to_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Runner(FakeRunner):
        @property
        def tp_rank(self) -> int:
            raise RuntimeError("not initialised")

    runner: Any = Runner()
    runner.ps = types.SimpleNamespace(tp_rank=6)
    module = types.ModuleType("sglang.srt.runtime_context")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert identity.ranks(runner)["tp_rank"] == 6
    assert identity.ranks(runner)["pp_rank"] is None


@pytest.mark.parametrize(
    ("runner", "gpu_id", "draft", "index"),
    [
        (FakeRunner(gpu_id=5), 5, False, None),
        (FakeRunner(draft=True), 0, True, None),
        (FakeRunner(draft=True, draft_index=2), 0, True, 2),
        (types.SimpleNamespace(ps=types.SimpleNamespace(gpu_id=3)), 3, False, None),
        (types.SimpleNamespace(gpu_id=None), 0, False, None),
    ],
)
def test_gpu_and_draft_of_a_runner(
    runner: Any, gpu_id: int, draft: bool, index: int | None
) -> None:
    assert identity.gpu_id(runner) == gpu_id
    assert identity.is_draft(runner) is draft
    assert identity.draft_index(runner) == index


def test_the_identity_of_a_runner_is_plain_json(monkeypatch: pytest.MonkeyPatch) -> None:
    sglang = types.ModuleType("sglang")
    sglang.__version__ = "0.5.23"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sglang", sglang)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    runner = FakeRunner(object(), gpu_id=1, draft=True, draft_index=0)
    found = identity.identity(runner)
    assert json.loads(json.dumps(found)) == found
    assert found["cuda_visible_devices"] == "3,4"
    assert (found["role"], found["draft_index"], found["gpu_id"]) == ("draft", 0, 1)
    assert (found["model_path"], found["model_class"]) == (FakeConfig.model_path, "object")
    assert (found["sglang_version"], found["hook_version"]) == ("0.5.23", __version__)
    assert found["gpu_uuid"] is None
    assert found["pci_bus_id"] is None


def test_a_process_is_told_from_a_later_one_with_its_pid() -> None:
    own = process.identity()
    assert own["pid"] == os.getpid()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        ticks = process.start_ticks(child.pid)
        assert ticks is not None
        assert ticks >= own["process_start_ticks"]
    finally:
        child.communicate(b"\n")
    assert process.start_ticks(child.pid) is None


def test_a_command_with_spaces_and_parentheses_does_not_hide_the_start_time(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = " ".join(str(number) for number in range(3, 53))
    monkeypatch.setattr(process, "_read", lambda path: f"77 (a) b (c) {fields}")
    assert process.start_ticks(77) == 22


def test_what_linux_alone_has_is_null_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_read", lambda path: None)

    def no_link(path: str) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(os, "readlink", no_link)
    found = process.identity()
    assert found["boot_id"] is None
    assert found["process_start_ticks"] is None
    assert found["pid_namespace"] is None
