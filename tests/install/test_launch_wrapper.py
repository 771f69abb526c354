"""``launch_wrapper.py``: the hook for one launch, with nothing installed and nothing in between.

The package ``sglang`` here is a fake with real files under the real names; a real server under
the wrapper is in ``tests/real_sglang/test_installation_methods.py``.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import ENVIRONMENT, ROOT, SUPPORTED, Target, interpreter, make_target, tree

WRAPPER = ROOT / "launch_wrapper.py"

MODEL_RUNNER = """
class ModelRunner:
    def load_model(self):
        pass

    def finalize_startup_weight_load(self):
        pass

    def alloc_memory_pool(self):
        pass
    def load_lora_adapter(self, lora_ref):
        pass
    def load_lora_adapter_from_tensors(self, lora_ref, tensors, config_dict):
        pass
    def unload_lora_adapter(self, lora_ref):
        pass
"""

# Says for itself and for a child of each kind whether the hook is there.
LAUNCH_SERVER = """
import multiprocessing, os, sys

def hooked():
    from sglang.srt.model_executor.model_runner import ModelRunner
    return hasattr(ModelRunner.load_model, "_sglang_weight_hook_entry")

def child(method):
    print(method, hooked(), flush=True)

if __name__ == "__main__":
    print(os.path.basename(sys.argv[0]), sys.argv[1:], hooked(), flush=True)
    for method in ("spawn", "forkserver", "fork"):
        process = multiprocessing.get_context(method).Process(target=child, args=(method,))
        process.start()
        process.join()
        assert process.exitcode == 0
"""

ALL_HOOKED = "launch_server.py ['--tp', '2'] True\nspawn True\nforkserver True\nfork True\n"


@pytest.fixture(scope="module")
def sglang(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH with a fake sglang."""
    folder = tmp_path_factory.mktemp("sglang-")
    for name, text in {
        "__init__.py": "__version__ = '0.5.23'\n",
        "launch_server.py": LAUNCH_SERVER,
        "srt/__init__.py": "",
        "srt/model_executor/__init__.py": "",
        "srt/model_executor/model_runner.py": MODEL_RUNNER,
    }.items():
        path = folder / "sglang" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture
def whole_checkout(checkout: Path) -> Path:
    """A copy of the checkout, the real library and the wrapper in it."""
    shutil.rmtree(checkout / "sglang_weight_hook")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("sglang_weight_hook", "launch_wrapper_path"):
        shutil.copytree(ROOT / name, checkout / name, ignore=ignored)
    shutil.copy2(WRAPPER, checkout)
    (checkout / "tests").mkdir()  # as the real one has, and as a server's environment may too
    return checkout


def run(
    python: Path | str,
    *arguments: str,
    path: Path | None = None,
    wrapper: Path | None = WRAPPER,
    flags: tuple[str, ...] = (),
    cwd: Path | str = "/",
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Under the wrapper, or without it as the same thing is started then."""
    words = [str(wrapper), *arguments] if wrapper else list(arguments)
    return subprocess.run(
        [str(python), *flags, *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**ENVIRONMENT, **({"PYTHONPATH": str(path)} if path else {}), **environment},
        timeout=60,
        check=False,
    )


# --- it hooks -----------------------------------------------------------------------------


@pytest.mark.parametrize("version", SUPPORTED)
def test_the_server_and_all_that_it_starts_are_hooked(version: str, sglang: Path) -> None:
    python = interpreter(version)
    if python is None:
        pytest.skip(f"there is no Python {version} here")
    done = run(python, "--tp", "2", path=sglang)
    assert (done.returncode, done.stdout, done.stderr) == (0, ALL_HOOKED, "")


def test_another_module_and_another_command_are_hooked(target: Target, sglang: Path) -> None:
    done = run(target.python, "-m", "sglang.launch_server", "--tp", "2", path=sglang)
    assert (done.stdout, done.stderr) == (ALL_HOOKED, "")
    command = ["sh", "-c", 'exec "$0" -m sglang.launch_server --tp 2', str(target.python)]
    done = run(target.python, "--", *command, path=sglang)
    assert (done.stdout, done.stderr) == (ALL_HOOKED, "")


def test_site_packages_and_the_checkout_stay_as_they_were(
    target: Target, sglang: Path, whole_checkout: Path
) -> None:
    before, checkout = tree(target.purelib), set(tree(whole_checkout))
    done = run(target.python, "--tp", "2", path=sglang, wrapper=whole_checkout / WRAPPER.name)
    assert done.stdout == ALL_HOOKED
    assert tree(target.purelib) == before == {}
    # As any Python program that runs from a directory it may write to.
    left = set(tree(whole_checkout)) - checkout
    assert {path for path in left if "__pycache__" not in path} == set()


def test_the_switch_is_heeded(target: Target, sglang: Path) -> None:
    done = run(target.python, "x", path=sglang, SGLANG_WEIGHT_HOOK="0")
    assert "True" not in done.stdout
    assert done.returncode == 0


def test_with_the_hook_installed_too_the_installed_one_is_active_once(
    target: Target, sglang: Path
) -> None:
    target.install()
    done = run(
        target.python,
        "--",
        str(target.python),
        "-c",
        "import sglang_patch_loader, sglang_weight_hook, sglang_weight_hook_patch_core, sys\n"
        "print(sum(type(f).__module__ == 'sglang_patch_loader' for f in sys.meta_path))\n"
        "print(sglang_patch_loader.__file__, sglang_weight_hook_patch_core.__file__)",
    )
    assert done.stdout.split() == [
        "1",
        str(target.purelib / "sglang_patch_loader.py"),
        str(target.purelib / "sglang_weight_hook_patch_core.py"),
    ]
    assert run(target.python, "--tp", "2", path=sglang).stdout == ALL_HOOKED


def test_a_wrapper_under_the_wrapper_changes_nothing(target: Target, sglang: Path) -> None:
    inner = [str(target.python), str(WRAPPER), "--", "sh", "-c", "echo $PYTHONPATH"]
    done = run(target.python, "--", *inner, path=sglang)
    assert done.stdout == f"{ROOT / 'launch_wrapper_path'}:{sglang}\n"


# --- the process as the user sees it ------------------------------------------------------

PORTRAIT = """
import os, signal, sys
modules = sorted(name for name in sys.modules if not name.startswith("sglang_"))
print(modules)
print(sys.flags, sys._xoptions, sys.warnoptions, sys.dont_write_bytecode)
print([place for place in sys.path if not place.endswith("launch_wrapper_path")])
print([getattr(finder, "__name__", "") for finder in sys.meta_path])
print(getattr(sys.modules.get("sitecustomize"), "__file__", None), hasattr(sys, "theirs"))
print(sys.argv, os.getcwd())
print([signal.getsignal(number) for number in (1, 2, 13, 15)], sys.stdin.read())
print("and stderr", file=sys.stderr)
sys.exit(7)
"""


@pytest.mark.parametrize("flags", [(), ("-O", "-X", "utf8"), ("-B", "-s", "-W", "error", "-u")])
@pytest.mark.parametrize("theirs", [None, "import sys; sys.theirs = 1\n"])
def test_the_process_is_the_one_without_the_wrapper(
    target: Target, tmp_path: Path, flags: tuple[str, ...], theirs: str | None
) -> None:
    (tmp_path / "portrait.py").write_text(PORTRAIT)
    if theirs:
        (tmp_path / "sitecustomize.py").write_text(theirs)
    run(target.python, "-m", "portrait", path=tmp_path, wrapper=None)  # compiles
    wrapped = run(target.python, "-m", "portrait", "a", path=tmp_path, flags=flags)
    plain = run(target.python, "-m", "portrait", "a", path=tmp_path, flags=flags, wrapper=None)
    assert wrapped.stderr == plain.stderr == "and stderr\n"
    assert wrapped.returncode == plain.returncode == 7
    ours = wrapped.stdout.replace("'', 'BuiltinImporter'", "'BuiltinImporter'")
    ours = ours.replace("'PathFinder', 'Checkout'", "'PathFinder'")
    assert ours == plain.stdout


@pytest.mark.parametrize(
    "theirs",
    [
        "print('theirs', __name__, __file__)\n",
        "raise RuntimeError('theirs fails')\n",
        "import no_such_module\n",
        "raise ImportError('odd', name='sitecustomize')\n",
        "raise SystemExit(3)\n",
        "def broken(:\n",
        "import sys; sys.path.insert(0, '/added'); sys.meta_path.insert(0, sys.meta_path[0])\n",
    ],
)
def test_the_other_sitecustomize_does_and_says_what_it_does_without_us(
    target: Target, tmp_path: Path, theirs: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(theirs)
    code = "import sys; print('sitecustomize' in sys.modules, '/added' in sys.path)"
    # -I for the wrapper's own interpreter, which would say the same once more.
    command = ["--", str(target.python), "-c", code]
    wrapped = run(target.python, *command, path=tmp_path, flags=("-I",))
    plain = run(target.python, "-c", code, path=tmp_path, wrapper=None)
    assert wrapped.returncode == plain.returncode
    assert wrapped.stdout == plain.stdout
    if "SystemExit" in theirs:  # fatal either way; its traceback shows who asked for it
        assert wrapped.stderr.startswith("Fatal Python error")
    else:
        assert wrapped.stderr == plain.stderr


def test_a_sitecustomize_in_site_packages_is_found_too(target: Target) -> None:
    (target.purelib / "sitecustomize.py").write_text("")
    code = "import sitecustomize; print(sitecustomize.__file__)"
    wrapped = run(target.python, "--", str(target.python), "-c", code)
    # Debian has one of its own, in the standard library.
    assert wrapped.stdout == run(target.python, "-c", code, wrapper=None).stdout != ""


def test_nothing_of_ours_stays_between_the_caller_and_the_server(target: Target) -> None:
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    running = subprocess.Popen(
        [target.python, WRAPPER, "--", target.python, "-c", code],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert running.stdout is not None
        assert int(running.stdout.readline()) == running.pid
        running.send_signal(signal.SIGTERM)
        assert running.wait(10) == -signal.SIGTERM
    finally:
        running.kill()
        running.communicate()


def test_the_command_begins_with_the_signals_that_it_would_have(target: Target) -> None:
    words = ["cat", "/proc/self/status"]
    plain = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, check=True)
    ignored = [line for line in plain.stdout.splitlines() if line.startswith("SigIgn")]
    assert ignored[0] in run(target.python, "--", *words).stdout


def test_the_rest_of_the_checkout_is_not_importable(target: Target, whole_checkout: Path) -> None:
    code = (
        "import importlib.util as u\n"
        "print([u.find_spec(n) for n in ('tests', 'installer', 'launch_wrapper')])"
    )
    wrapper = whole_checkout / WRAPPER.name
    done = run(target.python, "--", str(target.python), "-c", code, wrapper=wrapper)
    assert done.stdout == "[None, None, None]\n"


@pytest.mark.parametrize("before", ["", "/a", "/a:/b:", ":/a"])
def test_what_pythonpath_held_stays_in_it(target: Target, before: str) -> None:
    done = run(target.python, "--", "sh", "-c", "echo $PYTHONPATH", PYTHONPATH=before)
    expected = f"{ROOT / 'launch_wrapper_path'}" + (f":{before}" if before else "")
    assert done.stdout == expected + "\n"


# --- places -------------------------------------------------------------------------------


def test_a_read_only_checkout_in_an_odd_place(
    target: Target, sglang: Path, whole_checkout: Path, tmp_path: Path
) -> None:
    place = whole_checkout.rename(tmp_path / "Umgebung für 模型 $(x) 'q'")
    # Modes mean nothing to root; this holds for root too, where the file system has it.
    locks = shutil.which("chattr") is not None
    locked = (
        locks
        and not subprocess.run(
            ["chattr", "-R", "+i", place], capture_output=True, check=False
        ).returncode
    )
    try:
        before = tree(place)
        done = run(target.python, "--tp", "2", path=sglang, wrapper=place / WRAPPER.name)
        assert (done.stdout, done.stderr) == (ALL_HOOKED, "")
        if locked:
            assert tree(place) == before
    finally:
        if locks:
            subprocess.run(["chattr", "-R", "-i", place], capture_output=True, check=False)


def test_two_environments_share_one_checkout(target: Target, sglang: Path, tmp_path: Path) -> None:
    other = make_target(tmp_path / "other", "3.9")
    for python in (target.python, other.python):
        assert run(python, "--tp", "2", path=sglang).stdout == ALL_HOOKED


# --- refusals -----------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["-I", "-E", "-S"])
def test_flags_under_which_it_cannot_work_are_refused(target: Target, flag: str) -> None:
    done = run(target.python, "--tp", "2", flags=(flag,))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "install the hook" in done.stderr


@pytest.mark.parametrize(
    "damage",
    [
        lambda checkout: (checkout / "launch_wrapper_path" / "sitecustomize.py").unlink(),
        lambda checkout: shutil.rmtree(checkout / "sglang_weight_hook"),
        lambda checkout: checkout.rename(checkout.with_name("with:colon")),
    ],
    ids=["no sitecustomize", "no library", "a colon in the path"],
)
def test_a_checkout_that_cannot_work_is_refused(
    target: Target, whole_checkout: Path, damage: Callable[[Path], object]
) -> None:
    damage(whole_checkout)
    (wrapper,) = whole_checkout.parent.glob(f"*/{WRAPPER.name}")
    done = run(target.python, "--tp", "2", wrapper=wrapper)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("launch_wrapper.py: ")
    assert done.stderr.count("\n") == 1


def test_wrong_usage_is_said(target: Target) -> None:
    for arguments in (["-m"], ["--"]):
        done = run(target.python, *arguments)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert run(target.python).returncode == 2
    assert run(target.python).stderr.startswith("Usage: launch_wrapper.py")
    done = run(target.python, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    done = run(target.python, "--", "/no/such/command")
    assert (done.returncode, done.stderr.count("\n")) == (127, 1)
    done = run(target.python, "--", os.devnull)
    assert (done.returncode, done.stderr.count("\n")) == (126, 1)


def test_without_sglang_it_says_what_python_says(target: Target) -> None:
    wrapped = run(target.python, "--tp", "2")
    plain = run(target.python, "-m", "sglang.launch_server", "--tp", "2", wrapper=None)
    assert wrapped.returncode == plain.returncode == 1
    assert wrapped.stderr == plain.stderr


def test_a_broken_checkout_never_stops_a_python(target: Target, whole_checkout: Path) -> None:
    (whole_checkout / "sglang_patch_loader.py").write_text("broken(\n")
    wrapper = whole_checkout / WRAPPER.name
    done = run(target.python, "--", str(target.python), "-c", "print(1)", wrapper=wrapper)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")
