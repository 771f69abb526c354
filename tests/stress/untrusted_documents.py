"""Documents with any change somewhere, and everything that reads them.

With hypothesis from `test_untrusted_documents.py`; with atheris, where it is installed:

    python -m tests.stress.untrusted_documents FOLDER -max_total_time=60

FOLDER holds a good ``maps/`` directory (`test_untrusted_documents.py` makes one) and takes
what was found.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sglang_weight_hook import reader
from sglang_weight_hook.commands import entry as cli
from sglang_weight_hook.layout import files
from sglang_weight_hook.reader import totals
from tests.stress.processes import copy_documents

Pick = Callable[[int], int]  # a number from 0 to n - 1

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 4096, 2**31, 2**63 - 1, 2**63, 2**64, 2**64 + 1, -(2**63),
    10**400, 1.5, -0.0, 1e308, float("inf"), float("nan"), "", "x", "0", "\0", "\n", "\x1b[2J",
    "\ud800", "é" * 50, "a" * 100_000, "../../etc/passwd", "<script>alert(1)</script>",
    "[bold]x[/bold]", "[/", "ready", "released", "cuda:0", "torch.float32", "parameter", [], {},
    [0], [1, 1], [-1], [2**62] * 200, [10**300] * 2000, [1] * 5000, ["x", "x"], [[]], [None],
    {"": {}}, {"ptr": 1}, {"x": {"ptr": 1, "size": 1}}, [{"ptr": 1, "size": 2**64}],
)  # fmt: skip


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every (container, key) of a document."""
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    for key in keys:
        found.append((value, key))
        if isinstance(value[key], (dict, list)):
            places(value[key], found)
    return found


def corrupt(document: Any, pick: Pick) -> Any:
    """Change a few things somewhere in a document, in place."""
    for _ in range(1 + pick(4)):
        every = places(document, [])
        if not every:
            break
        container, key = every[pick(len(every))]
        way = pick(6)
        if way == 0 and isinstance(container, dict):
            del container[key]
        elif way == 1:
            other, that = every[pick(len(every))]
            container[key] = copy.deepcopy(other[that])
        elif way == 2 and isinstance(container, dict):
            name = VALUES[pick(len(VALUES))]
            if isinstance(name, str):
                container[name] = container.pop(key)
        elif way == 3:
            container[key] = nested(1 + pick(200))
        else:
            container[key] = copy.deepcopy(VALUES[pick(len(VALUES))])
    return document


def spoil(data: bytes, pick: Pick) -> bytes:
    """Change the bytes of a file."""
    way = pick(5)
    where = pick(len(data) + 1)
    if way == 0:
        return data[:where]
    if way == 1:
        return data[:where] + bytes([pick(256)]) + data[where + 1 :]
    if way == 2:
        return data[:where] + data[:where]
    if way == 3:
        return data[:where] + b"[" * 100_000 + data[where:]
    return data[:where] + b"9" * 10_000 + data[where:]


def spread(good: Path, bad: Path, pick: Pick) -> None:
    """A copy of the directory ``good`` in which some file untrusted_documents."""
    copy_documents(good, bad)
    names = sorted(name for name in os.listdir(good) if name.endswith(".json"))
    favourites = [files.LAYOUT.format("0"), files.STATE.format("0")] * 3
    for _ in range(1 + pick(2)):
        path = bad / (favourites + names)[pick(len(favourites) + len(names))]
        data = path.read_bytes()
        if pick(4):
            with contextlib.suppress(ValueError):
                data = json.dumps(corrupt(json.loads(data), pick)).encode()
        else:
            data = spoil(data, pick)
        path.write_bytes(data)


def read_all(good: Path, bad: Path) -> None:
    """Use the reader in every way; `HookError` is the only exception there may be."""
    directory = reader.open_directory(str(bad))
    for slot in directory.slots():
        with contextlib.suppress(reader.HookError):
            slot.owner_alive()
        with contextlib.suppress(reader.HookError):
            slot.wait_for_change(timeout=0)
        for document in (_read(slot), _open(slot)):
            if document is not None:
                _use(document, _open(reader.Slot(str(good), "0")))
    with contextlib.suppress(reader.HookError):
        list(directory.events(timeout=0))
    with contextlib.suppress(reader.HookError):
        list(directory.slot("0").generations(timeout=0))


def _read(slot: reader.Slot) -> Any:
    with contextlib.suppress(reader.HookError):
        return slot.read(timeout=0)
    return None


def _open(slot: reader.Slot) -> Any:
    with contextlib.suppress(reader.HookError):
        return reader.open_file(slot.path(files.LAYOUT))
    return None


def _use(document: reader.Document, other: reader.Document) -> None:
    uses: tuple[Callable[[], Any], ...] = (
        lambda: [(t.end, t.itemsize, t.layer, t.role) for t in document.iter_tensors()],
        lambda: [region.end for region in document.iter_regions()],
        lambda: [buffer.end for buffer in document.iter_kv_cache()],
        lambda: [document.lookup(tensor.ptr + 1) for tensor in document.iter_tensors()],
        lambda: [document.lookup(address) for address in (0, 4096, 2**64, -1)],
        lambda: document.region_at(4096),
        lambda: document.tensor("layer0"),
        lambda: document.owner_alive(),
        lambda: (document.layout_generation, document.content_generation, document.physical_epoch),
        lambda: document.changes_since(other).must_register_again,
        lambda: other.changes_since(document).as_dict(),
        lambda: totals.together(totals.per_gpu([document, other])),
        lambda: repr(document),
    )
    for use in uses:
        with contextlib.suppress(reader.HookError):
            use()


def commands(good: Path, bad: Path) -> list[list[str]]:
    layout = files.LAYOUT.format("0")
    page = str(bad / "page.html")
    at = ["--dir", str(bad)]
    return [
        ["show", *at], ["show", "--json", "--sort", "size", *at], ["show", str(bad / layout)],
        ["regions", *at], ["regions", "--json", *at],
        ["lookup", "0x1000", *at], ["lookup", "4096", "--json", *at],
        ["diff", str(good / layout), "0", *at], ["diff", str(bad / layout), str(good / layout)],
        ["diff", "0", str(good / layout), "--json", *at],
        ["report", "--gone", *at], ["report", "--gone", "--json", *at],
        ["watch", "--timeout", "0", *at], ["watch", "--timeout", "0", "--json", *at],
        ["verify", *at], ["verify", "--json", *at], ["verify", str(bad / layout)],
        ["plot", "-o", page, *at], ["plot", "-o", page, "--before", str(good / layout), *at],
    ]  # fmt: skip


def run_command(arguments: list[str]) -> tuple[int, str]:
    """One command in this process: its status and what it said on stderr."""
    out, err = io.TextIOWrapper(io.BytesIO()), io.TextIOWrapper(io.BytesIO())
    before, sys.argv = sys.argv, ["sglang-weight-hook", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = cli.main()
            err.flush()
    finally:
        sys.argv = before
    return status, err.buffer.getvalue().decode()


def check_command(arguments: list[str]) -> None:
    status, said = run_command(arguments)
    assert status in (0, 1, 2, 3), (arguments, status)
    assert "Traceback" not in said, (arguments, said)
    if status == 1:
        assert said.strip(), arguments


def no_waiting() -> None:
    """A document that does not settle is not waited for."""
    reader.Slot.read.__defaults__ = (0.0,)


def main() -> None:
    import atheris  # type: ignore[import-not-found,import-untyped,unused-ignore]

    folder = Path(sys.argv[1]).resolve()
    good, bad = folder / "maps", folder / "untrusted"
    no_waiting()
    every = commands(good, bad)

    def one(data: bytes) -> None:
        source = atheris.FuzzedDataProvider(data)

        def pick(count: int) -> int:
            return int(source.ConsumeIntInRange(0, count - 1))

        chosen = every[pick(len(every))]
        spread(good, bad, pick)
        read_all(good, bad)
        check_command(chosen)

    atheris.instrument_func(one)
    atheris.Setup([sys.argv[0], f"-artifact_prefix={folder}/", *sys.argv[2:]], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
