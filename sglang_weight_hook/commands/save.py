"""``sglang-weight-hook save``."""

from __future__ import annotations

import contextlib
import errno
import functools
import re
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Union

import typer

from ..layout.transport_document import ENGINES
from ..memory.save import SHARD_BYTES, Progress, Saved, save
from ..memory.transport import is_transferred
from ..reader import (
    ControlError,
    Document,
    HookError,
    NoSocket,
    NotAllowed,
    Slot,
    open_directory,
    open_file,
)
from ..reader.slot_names import slot_named
from .app import Misused, command
from .options import AddressOption, DirOption, JsonOption, MatchOption, ViaOption
from .render.text import complain, print_json, print_line, remark, size_text
from .selection import heading, is_wanted, slots_in
from .slot_choice import a_slot_or_file_named

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


_Slot = Annotated[
    str,
    typer.Argument(
        metavar="SLOT",
        help="A slot of a running server (0, 0_draft, ...), or with --via mooncake or nixl a "
        "saved layout file.",
        autocompletion=a_slot_or_file_named,
    ),
]
_File = Annotated[
    str,
    typer.Argument(
        metavar="FILE",
        help="The .safetensors file; weights of several shards are written as "
        "FILE-00001-of-0000N.safetensors, with an index.",
    ),
]


@command(
    "save",
    "sglang-weight-hook save 0 model.safetensors\n"
    "sglang-weight-hook save 0 layer3.safetensors --match '*.layers.3.*'\n"
    "sglang-weight-hook save 0 m.safetensors --shard-size 10GB --hold",
)
def save_(
    slot: _Slot,
    path: _File,
    directory: DirOption = None,
    match: MatchOption = None,
    shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Largest size of one file: 500MB, 5GB, ...")
    ] = f"{SHARD_BYTES // 10**9}GB",
    hold: Annotated[
        bool,
        typer.Option(
            "--hold",
            help="Hold the lock while saving: an update waits until it is free, for 10 s at most "
            "(SGLANG_WEIGHT_HOOK_LOCK_TIMEOUT), and then goes on.",
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
    via: ViaOption = None,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> int:
    """Save a running server's weights as safetensors.

    Needs as much memory as one piece of 8 MiB.  What was interrupted is taken up again by the same
    command if the weights are still the same.  Exit status 3 if they change meanwhile, or are not
    ready: then nothing is left.  Names are SGLang's own, of the tensors that it has fused.
    """
    if not path.endswith(".safetensors"):
        raise Misused(f"{path} does not end in .safetensors; give a name that does")
    limit = _bytes(shard_size)
    chosen: Union[Slot, Document]
    if slot.endswith(".json") and not hold:
        chosen = open_file(slot)
        if not is_transferred(chosen, via):
            raise Misused(
                f"{slot} is a saved file, which has no memory to be read; name the "
                f"slot, or give --via mooncake or --via nixl"
            )
    else:
        found = open_directory(directory)
        chosen = slot_named(found, slots_in(found), slot)
        if via not in ENGINES:
            _check(chosen)
    wanted = functools.partial(is_wanted, pattern=match)
    with contextlib.ExitStack() as stack:
        if hold:
            assert isinstance(chosen, Slot)  # of a saved map there is nothing to be held
            stack.enter_context(chosen.weights_held())
        tell = stack.enter_context(_progress())
        stack.enter_context(_explained())
        done = save(chosen, path, wanted, limit, via, force, tell, address)
    if as_json:
        return print_json({**heading(done.document), **_as_dict(done)})
    _print_saved(done)
    return 0


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Says of a full disk that what is there is gone on with."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise HookError(
            f"{error.strerror} ({error.filename}); make room and give the same command again, "
            f"which goes on where this one stopped, or give another path"
        ) from error


def _print_saved(done: Saved) -> None:
    for name in done.files:
        print_line(name)
    for name, dtype in done.raw.items():
        complain(f"{name} is saved as plain bytes: safetensors has no {dtype}")
    if done.left_out:
        first, why = next(iter(done.left_out.items()))
        remark(f"{len(done.left_out)} tensors are left out, such as {first}: {why}")
    resumed = f", {size_text(done.resumed)} of them by an earlier try" if done.resumed else ""
    remark(f"{done.tensors} tensors, {size_text(done.bytes)}{resumed}")


def _check(slot: Slot) -> None:
    """Have the owner compare its map with memory first, where it can be asked."""
    with contextlib.suppress(NoSocket, NotAllowed, ControlError):
        slot.check()


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", text.strip(), re.IGNORECASE)
    size = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if size < 1:
        raise Misused(f"--shard-size {text} is no size; give 500MB, 5GB, ...")
    return size


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[Progress], None]]:
    """A bar on stderr, if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda progress: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    with Bar(
        BarColumn(), DownloadColumn(), TransferSpeedColumn(), console=Console(stderr=True)
    ) as bar:
        task = bar.add_task("", total=None)

        def tell(progress: Progress) -> None:
            bar.update(task, completed=progress.bytes, total=progress.of)

        yield tell


def _as_dict(done: Saved) -> dict[str, Any]:
    return {
        "files": done.files,
        "index": done.index_file,
        "tensors": done.tensors,
        "bytes": done.bytes,
        "resumed": done.resumed,
        "left_out": done.left_out,
        "saved_as_bytes": done.raw,
    }
