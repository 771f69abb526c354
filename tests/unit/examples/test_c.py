"""The C example: the regions it prints, and the layouts that it refuses.

The publisher's runner is a fake (`fake_sglang`), its model and tensors are torch's, the files and
locks are real.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from documents_by_hand import LAYOUT, LINE, OWNER, STATE
from example_programs import Publisher

from sglang_weight_hook.layout import files


def run_c(program: Path, directory: Path, slot: str = "0") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program), str(directory), slot],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def expected_lines(publisher: Publisher) -> list[str]:
    fields = ("ptr", "size", "device", "allocation_ptr", "allocation_size")
    regions = publisher.slot.read().regions
    return [" ".join(str(region[field]) for field in fields) for region in regions]


def test_c_prints_every_region_before_and_after_one_moves(
    publisher: Publisher, print_regions: Path
) -> None:
    done = run_c(print_regions, publisher.maps)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == expected_lines(publisher)
    publisher.tell("move")
    again = run_c(print_regions, publisher.maps)
    assert again.stdout.splitlines() == expected_lines(publisher)
    assert again.stdout != done.stdout


def test_c_waits_for_the_update_under_way(publisher: Publisher, print_regions: Path) -> None:
    assert publisher.tell("pause") == "updating"
    reader = subprocess.Popen(
        [str(print_regions), str(publisher.maps), "0"], stdout=subprocess.PIPE, text=True
    )
    with pytest.raises(subprocess.TimeoutExpired):
        reader.wait(0.3)
    publisher.tell("go on")
    output, _ = reader.communicate(timeout=30)
    assert (reader.returncode, output.splitlines()) == (0, expected_lines(publisher))


def test_c_holds_no_lock_and_leaves_no_file_behind(
    publisher: Publisher, print_regions: Path
) -> None:
    before = sorted(os.listdir(publisher.maps))
    run_c(print_regions, publisher.maps)
    assert sorted(os.listdir(publisher.maps)) == before
    with open(publisher.slot.path(files.SAVING_LOCK), "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_c_says_when_the_map_is_not_to_be_used(publisher: Publisher, print_regions: Path) -> None:
    publisher.tell("release")
    done = run_c(print_regions, publisher.maps)
    assert (done.returncode, done.stdout) == (3, "")
    assert "slot 0 is released" in done.stderr
    publisher.process.kill()
    publisher.process.wait()
    done = run_c(print_regions, publisher.maps)
    assert (done.returncode, done.stdout) == (3, "")
    assert "is stale" in done.stderr


def test_c_refuses_a_wrong_directory_and_wrong_usage(print_regions: Path, tmp_path: Path) -> None:
    done = run_c(print_regions, tmp_path)
    assert done.returncode == 1
    assert "weight_saving_0.lock: No such file" in done.stderr
    assert subprocess.run([str(print_regions)], capture_output=True, check=False).returncode == 2


def test_c_reads_json_by_its_grammar_and_64_bits(
    by_hand: Callable[[str, str], Path], print_regions: Path
) -> None:
    done = run_c(print_regions, by_hand(LAYOUT, STATE))
    assert (done.returncode, done.stderr, done.stdout) == (0, "", LINE)


def test_c_takes_no_layout_of_another_instance(
    by_hand: Callable[[str, str], Path], print_regions: Path
) -> None:
    state = STATE.replace(OWNER, OWNER + ', "instance": "aa"')
    layout = LAYOUT.replace('"identity"', '"instance": "%s", "identity"')
    same = run_c(print_regions, by_hand(layout % "aa", state))
    assert (same.returncode, same.stderr) == (0, "")
    done = run_c(print_regions, by_hand(layout % "bb", state))
    assert (done.returncode, done.stdout) == (3, "")
    assert "no settled map" in done.stderr
    older = run_c(print_regions, by_hand(LAYOUT, state))  # release 0.1
    assert older.returncode == 0


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("18446744073709551000", "18446744073709551616"),
        ("18446744073709551000", "18446744073709551610"),  # wraps around with its size
        ("18446744073709551000", '"0x7f00"'),
        ("18446744073709551000", "1.5"),
        ('"size": 16', '"size": 0'),
        ('"regions"', '"areas"'),
        ('"device": "cuda:0", ', '"device": "cuda:0" '),
        ("sglang-weight-layout", "sglang-weight-state"),
        ('"schema_version": 1', '"schema_version": 2'),
        ("[true", "[" * 100_000),
        (LAYOUT, ""),
        (LAYOUT, "[]"),
        (LAYOUT, LAYOUT[:-20]),
        (LAYOUT, LAYOUT[:60] + '"'),
        (LAYOUT, "\\"),
    ],
)
def test_c_refuses_what_is_no_layout(
    old: str, new: str, by_hand: Callable[[str, str], Path], print_regions: Path
) -> None:
    done = run_c(print_regions, by_hand(LAYOUT.replace(old, new), STATE))
    assert done.returncode == 1
    assert done.stderr.startswith("print_regions: ")
    assert done.stdout == ""
