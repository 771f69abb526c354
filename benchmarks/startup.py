"""What the hook costs every interpreter that starts: instructions, counted, not timed.

    python benchmarks/startup.py [PYTHON ...]

For each Python (by default every supported one that is found) two virtual environments are
made, one with the hook, and ``python -c pass`` is run in both under ``valgrind
--tool=callgrind``.  Instruction counts do not depend on what else the machine does, so one run
each is enough.  Exit status: 0 if every ratio is within the budget, 1 if not or if nothing
could be measured.

Both environments hold one inert .pth file: to read any at all, some Pythons import a codec,
and an environment without a single .pth file is not where SGLang lives.  The share of that is
in the column "any .pth".
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SUPPORTED = ("3.9", "3.10", "3.11", "3.12", "3.13", "3.14")

#: design.md, section 3.
BUDGET = 1.05

# A hash seed of its own for each run would move the counts by more than the hook does; -B is
# for the standard library's sake, ours is installed compiled.
ENVIRONMENT = {
    "PATH": os.environ.get("PATH", os.defpath),
    "HOME": os.environ.get("HOME", "/"),
    "LC_ALL": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
}


def find_pythons() -> list[Path]:
    """One interpreter of each supported version: from pyenv, or else from PATH."""
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    found = []
    for version in SUPPORTED:
        candidates = sorted(versions.glob(f"{version}.*/bin/python"))
        on_path = shutil.which(f"python{version}")
        candidates += [Path(on_path)] if on_path else []
        for candidate in candidates:
            # A pyenv shim of a version that is not active only complains.
            probe = [str(candidate), "-c", "import venv"]
            if subprocess.run(probe, capture_output=True, check=False).returncode == 0:
                found.append(candidate)
                break
    return found


def make_environment(base: Path, place: Path, hook: bool, inert: bool = True) -> Path:
    subprocess.run([str(base), "-m", "venv", "--without-pip", str(place)], check=True)
    python = place / "bin" / "python"
    if inert:
        purelib = ask(python, "import sysconfig; print(sysconfig.get_path('purelib'))")
        Path(purelib, "a_inert.pth").write_text("# read by site, and nothing to do\n")
    if hook:
        subprocess.run(
            [str(ROOT / "install_sglang_hook_patch.sh"), "--python", str(python)],
            stdout=subprocess.DEVNULL,
            check=True,
        )
    return python


def ask(python: Path, code: str) -> str:
    done = subprocess.run(
        [str(python), "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=True
    )
    return done.stdout.strip()


def instructions(python: Path) -> int:
    """Executed by ``python -c pass``, all of the process counted."""
    done = subprocess.run(
        ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", python, "-c", "pass"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )
    counted = re.search(r"Collected\s*:\s*(\d+)", done.stderr)
    if done.returncode or counted is None:
        raise SystemExit(f"valgrind failed on {python}:\n{done.stderr[-2000:]}")
    return int(counted.group(1))


def modules(python: Path) -> set[str]:
    return set(ask(python, "import sys; print(*sys.modules)").split())


class Counts(NamedTuple):
    """Instructions of ``python -c pass``."""

    empty: int  # in an environment without any .pth file
    bare: int  # with an inert one
    hooked: int
    extra: set[str]  # modules that only the hooked one imports

    @property
    def ratio(self) -> float:
        return self.hooked / self.bare


def count(base: Path, place: Path) -> Counts:
    """Count for one Python, in environments below ``place``."""
    # Paths of one length: even that shows in the counts.
    empty = make_environment(base, place / "empty", hook=False, inert=False)
    bare = make_environment(base, place / "bare_", hook=False)
    hooked = make_environment(base, place / "hook_", hook=True)
    extra = modules(hooked) - modules(bare)
    for python in (empty, bare, hooked):  # so that the standard library is compiled
        subprocess.run([str(python), "-c", "pass"], check=True)
    return Counts(instructions(empty), instructions(bare), instructions(hooked), extra)


def measure(base: Path, place: Path) -> bool:
    """Print one line of the table; whether it is within the budget."""
    nothing, without, with_hook, extra = counts = count(base, place)
    within = counts.ratio <= BUDGET
    print(
        f"{ask(base, 'import platform; print(platform.python_version())'):<9}"
        f"{without:>14,}{with_hook:>14,}{counts.ratio:>9.4f}{without / nothing:>10.4f}"
        f"  {len(extra)} {' '.join(sorted(extra))}" + ("" if within else "  OVER BUDGET"),
        flush=True,
    )
    return within


def main() -> int:
    parser = argparse.ArgumentParser(description="Instructions of `python -c pass`.")
    parser.add_argument(
        "python", nargs="*", type=Path, help="interpreters to measure; default: every one found"
    )
    pythons = parser.parse_args().python or find_pythons()
    if shutil.which("valgrind") is None:
        print("valgrind is missing: apt-get install valgrind libc6-dbg", file=sys.stderr)
        return 1
    if not pythons:
        print("no Python from 3.9 on was found; name one", file=sys.stderr)
        return 1
    print("`python -c pass`, instructions; budget: ratio", BUDGET)
    print(f"{'Python':<9}{'bare':>14}{'with hook':>14}{'ratio':>9}{'any .pth':>10}  extra modules")
    with tempfile.TemporaryDirectory(prefix="sglang-weight-hook-") as place:
        results = [measure(base, Path(place, str(n))) for n, base in enumerate(pythons)]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
