"""What `doctor` says of interpreters, installations and SGLangs; SGLang is never imported.

The SGLangs here are trees of files in the shape that the patch core's table gives to a release;
``tests/real_sglang/test_cli.py`` has real ones.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sglang_weight_hook_patch_core as core
from sglang_weight_hook.commands import diagnosis as doctor
from sglang_weight_hook.commands.diagnosis import BAD, GOOD, NOTE, Diagnosis
from sglang_weight_hook.commands.sglang_gaps import GAPS, Gap
from sglang_weight_hook.commands.sglang_sources import Sources
from sglang_weight_hook.layout import variables

ROOT = Path(doctor.__file__).parents[2]


def texts(found: Diagnosis, topic: str, level: str | None = None) -> list[str]:
    return [
        fact.text
        for fact in found.facts
        if fact.topic == topic and (level is None or fact.level == level)
    ]


@pytest.fixture
def sglang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Make an installed SGLang of a release, with the methods that the table gives it."""

    def make(version: str, without: str = "") -> Path:
        site = tmp_path / "site"
        classes: dict[str, dict[str, list[str]]] = {}
        for entry in core.ENTRY_POINTS:
            if core._expected(entry, version) and entry.name != without:
                classes.setdefault(entry.module, {}).setdefault(entry.site[1], []).append(
                    entry.method
                )
        for module, owners in classes.items():
            path = site.joinpath(*module.split(".")).with_suffix(".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = ["raise RuntimeError('SGLang was imported')"]
            for owner, methods in owners.items():
                indent = ""
                if owner:
                    lines.append(f"class {owner}:")
                    indent = "    "
                lines += [f"{indent}def {method}(self): pass" for method in methods]
            path.write_text("\n".join(lines) + "\n")
        (site / "sglang" / "__init__.py").write_text("raise RuntimeError('SGLang was imported')\n")
        metadata = site / f"sglang-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: sglang\nVersion: {version}\n"
        )
        monkeypatch.syspath_prepend(str(site))
        return site / "sglang"

    return make


# --- SGLang ---------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["0.4.6.post5", "0.5.9", "0.5.15.post1", "0.5.21", "0.5.23"])
def test_a_release_with_everything_that_it_should_have(
    version: str, sglang: Callable[..., Path]
) -> None:
    package = sglang(version)
    found = doctor.diagnose()
    assert texts(found, "SGLang", GOOD) == [f"{version}, {package}"]
    assert texts(found, "Entry points", BAD) == []
    for entry in found.entry_points:
        assert entry.expected == entry.found
    assert "sglang" not in sys.modules


def test_an_entry_point_that_is_gone_is_named(sglang: Callable[..., Path]) -> None:
    sglang("0.5.23", without="WeightUpdater.update_weights_from_disk")
    found = doctor.diagnose()
    assert texts(found, "Entry points", BAD) == [
        "WeightUpdater.update_weights_from_disk is not in "
        "sglang.srt.model_executor.model_runner_components.weight_updater: "
        "update_weights_from_disk will not be seen"
    ]
    assert not found.good


def test_a_release_newer_than_those_checked_is_noted(sglang: Callable[..., Path]) -> None:
    sglang("0.9.1")
    assert any("newer than" in text for text in texts(doctor.diagnose(), "SGLang", NOTE))


def test_no_sglang_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_package_folders", list)
    found = doctor.diagnose()
    assert texts(found, "SGLang", NOTE) == ["not in this environment; the hook waits for it"]
    assert found.entry_points == []


def test_known_gaps_are_named_where_they_are_and_not_hooked(
    sglang: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    package = sglang("0.5.23")
    (one,) = texts(doctor.diagnose(), "Known gap")  # of what every release has
    assert one.startswith("new tensors of a single bucket (srt/model_executor/")
    old = package / "srt/disaggregation/encode_server.py"
    old.parent.mkdir(parents=True, exist_ok=True)
    old.touch()
    (package / "srt/hardware_backend/mlx").mkdir(parents=True)
    (package / "srt/hardware_backend/mlx/model_runner_stub.py").touch()
    monkeypatch.setattr(
        core,
        "ENTRY_POINTS",
        tuple(
            entry
            for entry in core.ENTRY_POINTS
            if entry.module.split(".")[2] not in ("disaggregation", "weight_cache", "runtime")
        ),
    )
    said = " ".join(texts(doctor.diagnose(), "Known gap", NOTE))
    for name in ("encode_server.py", "MlxModelRunnerStub", "weight-cache daemon", "multimodal_gen"):
        assert name in said
    monkeypatch.undo()


@pytest.mark.parametrize("gap", GAPS, ids=lambda gap: gap.name)
def test_each_gap_is_told_by_its_file_with_its_reason(
    gap: Gap, sglang: Callable[..., Path]
) -> None:
    package = sglang("0.5.23")
    events = [entry for entry in core.ENTRY_POINTS if gap.event and entry.event == gap.event]
    hooked = [entry.module.split(".", 1)[1].replace(".", "/") + ".py" for entry in events]
    for path in (*gap.paths, *hooked):
        (package / path).unlink(missing_ok=True)
    told = f"{gap.name} ({gap.paths[0]}): {gap.text}"
    assert told not in texts(doctor.diagnose(), "Known gap")
    first = package / gap.paths[0]
    first.parent.mkdir(parents=True, exist_ok=True)
    first.write_text("def something_else(): pass\n")
    # The entry points of its event are gone with the files that were taken away.
    assert (told in texts(doctor.diagnose(), "Known gap", NOTE)) == (not gap.defined)
    first.write_text(f"def {gap.defined or 'it'}(): pass\n")
    found = doctor.diagnose()
    assert told in texts(found, "Known gap", NOTE)
    entry = {"name": gap.name, "path": gap.paths[0], "text": gap.text}
    assert entry in found.as_dict()["sglang"]["gaps"]


def test_the_page_has_every_gap_in_the_words_of_the_table() -> None:
    page = (ROOT / "docs" / "sglang-support.md").read_text()
    section = page.partition("## What is not captured\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    told = [
        f"| {gap.name} | `{gap.paths[0]}` | {gap.text} |"
        for gap in GAPS
        if not gap.event  # the others have an entry point in the table
    ]
    assert rows[1:] == told
    wrapped = {entry.event for entry in core.ENTRY_POINTS}
    assert {gap.event for gap in GAPS if gap.event} <= wrapped


def test_an_environment_without_diffusion_lacks_nothing(sglang: Callable[..., Path]) -> None:
    package = sglang("0.5.23")
    shutil.rmtree(package / "multimodal_gen")
    assert texts(doctor.diagnose(), "Entry points", BAD) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("class A:\n    def f(self): pass", True),
        ("class A:\n    async def f(self): pass", True),
        ("class A:\n    f = len", True),
        ("class A:\n    if x:\n        def f(self): pass", True),
        ("try:\n    class A:\n        def f(self): pass\nexcept E:\n    pass", True),
        ("class B:\n    def f(self): pass\nclass A(B): pass", True),
        ("from sglang.other import B\nclass A(B): pass", True),
        ("from .other import B as A", True),
        ("from sglang.other import B as C\nclass A(C): pass", True),
        ("class A(A): pass", False),
        ("class A(nobody.B): pass", False),
        ("class A:\n    def g(self): pass", False),
        ("def f(): pass", False),
        ("A = 3", False),
        ("class A(", False),
        ("\0", False),
        ("", False),
    ],
)
def test_a_method_is_found_as_the_import_would_find_it(
    source: str, found: bool, tmp_path: Path
) -> None:
    (tmp_path / "it.py").write_text(source)
    (tmp_path / "other.py").write_text("class B:\n    def f(self): pass")
    assert Sources([str(tmp_path)]).defines("sglang.it", "A", "f") == found


def test_a_function_of_a_module_is_found(tmp_path: Path) -> None:
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / "__init__.py").write_text("def f(): pass")
    sources = Sources([str(tmp_path)])
    assert sources.defines("sglang.it", "", "f")
    assert not sources.defines("sglang.it", "", "g")
    assert not sources.defines("sglang.absent", "", "f")


# --- the hook -------------------------------------------------------------------------------


def test_an_interpreter_without_the_hook_is_told_how_to_get_it() -> None:
    found = doctor.diagnose()
    assert texts(found, "Active", BAD)
    (text,) = texts(found, "Installed", BAD)
    assert f"install_sglang_hook_patch.sh --python {sys.executable}" in text
    assert not found.good


def test_an_active_hook_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_WEIGHT_HOOK", "1")
    import sglang_patch_loader

    sglang_patch_loader.install()
    found = doctor.diagnose()
    assert texts(found, "Active", GOOD)
    assert "in this process alone" in texts(found, "Installed", NOTE)[0]
    assert found.data["hook"]["active"] is True
    assert found.data["hook"]["loader"] == sglang_patch_loader.__file__


def test_a_finder_that_is_asked_first_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_WEIGHT_HOOK", "1")
    import sglang_patch_loader

    class Tracer:
        @staticmethod
        def find_spec(*_: object) -> None:
            return None

    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    sglang_patch_loader.uninstall()
    sglang_patch_loader.install()
    assert doctor.diagnose().data["hook"]["finders_in_front"] == []
    sys.meta_path.insert(0, Tracer)
    sys.meta_path.append(Tracer())
    found = doctor.diagnose()
    assert found.data["hook"]["finders_in_front"] == [f"{__name__}.{Tracer.__qualname__}"]
    (text,) = texts(found, "Active", NOTE)
    assert "Tracer precedes the hook" in text


DIAGNOSE = """
import json, sys
from sglang_weight_hook.commands import diagnosis as doctor
json.dump(doctor.diagnose().as_dict(), sys.stdout)
"""


def said(answer: dict[str, Any], topic: str) -> str:
    return " | ".join(fact["text"] for fact in answer["facts"] if fact["topic"] == topic)


def test_an_installation_names_its_door_and_place(run_python: Any, tmp_path: Path) -> None:
    site = tmp_path / "elsewhere"
    record = site / "sglang_weight_hook-0.1.0.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text("Name: sglang-weight-hook\nVersion: 0.1.0\n")
    (record / "INSTALLER").write_text("install_sglang_hook_patch.sh\n")
    (site / "sglang_injector.pth").touch()
    (site / "sglang_injector.start").touch()
    answer = json.loads(run_python("-c", DIAGNOSE, path=site).stdout)
    (method,) = answer["hook"]["installed"]
    assert (method["door"], method["place"]) == ("install_sglang_hook_patch.sh", str(site))
    assert "by install_sglang_hook_patch.sh" in said(answer, "Installed")
    assert f"this command itself runs from {ROOT}" in said(answer, "Installed")
    (site / "sglang_injector.pth").unlink()
    (site / "sglang_injector.start").unlink()
    (record / "INSTALLER").write_text("pip\n")
    (record / "direct_url.json").write_text('{"url": "file:///x", "dir_info": {}}')
    answer = json.loads(run_python("-c", DIAGNOSE, path=site).stdout)
    assert answer["hook"]["installed"][0]["door"] == "pip"
    assert "is missing there" in said(answer, "Installed")


def test_dash_s_is_told(run_python: Any) -> None:
    answer = json.loads(run_python("-S", "-c", DIAGNOSE).stdout)
    assert "started with -S" in said(answer, "Python")
    assert answer["interpreter"]["no_site"] is True
    assert answer["good"] is False


def test_looking_imports_neither_sglang_nor_torch_and_changes_nothing(
    run_python: Any, sglang: Callable[..., Path], maps: Path
) -> None:
    package = sglang("0.5.23")
    code = DIAGNOSE + (
        "\nassert not [name for name in sys.modules if name.split('.')[0] in"
        " ('sglang', 'torch', 'numpy', 'sglang_patch_loader')]"
        "\nassert not [f for f in sys.meta_path if type(f).__module__ == 'sglang_patch_loader']"
    )
    answer = json.loads(run_python("-c", code, path=package.parent).stdout)
    assert answer["sglang"]["version"] == "0.5.23"
    assert all(entry["found"] for entry in answer["entry_points"] if entry["expected"])
    assert not maps.exists()


# --- variables and directory ----------------------------------------------------------------


def test_variables_are_listed_and_strange_ones_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_WEIGHT_HOOK_DIRECTORY", "/x")
    monkeypatch.setenv("SGLANG_WEIGHT_HOOK_LOCK_TIMEOUT", "soon")
    found = doctor.diagnose()
    notes = texts(found, "Variable", NOTE)
    assert any(
        "SGLANG_WEIGHT_HOOK_DIRECTORY is set, but this release has no" in text for text in notes
    )
    assert any("'soon' is no number of seconds" in text for text in notes)
    assert "SGLANG_WEIGHT_HOOK_DIR" in found.data["environment"]
    assert {known.name for known in variables.VARIABLES} <= set(found.data["environment"])


def test_the_off_switch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_WEIGHT_HOOK", "0")
    (text,) = texts(doctor.diagnose(), "Active", BAD)
    assert "SGLANG_WEIGHT_HOOK=0" in text


def test_a_directory_that_is_not_there_yet_is_good_if_it_can_be_made(maps: Path) -> None:
    found = doctor.diagnose()
    assert texts(found, "Directory", GOOD) == [f"{maps} (the server creates it)"]
    assert not maps.exists()
    maps.mkdir()
    assert texts(doctor.diagnose(), "Directory", GOOD) == [str(maps)]
    assert (
        texts(doctor.diagnose("/else/where"), "Directory")
        == ["/else/where (the server creates it)"]
        or os.geteuid()
    )


def test_a_file_in_the_directorys_place_is_bad(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = doctor.diagnose(str(tmp_path / "file" / "maps"))
    (text,) = texts(found, "Directory", BAD)
    assert "is not a directory; set SGLANG_WEIGHT_HOOK_DIR" in text


def test_a_directory_of_each_process_is_to_be_read_with_dir(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SGLANG_WEIGHT_HOOK_DIR", f"{tmp_path}/{{pid}}")
    assert any("--dir" in text for text in texts(doctor.diagnose(), "Directory", NOTE))


def test_without_typer_the_doctor_still_answers(run_python: Any, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['typer'] = None; sys.argv[1:] = {}; "
        "from sglang_weight_hook.__main__ import main; sys.exit(main())"
    )
    done = run_python("-c", code.format("['doctor']"), check=False)
    assert done.returncode == 3
    assert "BAD   Installed" in done.stdout
    done = run_python("-c", code.format("['doctor', '--json']"), check=False)
    assert json.loads(done.stdout)["good"] is False


# --- devices ----------------------------------------------------------------------------------


@pytest.fixture
def torch_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make an installed torch that says what it is for, and packages that bring more devices."""

    def make(version: str, *packages: str, annotated: bool = True, **stated: str | None) -> None:
        site = tmp_path / "torch-site"
        (site / "torch").mkdir(parents=True)
        (site / "torch" / "__init__.py").write_text("raise RuntimeError('torch was imported')\n")
        lines = [f"__version__ = {version!r}"]
        of_text = ": Optional[str]" if annotated else ""
        lines += [f"{name}{of_text} = {value!r}" for name, value in stated.items()]
        (site / "torch" / "version.py").write_text("\n".join(lines) + "\n")
        for package in packages:
            metadata = site / f"{package.replace('-', '_')}-2.8.0.dist-info"
            metadata.mkdir()
            (metadata / "METADATA").write_text(
                f"Metadata-Version: 2.1\nName: {package}\nVersion: 2.8.0\n"
            )
        monkeypatch.syspath_prepend(str(site))

    return make


@pytest.mark.parametrize(
    ("version", "stated", "text"),
    [
        ("2.13.0+cu128", {"cuda": "12.8", "hip": None, "xpu": None}, "for CUDA 12.8"),
        ("2.13.0+cpu", {"cuda": None, "hip": None, "xpu": None}, "for CPU"),
        ("2.4.0", {"cuda": "12.1", "hip": None}, "for CUDA 12.1"),  # before there was xpu
    ],
)
@pytest.mark.parametrize("annotated", [True, False])
def test_on_cuda_and_on_the_cpu_there_is_nothing_to_note_of_devices(
    torch_of: Callable[..., None],
    version: str,
    stated: dict[str, str | None],
    text: str,
    annotated: bool,
) -> None:
    torch_of(version, annotated=annotated, **stated)
    found = doctor.diagnose()
    assert texts(found, "Devices", GOOD) == [f"torch {version} {text}"]
    assert texts(found, "Devices", NOTE) == []


@pytest.mark.parametrize(
    ("packages", "stated", "name"),
    [
        ([], {"cuda": None, "hip": "6.4.43482"}, "ROCm"),
        ([], {"cuda": None, "hip": None, "xpu": "20250300"}, "XPU"),
        (["torch_npu"], {"cuda": None, "hip": None}, "NPU"),
        (["torch_musa"], {"cuda": None, "hip": None}, "MUSA"),
        (["habana-torch-plugin"], {"cuda": None}, "HPU"),
    ],
)
def test_another_device_is_noted_with_what_a_map_does_not_say_there(
    torch_of: Callable[..., None], packages: list[str], stated: dict[str, str | None], name: str
) -> None:
    torch_of("2.8.0", *packages, **stated)
    found = doctor.diagnose()
    (note,) = texts(found, "Devices", NOTE)
    assert f"no driver of {name}: a map there has what torch tells, and null for" in note
    assert "Not run there" in note
    assert found.data["torch"]["torch"] == "2.8.0"
    assert list(found.data["torch"]["devices"]) == [name]


def test_without_torch_nothing_is_said_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.torch_devices, "_stated", dict)
    found = doctor.diagnose()
    assert texts(found, "Devices") == []
    assert found.data["torch"]["torch"] is None
