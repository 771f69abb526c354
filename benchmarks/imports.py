"""What the hook costs before a weight is loaded: starting an interpreter, importing SGLang."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from cpu_sglang.environment import Environment, ensure_environment

from . import baselines, startup, table
from .measure import Child, Sample, child, ratios
from .table import Line, Section

#: Of the CPU time of importing SGLang's own target modules.
TARGET = 1.01

_PROTOTYPE = ("sglang_patch_loader.py", "sglang_weight_hook_patch_core.py", "sglang_injector.pth")

# Imports every module that the hook waits for, of those that this release has; says how long
# the hook's own code took of it, where it is asked to measure that.
_IMPORT = """
import importlib, sys, time
mode = sys.argv[1]
if mode != "bare":
    import sglang_patch_loader as loader
    loader.install()
spent = depth = 0
def timed(function):
    def wrapper(*arguments):
        global spent, depth
        depth += 1
        started = time.process_time_ns()
        try:
            return function(*arguments)
        finally:
            depth -= 1
            if not depth:
                spent += time.process_time_ns() - started
    return wrapper
if mode == "timed":
    # Everything that runs because the hook is there begins in one of these two.
    loader._Finder.find_spec = timed(loader._Finder.find_spec)
    started = time.process_time_ns()
    core = timed(importlib.import_module)("sglang_weight_hook_patch_core")
    core._patch_or_say = timed(core._patch_or_say)
for name in sys.argv[2].split(","):
    try:
        importlib.import_module(name)
    except Exception:  # it needs a package that is not there
        pass
if mode == "timed":
    print("%d %d" % (spent, time.process_time_ns() - started))
"""


def measure(quick: bool) -> Section:
    lines = _instructions()
    environment = ensure_environment()
    lines += _starts(environment, quick)
    lines += _imports(environment, quick)
    return Section("Start-up and import", lines, HOW, LIMITS)


def _instructions() -> list[Line]:
    what = "`python -c pass`, instructions"
    target = f"≤ {startup.BUDGET} x"
    if shutil.which("valgrind") is None:
        return [Line(what, "no valgrind here", "", "", target)]
    with tempfile.TemporaryDirectory(prefix="benchmark-") as place:
        counts = startup.count(Path(sys.executable).resolve(), Path(place))
    return [
        Line(
            what,
            table.number(counts.hooked),
            f"without {table.number(counts.bare)}",
            f"{counts.ratio:.4f} x",
            target,
            counts.ratio <= startup.BUDGET,
        )
    ]


def _starts(environment: Environment, quick: bool) -> list[Line]:
    """``python -c pass`` where torch and SGLang are installed, beside the prototype."""
    directory = baselines.prototype_directory()
    found: dict[str, list[Child]] = {"bare": [], "hook": []}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        pythons = {name: _venv(environment, Path(folder, name), name == "hook") for name in found}
        if directory is not None:
            found["prototype"] = []
            pythons["prototype"] = _venv(environment, Path(folder, "prototype"), False)
            for file in _PROTOTYPE:
                shutil.copy(directory / file, _purelib(pythons["prototype"]))
        for number in range(4 if quick else 21):
            for name, python in pythons.items():
                if name == "prototype" and number > (1 if quick else 3):
                    continue
                used = child([str(python), "-c", "pass"], environment.env())
                if number:  # the first one compiles what it imports
                    found[name].append(used)
    cpu = {name: Sample([used.cpu for used in runs]) for name, runs in found.items()}
    peak = {name: Sample([float(used.peak) for used in runs]) for name, runs in found.items()}
    what = "`python -c pass`, SGLang installed"
    hook = f"{table.timing(cpu['hook'])}, {table.size(peak['hook'].median)}"
    bare = f"without {table.seconds(cpu['bare'].median)}, {table.size(peak['bare'].median)}"
    lines = [Line(what, hook, bare, table.times(ratios(cpu["hook"], cpu["bare"])))]
    if "prototype" not in found:
        return [*lines, Line(what, hook, baselines.NOT_GIVEN, "")]
    text = f"prototype {table.timing(cpu['prototype'])}, {table.size(peak['prototype'].median)}"
    times = cpu["prototype"].median / cpu["hook"].median
    return [*lines, Line(what, hook, text, f"{times:.0f} x cheaper")]


def _venv(environment: Environment, place: Path, hook: bool) -> Path:
    """An environment that has all that SGLang's has, and the hook if it is to."""
    base = (environment.venv / "bin" / "python").resolve()
    python = startup.make_environment(base, place, hook)
    _purelib(python).joinpath("a_sglang.pth").write_text(f"{environment.purelib}\n")
    return python


def _purelib(python: Path) -> Path:
    return Path(startup.ask(python, "import sysconfig; print(sysconfig.get_path('purelib'))"))


def _imports(environment: Environment, quick: bool) -> list[Line]:
    variables = environment.env(python_path=[str(startup.ROOT)])
    names = ",".join(_targets(environment, variables))

    def command(mode: str) -> list[str]:
        return [str(environment.python), "-c", _IMPORT, mode, names]

    bare: list[float] = []
    hook: list[float] = []
    own: list[float] = []
    child(command("hook"), variables)  # compiles
    for number in range(1 if quick else 5):
        pair = [("bare", bare), ("hook", hook)]
        for mode, values in pair if number % 2 else reversed(pair):
            values.append(child(command(mode), variables).cpu)
        timed = subprocess.run(command("timed"), env=variables, stdout=subprocess.PIPE, check=True)
        spent, whole = map(int, timed.stdout.split()[-2:])
        own.append(whole / (whole - spent))
    share = Sample(own)
    without = f"without {table.timing(Sample(bare))}"
    both = ratios(Sample(hook), Sample(bare))
    what = f"import of {names.count(',') + 1} target modules"
    return [
        Line(what + ", whole process", table.timing(Sample(hook)), without, table.times(both, 3)),
        Line(
            what + ", the hook's own code",
            table.seconds((share.median - 1) * Sample(bare).median),
            without,
            f"{share.median:.5f} x n={share.n}",
            f"≤ {TARGET} x",
            share.median <= TARGET,
        ),
    ]


def _targets(environment: Environment, variables: Mapping[str, str]) -> list[str]:
    """The modules that the hook waits for and that this release has."""
    root = environment.overlay or environment.purelib
    import sglang_patch_loader

    return [
        name
        for name in sorted(sglang_patch_loader.TARGETS)
        if root.joinpath(*name.split(".")).with_suffix(".py").is_file()
    ]


HOW = """\
Instructions are callgrind's, of this Python in two virtual environments (`python
benchmarks/startup.py` does it for every Python found). The second and third rows are CPU time and
peak memory of `python -c pass` in environments that have SGLang's packages; the prototype, this
project's predecessor, imports torch and SGLang there. The import is of every module that the hook
waits for and that this release has, in fresh processes, interleaved; their noise is larger than the
hook, so the last row adds up the CPU time of the hook's own code inside such a process: its
`find_spec` and all that it leads to, the patch core's import, and the wrapping."""
LIMITS = """\
At the start: reading one `.pth` line and one compiled module of 8 kB. During SGLang's import: one
set look-up for each imported module, and once the patch core with what it imports (`logging`,
`functools`), which SGLang needs as well."""
