"""What must not differ from a Python without the hook is compared with one, in new interpreters.

The package ``sglang`` here is a fake with real files under the real names; ``tests/install``
has the hook in real environments, ``tests/real_sglang`` the real package.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_package import INSTALL, MODEL_RUNNER, RUNNER, UPDATER, RunPython

import sglang_patch_loader as loader

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
import sglang_patch_loader
print([type(x).__name__ for x in gc.get_objects() if type(x) is sglang_patch_loader._StandIn])
"""
    )
    assert done.stdout == "[]\n"


def test_the_stand_in_survives_copy_and_pickle() -> None:
    import copy

    stand_in = loader._StandIn("an original")
    assert copy.copy(stand_in).upper() == "AN ORIGINAL"
    with pytest.raises(AttributeError):
        stand_in.no_such_attribute  # noqa: B018
