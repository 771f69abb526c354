"""SGLang's scheduler in a Ray actor: the hook is active in Ray's worker, and the map is true.

SGLang's actor sets CUDA's current device when its loop begins, whatever its device is; on a machine
without a GPU that is a stand-in's doing (`cuda_stand_in`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cpu_sglang.environment import ensure_environment
from cpu_sglang.releases import RAY
from tests.real_sglang.hooked import (
    assert_legacy_files,
    assert_true_map,
    wait_for_end,
)
from tests.real_sglang.programs.test_programs import running
from tests.real_sglang.truth.report import other_process
from tests.real_sglang.truth.serving import make_probed_venv

STAND_IN = (
    "`cuda_stand_in.py` for `torch.cuda.set_device`, which SGLang's actor calls on any device"
)

pytestmark = [pytest.mark.real_sglang, pytest.mark.truth]


def test_a_scheduler_in_an_actor_of_ray_is_published(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    environment = ensure_environment(RAY)
    python = make_probed_venv(tmp_path / "venv", environment)
    (purelib,) = python.parents[1].glob("lib/python*/site-packages")
    shutil.copy(Path(__file__).with_name("cuda_stand_in.py"), purelib)
    (purelib / "zzzz_stand_in.pth").write_text("import cuda_stand_in; cuda_stand_in.start()\n")
    models = [checkpoint(1), checkpoint(2)]
    with (
        other_process("a scheduler in an actor of Ray", "`RayEngine`", STAND_IN) as row,
        running(environment, python, "ray_engine.py", models, tmp_path) as program,
    ):
        assert program.point() == "serving"
        slot = program.maps.slot("0")
        loaded = slot.read()
        pid = loaded.state["pid"]
        assert pid != program.process.pid
        assert Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::SchedulerActor")
        assert (loaded.state["state"], loaded.state["missing"]) == ("ready", [])
        assert_true_map(loaded, program.live()[pid])
        held = program.look(row, "load").parameters()
        program.go_on()

        assert program.point() == "updated"
        updated = slot.read()
        truth = program.live()[pid]
        assert_true_map(updated, truth)
        assert_legacy_files(updated, truth, updated=True)
        holds = program.look(row, "update from disk").parameters()
        assert [name for name, values in holds.items() if held[name] == values] == []
        assert updated.content_generation == loaded.content_generation + 1
        kinds = [kind for kind, _ in program.events("0")]
        assert kinds == ["load_model", "scheduler_ready", "update_weights_from_disk"]
        program.go_on()
        program.process.wait(60)
        wait_for_end(pid)
        assert not os.path.exists(f"/proc/{pid}")
        assert not slot.owner_alive()
