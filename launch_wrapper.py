"""Runs SGLang with the weight hook, for one launch, with nothing installed.

    python launch_wrapper.py --model-path ... --tp 8      the arguments of sglang.launch_server
    python launch_wrapper.py -m MODULE [ARGUMENT ...]     another module: `python -m MODULE ...`
    python launch_wrapper.py -- COMMAND [ARGUMENT ...]    any command that runs Python

`python` is the interpreter that has SGLang; its flags (-O, -X, -W, ...) are handed on.  The
checkout may be read-only, and serves any number of launches at once.

How: PYTHONPATH gets one directory more, `launch_wrapper_path`, whose sitecustomize.py every
Python that starts with this environment runs: the server, and whatever it spawns.  Then this
process *becomes* the server (exec): its process id, output, signals and exit status are those
of SGLang itself, and nothing of ours stays in between.

Python 3.9 to 3.14.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

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
    try:
        words = command(arguments)
        environment = hooked_environment(os.environ)
    except Refusal as refusal:
        sys.stderr.write(f"launch_wrapper.py: {refusal}\n")
        return 2
    # Python ignores these two, and what is ignored stays so through exec; the command shall
    # begin with what it would have without us.  (subprocess does the same.)
    for name in ("SIGPIPE", "SIGXFSZ"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    try:
        os.execvpe(words[0], words, environment)
    except OSError as error:
        sys.stderr.write(f"launch_wrapper.py: {words[0]} cannot be run: {error.strerror}.\n")
        # As a shell says it.
        return 127 if isinstance(error, FileNotFoundError) else 126


def command(arguments: Sequence[str]) -> list[str]:
    """The command to become."""
    if arguments[0] == "--":
        if len(arguments) < 2:
            raise Refusal("-- needs a command after it.")
        return list(arguments[1:])
    if sys.flags.ignore_environment or sys.flags.no_site:
        raise Refusal(
            "Python under -I, -E or -S ignores PYTHONPATH or sitecustomize, which activate the "
            "hook; omit the flag, or install the hook."
        )
    if arguments[0] == "-m":
        if len(arguments) < 2:
            raise Refusal("-m needs a module after it.")
        return [sys.executable, *interpreter_flags(), *arguments]
    return [sys.executable, *interpreter_flags(), "-m", SERVER, *arguments]


def interpreter_flags() -> list[str]:
    """The flags that this interpreter was started with, to hand on."""
    words = list(getattr(sys, "orig_argv", ()))  # Python 3.10 and later
    own = len(sys.argv)  # this script and its arguments stand at the end of it
    if len(words) > own and words[-own:] == sys.argv:
        return words[1:-own]
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return flags


def hooked_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment with our directory in front of PYTHONPATH."""
    for path in NEEDED:
        if not os.path.isfile(path):
            raise Refusal(f"{path} is missing; the wrapper runs from a complete checkout.")
    if os.pathsep in HOOKED:
        raise Refusal(f"{HOOKED} has a {os.pathsep!r} in it, which PYTHONPATH cannot hold.")
    before = environment.get("PYTHONPATH", "")
    folders = [folder for folder in before.split(os.pathsep) if folder != HOOKED] if before else []
    return {**environment, "PYTHONPATH": os.pathsep.join([HOOKED, *folders])}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
