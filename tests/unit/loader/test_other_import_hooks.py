"""The loader among other import hooks: before, behind and around them.

The package ``sglang`` here is a fake with real files under the real names; ``tests/install``
has the hook in real environments, ``tests/real_sglang`` the real package.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_package import INSTALL, ONCE, PATCHED, RUNNER, UPDATER, RunPython

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
    # SGLang's plugin entry point.
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
