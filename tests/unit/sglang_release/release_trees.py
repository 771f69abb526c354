"""Small made-up releases of SGLang: files as text, below ``sglang/srt``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sglang_weight_hook_patch_core as core
from tools.sglang_release import findings
from tools.sglang_release.paths import Paths
from tools.sglang_release.sources import open_release
from tools.sglang_release.summaries import Summary, summary_of

RUNNER = "srt.model_executor.model_runner:ModelRunner."


def make_tree(folder: Path, files: dict[str, str], version: str = "0.5.99") -> Path:
    """``files``: path below sglang/srt -> text."""
    for name, text in {"__init__.py": "", **files}.items():
        path = folder / "sglang" / "srt" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "sglang" / "version.py").write_text(f'__version__ = "{version}"\n')
    return folder


def summary(folder: Path, files: dict[str, str], version: str = "0.5.99") -> Summary:
    return summary_of(open_release(str(make_tree(folder, files, version))))


def row(method: str, owner: str = "ModelRunner", module: str = "", **more: Any) -> core.EntryPoint:
    site = (module or core.RUNNER[0], owner)
    return core.EntryPoint(more.pop("event", method), more.pop("effect", "update"), site, method,
                           "self", **more)  # fmt: skip


def runner(body: str, head: str = "") -> dict[str, str]:
    """A release whose ModelRunner has these methods."""
    lines = "\n".join("    " + line for line in body.strip("\n").split("\n"))
    return {"model_executor/model_runner.py": f"{head}\nclass ModelRunner:\n{lines}\n"}


def uncovered(
    release: Summary, *entries: core.EntryPoint, requests: tuple[core.EntryPoint, ...] = ()
) -> dict[str, list[str]]:
    """Kind of finding -> places."""
    result: dict[str, list[str]] = {}
    for each in findings.uncovered(Paths(release), entries, requests):
        result.setdefault(each.kind, []).append(each.place)
    return result
