"""The installation methods other than the ``.pth`` file, each on a real SGLang 0.5.23.

SGLang's plugin entry point, alone and together with the ``.pth``; ``launch_wrapper.py`` with
nothing installed.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cpu_sglang.environment import Environment
from tests.real_sglang import scenario
from tests.real_sglang.hooked import ROOT, HookedServer, make_venv

pytestmark = pytest.mark.real_sglang

WRAPPER = ROOT / "launch_wrapper.py"
UNINSTALL = ROOT / "uninstall_sglang_hook_patch.sh"

Checkpoint = Callable[..., Path]


def purelib_of(python: Path) -> Path:
    return next(python.parents[1].glob("lib/python*/site-packages"))


def remove_start_up_files(python: Path) -> Path:
    for name in ("sglang_injector.pth", "sglang_injector.start"):
        (purelib_of(python) / name).unlink()
    return python


@pytest.fixture(scope="module")
def plugin_only(environment: Environment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with everything of the hook but its ``.pth`` and ``.start``."""
    venv = tmp_path_factory.mktemp("plugin") / "venv"
    return remove_start_up_files(make_venv(venv, environment))


@pytest.fixture(scope="module")
def unhooked(environment: Environment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same interpreter with nothing of the hook."""
    python = make_venv(tmp_path_factory.mktemp("unhooked") / "venv", environment)
    command = [str(UNINSTALL), "--python", str(python)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return python


class WrappedServer(HookedServer):
    """A server started by ``python launch_wrapper.py ARGUMENT ...``."""

    def __init__(self, environment: Environment, python: Path, model: Path, folder: Path) -> None:
        super().__init__(environment, python, model, folder, ["--tp", "2"])
        assert self.command[1:3] == ["-m", "sglang.launch_server"]
        self.command[1:3] = [str(WRAPPER)]


def captures(server: HookedServer, checkpoint: Checkpoint, ranks: int = 1) -> None:
    """The map is there in every scheduler, is true, and follows an update."""
    slots = server.maps.slots()
    assert [slot.name for slot in slots] == [str(rank) for rank in range(ranks)]
    before = scenario.check(server, slots, "ready")
    status, answer = server.update_weights_from_disk(checkpoint(2))
    assert (status, answer["success"]) == (200, True), answer
    after = scenario.check(server, slots, "ready", updated=True)
    assert scenario.changes(before, after) == [1] * ranks
    assert all(document.state["missing"] == [] for document in after)
    assert not [line for line in server.hook_log() if "WARNING" in line.upper()]


def test_a_server_without_the_pth_captures_through_sglangs_plugin_entry_point(
    environment: Environment, plugin_only: Path, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with HookedServer(environment, plugin_only, checkpoint(1), tmp_path) as server:
        captures(server, checkpoint)


def test_a_server_under_the_wrapper_captures_in_every_scheduler(
    environment: Environment, unhooked: Path, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    before = sorted(purelib_of(unhooked).rglob("*"))
    assert not [path for path in before if "sglang" in path.name]
    with WrappedServer(environment, unhooked, checkpoint(1), tmp_path) as server:
        captures(server, checkpoint, ranks=2)
        # The process that was started is SGLang's own.
        line = Path(f"/proc/{server.pid}/cmdline").read_bytes()
        assert b"launch_wrapper" not in line
    after = {path for path in purelib_of(unhooked).rglob("*") if "__pycache__" not in path.parts}
    assert after == {path for path in before if "__pycache__" not in path.parts}


# --- one activation -----------------------------------------------------------------------

# What SGLang does in each of its processes, with the real modules, and the result.
LOAD_PLUGINS = """
import sys
{before}
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.managers.scheduler import Scheduler
mark = "_sglang_weight_hook_entry"
method = ModelRunner.load_model
print(
    sum(type(finder).__module__ == "sglang_patch_loader" for finder in sys.meta_path),
    type(sys.meta_path[0]).__module__ == "sglang_patch_loader",
    hasattr(method, mark), hasattr(Scheduler.__init__, mark),
    hasattr(method.__wrapped__, "__wrapped__"),
)
"""

# As the import hooks of typeguard and jaxtyping: in front, and asking PathFinder alone.
BYPASS = """
from importlib.machinery import PathFinder
class Bypass:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, path, target) if name.startswith("sglang") else None
sys.meta_path.insert(0, Bypass)
"""

EARLY = "import sglang.srt.model_executor.model_runner, sglang.srt.managers.scheduler"


@pytest.mark.parametrize(
    ("methods", "before"),
    [
        pytest.param("both", "", id="both"),
        # Each imports all of SGLang, which takes long.
        pytest.param("both", BYPASS, id="both, bypassed", marks=pytest.mark.truth),
        pytest.param("both", BYPASS + EARLY, id="both, bypassed and late"),
        pytest.param("the plugin's", EARLY, id="the plugin's alone, late", marks=pytest.mark.truth),
    ],
)
def test_by_either_method_or_both_it_is_activated_once(
    environment: Environment, hooked_python: Path, plugin_only: Path, methods: str, before: str
) -> None:
    python = hooked_python if methods == "both" else plugin_only
    done = subprocess.run(
        [str(python), "-c", LOAD_PLUGINS.format(before=before)],
        env=environment.env(),
        cwd=purelib_of(python),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "1 True True True False"
