"""The C example reads the header: its changes, its replacement, and what is no header.

The publisher's runner is a fake (`fake_sglang`), its model and tensors are torch's, the files and
locks are real.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from example_programs import Publisher

from sglang_weight_hook.layout import files
from sglang_weight_hook.layout.header import Header, pack
from sglang_weight_hook.layout.states import STATES
from sglang_weight_hook.publisher.header import HeaderFile
from sglang_weight_hook.reader import Slot


def run_header(program: Path, directory: Path, count: int = 1) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(program), f"--header={count}", str(directory), "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def expected_header(slot: Slot) -> list[str]:
    header = slot.header()
    numbers = (
        *(header.layout_generation, header.content_generation),
        *(header.physical_epoch, header.kv_physical_epoch, header.pid),
    )
    return [header.state, *map(str, numbers)]


def test_c_prints_the_header_and_its_changes(publisher: Publisher, print_regions: Path) -> None:
    reader = run_header(print_regions, publisher.maps, 3)
    assert reader.stdout is not None
    first = reader.stdout.readline().split()
    assert first[:6] == expected_header(publisher.slot)
    found = publisher.slot.header()
    assert first[8] == found.instance
    for told, wanted in zip(first[6:8], (found.updated_at, found.checked_at)):
        assert wanted is not None
        assert float(told) == pytest.approx(wanted, abs=1e-5)
    assert publisher.tell("pause") == "updating"
    assert reader.stdout.readline().split()[:6] == expected_header(publisher.slot)
    publisher.tell("go on")
    assert reader.stdout.readline().split()[:6] == expected_header(publisher.slot)
    _, said = reader.communicate(timeout=30)
    assert (reader.returncode, said) == (0, "")


def test_c_notices_that_the_header_was_replaced(
    print_regions: Path, maps: Path, tmp_path: Path
) -> None:
    maps.mkdir()
    path = str(maps / files.HEADER.format("0"))
    first = HeaderFile(path, A_HEADER)
    reader = run_header(print_regions, maps, 3)
    assert reader.stdout is not None
    assert reader.stdout.readline().startswith("ready 3 4 5 6 7 1.250000000 0.000000000 abab")
    second = HeaderFile(path, A_HEADER._replace(pid=8))
    assert reader.stdout.readline().split()[5] == "8"
    first.abandon()
    second.leave()
    assert reader.stdout.readline().split()[:2] == ["left", "3"]
    assert reader.wait(30) == 0
    reader.communicate()


A_HEADER = Header(2, 7, "ready", 11, "12" * 16, 3, 4, 5, 6, 1.25, None, "cd" * 16, "ab" * 8)


@pytest.mark.parametrize(
    ("data", "status", "says"),
    [
        (pack(A_HEADER)[:-1], 1, "not a file of 128 bytes"),
        (pack(A_HEADER) + b"x", 1, "not a file of 128 bytes"),
        (pack(A_HEADER._replace(sequence=3)), 3, "not consistent"),
        (pack(A_HEADER)[:-1] + b"?", 3, "not consistent"),
        (pack(A_HEADER)[:64] + pack(A_HEADER._replace(physical_epoch=9))[64:], 0, ""),
        (pack(A_HEADER)[:72] + pack(A_HEADER._replace(physical_epoch=9))[72:], 3, "consistent"),
        (b"?" * 128, 3, "not consistent"),
    ],
)
def test_c_refuses_what_is_no_whole_header(
    data: bytes, status: int, says: str, print_regions: Path, maps: Path
) -> None:
    maps.mkdir()
    (maps / files.HEADER.format("0")).write_bytes(data)
    reader = run_header(print_regions, maps)
    said, complained = reader.communicate(timeout=60)
    assert reader.returncode == status
    assert says in complained
    assert (said == "") == (status != 0)


@pytest.mark.parametrize("kind", ["nothing", "fifo", "link"])
def test_c_refuses_what_is_no_header_file(kind: str, print_regions: Path, maps: Path) -> None:
    maps.mkdir()
    path = maps / files.HEADER.format("0")
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        (maps / "other").write_bytes(pack(A_HEADER))
        path.symlink_to(maps / "other")
    reader = run_header(print_regions, maps)
    assert reader.communicate(timeout=60)[0] == ""
    assert reader.returncode == 1


def test_c_never_prints_a_header_mixed_of_two(
    print_regions: Path, maps: Path, start_python: Callable[..., subprocess.Popen[str]]
) -> None:
    """Beside a process that rewrites it as fast as it can; all fields follow from the first."""
    maps.mkdir()
    writer = start_python(HEADER_WRITER, str(maps / files.HEADER.format("0")))
    assert writer.stdout is not None
    assert writer.stdout.readline() == "ready\n"
    reader = run_header(print_regions, maps, 20_000)
    said, complained = reader.communicate(timeout=120)
    assert (reader.returncode, complained) == (0, "")
    lines = [line.split() for line in said.splitlines()]
    assert len(lines) == 20_000
    for state, layout, content, epoch, kv_epoch, pid, updated, checked, instance in lines:
        n = int(layout)
        assert state == STATES[n % len(STATES)]
        assert (int(content), int(epoch), int(kv_epoch)) == (n * 7, n * 11, n * 13)
        assert (int(pid), int(instance, 16)) == (n % 1000 + 1, n * 19)
        assert (float(updated), float(checked)) == (n, 2 * n)
    assert len({line[1] for line in lines}) > 1000


HEADER_WRITER = """
import sys
from sglang_weight_hook.layout.header import Header
from sglang_weight_hook.layout.states import STATES
from sglang_weight_hook.publisher.header import HeaderFile

def at(n):
    return Header(
        2, n % 1000 + 1, STATES[n % len(STATES)], n, f"{n:032x}", n, n * 7, n * 11, n * 13,
        float(n), 2.0 * n, f"{n:032x}", f"{n * 19:016x}",
    )

header = HeaderFile(sys.argv[1], at(1))
print("ready", flush=True)
n = 1
while True:
    n += 1
    header.write(at(n))
"""
