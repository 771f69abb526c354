"""The C example: anything in the place of a file, and what is no JSON, is refused in words."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from documents_by_hand import LAYOUT, LINE, STATE

from sglang_weight_hook.layout.header import Header, pack

Run = Callable[..., subprocess.CompletedProcess[str]]
Write = Callable[[str, str], Path]

A_HEADER = Header(2, 7, "ready", 11, "12" * 16, 3, 4, 5, 6, 1.25, None, "cd" * 16, "ab" * 8)


def refused(done: subprocess.CompletedProcess[str], says: str) -> None:
    assert (done.returncode, done.stdout) == (1, ""), done
    assert done.stderr.startswith("print_regions: ")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr


# --- what is no file ---------------------------------------------------------------------------

DOCUMENTS = ["weight_state_0.json", "weight_layout_0.json"]
NO_DOCUMENT = "is not JSON but a pipe or a device; it was not written by the hook"
NO_FILE = "is not a file but a"


def put(kind: str, path: Path) -> None:
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "link":
        (path.parent / "other").touch()
        path.symlink_to("other")
    elif kind == "huge":
        path.touch()
        os.truncate(path, 100 * 1024**3)
    else:
        path.symlink_to(kind)


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("pipe", NO_DOCUMENT),
        ("/dev/zero", NO_DOCUMENT),
        ("/dev/tty", ""),
        ("folder", "cannot be read (Is a directory)"),
        ("loop", "cannot be read (Too many levels of symbolic links)"),
        ("link", "is no sglang-weight-"),  # is followed, as the Python reader does, and is empty
        ("huge", f"has {100 * 1024**3} bytes, {256 * 1024**2} at most; it was not written by"),
    ],
)
def test_what_lies_in_a_documents_place(
    name: str, kind: str, says: str, by_hand: Write, run_c: Run
) -> None:
    folder = by_hand(LAYOUT, STATE)
    put(kind, folder / name)
    refused(run_c(folder), says)


def test_a_document_may_be_a_link_to_a_file(by_hand: Write, run_c: Run) -> None:
    folder = by_hand(LAYOUT, STATE)
    for name in DOCUMENTS:
        (folder / name).rename(folder / f"{name}.moved")
        (folder / name).symlink_to(f"{name}.moved")
    assert run_c(folder).stdout == LINE


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("pipe", NO_FILE + " pipe or a device"),
        ("folder", NO_FILE + " folder"),
        ("link", "cannot be read (Too many levels of symbolic links)"),
        ("/dev/zero", "cannot be read (Too many levels of symbolic links)"),
    ],
)
def test_what_lies_in_the_place_of_the_lock_or_of_the_header(
    kind: str, says: str, by_hand: Write, run_c: Run
) -> None:
    folder = by_hand(LAYOUT, STATE)
    for name, options in (("weight_header_0.bin", ["--header"]), ("weight_saving_0.lock", [])):
        put(kind, folder / name)
        refused(run_c(folder, *options), says)


def test_files_of_100_gb(by_hand: Write, run_c: Run) -> None:
    """Locks are not read, so that their size is of no account."""
    folder = by_hand(LAYOUT, STATE)
    os.truncate(folder / "weight_owner_0.lock", 100 * 1024**3)
    put("huge", folder / "weight_saving_0.lock")
    assert run_c(folder).stdout == LINE
    put("huge", folder / "weight_header_0.bin")
    refused(run_c(folder, "--header"), "is not a file of 128 bytes")


def test_a_document_that_never_settles_is_not_waited_for_long(by_hand: Write, run_c: Run) -> None:
    """However long each reading of it takes."""
    padding = '"padding": "' + "x" * (30 * 1024**2) + '", "regions"'
    layout = LAYOUT.replace('"layout_generation": 1', '"layout_generation": 2')
    folder = by_hand(layout.replace('"regions": [{', padding + ": [{"), STATE)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    done = run_c(folder)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.returncode, done.stdout) == (3, "")
    assert "no settled map" in done.stderr
    assert after.ru_utime - before.ru_utime < 6, time.monotonic() - started


# --- what is no JSON ---------------------------------------------------------------------------

MORE = '"more": [true, null, -1.5e3]'


@pytest.mark.parametrize(
    "more",
    [
        "NaN", "Infinity", "-Infinity", "nonsense", "True", "tru", "truee", "nul", "falsey",
        "01", "-", "-x", "1.", ".5", "1.e5", "1e", "1e+", "+1", "0x10", "1_000", "--1", "1.2.3",
        '"\\x"', '"\\u12g4"', '"\\u12"', '"a\nb"', '"a\tb"', '"a\x01b"', '"\x1b[2J"', "'a'",
        "[1,]", "[,1]", "[1 2]", "[1,,2]", '{"a": 1,}', '{"a" 1}', "{a: 1}", '{"a": }', '{"a"}',
        "[" * 65 + "]" * 65, '{"a":' * 65 + "1" + "}" * 65, "[}", "{]", "1 2", "/* */ 1", "",
    ],
)  # fmt: skip
@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_is_no_json_value_is_refused_wherever_it_stands(
    document: str, more: str, by_hand: Write, run_c: Run
) -> None:
    layout, state = LAYOUT, STATE
    if document == "weight_layout_0.json":
        layout = LAYOUT.replace(MORE, f'"more": {more}')
    else:
        state = f'{STATE[:-1]}, "more": {more}}}'
    refused(run_c(by_hand(layout, state)), f"{document} is no sglang-weight-")


@pytest.mark.parametrize(
    "more",
    [
        "0", "-0", "10", "-0.5", "1E5", "1e-5", "1.25e+300", "true", "false", "null", '""', "[]",
        "{}", '"\\"\\\\\\/\\b\\f\\n\\r\\t\\u00e9"', '"é€😀"', " [ 1 , 2 ] ",
        "[" * 60 + "]" * 60, '{"a": {"b": [{}]}}', "9" * 400,
    ],
)  # fmt: skip
def test_what_is_json_is_taken(more: str, by_hand: Write, run_c: Run) -> None:
    json.loads(more)
    layout = LAYOUT.replace(MORE, f'"more": {more}')
    done = run_c(by_hand(layout, f'{STATE[:-1]}, "more": {more}}}\n'))
    assert (done.returncode, done.stderr, done.stdout) == (0, "", LINE)


@pytest.mark.parametrize("tail", [b"x", b"{}", b",", b"\0", b"\0{}", b"}", b" 1", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_follows_the_document_is_refused(
    document: str, tail: bytes, by_hand: Write, run_c: Run
) -> None:
    folder = by_hand(LAYOUT, STATE)
    with open(folder / document, "ab") as file:
        file.write(tail)
    refused(run_c(folder), f"{document} is no sglang-weight-")


@pytest.mark.parametrize(
    "wrong", [b"\xff", b"\x80", b"\xc3", b"\xc0\x80", b"\xe2\x82", b"\xed\xa0\x80",
              b"\xf4\x90\x80\x80", b"\xf8\x88\x80\x80\x80"],
)  # fmt: skip
def test_what_is_no_utf_8_is_refused(wrong: bytes, by_hand: Write, run_c: Run) -> None:
    folder = by_hand(LAYOUT, STATE)
    layout = LAYOUT.encode().replace(b'"more"', b'"m' + wrong + b'"')
    (folder / "weight_layout_0.json").write_bytes(layout)
    refused(run_c(folder), "weight_layout_0.json is no sglang-weight-layout document")


def test_every_truncation_is_refused(by_hand: Write, run_c: Run) -> None:
    for length in range(0, len(LAYOUT), 23):
        refused(run_c(by_hand(LAYOUT[:length], STATE)), "weight_layout_0.json is no")
    for length in range(0, len(STATE), 23):
        refused(run_c(by_hand(LAYOUT, STATE[:length])), "weight_state_0.json is no")


@pytest.mark.parametrize(
    ("field", "new"),
    [
        ('"layout_generation": 1', '"x": 1'),
        ('"content_generation": 1', '"x": 1'),
        ('"content_generation": 1', '"content_generation": "1"'),
        ('"layout_generation": 1', '"layout_generation": 01'),
        ('"layout_generation": 1', '"layout_generation": -1'),
        ('"pid": ', '"x": '),
        ('"process_start_ticks": ', '"process_start_ticks": 1.'),
        ('"boot_id": ', '"boot_id": [], "x": '),
    ],
)
def test_a_document_without_a_field_that_counts_is_refused(
    field: str, new: str, by_hand: Write, run_c: Run
) -> None:
    assert field in LAYOUT
    assert field in STATE
    if field == '"pid": ':  # only the one in `identity` counts
        refused(run_c(by_hand(LAYOUT.replace(field, new, 1)[:-1] + ', "pid": 7}', STATE)), "is no")
    refused(run_c(by_hand(LAYOUT.replace(field, new, 1), STATE)), "is no sglang-weight-layout")
    refused(run_c(by_hand(LAYOUT, STATE.replace(field, new, 1))), "is no sglang-weight-state")


def test_a_state_without_its_state_and_a_layout_without_tensors(by_hand: Write, run_c: Run) -> None:
    refused(
        run_c(by_hand(LAYOUT, STATE.replace('"state": ', '"x": '))), "is no sglang-weight-state"
    )
    for name in ("tensors", "identity"):
        layout = LAYOUT.replace(f'"{name}": {{', '"x": {', 1)
        refused(run_c(by_hand(layout, STATE)), "is no sglang-weight-layout")


@pytest.mark.parametrize(
    ("mine", "theirs", "status"),
    [('"a"', '"a"', 0), ("null", '"a"', 0), ('""', '"a"', 3), ("[]", '"a"', 1), ('"a"', "1", 1)],
)
def test_an_instance_is_a_text_or_not_known(
    mine: str, theirs: str, status: int, by_hand: Write, run_c: Run
) -> None:
    state, layout = (
        document.replace('"schema"', f'"instance": {instance}, "schema"')
        for document, instance in ((STATE, mine), (LAYOUT, theirs))
    )
    done = run_c(by_hand(layout, state))
    assert (done.returncode, done.stdout) == (status, "" if status else LINE)


A_REGION = '{"ptr": 4096, "size": 16, "device": "cuda:0"}'


@pytest.mark.parametrize(
    "second",
    [
        '{"ptr": 0, "size": 16, "device": "cuda:0"}', '{"ptr": 1, "size": 16}', "7", "{}",
        '{"ptr": 1, "size": 16, "device": "cuda:0 9"}', '{"ptr": 1, "size": 1, "device": ""}',
        '{"ptr": 1, "size": 16, "device": "\\u001b"}', '{"ptr": 1, "size": 16, "device": "\u009b"}',
    ],
)  # fmt: skip
def test_no_region_is_printed_where_one_is_wrong(second: str, by_hand: Write, run_c: Run) -> None:
    regions = f'"regions": [{A_REGION}, {second}], "old": [{{'
    folder = by_hand(LAYOUT.replace('"regions": [{', regions), STATE)
    refused(run_c(folder), "has no valid regions")


# --- the header --------------------------------------------------------------------------------


def test_a_header_that_is_cut_short_while_it_is_polled(by_hand: Write, print_regions: Path) -> None:
    path = by_hand(LAYOUT, STATE) / "weight_header_0.bin"
    path.write_bytes(pack(A_HEADER))
    reader = subprocess.Popen(
        [str(print_regions), "--header=2", str(path.parent), "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert reader.stdout is not None
    assert reader.stdout.readline().startswith("ready 3 4")
    os.truncate(path, 0)
    said, complained = reader.communicate(timeout=20)
    assert (reader.returncode, said) == (1, "")
    assert complained == "print_regions: the header was cut short while it was read\n"


def test_a_header_that_its_owner_left_at_the_first_write(by_hand: Write, run_c: Run) -> None:
    folder = by_hand(LAYOUT, STATE)
    (folder / "weight_header_0.bin").write_bytes(pack(A_HEADER._replace(sequence=1)))
    done = run_c(folder, "--header")
    assert (done.returncode, done.stdout) == (3, "")
    assert "is not consistent" in done.stderr


def test_a_header_whose_sequence_is_0_is_read_like_any_other(by_hand: Write, run_c: Run) -> None:
    folder = by_hand(LAYOUT, STATE)
    (folder / "weight_header_0.bin").write_bytes(pack(A_HEADER._replace(sequence=0)))
    done = run_c(folder, "--header")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("ready 3 4")


@pytest.mark.parametrize("count", ["0", "-1", "+1", " 1", "", "1x", "99999999999999999999"])
def test_a_count_of_headers_is_a_number(count: str, by_hand: Write, run_c: Run) -> None:
    folder = by_hand(LAYOUT, STATE)
    (folder / "weight_header_0.bin").write_bytes(pack(A_HEADER))
    done = run_c(folder, f"--header={count}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: ")
