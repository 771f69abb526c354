"""The hook on this machine, step by step: install, serve, read, update, uninstall.

Needs Python 3.11 and pip.  The server is SGLang itself, unchanged, on the CPU; its
model is a few hundred kilobytes of random numbers.  What is installed for it stays in
``.cache/`` and makes the second run short; everything else is taken back.

    python3 demo/demo.py        (or: make demo)
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

REPOSITORY = Path(__file__).resolve().parent.parent
if str(REPOSITORY) not in sys.path:  # run as a file, Python only knows this folder
    sys.path.insert(0, str(REPOSITORY))

# ruff: noqa: E402
from cpu_sglang.environment import Environment, EnvironmentFailed, ensure_environment
from cpu_sglang.releases import BASE_RELEASE
from cpu_sglang.server import Server, ServerFailed
from demo import evidence, weight_table
from demo.published_map import PublishedMap, StateHistory

INSTALL = "install_sglang_hook_patch.sh"
UNINSTALL = "uninstall_sglang_hook_patch.sh"
STEPS = 8


class DemoFailed(RuntimeError):
    """A step did not do what it should; the message is the sentence to show."""


class Narrator:
    """Says what is being done and how long it took."""

    def __init__(self) -> None:
        self._number = 0
        self._on_terminal = sys.stdout.isatty()
        self._waiting = False
        self._last_progress = 0.0

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[None]:
        self._number += 1
        print(f"\n{self._number}/{STEPS}  {what}", flush=True)
        start = time.monotonic()
        yield
        self.say(f"({time.monotonic() - start:.1f} s)")

    def say(self, line: str = "") -> None:
        if self._waiting:
            self._waiting = False
            print("\r\033[K", end="")
        print(f"     {line}".rstrip(), flush=True)

    def wait(self, seconds: float, doing: str) -> None:
        """Progress: one line that changes on a terminal, one in ten seconds in a pipe."""
        line = f"{seconds:3.0f} s  {doing}"[:72]
        if self._on_terminal:
            self._waiting = True
            print(f"\r\033[K     {line}", end="", flush=True)
        elif seconds - self._last_progress >= 10:
            self._last_progress = seconds
            self.say(line)


def main() -> int:
    for name in [name for name in os.environ if name.startswith("SGLANG_WEIGHT_HOOK")]:
        del os.environ[name]  # the demo shows the defaults
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    start = time.monotonic()
    try:
        _run(Narrator())
    except (DemoFailed, EnvironmentFailed, ServerFailed) as failure:
        return _fail(str(failure))
    except Exception as failure:  # the reader's, the machine's: cleaned up after all the same
        return _fail(f"the demo stopped: {type(failure).__name__}: {failure}")
    except KeyboardInterrupt:
        return _fail("interrupted; the server is stopped and the hook uninstalled.", 130)
    print(f"\nEvery step succeeded, in {time.monotonic() - start:.0f} s.")
    return 0


def _run(narrator: Narrator) -> None:
    with contextlib.ExitStack() as cleanup:
        scratch = Path(cleanup.enter_context(_scratch_directory()))
        with narrator.step(f"SGLang {BASE_RELEASE} for this CPU, and two tiny models"):
            environment, model_a, model_b = _prepare(narrator, scratch)

        with narrator.step("Install the hook into that environment"):
            files_before = evidence.files_below(environment.purelib)
            modules_before = _modules(environment)
            narrator.say(f"{len(files_before):,} files and folders there before")
            cleanup.callback(_uninstall_quietly, environment)
            _run_script(narrator, INSTALL, environment)
            added = _modules(environment) - modules_before
            narrator.say(f"a new interpreter now also imports: {', '.join(sorted(added))}")

        serving = scratch / "server"
        serving.mkdir()
        server = Server(
            environment,
            model_a,
            cwd=serving,
            log_path=scratch / "server.log",
            on_progress=narrator.wait,
        )
        cleanup.callback(server.stop)
        with narrator.step("Start the server as always: python -m sglang.launch_server ..."):
            server.start()
            narrator.say(f"ready; {len(server.group_pids())} processes, in a directory of its own")

        published = PublishedMap(serving)
        with narrator.step("Read the published map"):
            before = published.settled_layout()
            _show_map(narrator, before)
            _compare_memory(narrator, before, model_a, "A")

        with narrator.step("Update the weights: POST /update_weights_from_disk"):
            _update(narrator, server, published, before, model_b)

        with narrator.step("Release the weights' memory, and resume"):
            _release_and_resume(narrator, server, published)

        with narrator.step("Stop the server"):
            server.stop()
            narrator.say("all its processes have exited")

        with narrator.step("Uninstall the hook"):
            _run_script(narrator, UNINSTALL, environment)
            _expect_nothing_left(narrator, environment, files_before, modules_before)


def _prepare(narrator: Narrator, scratch: Path) -> tuple[Environment, Path, Path]:
    environment = ensure_environment(BASE_RELEASE, narrator.say)
    narrator.say(f"the environment is {_shown(environment.venv)}")
    if (environment.purelib / "sglang_injector.pth").exists():
        narrator.say("an earlier run was killed and left the hook installed; uninstalling it")
        _run_script(narrator, UNINSTALL, environment)
    models = []
    for name, seed in (("A", 0), ("B", 1)):
        directory = scratch / f"model-{name}"
        command = [str(environment.python), "-m", "cpu_sglang.tiny_model", str(directory)]
        written = subprocess.run(
            [*command, "--seed", str(seed)],
            cwd=REPOSITORY,
            env=environment.env(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if written.returncode:
            raise DemoFailed(f"model {name} could not be written:\n{written.stdout}")
        narrator.say(f"model {name}: {written.stdout.strip().partition(': ')[2]}")
        models.append(directory)
    return environment, models[0], models[1]


def _show_map(narrator: Narrator, layout: dict[str, Any]) -> None:
    identity = layout["identity"]
    narrator.say(f"process {identity['pid']}, {identity['model_class']}, state {layout['state']}")
    print()
    for line in weight_table.table(layout["tensors"]):
        print(line)
    print()
    for line in weight_table.totals(layout):
        narrator.say(line)


def _compare_memory(
    narrator: Narrator, layout: dict[str, Any], checkpoint: Path, name: str
) -> None:
    try:
        found, compared = evidence.weights_in_place(layout, checkpoint)
    except PermissionError:
        narrator.say("(not compared: this machine does not permit reading the server's memory)")
        return
    narrator.say(f"bytes in memory: {found} of {compared} weights equal checkpoint {name}'s")
    if found != compared or not compared:
        raise DemoFailed(f"only {found} of {compared} published addresses hold their weight")


def _update(
    narrator: Narrator,
    server: Server,
    published: PublishedMap,
    before: dict[str, Any],
    model_b: Path,
) -> None:
    said_before = server.generate()
    with StateHistory(published) as history:
        status, answer = server.update_weights_from_disk(model_b)
    if status != 200:
        raise DemoFailed(f"the update was answered {status}: {answer}")
    said_after = server.generate()
    after = published.layout()
    event = after["event"]
    narrator.say(f"the server answered {status}: {answer['message']}")
    narrator.say(f"it generated  {said_before}")
    narrator.say(f"and now       {said_after}")
    narrator.say(f"state: {history}")
    for generation in ("layout_generation", "content_generation"):
        narrator.say(f"{generation}: {before[generation]} -> {after[generation]}")
    counts = ", ".join(f"{event[key]} {key}" for key in ("moved", "added", "removed"))
    narrator.say(f"addresses: {counts}")
    _compare_memory(narrator, after, model_b, "B")
    if said_after == said_before:
        raise DemoFailed("the update succeeded, but the model generates the same answer")
    if after["content_generation"] <= before["content_generation"]:
        raise DemoFailed("the weights changed, but content_generation did not rise")


def _release_and_resume(narrator: Narrator, server: Server, published: PublishedMap) -> None:
    said = server.generate()
    server.wait_idle()
    with StateHistory(published) as history:
        for route in ("/release_memory_occupation", "/resume_memory_occupation"):
            status, answer = server.post(route)
            narrator.say(f"{route}: {status}; the map says {published.state()['state']}")
            if status != 200:
                raise DemoFailed(f"{route} was answered {status}: {answer}")
    narrator.say(f"state: {history}")
    same = "the same as before" if server.generate() == said else "something else"
    narrator.say(f"the model generates {same}")
    narrator.say("No memory was freed: SGLang accepts these requests everywhere, but frees memory")
    narrator.say("only on a GPU, when started with --enable-memory-saver.")


def _expect_nothing_left(
    narrator: Narrator,
    environment: Environment,
    files_before: dict[str, str],
    modules_before: set[str],
) -> None:
    left = evidence.difference(files_before, evidence.files_below(environment.purelib))
    if left:
        raise DemoFailed(f"site-packages differs from before: {', '.join(left[:10])}")
    narrator.say(f"site-packages: {len(files_before):,} files and folders, each as it was")
    extra = _modules(environment) ^ modules_before
    if extra:
        raise DemoFailed(f"a new interpreter's modules differ: {', '.join(sorted(extra))}")
    narrator.say("a new interpreter imports what it did before")


def _modules(environment: Environment) -> set[str]:
    # Without our PYTHONPATH: what counts is what any Python in this environment does.
    variables = environment.env()
    del variables["PYTHONPATH"]
    return evidence.modules_at_start(environment.python, variables)


def _run_script(narrator: Narrator, script: str, environment: Environment) -> None:
    narrator.say(f"$ ./{script} --python {_shown(environment.python)}")
    finished = _script(script, environment)
    for line in finished.stdout.splitlines():
        narrator.say(f"  {line}")
    if finished.returncode:
        raise DemoFailed(f"{script} ended with status {finished.returncode}")


def _uninstall_quietly(environment: Environment) -> None:
    """On the way out of a failure; a demo that ended well has done it already."""
    if not (environment.purelib / "sglang_injector.pth").exists():
        return
    finished = _script(UNINSTALL, environment)
    if finished.returncode:
        print(finished.stdout, file=sys.stderr)
        command = f"./{UNINSTALL} --python {_shown(environment.python)}"
        print(f"demo: the hook is still installed; take it out with {command}", file=sys.stderr)


def _script(script: str, environment: Environment) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(REPOSITORY / script), "--python", str(environment.python)],
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


@contextlib.contextmanager
def _scratch_directory() -> Iterator[str]:
    """For models, log and map.  A failure leaves it: the log is in it."""
    directory = tempfile.mkdtemp(prefix="sglang-weight-hook-demo-")
    try:
        yield directory
    except Exception:
        print(f"\ndemo: models, log and map are kept in {directory}", file=sys.stderr)
        raise
    except BaseException:
        shutil.rmtree(directory)
        raise
    shutil.rmtree(directory)


def _shown(path: Path) -> str:
    here = os.path.relpath(path)
    return here if not here.startswith("..") else str(path)


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _fail(message: str, status: int = 1) -> int:
    sentence, _, details = message.partition("\n")
    print(f"\ndemo: {sentence}", file=sys.stderr)
    if details:
        print(re.sub("^", "  ", details, flags=re.MULTILINE), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
