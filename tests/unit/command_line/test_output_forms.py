"""-o, --no-headers and narrow terminals; lookup over slots and addresses; sums; completion."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ended_command import ROOT, Run, sentence
from fake_sglang import FakeRunner

from sglang_weight_hook.commands.render import table
from sglang_weight_hook.commands.render.output import FORMS
from sglang_weight_hook.commands.selection import is_like
from sglang_weight_hook.layout import files

LISTS = ["slots", "show", "regions", "report", "history"]


@pytest.mark.parametrize("command", LISTS)
def test_csv_and_tsv_have_a_record_a_row_and_headers_unless_told(
    command: str, run: Run, layout: Any
) -> None:
    ended = run(command, "-o", "csv")
    assert ended.status == 0
    records = list(csv.DictReader(io.StringIO(ended.out)))
    assert records
    assert all(None not in record and None not in record.values() for record in records)
    bare = run(command, "--output", "csv", "--no-headers").out
    assert bare == ended.out.partition("\n")[2]
    assert bare.count("\n") == len(records)
    tabbed = run(command, "-o", "tsv").out.splitlines()
    assert len({line.count("\t") for line in tabbed}) == 1
    assert len(tabbed) == len(records) + 1


def test_a_record_has_the_numbers_of_the_layout(run: Run, layout: Any) -> None:
    for record in csv.DictReader(io.StringIO(run("show", "-o", "csv").out)):
        raw = layout["tensors"][record["name"]]
        assert (int(record["ptr"]), int(record["size"])) == (raw["ptr"], raw["size"])
        assert json.loads(record["shape"]) == raw["shape"]
        assert record["dtype"] == raw["dtype"]


@pytest.mark.parametrize("command", LISTS)
def test_parquet_can_be_read_back(
    command: str, run: Run, layout: Any, maps: Path, tmp_path: Path
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    done = subprocess.run(
        [sys.executable, "-m", "sglang_weight_hook", command, "-o", "parquet", "--dir", str(maps)],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    found = parquet.read_table(io.BytesIO(done.stdout))
    rows = list(csv.DictReader(io.StringIO(run(command, "-o", "csv").out)))
    assert found.num_rows == len(rows)
    assert found.schema.names == list(rows[0])
    if command == "show":
        assert found.schema.field("ptr").type == pyarrow.uint64()
        assert found["name"].to_pylist() == list(layout["tensors"])


def test_findings_and_checksums_are_records_too(run: Run, layout: Any, maps: Path) -> None:
    sums = list(csv.DictReader(io.StringIO(run("checksum", "-o", "csv").out)))
    whole = run("checksum", "--json").json["checksums"]
    assert {record["name"]: record["checksum"] for record in sums} == whole
    sizes = {name: str(layout["tensors"][name]["size"]) for name in whole}
    assert {record["name"]: record["size"] for record in sums} == sizes
    assert len(run("checksum", "-o", "tsv", "--no-headers").out.splitlines()) == len(whole)
    assert run("verify", "-o", "csv").out == "slot,level,check,message\n"
    layout["regions"][0]["size"] += 1
    (maps / files.LAYOUT.format(0)).write_text(json.dumps(layout))
    ended = run("verify", "-o", "csv")
    findings = [
        finding for slot in run("verify", "--json").json["slots"] for finding in slot["findings"]
    ]
    assert ended.status == 3
    assert list(csv.DictReader(io.StringIO(ended.out))) == findings


def test_without_pyarrow_one_sentence_tells(
    run: Run, layout: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert "pip install pyarrow" in sentence(run("show", "-o", "parquet"), 2)


@pytest.mark.parametrize("command", ["show", "regions", "report"])
def test_o_json_is_json(command: str, run: Run, layout: Any) -> None:
    assert run(command, "-o", "json").json == run(command, "--json").json


def test_stdout_has_the_rows_alone(run: Run, layout: Any) -> None:
    ended = run("show")
    assert len(ended.out.splitlines()) == 1 + len(layout["tensors"])
    assert f"{len(layout['tensors'])} tensors" in ended.err
    assert len(run("show", "--no-headers").out.splitlines()) == len(layout["tensors"])


def test_what_does_not_fit_is_named_and_long_names_are_cut_in_the_middle(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = [table.Column("address"), table.Column("type", drop=1), table.Column("name")]
    name = "model.layers.0." + "a_long_module_name." * 6 + "weight"
    rows = [["0x7f0000000000", "bfloat16", name]]
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    table.print_table(columns, rows, remedy="-o wide shows them")
    captured = capsys.readouterr()
    assert captured.err == "type not shown at 80 columns; -o wide shows them\n"
    heading, row = captured.out.splitlines()
    assert max(len(heading), len(row)) <= 80
    assert row.startswith("0x7f0000000000  model.layers.0.")
    assert row.endswith("name.weight")
    assert table.ELLIPSIS in row
    table.print_table(columns, rows, wide=True)
    captured = capsys.readouterr()
    assert name in captured.out
    assert captured.err == ""


def test_match_is_by_a_part_unless_it_is_a_pattern(run: Run, layout: Any) -> None:
    assert is_like("a.b.c", ".b")
    assert not is_like("a.b.c", ".b*")
    shown = set(run("show", "--json", "--match", "mlp").json["tensors"])
    assert shown == {name for name in layout["tensors"] if "mlp" in name} != set()
    assert run("show", "--json", "--match", "mlp*").json["tensors"] == {}


def test_show_says_why_it_lists_nothing(run: Run, layout: Any) -> None:
    name = next(iter(layout["tensors"]))
    cut = run("show", "--match", "*" + name[1:-1])  # a pattern that stops short of the name's end
    assert (cut.status, cut.rows[1:]) == (0, [])
    assert f"--match '*{name[1:-1]}*' finds some" in cut.err
    assert len(run("show", "--match", f"*{name[1:-1]}*").rows) > 1
    assert "no tensor has a name like nonsense" in run("show", "--match", "nonsense").err
    assert "--by layer" in run("show", "--layer", 99).err
    assert "no tensor" not in run("show", "--match", name).err


@pytest.mark.parametrize("by", ["role", "layer", "dtype"])
def test_show_adds_up(by: str, run: Run, layout: Any) -> None:
    ended = run("show", "--by", by, "--json").json
    assert sum(group["tensors"] for group in ended["groups"]) == len(layout["tensors"])
    assert sum(group["bytes"] for group in ended["groups"]) == ended["total"]["bytes"]
    assert len(run("show", "--by", by).out.splitlines()) == 1 + len(ended["groups"])
    if by == "dtype":
        by_dtype = {group["dtype"]: group["tensors"] for group in ended["groups"]}
        told = [raw["dtype"] for raw in layout["tensors"].values()]
        assert by_dtype == {dtype: told.count(dtype) for dtype in told}


def test_show_by_what_is_not_known_is_wrong_usage(run: Run, layout: Any) -> None:
    assert "role" in sentence(run("show", "--by", "colour"), 2)


@pytest.fixture
def two_slots(maps: Path, layout: Any) -> Path:
    """Slot 1 beside slot 0: a copy whose lock nobody holds."""
    for path in maps.glob("*_0.*"):
        shutil.copy(path, maps / path.name.replace("_0.", "_1."))
    document = json.loads((maps / files.LAYOUT.format(1)).read_bytes())
    for part in (*document["tensors"].values(), *document["regions"]):
        for field in ("ptr", "storage_ptr", "allocation_ptr"):
            if part.get(field):
                part[field] += 1 << 60
    document["memory"]["kv_cache"] = []
    (maps / files.LAYOUT.format(1)).write_text(json.dumps(document))
    return maps


def test_lookup_looks_in_every_slot(run: Run, layout: Any, two_slots: Path) -> None:
    name = "layers.0.mlp.weight"
    place = layout["tensors"][name]["ptr"]
    live = run("lookup", hex(place), "--json")
    assert live.status == 0  # the slot that has it is good
    ((slot,),) = [one["slots"] for one in live.json["addresses"]]
    assert (slot["slot"], slot["tensors"][0]["name"]) == ("0", name)
    dead = run("lookup", hex(place + (1 << 60)), "--json")
    assert dead.status == 3
    assert "slot 1 is stale" in dead.err
    assert dead.json["addresses"][0]["slots"][0]["slot"] == "1"
    assert run("lookup", hex(place), "--slot", "1").status == 3
    assert name in run("lookup", hex(place), "0").out


def test_lookup_takes_addresses_from_stdin(
    run: Run, layout: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["layers.0.mlp.weight", "layers.1.mlp.weight"]
    told = "\n".join(hex(layout["tensors"][name]["ptr"]) for name in names)
    monkeypatch.setattr(sys, "stdin", io.StringIO(told + "\n"))
    ended = run("lookup", "-", "-o", "csv")
    assert ended.status == 0
    records = list(csv.DictReader(io.StringIO(ended.out)))
    assert [record["name"] for record in records] == names
    assert [record["layer"] for record in records] == ["0", "1"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("0x10\n"))
    assert run("lookup", "-").status == 3
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert "no address" in sentence(run("lookup", "-"), 2)


def test_lookup_names_layer_and_token_of_the_kv_cache(run: Run, maps: Path) -> None:
    from small_model import a_runner

    kept = a_runner()
    place = kept.token_to_kv_pool.v_buffer[0][5].data_ptr()  # type: ignore[attr-defined]
    (buffer,) = run("lookup", place + 4, "--json").json["kv_cache"]
    assert (buffer["layer"], buffer["role"], buffer["token"]) == (0, "v", 5)
    out = run("lookup", place).out
    assert "token    5 of 8" in out
    assert "layer 0, v, float32" in out


def test_many_slots_are_told_in_a_line(run: Run, maps: Path, layout: Any) -> None:
    for number in range(1, 64):
        shutil.copy(maps / files.STATE.format(0), maps / files.STATE.format(number))
    err = sentence(run("show"), 2)
    assert "0, 1, 2, 3, 4, 5 and 58 more" in err
    assert "sglang-weight-hook slots" in err


def test_watch_says_that_it_waits_and_for_what(run: Run, maps: Path) -> None:
    ended = run("watch", "--timeout", "0")
    assert ended.out == ""
    assert str(maps) in ended.err
    assert "waiting" in ended.err
    maps.mkdir()
    assert "no slot 7 is published" in run("watch", "7", "--timeout", "0").err


def test_watch_of_an_empty_directory_ends_with_a_sentence_and_not_with_0(
    run: Run, maps: Path
) -> None:
    maps.mkdir()
    for more in ([], ["--count", "1"]):
        ended = run("watch", "--timeout", "0.1", *more)
        assert (ended.status, ended.out) == (1, "")
        assert f"no slot was published in {maps} within 0.1 s" in ended.complaints[-1]


def test_doctor_says_how_many_slots_it_has_tried(run: Run, maps: Path, layout: Any) -> None:
    from sglang_weight_hook.commands import memory_access

    assert not any("were tried" in text for _, text in memory_access.found_in(str(maps)))
    for number in range(1, 12):
        shutil.copy(maps / files.STATE.format(0), maps / files.STATE.format(number))
    assert ("good", "of 12 slots the first 8 were tried") in memory_access.found_in(str(maps))


def test_report_watches_until_it_is_interrupted(
    run: Run, runner: FakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang_weight_hook.commands import report

    looks = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(report.time, "sleep", sleep)
    ended = run("report", "--watch")
    assert (ended.status, len(looks)) == (0, 3)
    assert "KV cache" in ended.out
    assert "json" in sentence(run("report", "--watch", "--json"), 2)


def completed(folder: Path, words: str, slots: Path) -> list[str]:
    """What bash is offered behind ``words`` in ``folder``."""
    done = subprocess.run(
        [sys.executable, "-m", "sglang_weight_hook"],
        cwd=folder,
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": str(ROOT),
            "SGLANG_WEIGHT_HOOK_DIR": str(slots),
            "_PYTHON _M SGLANG_WEIGHT_HOOK_COMPLETE": "complete_bash",
            "_PYTHON__M_SGLANG_WEIGHT_HOOK_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split(" ")) - 1),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.split()


def test_a_shell_completes_names_of_slots(two_slots: Path) -> None:
    assert completed(ROOT, "sglang-weight-hook show ", two_slots) == ["0", "1"]


@pytest.mark.parametrize("command", ["watch", "history", "verify", "scrub", "report", "plot"])
def test_a_shell_completes_slots_for_every_command(command: str, two_slots: Path) -> None:
    assert completed(ROOT, f"sglang-weight-hook {command} ", two_slots) == ["0", "1"]


def test_a_shell_completes_what_an_option_may_be(two_slots: Path) -> None:
    assert completed(ROOT, "sglang-weight-hook show -o ", two_slots) == list(FORMS)
    assert completed(ROOT, "sglang-weight-hook show --by d", two_slots) == ["dtype"]
    assert completed(ROOT, "sglang-weight-hook show --role mo", two_slots) == ["moe_expert"]
    assert completed(ROOT, "sglang-weight-hook save --via m", two_slots) == ["mooncake"]


def test_python_m_installs_no_completion_for_python(run_python: Any) -> None:
    for option in ("--show-completion", "--install-completion"):
        done = run_python("-m", "sglang_weight_hook", option, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert "pip install ." in done.stderr


def test_a_shell_completes_slots_and_saved_layouts_for_diff(
    two_slots: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    for name in ("before.json", "1.json", "notes.txt"):
        (folder / name).touch()
    both = ["0", "1", "1.json", "before.json"]
    assert completed(folder, "sglang-weight-hook diff ", two_slots) == both
    assert completed(folder, "sglang-weight-hook diff before.json 1", two_slots) == ["1", "1.json"]
