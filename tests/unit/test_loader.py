"""The loader: it sees every import of SGLang's modules, and nobody sees it.

The package ``sglang`` here is a fake with real files under the real names; ``tests/install``
has the hook in real environments, ``tests/real_sglang`` the real package.  What must not
differ from a Python without the hook is compared with a Python without the hook, in new
interpreters.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import sglang_patch_loader as loader
import sglang_weight_hook_patch_core as core

RunPython = Callable[..., "subprocess.CompletedProcess[str]"]

RUNNER = "sglang.srt.model_executor.model_runner"
UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater"

MODEL_RUNNER = """
class ModelRunner:
    def load_model(self):
        return "loaded"
    def finalize_startup_weight_load(self):
        return "final"

if __name__ == "__main__":
    import inspect, sys
    print("main", __spec__.name, __file__ == inspect.getsourcefile(ModelRunner), sys.argv[1:])
"""

WEIGHT_UPDATER = """
from dataclasses import dataclass

@dataclass(frozen=True)
class WeightUpdater:
    runner: object = None
    def get_model_runner(self): return self.runner
    def update_weights_from_disk(self, model_path, load_format): return True, "ok"
    def update_weights_from_tensor(self, named_tensors): return True, "ok"
    def update_weights_from_ipc(self, recv_req): return True, "ok"
    def load_weights_from_distributed(self, named_tensors): return True, "ok"
    def begin_weight_update(self): pass
    def end_weight_update(self, *, run_post_load): pass
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder for sys.path with a fake sglang in it."""
    folder = tmp_path / "site"
    for name, text in {
        "sglang/__init__.py": "__version__ = '0.5.23'\n",
        "sglang/srt/__init__.py": "",
        "sglang/srt/model_executor/__init__.py": "",
        "sglang/srt/model_executor/model_runner.py": MODEL_RUNNER,
        "sglang/srt/model_executor/config.json": "{}",
        "sglang/srt/model_executor/model_runner_components/__init__.py": "",
        "sglang/srt/model_executor/model_runner_components/weight_updater.py": WEIGHT_UPDATER,
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture
def python(run_python: RunPython, package: Path) -> RunPython:
    """Run code where the fake sglang is importable; the hook is not installed by itself."""

    def run(
        code: str, *arguments: str, check: bool = True, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return run_python(
            "-c", textwrap.dedent(code), *arguments, path=package, check=check, **environment
        )

    return run


INSTALL = "import sglang_patch_loader; sglang_patch_loader.install()\n"
PATCHED = "hasattr(ModelRunner.load_model, '_sglang_weight_hook_entry')"


# --- the two lists ------------------------------------------------------------------------


def test_the_loaders_targets_are_the_modules_of_the_cores_table() -> None:
    assert loader.TARGETS == core.TARGET_MODULES
    assert core.__name__ == loader.CORE


# --- installing ---------------------------------------------------------------------------


def test_installing_twice_leaves_one_finder() -> None:
    loader.install()
    loader.install()
    assert [type(finder).__name__ for finder in sys.meta_path].count("_Finder") == 1
    assert loader.is_installed()
    loader.uninstall()
    assert not loader.is_installed()


def test_a_reloaded_loader_does_not_install_a_second_finder(python: RunPython) -> None:
    done = python(
        INSTALL
        + """
import importlib, sys
importlib.reload(sglang_patch_loader).install()
print([type(finder).__name__ for finder in sys.meta_path].count("_Finder"))
"""
    )
    assert done.stdout == "1\n"


def test_the_off_switch_leaves_the_meta_path_and_the_imports_alone(python: RunPython) -> None:
    done = python(
        "import sys; before = list(sys.meta_path)\n"
        + INSTALL
        + "assert sys.meta_path == before\n"
        + f"from {RUNNER} import ModelRunner; print({PATCHED})\n"
        + "assert 'sglang_weight_hook_patch_core' not in sys.modules",
        SGLANG_WEIGHT_HOOK="0",
    )
    assert done.stdout == "False\n"


@pytest.mark.parametrize("value", ["1", "", "yes"])
def test_any_other_value_of_the_switch_leaves_it_on(value: str, python: RunPython) -> None:
    code = INSTALL + f"from {RUNNER} import ModelRunner; print({PATCHED})"
    assert python(code, SGLANG_WEIGHT_HOOK=value).stdout == "True\n"


def test_installing_imports_nothing_but_the_loader(run_python: RunPython) -> None:
    code = "import sys; before = set(sys.modules)\n%sprint(sorted(set(sys.modules) - before))"
    done = run_python("-c", code % INSTALL)
    assert done.stdout == "['sglang_patch_loader']\n"
    assert done.stderr == ""


def test_an_import_that_is_not_of_a_target_costs_no_import_of_the_core(python: RunPython) -> None:
    done = python(
        INSTALL
        + """
import sys, sglang.srt.model_executor, json, email
print([name for name in sys.modules if name.startswith("sglang_weight_hook")])
"""
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_an_installation_that_fails_never_raises(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loader, "_Finder", None)
    loader.install()
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv(loader.DEBUG_SWITCH, "1")
    loader.install()
    out, err = capsys.readouterr()
    assert out == ""
    assert "not installed" in err


# --- however it is imported ---------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        f"from {RUNNER} import ModelRunner",
        f"import {RUNNER} as m; ModelRunner = m.ModelRunner",
        f"import importlib; ModelRunner = importlib.import_module({RUNNER!r}).ModelRunner",
        f"ModelRunner = __import__({RUNNER!r}, fromlist=['ModelRunner']).ModelRunner",
        "import importlib\n"
        "ModelRunner = importlib.import_module('.model_runner', "
        "'sglang.srt.model_executor').ModelRunner",
        "import importlib.util, sys\n"
        f"spec = importlib.util.find_spec({RUNNER!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module); ModelRunner = module.ModelRunner",
        "import importlib.util, sys\n"
        f"spec = importlib.util.find_spec({RUNNER!r})\n"
        "spec.loader = importlib.util.LazyLoader(spec.loader)\n"
        "module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module); ModelRunner = module.ModelRunner",
    ],
)
def test_a_target_is_patched_however_it_is_imported(statement: str, python: RunPython) -> None:
    done = python(INSTALL + statement + f"\nprint({PATCHED}, ModelRunner().load_model())")
    assert done.stdout == "True loaded\n"


def test_a_target_imported_before_the_hook_is_patched_at_once(python: RunPython) -> None:
    done = python(f"from {RUNNER} import ModelRunner\n" + INSTALL + f"print({PATCHED})")
    assert done.stdout == "True\n"


def test_a_target_that_installs_the_hook_while_it_executes_is_imported(
    python: RunPython, package: Path
) -> None:
    path = package / "sglang/srt/model_executor/model_runner.py"
    path.write_text(INSTALL + MODEL_RUNNER)
    done = python(f"from {RUNNER} import ModelRunner; print(ModelRunner().load_model())")
    assert (done.stdout, done.stderr) == ("loaded\n", "")


def test_a_reloaded_target_has_its_new_class_patched(python: RunPython) -> None:
    done = python(
        INSTALL
        + f"""
import importlib, {RUNNER} as module
old = module.ModelRunner
ModelRunner = importlib.reload(module).ModelRunner
print(ModelRunner is not old, {PATCHED}, type(module.__spec__.loader).__name__)
"""
    )
    assert done.stdout == "True True SourceFileLoader\n"


def test_a_first_import_that_fails_is_patched_when_it_is_retried(
    python: RunPython, package: Path
) -> None:
    path = package / "sglang/srt/model_executor/model_runner.py"
    path.write_text("import os\nif os.environ.pop('FAIL', 0): 1 / 0\n" + MODEL_RUNNER)
    done = python(
        INSTALL
        + f"""
import sys
try:
    import {RUNNER}
except ZeroDivisionError:
    print("failed", {RUNNER!r} in sys.modules)
from {RUNNER} import ModelRunner
print({PATCHED})
""",
        FAIL="1",
    )
    assert done.stdout == "failed False\nTrue\n"


def test_a_target_that_is_not_there_fails_as_without_the_hook(
    python: RunPython, package: Path
) -> None:
    (package / "sglang/srt/model_executor/model_runner.py").unlink()
    code = f"""
try:
    import {RUNNER}
except ModuleNotFoundError as error:
    print(error, error.name)
import importlib.util
print(importlib.util.find_spec({RUNNER!r}))
"""
    assert python(INSTALL + code).stdout == python(code).stdout


@pytest.mark.parametrize("hook", [True, False])
def test_python_m_of_a_target_runs_it(hook: bool, run_python: RunPython, package: Path) -> None:
    customize = package / "sitecustomize.py"
    customize.write_text(INSTALL)
    done = run_python(
        "-W", "error", "-m", RUNNER, "a", "b", path=package, SGLANG_WEIGHT_HOOK=str(int(hook))
    )
    assert (done.stdout, done.stderr) == (f"main {RUNNER} True ['a', 'b']\n", "")


def test_python_m_of_a_target_shows_it_its_own_loader(run_python: RunPython, package: Path) -> None:
    (package / "sitecustomize.py").write_text(INSTALL)
    path = package / "sglang/srt/model_executor/model_runner.py"
    path.write_text("print(type(__spec__.loader), __loader__ is __spec__.loader)\n")
    hooked, plain = (
        run_python("-m", RUNNER, path=package, SGLANG_WEIGHT_HOOK=switch).stdout for switch in "10"
    )
    assert hooked == plain
    assert "SourceFileLoader" in plain


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_the_children_of_multiprocessing_are_patched(
    method: str, run_python: RunPython, package: Path, tmp_path: Path
) -> None:
    (package / "sitecustomize.py").write_text(INSTALL)
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import multiprocessing, sys

def child():
    from {RUNNER} import ModelRunner
    print({PATCHED}, flush=True)

if __name__ == "__main__":
    process = multiprocessing.get_context(sys.argv[1]).Process(target=child)
    process.start()
    process.join()
    sys.exit(process.exitcode)
"""
    )
    assert run_python(str(script), method, path=package).stdout == "True\n"


def test_threads_that_import_at_once_get_one_patched_class_each_way(python: RunPython) -> None:
    done = python(
        INSTALL
        + f"""
import threading, importlib
import typing  # which SGLang has imported long before, and dataclasses look for in sys.modules
barrier, seen = threading.Barrier(8), []
names = [{RUNNER!r}, {UPDATER!r}]
def work(number):
    barrier.wait()
    seen.append(importlib.import_module(names[number % 2]))
threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
(a, b) = sorted(set(seen), key=lambda module: module.__name__)
ModelRunner = a.ModelRunner
print(len(seen), {PATCHED}, hasattr(b.WeightUpdater.update_weights_from_disk,
                                     "_sglang_weight_hook_entry"),
      hasattr(ModelRunner.load_model.__wrapped__, "__wrapped__"), sglang_patch_loader._walking)
"""
    )
    assert (done.stdout, done.stderr) == ("8 True True False set()\n", "")


# --- among other finders ------------------------------------------------------------------

WALKER = """
import sys
class Walker:
    '''A finder that walks sys.meta_path itself and skips nothing but itself.'''
    calls = 0
    def find_spec(self, name, path=None, target=None):
        Walker.calls += 1
        for finder in sys.meta_path:
            if finder is not self:
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    return spec
"""

ONCE = f"""
from {RUNNER} import ModelRunner
print({PATCHED}, hasattr(ModelRunner.load_model.__wrapped__, "__wrapped__"),
      type(sys.modules[{RUNNER!r}].__spec__.loader).__name__, sglang_patch_loader._walking)
"""


@pytest.mark.parametrize(
    "order",
    [
        "sys.meta_path.insert(0, Walker())\n" + INSTALL,
        INSTALL + "sys.meta_path.insert(0, Walker())\n",
        INSTALL + "sys.meta_path.append(Walker())\n",
        "sys.meta_path.append(Walker())\n" + INSTALL,
    ],
    ids=["before us, older", "before us, newer", "after us, newer", "after us, older"],
)
def test_a_finder_that_walks_the_others_does_not_recurse_with_ours(
    order: str, python: RunPython
) -> None:
    done = python(WALKER + order + ONCE)
    assert done.stdout == "True False SourceFileLoader set()\n"


@pytest.mark.parametrize("place", ["insert(0, Wrapping())", "append(Wrapping())"])
def test_a_finder_that_wraps_loaders_like_wrapt_keeps_working(
    place: str, python: RunPython
) -> None:
    done = python(
        f"""
import sys
class Loader:
    '''Like wrapt's: calls the loader that it found, then a hook of its own.'''
    def __init__(self, loader): self.loader = loader
    def create_module(self, spec): return None
    def exec_module(self, module):
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        print("theirs", module.__name__)
class Wrapping:
    busy = set()
    def find_spec(self, name, path=None, target=None):
        if name != {RUNNER!r} or name in self.busy: return None
        self.busy.add(name)
        try:
            import importlib.util
            spec = importlib.util.find_spec(name)
        finally:
            self.busy.discard(name)
        spec.loader = Loader(spec.loader)
        return spec
sys.meta_path.{place}
{INSTALL}
if {place!r}.startswith("insert"):
    sys.meta_path.insert(0, sys.meta_path.pop(1))
from {RUNNER} import ModelRunner
print({PATCHED}, ModelRunner().load_model())
"""
    )
    expected = f"theirs {RUNNER}\n" if place.startswith("insert") else ""
    assert done.stdout == expected + "True loaded\n"


BYPASS = """
import sys
from importlib.machinery import PathFinder
class Bypass:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, path, target) if name.startswith("sglang") else None
sys.meta_path.insert(0, Bypass)
before = list(sys.meta_path)
"""


def test_a_finder_in_front_that_keeps_an_import_from_us_is_made_up_for(
    python: RunPython,
) -> None:
    # The import hooks of typeguard and jaxtyping are like that.  What calls install() again is
    # SGLang's plugin door.
    done = python(
        INSTALL
        + BYPASS
        + f"""
from {RUNNER} import ModelRunner
print({PATCHED})
sglang_patch_loader.install()
print({PATCHED}, hasattr(ModelRunner.load_model.__wrapped__, "__wrapped__"))
print(sys.meta_path[0] is before[1], sorted(map(id, before)) == sorted(map(id, sys.meta_path)))
from {UPDATER} import WeightUpdater  # comes our way now
print(hasattr(WeightUpdater.update_weights_from_disk, "_sglang_weight_hook_entry"))
"""
    )
    assert (done.stdout, done.stderr) == ("False\nTrue False\nTrue True\nTrue\n", "")


def test_before_sglang_is_there_a_second_installation_moves_nobody(python: RunPython) -> None:
    done = python(
        INSTALL + BYPASS + "sglang_patch_loader.install(); print(sys.meta_path == before)"
    )
    assert done.stdout == "True\n"


def test_a_loader_that_took_ours_for_the_original_puts_back_as_good_as_that(
    python: RunPython,
) -> None:
    # ddtrace 4.16 remembers the loader that it found, and sets it as __loader__ afterwards.
    code = f"""
import sys, importlib.util
spec = importlib.util.find_spec({RUNNER!r})
held = spec.loader
module = importlib.util.module_from_spec(spec)
held.exec_module(module)
module.__loader__ = held
print(type(held), held == type(held)(spec.name, spec.origin), vars(held), held.get_code)
"""
    hooked, plain = (python(prefix + code).stdout for prefix in (INSTALL, ""))
    assert hooked.partition("<bound")[0] == plain.partition("<bound")[0]
    assert "SourceFileLoader" in plain


def test_a_finder_of_an_editable_installation_is_asked(
    python: RunPython, package: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (package / "sglang").rename(elsewhere / "sglang")
    done = python(
        f"""
import sys
from importlib.machinery import PathFinder
class Editable:
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return PathFinder.find_spec(name, [{str(elsewhere)!r}]) if name == "sglang" else None
sys.meta_path.insert(0, Editable)  # a real sglang may be installed here
{INSTALL}{ONCE}"""
    )
    assert done.stdout == "True False SourceFileLoader set()\n"


def test_a_finder_that_raises_raises_through_ours_and_is_asked_again(python: RunPython) -> None:
    done = python(
        f"""
import sys
class Angry:
    angry = True
    def find_spec(self, name, path=None, target=None):
        if name == {RUNNER!r} and self.angry: raise OSError("not today")
sys.meta_path.insert(0, Angry())
{INSTALL}
try:
    import {RUNNER}
except OSError as error:
    print(error, sglang_patch_loader._walking)
Angry.angry = False
{ONCE}"""
    )
    assert done.stdout == "not today set()\nTrue False SourceFileLoader set()\n"


def test_finders_without_find_spec_are_passed_over(python: RunPython) -> None:
    done = python("import sys\nclass Old: pass\n" + INSTALL + "sys.meta_path.append(Old())" + ONCE)
    assert done.stdout == "True False SourceFileLoader set()\n"


# --- kinds of modules ---------------------------------------------------------------------


def test_a_namespace_package_in_a_targets_place_is_imported_untouched(
    python: RunPython, package: Path
) -> None:
    path = package / "sglang/srt/model_executor/model_runner.py"
    path.unlink()
    path.with_suffix("").mkdir()
    code = f"import {RUNNER} as m; print(m.__name__, list(m.__path__), type(m.__spec__.loader))"
    assert python(INSTALL + code).stdout == python(code).stdout


def test_a_spec_without_a_loader_is_returned_untouched() -> None:
    from importlib.machinery import ModuleSpec

    spec = ModuleSpec(RUNNER, None, is_package=True)

    class Finder:
        def find_spec(self, *arguments: object) -> ModuleSpec:
            return spec

    sys.meta_path.insert(0, Finder())
    loader.install()
    ours = sys.meta_path[0]
    assert ours.find_spec(RUNNER, None) is spec
    assert spec.loader is None


def test_a_target_inside_a_zip_is_patched(python: RunPython, package: Path, tmp_path: Path) -> None:
    archive = tmp_path / "sglang.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(package.rglob("*.py")):
            file.write(path, path.relative_to(package))
            path.unlink()
    done = python(
        f"import sys; sys.path.insert(0, {str(archive)!r}); sys.path_importer_cache.clear()\n"
        f"sys.path.remove({str(package)!r})\n" + INSTALL + ONCE + "import inspect\n"
        f"print(inspect.getsource(sys.modules[{RUNNER!r}])[:18].strip())"
    )
    assert done.stdout == "True False zipimporter set()\nclass ModelRunner\n"


# --- nobody sees it -----------------------------------------------------------------------

PORTRAIT = f"""
import importlib.resources, inspect, pickle, sys, importlib
import {RUNNER} as module, {UPDATER} as updater
instance = module.ModelRunner()
updated = updater.WeightUpdater("its runner")
print(type(module.__spec__.loader), module.__spec__.loader is module.__loader__)
print(module.__spec__.name, module.__spec__.origin, module.__spec__.cached, module.__cached__)
print(module.__file__, module.__name__, module.__package__, module.__doc__)
print(sorted(vars(module)), sorted(vars(module.__spec__)), sorted(vars(module.__loader__)))
print(inspect.getsource(module))
print(inspect.getsource(module.ModelRunner))
print(inspect.getsource(module.ModelRunner.load_model), inspect.getsourcefile(module))
print(inspect.signature(updated.update_weights_from_disk), inspect.getfile(module.ModelRunner))
print(type(pickle.loads(pickle.dumps(instance))), pickle.loads(pickle.dumps(updated)))
print(pickle.dumps(module.ModelRunner), pickle.dumps(module.ModelRunner.load_model))
print(sorted(vars(module.ModelRunner)), module.ModelRunner.__mro__, module.ModelRunner.__module__)
package = importlib.import_module("sglang.srt.model_executor")
print((importlib.resources.files(package) / "config.json").read_text())
print(module.__loader__.get_data(module.__file__)[:20], module.__loader__.get_filename())
"""


def test_a_patched_module_is_indistinguishable_from_an_unpatched_one(python: RunPython) -> None:
    python("import sglang.srt.model_executor.model_runner")  # writes its .pyc
    patched, plain = python(INSTALL + PORTRAIT), python(PORTRAIT)
    assert patched.stdout == plain.stdout
    assert (patched.stderr, plain.stderr) == ("", "")


def test_what_a_target_sees_of_itself_while_it_executes_is_the_same(
    python: RunPython, package: Path
) -> None:
    path = package / "sglang/srt/model_executor/model_runner.py"
    path.write_text(
        MODEL_RUNNER + "print(type(__spec__.loader), type(__loader__), "
        "__spec__.loader is __loader__, __spec__._initializing)\n"
        "import importlib.resources\n"
        "print((importlib.resources.files(__package__) / 'config.json').read_text())\n"
    )
    code = f"import {RUNNER}"
    assert python(INSTALL + code).stdout == python(code).stdout != ""


@pytest.mark.parametrize(
    "text",
    [
        "def broken():\n    raise RuntimeError('no kernel')\nbroken()\n",
        "import sglang.no_such_module\n",
        "from sglang import no_such_name\n",
        "def broken(:\n",
        "raise SystemExit('bye')\n",
    ],
    ids=["RuntimeError", "ModuleNotFoundError", "ImportError", "SyntaxError", "SystemExit"],
)
def test_the_traceback_of_a_failing_target_is_the_one_without_the_hook(
    text: str, python: RunPython, package: Path
) -> None:
    (package / "sglang/srt/model_executor/model_runner.py").write_text(text)
    code = f"import {RUNNER}"
    plain = python(code, check=False)
    (package / "sitecustomize.py").write_text(INSTALL)
    hooked = python(code, check=False)
    assert hooked.returncode == plain.returncode == 1
    assert hooked.stderr == plain.stderr != ""


def test_an_executed_target_leaves_no_spec_of_ours_behind(python: RunPython) -> None:
    done = python(
        INSTALL
        + f"""
import gc, {RUNNER}, {UPDATER}
gc.collect()
import sglang_weight_hook_patch_core as core
print([type(x).__name__ for x in gc.get_objects() if type(x) is core.StandIn])
"""
    )
    assert done.stdout == "[]\n"


def test_the_stand_in_survives_copy_and_pickle() -> None:
    import copy

    stand_in = core.StandIn("an original")
    assert copy.copy(stand_in).upper() == "AN ORIGINAL"
    with pytest.raises(AttributeError):
        stand_in.no_such_attribute  # noqa: B018


# --- our own failures ---------------------------------------------------------------------

BROKEN_CORES = {
    "missing": None,
    "raising at import": "raise RuntimeError('half an upgrade')\n",
    "a syntax error": "def (\n",
    "raising": "def patch_module(module): raise RuntimeError('unknown release')\n",
    "empty": "",
}


@pytest.mark.parametrize("text", BROKEN_CORES.values(), ids=list(BROKEN_CORES))
@pytest.mark.parametrize("logs", [True, False], ids=["logging", "no logging"])
def test_a_broken_core_never_fails_the_import_and_is_said_once(
    text: str | None, logs: bool, run_python: RunPython, package: Path
) -> None:
    source = Path(loader.__file__).read_text()
    (package / "sglang_patch_loader.py").write_text(source)
    # Without the repository's root on the path: half of an installation.
    if text is not None:
        (package / "sglang_weight_hook_patch_core.py").write_text(text)
    code = f"""
import sys
sys.path[:] = [{str(package)!r}] + [p for p in sys.path if "lib/python" in p or "lib64" in p]
{"import logging; logging.basicConfig(format='LOGGED %(message)s')" if logs else ""}
{INSTALL}
import importlib, {RUNNER} as module
for _ in range(3):
    importlib.reload(module)
print(module.ModelRunner().load_model())
"""
    done = run_python("-c", textwrap.dedent(code), path=package)
    assert done.stdout == "loaded\n"
    lines = [line for line in done.stderr.splitlines() if RUNNER in line]
    assert len(lines) == 1
    assert "unpatched" in lines[0]
    assert lines[0].startswith("LOGGED ") == logs


def test_a_patch_that_fails_never_fails_the_import_and_is_said_once(
    python: RunPython, package: Path
) -> None:
    done = python(
        INSTALL
        + f"""
import sglang_weight_hook_patch_core as core
def patch_module(module): raise RuntimeError("unknown release")
core.patch_module = patch_module
import importlib, {RUNNER} as module
importlib.reload(module)
sglang_patch_loader.install()
print(module.ModelRunner().load_model())
"""
    )
    assert done.stdout == "loaded\n"
    (line,) = done.stderr.splitlines()
    assert RUNNER in line
    assert "unknown release" in line


def test_nothing_is_ever_written_to_stdout(python: RunPython) -> None:
    done = python(INSTALL + f"import {RUNNER}, {UPDATER}", SGLANG_WEIGHT_HOOK_DEBUG="1", check=True)
    assert done.stdout == ""
