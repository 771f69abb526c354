"""The header's table: what the page, the module and the code say of the same 128 bytes."""

from __future__ import annotations

import re
import struct
from pathlib import Path

from sglang_weight_hook.layout import header

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "format.md").read_text("utf-8")


def rows_of_the_module() -> list[tuple[int, int, str]]:
    assert header.__doc__ is not None
    rows: list[tuple[int, int, str]] = []
    for line in header.__doc__.splitlines():
        found = re.match(r"(\d+) +(\d+) +(.*)", line)
        if found:
            rows.append((int(found[1]), int(found[2]), found[3]))
        elif rows and line.startswith("  "):
            offset, size, text = rows[-1]
            rows[-1] = (offset, size, f"{text} {line.strip()}")
    return rows


def rows_of_the_page() -> list[tuple[int, int, str]]:
    _, _, chapter = PAGE.partition("\n## `weight_header_{slot}.bin`\n")
    assert chapter
    found = re.findall(r"^\| (\d+) \| (\d+) \| (.*) \|$", chapter, re.MULTILINE)
    return [(int(offset), int(size), text) for offset, size, text in found]


def test_the_page_says_what_the_module_says() -> None:
    module = [
        (offset, size, text.replace("``", "`")) for offset, size, text in rows_of_the_module()
    ]
    assert module == rows_of_the_page()


def test_the_table_says_where_everything_is_in_memory() -> None:
    sizes = [struct.calcsize("<" + code) for code in re.findall(r"\d*[a-zA-Z]", "8sQIIQ16s")]
    sizes += [8] * 6 + [16, 8, 4, 4]
    assert struct.calcsize(header._FORMAT.format) == sum(sizes) == header.SIZE
    rows = rows_of_the_page()
    assert [size for _, size, _ in rows] == sizes
    assert [offset for offset, _, _ in rows] == [sum(sizes[:n]) for n in range(len(sizes))]


def test_each_field_is_at_the_offset_that_the_table_says() -> None:
    plain = header.Header(2, 0, "left", 0, "0" * 32, 0, 0, 0, 0, 0.0, None, "0" * 32, "0" * 16)
    changes = {
        8: {"sequence": 4},
        16: {"pid": 1},
        20: {"state": "ready"},
        24: {"process_start_ticks": 1},
        32: {"boot_id": "01" * 16},
        48: {"layout_generation": 1},
        56: {"content_generation": 1},
        64: {"physical_epoch": 1},
        72: {"kv_physical_epoch": 1},
        80: {"updated_at": 1e-9},
        88: {"checked_at": 1e-9},
        96: {"layout_digest": "01" * 16},
        112: {"instance": "01" * 8},
    }
    before = header.pack(plain)
    for offset, change in changes.items():
        after = header.pack(plain._replace(**change))
        differs = next(n for n in range(header.SIZE) if before[n] != after[n])
        assert differs == offset, change
        assert after[124:] != before[124:]
    assert set(changes) | {0, 120, 124} == {offset for offset, _, _ in rows_of_the_page()}


def test_the_page_numbers_the_states_as_the_code_does() -> None:
    (line,) = [line for line in PAGE.splitlines() if line.startswith("The states, by number")]
    assert [name for _, name in re.findall(r"(\d) `(\w+)`", line)] == list(header.CODES)
    assert [int(number) for number, _ in re.findall(r"(\d) `(\w+)`", line)] == list(
        range(len(header.CODES))
    )
