"""Weights of a running server into safetensors files, in a stream.

Needs no more memory than one piece, however large the model.  Every byte in the files is of one
generation; what was written of another is never left behind as a file that looks good.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Optional

from .. import __version__
from ..layout.states import READY
from ..reader import Document, HookError, NotReady, OwnerGone, Slot, Tensor
from . import safetensors_file
from .errors import Changed
from .memory import Memory
from .safetensors_file import Entry

SHARD_BYTES = 5_000_000_000  # as Hugging Face's libraries have it
PARTIAL = ".partial"  # added to a name until the file is whole
SUFFIX = ".safetensors"


class Saved(NamedTuple):
    """What was written."""

    files: list[str]
    index_file: Optional[str]  # only where there are several files
    tensors: int
    bytes: int  # of the values
    resumed: int  # of these, bytes that an earlier try had written
    left_out: dict[str, str]  # name -> why
    raw: dict[str, str]  # tensors saved as plain bytes -> torch's name of their type
    document: Document


class Progress(NamedTuple):
    """So much has been written."""

    tensor: str
    bytes: int
    of: int


def save(
    slot: Slot,
    path: str,
    wanted: Callable[[Tensor], bool] = lambda tensor: True,
    shard_bytes: int = SHARD_BYTES,
    via: Optional[str] = None,
    force: bool = False,
    tell: Callable[[Progress], None] = lambda progress: None,
) -> Saved:
    """Save a slot's weights as ``path``, or as several files and an index named after it.

    Raises HookError: `Changed` if the weights change meanwhile (nothing is left then), and OSError
    where the files cannot be written (what was written is taken up by the next try, if the weights
    are still the same then).
    """
    document = slot.read()
    if not document.owner_alive():
        raise OwnerGone(
            f"slot {slot.name} is stale: its owner has exited, and its memory with it; start the "
            f"server again"
        )
    if document.state["state"] != READY:
        raise NotReady(
            f"slot {slot.name} is {document.state['state']}, so its weights are not whole or not "
            f"there; wait until it is ready"
        )
    chosen, left_out = _chosen(document, wanted)
    if not chosen:
        raise HookError(f"slot {slot.name} has no tensor to be saved; see --match")
    pairs = {tensor.name: safetensors_file.entry_of(tensor) for tensor in chosen}
    raw = {tensor.name: tensor.dtype for tensor in chosen if pairs[tensor.name][1]}
    metadata = _metadata(document, left_out, raw)
    shards = list(_sharded([pairs[tensor.name][0] for tensor in chosen], shard_bytes))
    files = _names(path, len(shards))
    total = sum(tensor.size for tensor in chosen)
    headers = [safetensors_file.header_of(shard, metadata) for shard in shards]
    _refuse_to_replace(files, headers, shards, force)
    resumed = done = 0
    with document.open_memory(via=via) as memory:
        for name, header, shard in zip(files, headers, shards):
            resumed += _write(memory, name, header, shard, _telling(tell, done, total))
            done += sum(entry.size for entry in shard)
    index = _write_index(path, files, shards, metadata) if len(files) > 1 else None
    return Saved(files, index, len(chosen), total, resumed, left_out, raw, document)


def _telling(
    tell: Callable[[Progress], None], before: int, total: int
) -> Callable[[str, int], None]:
    """Progress in one file as progress of all; ``before``: bytes in the files before it."""

    def of_file(tensor: str, written: int) -> None:
        tell(Progress(tensor, before + written, total))

    return of_file


def _chosen(
    document: Document, wanted: Callable[[Tensor], bool]
) -> tuple[list[Tensor], dict[str, str]]:
    chosen, left_out = [], {}
    for tensor in document.iter_tensors():
        if not wanted(tensor):
            continue
        if not tensor.resident:
            left_out[tensor.name] = f"it lies on {tensor.device}"
        elif tensor.volatile:
            left_out[tensor.name] = "SGLang rewrites it in a forward"
        else:
            chosen.append(tensor)
    return chosen, left_out


def _metadata(document: Document, left_out: dict[str, str], raw: dict[str, str]) -> dict[str, str]:
    """What a file says of itself; the same for the same weights, so that a try can be resumed."""
    identity = document.identity
    names = (
        *("hostname", "pid", "process_start_ticks", "role", "draft_index", "model_path"),
        *("model_class", "quantization", "tp_rank", "tp_size", "pp_rank", "pp_size"),
        *("dp_rank", "dp_size", "ep_rank", "ep_size", "node_rank", "gpu_id", "sglang_version"),
    )
    aliases = {t.name: list(t.aliases) for t in document.iter_tensors() if t.aliases}
    found = {
        "format": "pt",
        "generator": f"sglang-weight-hook {__version__}",
        "slot": document.slot.name,
        "instance": document.instance or "",
        "layout_generation": str(document.layout_generation),
        "content_generation": str(document.content_generation),
        "physical_epoch": str(document.physical_epoch),
        "updated_at": str(document.state.get("updated_at")),
        "aliases": json.dumps(aliases),
        "left_out": json.dumps(left_out),
        safetensors_file.RAW: json.dumps(raw),
    }
    for name in names:
        if identity.get(name) is not None:
            found[name] = str(identity[name])
    return found


def _sharded(entries: list[Entry], limit: int) -> Iterator[list[Entry]]:
    """In the model's order; a tensor larger than ``limit`` has a file of its own."""
    shard: list[Entry] = []
    size = 0
    for entry in entries:
        if shard and size + entry.size > limit:
            yield shard
            shard, size = [], 0
        shard.append(entry)
        size += entry.size
    if shard:
        yield shard


def _names(path: str, count: int) -> list[str]:
    if count == 1:
        return [path]
    stem = path.removesuffix(SUFFIX)
    return [f"{stem}-{n:05d}-of-{count:05d}{SUFFIX}" for n in range(1, count + 1)]


def _refuse_to_replace(
    files: list[str], headers: list[bytes], shards: list[list[Entry]], force: bool
) -> None:
    for name, header, shard in zip(files, headers, shards):
        if (
            os.path.lexists(name)
            and not force
            and not (len(files) > 1 and _is_whole(name, header, shard))
        ):
            raise HookError(f"{name} exists already; give another name, or --force to replace it")


def _is_whole(name: str, header: bytes, shard: list[Entry]) -> bool:
    """Whether a file is the very one that would be written: of an earlier try."""
    try:
        with open(name, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            return size == len(header) + sum(e.size for e in shard) and _begins(file, header)
    except OSError:
        return False


def _begins(file: Any, header: bytes) -> bool:
    file.seek(0)
    return bool(file.read(len(header)) == header)


def _write(
    memory: Memory,
    name: str,
    header: bytes,
    shard: list[Entry],
    tell: Callable[[str, int], None],
) -> int:
    """One file; how many bytes of values an earlier try had written."""
    size = sum(entry.size for entry in shard)
    if _is_whole(name, header, shard):
        return size
    partial = name + PARTIAL
    descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    with os.fdopen(descriptor, "r+b", buffering=0) as file:
        kept = _kept(file, header, shard)
        done = 0
        try:
            for entry in shard:
                done += entry.size
                if done > kept:
                    written = done - entry.size
                    for piece in memory.pieces(entry.name):
                        _put(file, piece)
                        written += len(piece)
                        tell(entry.name, written)
            memory.check()
        except Changed:
            with contextlib.suppress(OSError):
                os.unlink(partial)  # nobody can go on with it
            raise
        os.fsync(descriptor)
    found = safetensors_file.checked(partial)
    if set(found.keys()) != {entry.name for entry in shard}:
        raise HookError(f"{partial} does not read back as it was written; save it again")
    del found
    os.replace(partial, name)
    _flush_folder(name)
    return kept


def _kept(file: Any, header: bytes, shard: list[Entry]) -> int:
    """Make ``file`` begin with ``header``; bytes of whole tensors that are behind it already."""
    there = os.fstat(file.fileno()).st_size - len(header)
    kept = 0
    if there >= 0 and _begins(file, header):
        for entry in shard:
            if kept + entry.size > there:
                break
            kept += entry.size
        file.truncate(len(header) + kept)
        file.seek(len(header) + kept)
        return kept
    file.truncate(0)
    file.seek(0)
    _put(file, memoryview(header))
    return 0


def _put(file: Any, data: memoryview) -> None:
    while len(data):
        data = data[file.write(data) :]


def _flush_folder(name: str) -> None:
    descriptor = os.open(os.path.dirname(os.path.abspath(name)), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_index(
    path: str, files: list[str], shards: list[list[Entry]], metadata: dict[str, str]
) -> str:
    """The index that Hugging Face's libraries look for; written last."""
    name = path.removesuffix(SUFFIX) + SUFFIX + ".index.json"
    total = sum(entry.size for shard in shards for entry in shard)
    content = {
        "metadata": {"total_size": total, **metadata},
        "weight_map": {
            entry.name: os.path.basename(file)
            for file, shard in zip(files, shards)
            for entry in shard
        },
    }
    partial = name + PARTIAL
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, name)
    _flush_folder(name)
    return name
