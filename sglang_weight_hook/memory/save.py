"""Weights of a running server into safetensors files, in a stream.

Needs no more memory than one piece, however large the model.  Every byte in the files is of one
generation; what was written of another is never left behind as a file that looks good.  Files have
other names until all of them are written; an index comes last, and goes first where it is replaced.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Optional, Union

from .. import __version__
from ..layout.states import READY
from ..reader import Document, HookError, NotReady, OwnerGone, Slot, Tensor
from . import safetensors_file
from .errors import Changed
from .memory import Memory
from .safetensors_file import Entry
from .transport import is_transferred

SHARD_BYTES = 5_000_000_000  # as Hugging Face's libraries have it
PARTIAL = ".partial"  # added to a name until the file is whole
SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"


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
    source: Union[Slot, Document],
    path: str,
    wanted: Callable[[Tensor], bool] = lambda tensor: True,
    shard_bytes: int = SHARD_BYTES,
    via: Optional[str] = None,
    force: bool = False,
    tell: Callable[[Progress], None] = lambda progress: None,
    address: Optional[str] = None,
) -> Saved:
    """Save a slot's weights as ``path``, or as several files and an index named after it.

    ``source``: also a saved copy of a map, whose memory a transfer engine reaches (``via``,
    ``address``).
    Raises HookError: `Changed` if the weights change meanwhile (nothing is left then), and OSError
    where the files cannot be written (what was written is taken up by the next try, if the weights
    are still the same then).
    """
    safetensors_file.require()  # and not after an hour of writing
    document = _good_document(source, via)
    chosen, left_out = _chosen(document, wanted)
    if not chosen:
        raise HookError(f"slot {document.slot.name} has no tensor to be saved; see --match")
    pairs = {tensor.name: safetensors_file.entry_of(tensor) for tensor in chosen}
    raw = {tensor.name: tensor.dtype for tensor in chosen if pairs[tensor.name][1]}
    metadata = _metadata(document, left_out, raw)
    shards = list(_sharded([pairs[tensor.name][0] for tensor in chosen], shard_bytes))
    target = _Target(path, _names(path, len(shards)), path.removesuffix(SUFFIX) + INDEX_SUFFIX)
    headers = _headers(target, shards, metadata)
    whole = _refuse_to_replace(target, headers, shards, force)
    total = sum(tensor.size for tensor in chosen)
    resumed = done = 0
    with _alone(target.files[0] + PARTIAL), _nothing_left_of_others(target.files):
        with document.open_memory(via=via, address=address) as memory:
            for name, header, shard in zip(target.files, headers, shards):
                size = sum(entry.size for entry in shard)
                if name in whole:
                    resumed += size
                else:
                    telling = _telling(tell, done, total)
                    resumed += _write(memory, name + PARTIAL, header, shard, telling)
                done += size
            memory.check()
        written = [name for name in target.files if name not in whole]
        for name, shard in zip(target.files, shards):
            if name in written:
                _read_back(name + PARTIAL, shard)
        _put_in_place(target, written)
    index = None
    if len(shards) > 1:
        index = target.index_file
        _write_index(target, shards, {**metadata, "total_size": total})
    return Saved(target.files, index, len(chosen), total, resumed, left_out, raw, document)


class _Target(NamedTuple):
    """The names that a save takes."""

    path: str  # as it was asked for
    files: list[str]
    index_file: str  # written only for several files


def _good_document(source: Union[Slot, Document], via: Optional[str]) -> Document:
    document = source if isinstance(source, Document) else source.read()
    slot = document.slot
    if is_transferred(document, via):
        return document  # what is true there, the owner's own header says
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
    return document


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
    """What a file says of itself, but when it was saved: the same for the same weights."""
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


def _is_without_index(target: _Target) -> bool:
    """Whether files that have their names already can be those of an interrupted save."""
    return len(target.files) > 1 and not os.path.lexists(target.index_file)


def _headers(target: _Target, shards: list[list[Entry]], metadata: dict[str, str]) -> list[bytes]:
    """What each file begins with: as an earlier try had it, if that was of the same weights."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    first = target.files[0]
    for name in (first + PARTIAL, *([first] if _is_without_index(target) else [])):
        earlier = safetensors_file.metadata_at(name).get("saved_at")
        if earlier is not None:
            found = [
                safetensors_file.header_of(shard, {**metadata, "saved_at": earlier})
                for shard in shards
            ]
            if _begins_with(name, found[0]):
                return found
    return [safetensors_file.header_of(shard, {**metadata, "saved_at": now}) for shard in shards]


def _refuse_to_replace(
    target: _Target, headers: list[bytes], shards: list[list[Entry]], force: bool
) -> set[str]:
    """The files that an earlier try had put in place, before it came to the index."""
    whole: set[str] = set()
    if _is_without_index(target):
        whole = {
            name
            for name, header, shard in zip(target.files, headers, shards)
            if _is_whole(name, header, shard)
        }
    for name in (target.path, *target.files, target.index_file):
        if not force and name not in whole and os.path.lexists(name):
            raise HookError(f"{name} exists already; give another name, or --force to replace it")
    return whole


def _is_whole(name: str, header: bytes, shard: list[Entry]) -> bool:
    """Whether a file is as long as the one that would be written, and begins like it."""
    try:
        size = os.stat(name).st_size
    except OSError:
        return False
    return size == len(header) + sum(e.size for e in shard) and _begins_with(name, header)


def _begins_with(name: str, header: bytes) -> bool:
    try:
        with open(name, "rb") as file:
            return _begins(file, header)
    except OSError:
        return False


def _begins(file: Any, header: bytes) -> bool:
    file.seek(0)
    return bool(file.read(len(header)) == header)


@contextlib.contextmanager
def _alone(partial: str) -> Iterator[None]:
    """Nobody else writes the same files meanwhile.  Raises HookError."""
    descriptor = _opened(partial)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever had the lock may have finished, and its file has its own name now.
            is_it = os.path.samestat(os.fstat(descriptor), os.stat(partial))
        except (BlockingIOError, FileNotFoundError):
            is_it = False
        if not is_it:
            raise HookError(
                f"{partial} is being written by another process; wait for it, or give another name"
            )
        yield
    finally:
        os.close(descriptor)


def _opened(partial: str) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    descriptor = os.open(partial, flags, 0o666)
    status = os.fstat(descriptor)
    why = None
    if not stat.S_ISREG(status.st_mode):
        why = "is no regular file"
    elif status.st_uid != os.geteuid() or status.st_nlink != 1 or status.st_mode & 0o002:
        why = "is another user's or can be written by others, so what it holds is not trusted"
    if why is not None:
        os.close(descriptor)
        raise HookError(f"{partial} {why}; remove it, or give another name")
    return descriptor


@contextlib.contextmanager
def _nothing_left_of_others(files: list[str]) -> Iterator[None]:
    """Where the weights change, nobody can go on with what was written; nor with an empty file."""
    try:
        yield
    except Changed:
        for name in files:
            with contextlib.suppress(OSError):
                os.unlink(name + PARTIAL)
        raise
    except BaseException:
        for name in files:
            with contextlib.suppress(OSError):
                if not os.path.getsize(name + PARTIAL):
                    os.unlink(name + PARTIAL)
        raise


def _write(
    memory: Memory,
    partial: str,
    header: bytes,
    shard: list[Entry],
    tell: Callable[[str, int], None],
) -> int:
    """One file; how many bytes of values an earlier try had written."""
    with os.fdopen(_opened(partial), "r+b", buffering=0) as file:
        try:
            kept = _kept(file, header, shard)
            done = 0
            for entry in shard:
                done += entry.size
                if done > kept:
                    _write_tensor(memory, file, entry, done - entry.size, tell)
            os.fsync(file.fileno())
        except OSError as error:
            if os.fstat(file.fileno()).st_size < len(header):
                file.truncate(0)  # nobody can go on with it
            raise OSError(error.errno, error.strerror, partial) from error
    return kept


def _write_tensor(
    memory: Memory, file: Any, entry: Entry, written: int, tell: Callable[[str, int], None]
) -> None:
    try:
        for piece in memory.pieces(entry.name):
            _put(file, piece)
            written += len(piece)
            tell(entry.name, written)
    except Changed as error:
        raise Changed(
            f"the weights changed before {entry.name} was saved: {error}; save them again, or "
            f"with --hold"
        ) from error


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


def _read_back(partial: str, shard: list[Entry]) -> None:
    """Raises HookError where the library does not find in a file what was written."""
    found = safetensors_file.checked(partial)
    if set(found.keys()) != {entry.name for entry in shard}:
        raise HookError(f"{partial} does not read back as it was written; save it again")


def _put_in_place(target: _Target, written: list[str]) -> None:
    """Give the files their names.  Without its index, a set that is half replaced is none."""
    for name in {target.index_file, target.path} - set(target.files):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
    _flush_folder(target.path)
    for name in target.files:
        if name in written:
            os.replace(name + PARTIAL, name)
        else:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name + PARTIAL)
    _flush_folder(target.path)


def _flush_folder(name: str) -> None:
    descriptor = os.open(os.path.dirname(os.path.abspath(name)), os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_index(target: _Target, shards: list[list[Entry]], metadata: dict[str, Any]) -> None:
    """As Hugging Face's libraries read it."""
    content = {
        "metadata": metadata,
        "weight_map": {
            entry.name: os.path.basename(file)
            for file, shard in zip(target.files, shards)
            for entry in shard
        },
    }
    partial = target.index_file + PARTIAL
    with os.fdopen(_opened(partial), "r+", encoding="utf-8") as file:
        file.truncate(0)
        json.dump(content, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, target.index_file)
    _flush_folder(target.index_file)
