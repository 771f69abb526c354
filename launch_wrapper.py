"""Runs SGLang with the weight hook, for one launch, with nothing installed.

    python launch_wrapper.py --model-path ... --tp 8      the arguments of sglang.launch_server
    python launch_wrapper.py -m MODULE [ARGUMENT ...]     another module: `python -m MODULE ...`
    python launch_wrapper.py -- COMMAND [ARGUMENT ...]    any command that runs Python

`python` is the interpreter that has SGLang; its flags (-O, -X, -W, ...) are handed on.  The
checkout may be read-only, and serves any number of launches at once.

How: PYTHONPATH gets one directory more, `launch_wrapper_path`, whose sitecustomize.py every
Python that starts with this environment runs: the server, and whatever it spawns.  Then this
process *becomes* the server (exec): its process id, output, signals and exit status are those
of SGLang itself, and nothing of ours stays in between.  The rest it gets as this process got it:
arguments and environment are those that the kernel has, not what Python made of them.

Python 3.9 to 3.14.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

SERVER = "sglang.launch_server"
HERE = os.path.dirname(os.path.abspath(__file__))
#: What goes on PYTHONPATH.  Not the checkout itself: its `tests` or `demo` would stand in front
#: of whatever else is called that in the server's environment.
HOOKED = os.path.join(HERE, "launch_wrapper_path")
#: All that is needed of the checkout.
NEEDED = (
    os.path.join(HOOKED, "sitecustomize.py"),
    os.path.join(HERE, "sglang_patch_loader.py"),
    os.path.join(HERE, "sglang_weight_hook_patch_core.py"),
    os.path.join(HERE, "sglang_weight_hook", "__init__.py"),
)

USAGE = """\
Usage: launch_wrapper.py ARGUMENT ...                 run sglang.launch_server with the hook
       launch_wrapper.py -m MODULE [ARGUMENT ...]     run another module with the hook
       launch_wrapper.py -- COMMAND [ARGUMENT ...]    run any command with the hook

Nothing is installed and nothing is left.  The maps appear where they always do
(SGLANG_WEIGHT_HOOK_DIR, by default weights_metadata).
SGLang's own arguments: launch_wrapper.py -- python -m sglang.launch_server --help
"""


class Refusal(Exception):
    """Why nothing was started: one sentence."""


def main(arguments: Sequence[str]) -> int:
    if list(arguments) in ([], ["-h"], ["--help"]):
        stream = sys.stdout if arguments else sys.stderr
        stream.write(USAGE)
        return 0 if arguments else 2
    given = given_arguments()
    try:
        words = command(given)
        environment = hooked_environment(given_environment())
    except Refusal as refusal:
        sys.stderr.write(f"launch_wrapper.py: {refusal}\n")
        return 2
    is_python = given.own[0] != b"--"
    restore_signals(is_python)
    try:
        if is_python:
            os.execve(sys.executable, words, environment)
        else:
            os.execvpe(words[0], words, environment)
    except OSError as error:
        name = os.fsdecode(words[0])
        sys.stderr.write(f"launch_wrapper.py: {name} cannot be run: {error.strerror}.\n")
        # As a shell says it.
        return 127 if isinstance(error, FileNotFoundError) else 126


class Given(NamedTuple):
    """The command line that this process was started with."""

    python: bytes
    flags: list[bytes]
    #: What follows the name of this script.
    own: list[bytes]


def given_arguments() -> Given:
    """The command line, byte for byte."""
    own = [os.fsencode(argument) for argument in sys.argv]
    words = _of_this_process("cmdline")
    # This script and its arguments stand at the end of it, unless runpy started it.
    if len(words) > len(own) and words[-len(own) :] == own:
        return Given(words[0], words[1 : -len(own)], own[1:])
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return Given(os.fsencode(sys.executable), [os.fsencode(flag) for flag in flags], own[1:])


def given_environment() -> dict[bytes, bytes]:
    """The environment that this process was started with.

    Python changes its own: in the C locale it sets LC_CTYPE (PEP 538), by which a Python that
    is started from here would no longer see that it is in the C locale.
    """
    found: dict[bytes, bytes] = {}
    for entry in _of_this_process("environ"):
        name, equals, value = entry.partition(b"=")
        if name and equals:
            # Of two with one name the first counts, for getenv() and for Python.
            found.setdefault(name, value)
    return found or dict(os.environb)


def _of_this_process(name: str) -> list[bytes]:
    """What the kernel was given for this process; nothing where /proc does not tell."""
    try:
        with open(f"/proc/self/{name}", "rb") as stream:
            return stream.read().split(b"\0")[:-1]
    except OSError:
        return []


def restore_signals(is_python: bool) -> None:
    """Undo what Python did to signals when it started: it ignores two, and forgets whether they
    were ignored before.  What is ignored stays so through exec.

    Another Python ignores them whatever it gets.  Other commands get the default, unless the
    process that started this one ignores the signal itself, as systemd does for its services.
    One that is a Python does so for itself alone: subprocess gives children the default.
    """
    ignored = 0
    if not is_python:
        try:
            with open(f"/proc/{os.getppid()}/status", "rb") as stream:
                for line in stream:
                    if line.startswith(b"SigIgn:"):
                        ignored = int(line.split()[1], 16)
            program = os.path.basename(os.readlink(f"/proc/{os.getppid()}/exe"))
        except (OSError, ValueError):
            # Not ours to look at.  Its name is in a file that everybody may read.
            program = _name_of_parent()
        if program.startswith("python"):
            ignored = 0
    for name in ("SIGPIPE", "SIGXFSZ"):
        number = getattr(signal, name)
        if not ignored >> (number - 1) & 1:
            signal.signal(number, signal.SIG_DFL)


def _name_of_parent() -> str:
    try:
        with open(f"/proc/{os.getppid()}/comm", errors="replace") as stream:
            return stream.read()
    except OSError:
        return "python"


def command(given: Given) -> list[bytes]:
    """The command to become."""
    first, *others = given.own
    if first == b"--":
        if not others:
            raise Refusal("-- needs a command after it.")
        return others
    if sys.flags.ignore_environment or sys.flags.no_site:
        raise Refusal(
            "Python under -I, -E or -S ignores PYTHONPATH or sitecustomize, which activate the "
            "hook; omit the flag, or install the hook."
        )
    if first == b"-m":
        if not others:
            raise Refusal("-m needs a module after it.")
        return [given.python, *given.flags, first, *others]
    return [given.python, *given.flags, b"-m", SERVER.encode(), first, *others]


def hooked_environment(environment: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    """The environment with our directory in front of PYTHONPATH."""
    for path in NEEDED:
        if not os.path.isfile(path):
            raise Refusal(f"{path} is missing; the wrapper runs from a complete checkout.")
    if os.pathsep in HOOKED:
        raise Refusal(f"{HOOKED} has a {os.pathsep!r} in it, which PYTHONPATH cannot hold.")
    ours, separator = os.fsencode(HOOKED), os.fsencode(os.pathsep)
    before = environment.get(b"PYTHONPATH", b"")
    folders = [folder for folder in before.split(separator) if folder != ours] if before else []
    return {**environment, b"PYTHONPATH": separator.join([ours, *folders])}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
