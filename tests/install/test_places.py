"""Layouts of Python environments: in each, the hook goes into purelib.

More of them are in other files: read-only, externally managed (PEP 668) and missing places, and
paths with spaces and other alphabets, in test_install.py; installation by pip in test_pip.py.
What cannot be run here is in docs/installing.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ENVIRONMENT, INSTALL, UNINSTALL, Target, hand_made, make_target, tree


def system_site(base: Target, place: Path) -> Target:
    """A virtual environment that sees the site-packages of its base."""
    command = [base.python, "-m", "venv", "--without-pip", "--system-site-packages", place]
    subprocess.run(command, check=True, env=ENVIRONMENT)
    return Target(place / "bin" / "python", next(place.glob("lib/*/site-packages")), base.version)


def test_condas_layout(tmp_path: Path) -> None:
    # By hand: neither conda nor micromamba could be had.
    target = hand_made(tmp_path / "envs" / "serve", "3.11")
    done = target.script(INSTALL)
    assert (done.returncode, done.stderr) == (0, "")
    assert str(target.purelib) in done.stdout
    assert target.finders() == 1
    target.uninstall()
    assert tree(target.purelib) == {}


def test_a_venv_that_sees_its_bases_packages(tmp_path: Path) -> None:
    base = hand_made(tmp_path / "base", "3.11")
    venv = system_site(base, tmp_path / "venv")
    look = "import sglang_patch_loader as l, sglang_weight_hook as h; print(l.__file__, h.__file__)"

    base.install()  # below: active above too, and nothing of the venv's own
    assert venv.finders() == 1
    assert tree(venv.purelib) == {}
    assert venv.script(INSTALL, "--check").returncode == 1

    venv.install()  # in both: once, and the venv's own
    assert venv.finders() == base.finders() == 1
    assert {
        Path(name).is_relative_to(venv.purelib) for name in venv.run("-c", look).stdout.split()
    } == {True}

    base.uninstall()  # above only
    assert (venv.finders(), base.finders("-B")) == (1, 0)
    venv.uninstall()
    assert tree(venv.purelib) == tree(base.purelib) == {}


def test_a_purelib_that_is_not_the_first_site_directory(tmp_path: Path) -> None:
    # As with Fedora's lib64.  Up to 3.10, because later interpreters have `site` built in.
    target = hand_made(tmp_path / "prefix", "3.10")
    site = target.purelib.parent / "site.py"
    text = site.read_text()
    site.unlink()
    changed = text.replace("libdirs = [sys.platlibdir]", 'libdirs = ["lib64"]')
    changed = changed.replace('if sys.platlibdir != "lib":', "if True:")
    assert changed != text
    site.write_text(changed)
    first = tmp_path / "prefix" / "lib64" / "python3.10" / "site-packages"
    first.mkdir(parents=True)
    asked = target.run("-c", "import site; print(site.getsitepackages()[0])")
    assert asked.stdout == f"{first}\n"
    target.install()
    assert target.finders() == 1
    assert (target.purelib / "sglang_injector.pth").exists()
    assert tree(first) == {}
    target.uninstall()
    assert tree(target.purelib) == {}


def test_two_sglang_environments_are_two_installations(tmp_path: Path, checkout: Path) -> None:
    old, new = (make_target(tmp_path / name, "3.11") for name in ("old", "new"))
    for target, release in ((old, "0.4.7"), (new, "0.5.23")):
        information = target.purelib / f"sglang-{release}.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: sglang\nVersion: {release}\n"
        )
    done = old.script(INSTALL, root=checkout)  # of another version, even
    assert "SGLang     0.4.7\n" in done.stdout
    assert (old.finders(), new.finders()) == (1, 0)
    untouched = tree(old.purelib)
    done = new.script(INSTALL)
    assert "SGLang     0.5.23\n" in done.stdout
    assert tree(old.purelib) == untouched
    old.uninstall()
    assert (old.finders(), new.finders()) == (0, 1)


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """uv and virtualenv, from the registry."""
    place = tmp_path_factory.mktemp("uv-")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", place]
    subprocess.run([*command, "uv", "virtualenv", "filelock", "platformdirs", "distlib",
                    "packaging", "python-discovery"],
                   check=True, capture_output=True, timeout=300)  # fmt: skip
    return place


def run_uv(tools: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [tools / "bin" / "uv", "--offline", "--no-config", *map(str, arguments)],
        capture_output=True, text=True, env=ENVIRONMENT, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.registry
def test_an_environment_of_uv_takes_the_script_and_the_wheel(
    tools: Path, wheel: Path, tmp_path: Path
) -> None:
    base = make_target(tmp_path / "any", "3.11").python.resolve()
    made = run_uv(tools, "venv", "--python", base, tmp_path / "venv")
    assert made.returncode == 0, made.stderr
    (purelib,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    target = Target(tmp_path / "venv" / "bin" / "python", purelib, "")
    before = tree(purelib)
    target.install()
    assert target.finders() == 1
    listed = run_uv(tools, "pip", "list", "--format", "json", "--python", target.python)
    assert "sglang-weight-hook" in {entry["name"] for entry in json.loads(listed.stdout)}
    target.uninstall()
    assert tree(purelib) == before

    installed = run_uv(tools, "pip", "install", "--python", target.python, wheel)
    assert installed.returncode == 0, installed.stderr
    assert target.finders() == 1
    for script in (INSTALL, UNINSTALL):
        assert "by uv; remove it with `uv pip uninstall sglang-weight-hook`" in (
            target.refused(script)
        )
    removed = run_uv(tools, "pip", "uninstall", "--python", target.python, "sglang-weight-hook")
    assert removed.returncode == 0, removed.stderr
    # uv leaves what an interpreter has compiled of anybody's top-level modules.
    left = {path for path in tree(purelib) if "__pycache__" not in path}
    assert not [path for path in left if "sglang" in path]


@pytest.mark.registry
def test_an_environment_of_virtualenv_takes_the_script(tools: Path, tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "virtualenv", "-q", "--no-download", tmp_path / "venv"],
        env={**ENVIRONMENT, "PYTHONPATH": str(tools)}, check=True, timeout=120,
    )  # fmt: skip
    (purelib,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    target = Target(tmp_path / "venv" / "bin" / "python", purelib, "")
    # virtualenv puts a .pth with an import line there itself.
    before = {path for path in tree(purelib) if "__pycache__" not in path}
    target.install()
    assert target.finders() == 1
    target.uninstall()
    assert {path for path in tree(purelib) if "__pycache__" not in path} == before


@pytest.mark.registry
def test_the_user_site_is_reached_with_pip(wheel: Path, tmp_path: Path) -> None:
    base = make_target(tmp_path / "any", "3.11").python.resolve()
    managed = (
        "import sys, sysconfig as s, os; "
        "print(sys.prefix == sys.base_prefix and "
        "not os.path.exists(s.get_path('stdlib') + '/EXTERNALLY-MANAGED'))"
    )
    asked = subprocess.run([base, "-c", managed], capture_output=True, text=True, check=True)
    if asked.stdout != "True\n":
        pytest.skip("needs a Python that is neither a virtual environment nor managed")
    place = {"PYTHONUSERBASE": str(tmp_path / "user")}
    target = Target(base, tmp_path / "user", "")
    for arguments in (["install", "--user", "--no-index", str(wheel)],):
        done = target.run("-m", "pip", "--disable-pip-version-check", *arguments, environment=place)
        if "No module named pip" in done.stderr:
            pytest.skip("that Python has no pip")
        assert done.returncode == 0, done.stderr
    assert target.finders(environment=place) == 1
    for flag in ("-s", "-I"):  # under which there is no user site
        assert target.finders(flag, environment=place) == 0
    done = target.run("-m", "pip", "uninstall", "-y", "sglang-weight-hook", environment=place)
    assert done.returncode == 0, done.stderr
    assert {path for path in tree(tmp_path / "user") if path.endswith((".pth", ".py"))} == set()
