"""What must hold of a published map on a GPU, and a report of what was seen."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sglang_weight_hook as hook
from tests.gpu import checkpoint_bytes
from tests.gpu.gpu_server import GpuServer
from tests.unit.memory_figures import PARTS, sum_of_parts


class Report:
    """Checks by name, with what was seen; printed as they are made."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    @contextmanager
    def check(self, name: str) -> Iterator[dict[str, Any]]:
        seen: dict[str, Any] = {}
        started = time.monotonic()
        try:
            yield seen
            held, why = True, ""
        except Exception as error:
            held, why = False, f"{type(error).__name__}: {error}"
            traceback.print_exc()
        seconds = round(time.monotonic() - started, 2)
        self.rows.append({"check": name, "held": held, "why": why, "seen": seen, "s": seconds})
        shown = ", ".join(f"{key} {value}" for key, value in seen.items())
        print(f"{'ok  ' if held else 'FAIL'} {name}: {shown} {why}".rstrip(), flush=True)


def check_geometry(document: hook.Document, seen: dict[str, Any]) -> None:
    """Every tensor in regions, every region in one driver allocation, none overlap."""
    raw = document.raw
    previous_end = 0
    covered: dict[str, int] = {}
    for region in raw["regions"]:
        start, end = region["ptr"], region["ptr"] + region["size"]
        base = region["allocation_ptr"]
        assert region["allocation_source"] == "driver", region
        assert base <= start, region
        assert end <= base + region["allocation_size"], region
        assert start >= previous_end, "regions overlap"
        previous_end = end
        for name in region["tensors"]:
            tensor = raw["tensors"][name]
            first, last = tensor["ptr"], tensor["ptr"] + tensor["span"]
            covered[name] = covered.get(name, 0) + min(end, last) - max(start, first)
    for name, tensor in raw["tensors"].items():
        if tensor["resident"]:
            assert covered.get(name, 0) == tensor["span"], name
    kinds = {region["allocation_kind"] for region in raw["regions"]}
    seen.update(
        tensors=len(raw["tensors"]), regions=len(raw["regions"]), kinds=sorted(map(str, kinds))
    )


def check_memory(document: hook.Document, seen: dict[str, Any]) -> None:
    memory = document.raw["memory"]
    assert sum_of_parts(memory) == memory["device_total_bytes"], memory
    seen.update({part: memory[part] for part in PARTS})
    seen.update(document.raw["validation"]["allocator"])


def check_bytes(
    server: GpuServer, slot: str, folder: Path, seen: dict[str, Any], rank: int = 0, ranks: int = 1
) -> None:
    """Bytes through the published addresses equal the checkpoint's."""
    held = server.bytes_by_slot(ranks)[slot]
    wanted = checkpoint_bytes.expected(folder, rank, ranks)
    compared = wanted.keys() & held.keys()
    wrong = sorted(name for name in compared if held[name] != wanted[name])
    assert not wrong, wrong
    missing = sorted(wanted.keys() - held.keys())
    seen.update(equal=len(compared), not_published=missing)
    assert not missing
