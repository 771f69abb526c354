"""``sglang-weight-hook report``."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

from ..reader import Document, HookError, Slot, totals
from .app import ACT, NO_ANSWER, command
from .options import AllowStaleOption, DirsOption, JsonOption
from .render.table import Column, print_table
from .render.text import complain, print_json, print_line, printable, size_text
from .selection import directories_of, heading, stale_status


@command(
    "report",
    "sglang-weight-hook report\nsglang-weight-hook report --dir '/shared/maps/*' --json",
)
def report(
    directories: DirsOption = None,
    count_stale: Annotated[
        bool, typer.Option("--gone", help="Also count stale slots, whose owner has exited.")
    ] = False,
    allow_stale: AllowStaleOption = False,
    as_json: JsonOption = False,
) -> int:
    """Add up each GPU's memory: weights, KV cache, other use, free.

    A storage that a draft shares with its target is counted once.  Exit status 3 if a slot is
    stale, so left out unless --gone counts it, or is not ready, or cannot be read.
    """
    directories_given = directories_of(directories)
    status = 0
    counted: list[Document] = []
    slots: list[dict[str, Any]] = []
    unreadable = 0
    for found in directories_given:
        try:
            published = found.slots()
        except HookError as error:
            if len(directories_given) == 1:
                raise
            complain(f"{found.path} is left out: {error}")
            unreadable += 1
            continue
        for slot in published:
            entry: dict[str, Any] = {"dir": found.path, "slot": slot.name}
            slots.append(entry)
            try:
                alive = entry["owner_alive"] = slot.owner_alive()
                document = _countable(slot) if alive or count_stale else None
            except HookError as error:
                # The others' sums are still true; that they are not all is told here, by `counted`
                # and by the exit status.
                complain(f"slot {slot.name} in {found.path} is left out: {error}")
                entry.update(counted=False, problem=str(error))
                unreadable += 1
                continue
            entry["counted"] = document is not None
            if document is None:
                complain(
                    f"slot {slot.name} in {found.path} is left out: its owner has exited "
                    f"(--gone counts it)"
                )
                status = max(status, 0 if allow_stale else ACT)
                continue
            status = max(status, stale_status(document, allow_stale))
            counted.append(document)
            entry.update(heading(document))
            names = ("role", "model_path", "model_class", "quantization", "tp_rank", "tp_size")
            entry["identity"] = {name: document.identity.get(name) for name in names}
    if unreadable:
        if not counted:
            return NO_ANSWER
        status = ACT
    gpus = totals.per_gpu(counted)
    total = totals.together(gpus)
    if as_json:
        print_json(
            {
                "gpus": [{**gpu.as_dict(), "rest": _other(gpu)} for gpu in gpus],
                "total": {**total.as_dict(), "rest": _other(total)},
                "slots": slots,
            }
        )
        return status
    if not gpus:
        if slots:
            return status
        where = ", ".join(found.path for found in directories_given)
        raise HookError(
            f"no live SGLang publishes in {where}; check --dir and that the server has loaded its "
            f"model"
        )
    _print_gpus(gpus, total)
    return status


def _countable(slot: Slot) -> Document:
    """The slot's document, if all that the sums need can be read in it.  Raises HookError."""
    document = slot.read()
    totals.per_gpu([document])
    return document


def _print_gpus(gpus: list[totals.Gpu], total: totals.Gpu) -> None:
    lora = any(gpu.lora for gpu in gpus)
    columns = [Column("GPU"), Column("weights", right=True)]
    columns += [Column("LoRA", right=True)] if lora else []
    columns += [Column(name, right=True) for name in ("KV cache", "other", "free", "total")]
    columns += [Column("slots")]
    rows = []
    for gpu in [*gpus, total] if len(gpus) > 1 else gpus:
        row = ["total" if gpu is total else printable(gpu.label), size_text(gpu.weights)]
        row += [size_text(gpu.lora)] if lora else []
        row += [size_text(gpu.kv_cache), *map(size_text, (_other(gpu), gpu.free, gpu.total))]
        row += [str(len(gpu.slots)) if gpu is total else printable(" ".join(gpu.slots))]
        rows.append(row)
    print_table(columns, rows)
    if total.released:
        print_line(
            f"{size_text(total.released)} of these are released: addresses without physical memory"
        )
    if total.elsewhere:
        print_line(f"{size_text(total.elsewhere)} of weights lie on another device (offloaded)")
    if total.total is None:
        print_line("-: unknown; only CUDA devices report total and free memory")


def _other(gpu: totals.Gpu) -> Optional[int]:
    """Used memory that is neither weights, LoRA pool nor KV cache."""
    if gpu.total is None or gpu.free is None:
        return None
    return gpu.total - gpu.free - (gpu.weights + gpu.lora + gpu.kv_cache - gpu.released)
