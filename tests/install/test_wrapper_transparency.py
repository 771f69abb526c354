"""What is launched through ``launch_wrapper.py`` gets what it gets when it is launched directly.

Arguments, environment but for ``PYTHONPATH``, flags, signal dispositions and mask, descriptors,
locale: compared over a table of launches, and over launches that hypothesis makes up.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import launch_wrapper

from .conftest import ENVIRONMENT, ROOT, Target, interpreter

WRAPPER = ROOT / "launch_wrapper.py"

#: Everything about a process that whoever launches it decides, as JSON.
PORTRAIT = r"""
import fcntl, json, locale, os, resource, sys

def raw(name):
    with open("/proc/self/" + name, "rb") as stream:
        return [entry.decode("latin-1") for entry in stream.read().split(b"\0")]

def paths(places):
    return [place for place in places if os.path.basename(place) != "launch_wrapper_path"]

def of(mapping, name, separator):
    value = mapping.get(name)
    return value and separator.join(p for p in value.split(separator) if b"launch_wrapper" not in p)

def descriptors():
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink("/proc/self/fd/" + name)
            flags = fcntl.fcntl(int(name), fcntl.F_GETFD), fcntl.fcntl(int(name), fcntl.F_GETFL)
            where = os.lseek(int(name), 0, 1) if os.path.isfile(target) else 0
        except OSError:  # the one that lists them
            continue
        found[name] = target.split(":")[0], flags, where
    return found

with open("/proc/self/status") as stream:
    signals = [line.split() for line in stream if line.startswith(("Sig", "Shd"))]
flags = {name: getattr(sys.flags, name) for name in dir(sys.flags) if name[0] != "_"}
json.dump(
    {
        "argv": [os.fsencode(word).decode("latin-1") for word in sys.argv[1:]],
        "orig_argv": [ascii(word) for word in getattr(sys, "orig_argv", ())],
        "cmdline": raw("cmdline"),
        "executable": sys.executable,
        "environment": [e for e in raw("environ") if not e.startswith("PYTHONPATH=")],
        "PYTHONPATH": str(of(os.environb, b"PYTHONPATH", b":") or None),
        "os.environ": sorted(ascii(pair) for pair in os.environ.items() if pair[0] != "PYTHONPATH"),
        "flags": {name: value for name, value in flags.items() if not callable(value)},
        "options": [sys._xoptions, sys.warnoptions, sys.dont_write_bytecode],
        "signals": [line for line in signals if line[0] != "SigQ:"],
        "descriptors": descriptors(),
        "locale": [locale.setlocale(locale.LC_ALL), sys.getfilesystemencoding(),
                   sys.stdout.encoding, sys.stdout.errors, getattr(sys.stdin, "encoding", None)],
        "path": [ascii(place) for place in paths(sys.path)],
        "process": [os.getcwd(), os.umask(0), os.nice(0), os.getpgid(0) == os.getpid(),
                    resource.getrlimit(resource.RLIMIT_CORE)],
        "input": sys.stdin.buffer.read().decode("latin-1") if sys.stdin else None,
    },
    sys.stdout,
)
"""


@dataclass
class Launch:
    """One way to launch a Python program."""

    flags: tuple[str, ...] = ()
    environment: dict[bytes, bytes] = field(default_factory=dict)
    arguments: tuple[bytes, ...] = (b"a",)
    #: What a shell does first: traps, redirections, limits.
    before: str = ""
    #: Blocked when it starts; then the parent is a Python, because no shell can.
    blocked: tuple[signal.Signals, ...] = ()
    #: Through `--`: else the wrapper is run with the flags, and hands them on.
    as_command: bool = False


C = {b"LANG": b"C"}

TABLE = {
    "nothing": Launch(),
    "C by LANG": Launch(environment=C),
    "POSIX by LANG": Launch(environment={b"LANG": b"POSIX"}),
    "C by LC_ALL": Launch(environment={b"LC_ALL": b"C"}),
    "C by LC_CTYPE": Launch(environment={b"LC_CTYPE": b"C"}),
    "C.UTF-8": Launch(environment={b"LC_ALL": b"C.UTF-8"}),
    "a locale that there is not": Launch(environment={b"LC_ALL": b"xx_YY.UTF-8"}),
    "no coercion": Launch(environment={**C, b"PYTHONCOERCECLOCALE": b"0"}),
    "neither coercion nor UTF-8": Launch(
        environment={**C, b"PYTHONCOERCECLOCALE": b"0", b"PYTHONUTF8": b"0"}
    ),
    "PYTHONUTF8=0": Launch(environment={**C, b"PYTHONUTF8": b"0"}),
    "PYTHONUTF8=1": Launch(environment={b"PYTHONUTF8": b"1"}),
    "-X utf8": Launch(flags=("-X", "utf8"), environment=C),
    "-X utf8=0": Launch(flags=("-X", "utf8=0"), environment=C),
    "-E": Launch(flags=("-E",), environment=C, as_command=True),
    "-I": Launch(flags=("-I",), environment=C, as_command=True),
    "many flags": Launch(flags=("-O", "-B", "-s", "-u", "-W", "error", "-X", "dev")),
    "odd arguments": Launch(
        environment=C,
        arguments=(b"", b"\xff\xfe", b" ", "模型".encode(), b"--", b"-m", b"a\nb", b"$(x)", b""),
    ),
    "an empty argument first": Launch(arguments=(b"", b"-c")),
    "odd values": Launch(environment={b"ODD": b"\xff=\n", "Ü".encode(): b"", b"EMPTY": b""}),
    "a PYTHONPATH": Launch(environment={b"PYTHONPATH": b"/a::/b/\xff:"}),
    "descriptors": Launch(before="exec 7</etc/hostname 9>>/dev/null 5<&7; read -u 7 line"),
    "no input": Launch(before="exec </dev/null"),
    "closed input": Launch(before="exec <&-"),
    "SIGINT ignored": Launch(before="trap '' INT"),
    "SIGPIPE ignored": Launch(before="trap '' PIPE XFSZ"),
    "many ignored": Launch(before="trap '' INT HUP PIPE USR1 TERM QUIT"),
    "nohup": Launch(before="trap '' HUP"),
    "blocked": Launch(blocked=(signal.SIGUSR1, signal.SIGINT, signal.SIGCHLD)),
    "a Python as parent": Launch(blocked=(signal.SIGRTMIN,), as_command=True),
    "limits": Launch(before="ulimit -c 0; umask 037; cd /usr"),
}


@pytest.fixture(scope="module")
def portrait(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("portrait-")
    (folder / "portrait.py").write_text(PORTRAIT)
    return folder


def words_of(launch: Launch, python: Path, folder: Path, wrapped: bool) -> list[bytes]:
    command = [str(python), *launch.flags]
    wrapper = [str(WRAPPER)] if wrapped else []
    if launch.as_command:
        program = [str(folder / "portrait.py")]
        whole = [str(python), *wrapper, "--", *command, *program] if wrapped else command + program
    else:
        whole = [*command, *wrapper, "-m", "portrait"]
    return [*map(os.fsencode, whole), *launch.arguments]


def environment_of(launch: Launch, folder: Path) -> dict[bytes, bytes]:
    inherited = {
        os.fsencode(key): os.fsencode(value)
        for key, value in ENVIRONMENT.items()
        if not key.startswith(("LC_", "LANG"))
    }
    made = {**inherited, **launch.environment}
    if not launch.as_command:
        mine = made.get(b"PYTHONPATH")
        made[b"PYTHONPATH"] = os.fsencode(folder) + (b":" + mine if mine else b"")
    return made


def run(launch: Launch, words: list[bytes], folder: Path) -> tuple[int, bytes, bytes]:
    def block() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, launch.blocked)

    if not launch.blocked:
        # `exit` keeps the shell from becoming the program: it stays the parent.
        words = [b"bash", b"-c", f'{launch.before}\n"$@"\nexit $?'.encode(), b"-", *words]
    done = subprocess.run(
        words,
        input=b"the input",
        capture_output=True,
        env=environment_of(launch, folder),
        cwd="/",
        preexec_fn=block if launch.blocked else None,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def compare(launch: Launch, python: Path, folder: Path) -> None:
    plain, wrapped = (
        run(launch, words_of(launch, python, folder, wrapped), folder) for wrapped in (False, True)
    )
    assert (wrapped[0], wrapped[2]) == (plain[0], plain[2])
    assert plain[0] == 0
    theirs: dict[str, Any] = json.loads(plain[1])
    ours: dict[str, Any] = json.loads(wrapped[1])
    assert ours == theirs


@pytest.mark.parametrize("name", TABLE)
def test_a_launch_through_the_wrapper_is_the_launch(
    target: Target, portrait: Path, name: str
) -> None:
    compare(TABLE[name], target.python, portrait)


@pytest.mark.parametrize("version", ["3.9", "3.10", "3.12", "3.13", "3.14"])
def test_on_other_pythons_too(portrait: Path, version: str) -> None:
    python = interpreter(version)
    if python is None:
        pytest.skip(f"there is no Python {version} here")
    for name in ("C by LANG", "odd arguments", "many flags", "many ignored"):
        compare(TABLE[name], python, portrait)


WORDS = st.binary(max_size=6).map(lambda data: data.replace(b"\0", b"")) | st.sampled_from(
    [b"", b"-m", b"--", b"-c", b"--tp", b"\xff", "é".encode()]
)
LAUNCHES = st.builds(
    Launch,
    flags=st.lists(
        st.sampled_from([("-O",), ("-s",), ("-u",), ("-B",), ("-X", "utf8"), ("-X", "utf8=0"),
                         ("-W", "ignore")]),
        max_size=3,
    ).map(lambda groups: tuple(word for group in groups for word in group)),
    environment=st.dictionaries(
        st.sampled_from([b"LANG", b"LC_ALL", b"LC_CTYPE", b"LC_NUMERIC"]),
        st.sampled_from([b"", b"C", b"POSIX", b"C.UTF-8", b"en_US.ISO-8859-1"]),
    ).flatmap(
        lambda made: st.dictionaries(
            st.sampled_from([b"PYTHONUTF8", b"PYTHONCOERCECLOCALE", b"PYTHONNOUSERSITE"]),
            st.sampled_from([b"0", b"1"]),
        ).map(lambda more: {**made, **more})
    ),
    arguments=st.lists(WORDS, max_size=4).map(tuple),
    before=st.lists(
        st.sampled_from(["trap '' PIPE", "trap '' INT", "exec 8</dev/null", "umask 0",
                         "trap '' XFSZ"]),
        max_size=3, unique=True,
    ).map("; ".join),
    as_command=st.booleans(),
)  # fmt: skip


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(launch=LAUNCHES)
def test_any_launch_through_the_wrapper_is_the_launch(
    target: Target, portrait: Path, launch: Launch
) -> None:
    compare(launch, target.python, portrait)


@pytest.mark.parametrize("before", ["", "trap '' PIPE", "trap '' XFSZ INT"])
def test_a_command_that_is_no_python_gets_the_signals_too(target: Target, before: str) -> None:
    words = ["grep", "^Sig[BI]", "/proc/self/status"]
    told = [
        subprocess.run(
            ["bash", "-c", f'{before}\n"$@"\nexit $?', "-", *prefix, *words],
            env=ENVIRONMENT, capture_output=True, check=True, timeout=60,
        ).stdout
        for prefix in ([], [str(target.python), str(WRAPPER), "--"])
    ]  # fmt: skip
    assert told[0] == told[1]


def test_without_proc_it_runs_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_wrapper, "_of_this_process", lambda name: [])
    monkeypatch.setattr("sys.argv", ["launch_wrapper.py", "--tp", "", "2"])
    given_words = launch_wrapper.given_arguments()
    assert given_words.own == [b"--tp", b"", b"2"]
    assert launch_wrapper.given_environment() == dict(os.environb)
    words = launch_wrapper.command(given_words)
    assert words[-5:] == [b"-m", b"sglang.launch_server", b"--tp", b"", b"2"]


def any_python(version: str) -> Path | None:
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    found = sorted(versions.glob(f"{version}.*/bin/python"))
    if found:
        return found[0]
    on_path = shutil.which(f"python{version}")
    return Path(on_path) if on_path else None


@pytest.mark.parametrize("version", ["2.7", "3.6", "3.7", "3.8"])
@pytest.mark.parametrize("theirs", [None, "import sys\nsys.stdout.write('theirs ')\n"])
def test_children_that_the_hook_does_not_support_are_as_without_it(
    target: Target, tmp_path: Path, version: str, theirs: str | None
) -> None:
    child = any_python(version)
    if child is None or subprocess.run([child, "-c", ""], check=False).returncode:
        pytest.skip(f"there is no Python {version} here")
    if theirs:
        (tmp_path / "sitecustomize.py").write_text(theirs)
    code = (
        "import sys; print(sorted(sys.modules), sys.meta_path, "
        "[p for p in sys.path if 'launch_wrapper_path' not in p])"
    )
    environment = {**ENVIRONMENT, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    told = [
        subprocess.run(
            [*prefix, str(child), "-c", code],
            env=environment, capture_output=True, text=True, check=False, timeout=60,
        )
        for prefix in ([], [str(target.python), "-I", str(WRAPPER), "--"])
    ]  # fmt: skip
    assert told[0].stderr == told[1].stderr == ""
    assert told[0].stdout == told[1].stdout
    assert ("theirs" in told[1].stdout) == bool(theirs)
