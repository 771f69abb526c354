"""SGLang's own tests pass or fail with the hook installed exactly as without it.

The wheel carries the unit tests of ``sglang.multimodal_gen`` (about 400 files, of which those
run here whose imports are there), and helpers and server tests that need a GPU or a checkpoint
from the network.  What is wrapped is in ``sglang.srt``, whose unit tests are not in the wheel:
the real servers of ``tests/real_sglang`` are there for that.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import pytest

from cpu_sglang.environment import Environment, ensure_environment
from tests.real_sglang.hooked import make_venv

SUITE = "sglang/multimodal_gen/test/unit"
PATIENCE = 1200  # seconds


@pytest.fixture(scope="module")
def environment(is_long: bool) -> Environment:
    if not is_long:
        pytest.skip("takes four minutes; the long form does")
    return ensure_environment()


@pytest.fixture(scope="module")
def with_hook(environment: Environment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tools(make_venv(tmp_path_factory.mktemp("with") / "venv", environment))


@pytest.fixture(scope="module")
def without_hook(environment: Environment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    venv = tmp_path_factory.mktemp("without") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    purelib = next(venv.glob("lib/python*/site-packages"))
    (purelib / "zz_shared.pth").write_text(f"{environment.purelib}\n")
    return with_tools(venv / "bin" / "python")


def with_tools(python: Path) -> Path:
    """pytest for that interpreter, behind everything else."""
    purelib = next(python.parents[1].glob("lib/python*/site-packages"))
    (purelib / "zzz_tools.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def outcomes(
    python: Path, environment: Environment, names: list[str], report: Path
) -> dict[str, str]:
    """Outcome by test; a file that cannot be collected counts as one."""
    suite = environment.purelib / SUITE
    subprocess.run(
        [str(python), "-m", "pytest", "-q", "--tb=no", "-p", "no:cacheprovider", "--noconftest",
         "-p", "no:hypothesispytest", "-o", "addopts=", "--continue-on-collection-errors",
         f"--rootdir={report.parent}", f"--junitxml={report}",
         *(str(suite / name) for name in names)],
        cwd=report.parent,
        env=environment.env(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=PATIENCE,
        check=False,
    )  # fmt: skip
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        found[f"{case.get('classname')}::{case.get('name')}"] = "+".join(sorted(kinds)) or "passed"
    return found


def test_sglangs_own_tests_end_as_without_the_hook(
    with_hook: Path,
    without_hook: Path,
    environment: Environment,
    tmp_path: Path,
) -> None:
    probe = "import sys; print('sglang_patch_loader' in sys.modules)"
    for python, expected in ((with_hook, "True\n"), (without_hook, "False\n")):
        said = subprocess.run([python, "-c", probe], capture_output=True, text=True, check=True)
        assert said.stdout == expected
    suite = environment.purelib / SUITE
    names = sorted(str(path.relative_to(suite)) for path in suite.rglob("test_*.py"))
    hooked = outcomes(with_hook, environment, names, tmp_path / "with.xml")
    plain = outcomes(without_hook, environment, names, tmp_path / "without.xml")
    differing = {
        name: (plain.get(name), hooked.get(name))
        for name in plain.keys() | hooked.keys()
        if plain.get(name) != hooked.get(name)
    }
    print(f"with: {dict(Counter(hooked.values()))}; without: {dict(Counter(plain.values()))}")
    if differing:  # unless it differs from itself
        again = outcomes(without_hook, environment, names, tmp_path / "again.xml")
        flaky = {name for name in differing if again.get(name) != plain.get(name)}
        print(f"not the same twice without the hook: {sorted(flaky)}")
        differing = {name: both for name, both in differing.items() if name not in flaky}
    assert differing == {}
    assert "passed" in hooked.values()
