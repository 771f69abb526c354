"""What the install script puts where, what it replaces, and what it leaves alone."""

from __future__ import annotations

import base64
import csv
import hashlib
import os
import subprocess
import time
from pathlib import Path

import pytest

from .conftest import (
    ENVIRONMENT,
    INSTALL,
    ROOT,
    UNINSTALL,
    Target,
    make_target,
    tree,
    without_times,
)


def test_site_packages_holds_exactly_the_hook(target: Target) -> None:
    target.install()
    assert sorted(path.name for path in target.purelib.iterdir()) == [
        "__pycache__",
        "sglang_injector.pth",
        "sglang_injector.start",
        "sglang_patch_loader.py",
        "sglang_weight_hook",
        "sglang_weight_hook-0.1.0.dist-info",
        "sglang_weight_hook_patch_core.py",
    ]
    for name in (
        "sglang_injector.pth",
        "sglang_injector.start",
        "sglang_patch_loader.py",
        "sglang_weight_hook_patch_core.py",
        "sglang_weight_hook/__init__.py",
    ):
        assert (target.purelib / name).read_bytes() == (ROOT / name).read_bytes()
    assert [path for path in tree(target.purelib) if path.endswith(".tmp")] == []


def test_the_pth_is_one_plain_line() -> None:
    assert (ROOT / "sglang_injector.pth").read_bytes() == (
        b"import sglang_patch_loader; sglang_patch_loader.install()\n"
    )
    # PEP 829, for Python 3.15: from its text; no 3.15 was run.
    assert (ROOT / "sglang_injector.start").read_bytes() == b"sglang_patch_loader:install\n"


def test_record_lists_every_file_with_its_hash(target: Target) -> None:
    target.install()
    (record,) = target.purelib.glob("*.dist-info/RECORD")
    rows = {row[0]: row[1:] for row in csv.reader(record.read_text().splitlines())}
    files = {path for path, (kind, _, _) in tree(target.purelib).items() if kind.startswith("file")}
    assert set(rows) == files
    for path, (expected, size) in rows.items():
        if path.endswith((".pyc", "/RECORD")):
            assert (expected, size) == ("", "")
            continue
        data = (target.purelib / path).read_bytes()
        value = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
        assert (expected, size) == (f"sha256={value}", str(len(data)))


def test_every_user_who_reads_site_packages_reads_the_files(target: Target) -> None:
    for umask in (0o022, 0o077):
        target.empty()
        done = subprocess.run(
            ["bash", "-c", 'umask "$1"; exec "$2" --python "$3"', "-", f"{umask:o}",
             str(ROOT / INSTALL), str(target.python)],
            env=ENVIRONMENT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0
        kinds = {kind for kind, _, _ in tree(target.purelib).values()}
        assert kinds == {"file 644", "directory 755"}


def test_installing_again_changes_nothing(target: Target) -> None:
    target.install()
    before = tree(target.purelib, times=True)
    target.install()
    assert tree(target.purelib, times=True) == before


def test_what_was_damaged_is_mended(target: Target) -> None:
    target.install()
    whole = tree(target.purelib)
    (target.purelib / "sglang_weight_hook_patch_core.py").write_text("broken(\n")
    (target.purelib / "sglang_weight_hook" / "__init__.py").unlink()
    target.install()
    changed = {path for path, entry in tree(target.purelib).items() if entry != whole.get(path)}
    # Compiled files carry the time of their source.
    assert all(path.endswith(".pyc") for path in changed)
    assert set(tree(target.purelib)) == set(whole)


def test_an_upgrade_removes_what_the_new_version_lacks(target: Target, checkout: Path) -> None:
    (checkout / "sglang_weight_hook" / "old").mkdir()
    (checkout / "sglang_weight_hook" / "old" / "__init__.py").write_text("")
    target.install(root=checkout)
    assert (target.purelib / "sglang_weight_hook-0.0.9.dist-info").is_dir()
    done = target.script(INSTALL)
    assert done.returncode == 0
    assert "in place of 0.0.9" in done.stdout
    upgraded = set(tree(target.purelib))
    target.empty()
    target.install()
    assert upgraded == set(tree(target.purelib))


def test_the_three_files_of_the_prototype_are_replaced(target: Target) -> None:
    (target.purelib / "sglang_patch_loader.py").write_text("import sglang_weight_hook_patch_core\n")
    (target.purelib / "sglang_weight_hook_patch_core.py").write_text("PROTOTYPE = True\n")
    (target.purelib / "sglang_injector.pth").write_text("import sglang_patch_loader\n")
    target.run("-c", "pass")  # which leaves their compiled files
    assert (target.purelib / "__pycache__").is_dir()
    assert target.finders() == 0
    target.install()
    assert target.finders() == 1
    target.uninstall()
    assert tree(target.purelib) == {}


def test_a_hard_linked_file_is_not_written_through(target: Target, tmp_path: Path) -> None:
    # uv links installed files to its cache, which is shared by other environments.
    cached = tmp_path / "cached.py"
    cached.write_text("CACHED = True\n")
    for name in ("sglang_patch_loader.py", "sglang_injector.pth"):
        os.link(cached, target.purelib / name)
    # Nothing says that they are ours.
    assert "no record says" in target.refused(INSTALL)
    target.install("--force")
    assert cached.read_text() == "CACHED = True\n"
    assert cached.stat().st_nlink == 1


def test_a_symbolic_link_at_a_destination_is_not_followed(target: Target, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious\n")
    for name in ("sglang_patch_loader.py", "sglang_injector.start"):
        (target.purelib / name).symlink_to(victim)
    (target.purelib / "sglang_weight_hook_patch_core.py").symlink_to(tmp_path / "nowhere")
    assert "no record says" in target.refused(INSTALL)
    target.install("--force")
    assert victim.read_text() == "precious\n"
    assert not (tmp_path / "nowhere").exists()
    assert not (target.purelib / "sglang_patch_loader.py").is_symlink()


@pytest.mark.parametrize("name", ["sglang_weight_hook", "__pycache__"])
@pytest.mark.parametrize("script", [INSTALL, UNINSTALL])
def test_a_linked_directory_is_refused(
    target: Target, tmp_path: Path, name: str, script: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "__init__.py").write_text("precious = True\n")
    if script == UNINSTALL:
        target.install()
        target.run(
            "-c", "import shutil, sys; shutil.rmtree(sys.argv[1])", str(target.purelib / name)
        )
    (target.purelib / name).symlink_to(elsewhere)
    if script == UNINSTALL and name == "__pycache__":
        target.uninstall()  # nothing of ours lies behind it
    else:
        assert "is a symbolic link" in target.refused(script)
    assert (elsewhere / "__init__.py").read_text() == "precious = True\n"


def test_a_directory_in_the_place_of_a_file_is_refused(target: Target) -> None:
    (target.purelib / "sglang_patch_loader.py").mkdir()
    assert "is not a file" in target.refused(INSTALL)


@pytest.mark.parametrize("script", [INSTALL, UNINSTALL])
@pytest.mark.parametrize("installed", [False, True])
def test_a_dry_run_changes_nothing(
    target: Target, checkout: Path, script: str, installed: bool
) -> None:
    if installed:
        target.install(root=checkout)
        (checkout / "sglang_weight_hook" / "__init__.py").write_text('__version__ = "0.1.0"\n')
    before = tree(target.purelib, times=True), tree(checkout, times=True)
    done = target.script(script, "--dry-run", root=checkout)
    assert (done.returncode, done.stderr) == (0, "")
    assert ("sglang_injector.pth" in done.stdout) == (installed or script == INSTALL)
    assert (tree(target.purelib, times=True), tree(checkout, times=True)) == before


def test_the_checkout_is_not_written_to(target: Target, checkout: Path) -> None:
    before = tree(checkout, times=True)
    target.install(root=checkout)
    target.uninstall(root=checkout)
    assert tree(checkout, times=True) == before


def test_spaces_and_other_alphabets_in_paths(tmp_path: Path, checkout: Path) -> None:
    place = tmp_path / "Umgebung für 模型 $(x) 'q'"
    target = make_target(place / "venv", "3.11")
    moved = checkout.rename(place / "chec kout")
    for environment in ({}, {"LC_ALL": "C"}):
        done = target.script(INSTALL, root=moved, environment=environment)
        assert (done.returncode, done.stderr) == (0, "")
        assert target.finders() == 1
        done = target.script(INSTALL, "--check", root=moved, environment=environment)
        assert done.returncode == 0
        done = target.script(UNINSTALL, root=moved, environment=environment)
        assert (done.returncode, done.stderr) == (0, "")
        assert tree(target.purelib) == {}


def test_a_script_works_through_a_link_to_it(target: Target, tmp_path: Path) -> None:
    (tmp_path / INSTALL).symlink_to(ROOT / INSTALL)
    target.install(root=tmp_path)


def test_an_immutable_directory_is_refused(target: Target) -> None:
    # The tests may run as root, for whom modes mean nothing; this holds for root too.
    try:
        made = subprocess.run(["chattr", "+i", target.purelib], capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no chattr")
    if made.returncode:
        pytest.skip("this file system, or this user, has no immutable directories")
    try:
        said = target.refused(INSTALL)
        target.script(INSTALL, "--check")
    finally:
        subprocess.run(["chattr", "-i", target.purelib], check=True)
    assert "launch_wrapper.py" in said
    assert tree(target.purelib) == {}


def test_another_users_directory_is_refused(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    base = Path("/usr/bin/python3")
    if not base.exists():
        pytest.skip("needs a Python that every user may execute")
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--clear-groups", base, "-c",
         "import sys; assert sys.version_info >= (3, 9)"],
        capture_output=True, check=False,
    )  # fmt: skip
    if done.returncode:
        pytest.skip("/usr/bin/python3 is too old, or setpriv is not allowed")
    purelib = subprocess.run(
        [base, "-I", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    if not os.path.isdir(purelib) or os.stat(purelib).st_mode & 0o002:
        pytest.skip("/usr/bin/python3 has no purelib that is closed to others")
    # It becomes another user only after the import: this checkout may be closed to others.
    lines = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); import installer.command as c; "
        "os.setgroups([]); os.setgid(65534); os.setuid(65534); "
        "sys.exit(c.main(['install', '--force']))"
    )
    done_text = subprocess.run(
        [base, "-I", "-B", "-c", lines, ROOT], capture_output=True, text=True, check=False
    )
    assert done_text.returncode == 1
    assert done_text.stderr.count("\n") == 1
    assert "cannot be written (Permission denied); launch_wrapper.py" in done_text.stderr
    assert not os.path.lexists(os.path.join(purelib, "sglang_injector.pth"))


def test_an_externally_managed_python_is_refused(tmp_path: Path) -> None:
    base = Path("/usr/bin/python3")
    marker = (
        "import os, sysconfig as s; "
        "print(os.path.exists(s.get_path('stdlib') + '/EXTERNALLY-MANAGED'), "
        "s.get_path('purelib'))"
    )
    try:
        asked = subprocess.run(
            [base, "-I", "-c", marker], capture_output=True, text=True, check=True
        ).stdout.split()
    except FileNotFoundError:
        pytest.skip("there is no system Python")
    if asked[0] != "True":
        pytest.skip("the system's Python is not externally managed")
    managed = Target(base, Path(asked[1]), "")
    # Dry, lest a fault of ours change the machine that runs the tests.
    done = managed.script(INSTALL, "--dry-run")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "PEP 668" in done.stderr
    assert "--force" in done.stderr
    done = managed.script(INSTALL, "--dry-run", "--force")
    assert (done.returncode, done.stderr) == (0, "")
    # A virtual environment made from it is the user's own.
    venv = tmp_path / "venv"
    if subprocess.run([base, "-m", "venv", "--without-pip", venv], check=False).returncode == 0:
        own = Target(venv / "bin" / "python", next(venv.glob("lib/*/site-packages")), "")
        own.install()
        own.uninstall()


def test_a_missing_purelib_is_refused(tmp_path: Path) -> None:
    target = make_target(tmp_path / "venv", "3.11")
    target.purelib.rmdir()
    done = target.script(INSTALL)
    assert done.returncode == 1
    assert "does not exist" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not target.purelib.exists()


def test_an_incomplete_checkout_is_refused(target: Target, checkout: Path) -> None:
    (checkout / "sglang_injector.start").unlink()
    assert "this checkout is incomplete" in target.refused(INSTALL, root=checkout)


def test_a_source_that_does_not_compile_is_refused(target: Target, checkout: Path) -> None:
    (checkout / "sglang_weight_hook" / "reader.py").write_text("def (:\n")
    assert "cannot be compiled" in target.refused(INSTALL, root=checkout)


@pytest.mark.parametrize("installed", [False, True])
@pytest.mark.parametrize(
    ("loader", "reason"),
    [
        ("def install():\n    pass\n", "no finder is on sys.meta_path"),
        ("import no_such_module\n", "its .pth file was not processed, or failed"),
        ("def install():\n    raise SystemExit\n", "nothing answered"),
    ],
)
def test_a_hook_that_is_not_live_is_taken_back(
    target: Target, checkout: Path, installed: bool, loader: str, reason: str
) -> None:
    if installed:
        target.install(root=checkout)
        (checkout / "sglang_weight_hook" / "__init__.py").write_text('__version__ = "0.1.0"\n')
    before = tree(target.purelib, times=True)
    (checkout / "sglang_patch_loader.py").write_text(loader)
    assert reason in target.refused(INSTALL, root=checkout)
    after = tree(target.purelib, times=True)
    files = {path for path, (kind, _, _) in before.items() if kind.startswith("file")}
    assert without_times(after) == without_times(before)
    assert {path: after[path] for path in files} == {path: before[path] for path in files}
    assert target.finders() == int(installed)


def test_other_pth_files_may_print_what_they_like(target: Target) -> None:
    (target.purelib / "aaa_noise.pth").write_text(
        "import sys; print('noise'); sys.stderr.write('x')\n"
    )
    (target.purelib / "zzz_fault.pth").write_text("import no_such_module\n")
    done = target.script(INSTALL)
    assert done.returncode == 0
    assert "Live       in a fresh interpreter and in a spawned child\n" in done.stdout


def test_the_callers_environment_has_no_say(target: Target, tmp_path: Path) -> None:
    (tmp_path / "sglang_patch_loader.py").write_text("raise SystemExit('the wrong loader')\n")
    (tmp_path / "multiprocessing.py").write_text("raise SystemExit('the wrong multiprocessing')\n")
    environment = {
        "PYTHONPATH": str(tmp_path),
        "PYTHONPYCACHEPREFIX": str(tmp_path / "elsewhere"),
        "PYTHONHOME": "/nowhere",
        "SGLANG_WEIGHT_HOOK": "0",
    }
    done = target.script(INSTALL, environment=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "SGLANG_WEIGHT_HOOK=0 is set in this shell" in done.stdout
    assert not (tmp_path / "elsewhere").exists()
    assert target.finders() == 1


def test_sglang_is_reported_without_being_imported(target: Target) -> None:
    done = target.script(INSTALL)
    assert "SGLang     not in this environment yet" in done.stdout
    (target.purelib / "sglang").mkdir()
    (target.purelib / "sglang" / "__init__.py").write_text("raise SystemExit('imported')\n")
    assert "SGLang     of unknown version" in target.script(INSTALL).stdout
    information = target.purelib / "sglang-0.5.9.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.9\n")
    assert "SGLang     0.5.9\n" in target.script(INSTALL).stdout


def test_check_says_what_is_wrong(target: Target) -> None:
    done = target.script(INSTALL, "--check")
    assert done.returncode == 1
    assert "Installed  no" in done.stdout

    target.install()
    before = tree(target.purelib, times=True)
    done = target.script(INSTALL, "--check")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"by {INSTALL}" in done.stdout
    assert tree(target.purelib, times=True) == before

    core = target.purelib / "sglang_weight_hook_patch_core.py"
    whole = core.read_text()
    core.write_text(whole + "\n")
    done = target.script(INSTALL, "--check")
    assert done.returncode == 1
    assert f"{core.name} was changed" in done.stdout
    core.unlink()
    assert f"{core.name} is missing" in target.script(INSTALL, "--check").stdout
    core.write_text(whole)
    assert target.script(INSTALL, "--check").returncode == 0

    (target.purelib / "sglang_injector.pth").unlink()
    done = target.script(INSTALL, "--check")
    assert done.returncode == 1
    assert "in a spawned child: its .pth file was not processed" in done.stdout

    target.install()
    for path in target.purelib.glob("*.dist-info/*"):
        path.unlink()
    done = target.script(INSTALL, "--check")
    assert done.returncode == 1


def test_two_installations_at_once_both_end_well(target: Target) -> None:
    target.install()
    whole = set(tree(target.purelib))
    for names in ((INSTALL, INSTALL), (INSTALL, INSTALL, INSTALL), (INSTALL, UNINSTALL)):
        target.empty()
        running = [
            subprocess.Popen(
                [ROOT / name, "--python", target.python],
                env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
            for name in names
        ]  # fmt: skip
        assert [(process.communicate()[1], process.returncode) for process in running] == [
            (b"", 0) for _ in running
        ]
        assert set(tree(target.purelib)) in (whole, set() if UNINSTALL in names else whole)


@pytest.mark.parametrize("number", [15, 2, 1])
def test_a_signal_takes_the_installation_back(target: Target, checkout: Path, number: int) -> None:
    # The loader holds the verification up, when everything is in place.
    loader = checkout / "sglang_patch_loader.py"
    loader.write_text(loader.read_text() + "import time\ntime.sleep(30)\n")
    running = subprocess.Popen(
        [checkout / INSTALL, "--python", target.python],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 20
    while not (target.purelib / "sglang_injector.pth").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.2)
    running.send_signal(number)
    _, said = running.communicate(timeout=20)
    assert running.returncode == 1
    assert said == f"{INSTALL}: interrupted.\n".encode()
    assert tree(target.purelib) == {}


def test_piping_into_head_does_not_undo_the_installation(target: Target) -> None:
    done = subprocess.run(
        ["bash", "-c", 'set -o pipefail; "$1" --python "$2" | true', "-",
         ROOT / INSTALL, target.python],
        env=ENVIRONMENT, capture_output=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert target.finders() == 1
