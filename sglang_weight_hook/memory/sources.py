"""Where weights can be compared from: slots of running servers, and saved files."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple, Optional, Protocol, Union

from ..layout.location import is_url
from ..reader import Document, HookError, Slot, open_directory, open_file
from ..reader.slot_names import slot_named
from .memory import PIECE, Memory
from .safetensors_file import Entry, SafetensorsFile, entry_of, index_of


class Source(Protocol):
    """Tensors by name, and their values piece by piece."""

    label: str
    entries: dict[str, Entry]
    aliases: dict[str, str]  # other name -> name
    left_out: dict[str, str]  # name -> why it cannot be compared

    def pieces(self, name: str) -> Iterator[Any]:
        """Bytes of the values, row-major, in whole elements.  Raises HookError."""

    def close(self) -> None: ...


class Pair(NamedTuple):
    """Two that are to be compared."""

    label: str
    one: Source
    other: Source


class SlotSource:
    """A slot of a running server."""

    def __init__(
        self,
        source: Union[Slot, Document],
        via: Optional[str] = None,
        address: Optional[str] = None,
    ) -> None:
        """``source``: also a saved copy of a map, for a transfer engine.  Raises HookError."""
        document = source if isinstance(source, Document) else source.read()
        self.label = f"slot {document.slot.name} in {document.slot.directory}"
        self._memory: Memory = document.open_memory(via=via, address=address)
        self.document = document = self._memory.document
        self.entries: dict[str, Entry] = {}
        self.aliases: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        for tensor in document.iter_tensors():
            if tensor.resident and not tensor.volatile:
                self.entries[tensor.name] = entry_of(tensor)[0]
                self.aliases.update(dict.fromkeys(tensor.aliases, tensor.name))
            else:
                self.left_out[tensor.name] = "volatile" if tensor.volatile else tensor.device

    def pieces(self, name: str) -> Iterator[Any]:
        return self._memory.pieces(name, PIECE)

    def close(self) -> None:
        self._memory.close()


class FileSource:
    """One or several safetensors files."""

    def __init__(self, label: str, paths: list[str]) -> None:
        """Raises HookError."""
        self.label = label
        self.entries: dict[str, Entry] = {}
        self.aliases: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        self.metadata: dict[str, str] = {}  # of the first file
        self._files: dict[str, SafetensorsFile] = {}
        self._stack = ExitStack()
        try:
            for path in paths:
                file = self._stack.enter_context(SafetensorsFile(path))
                for name, entry in file.entries.items():
                    if name in self.entries:
                        raise HookError(f"{label} has tensor {name} twice; give one of the files")
                    self.entries[name], self._files[name] = entry, file
                self._take_names(file.metadata)
        except BaseException:
            self._stack.close()
            raise

    def _take_names(self, metadata: dict[str, str]) -> None:
        """What `save` has noted of aliases; other programs' files have none."""
        self.metadata = self.metadata or metadata
        for name, others in _object(metadata.get("aliases")).items():
            if isinstance(others, list) and name in self.entries:
                self.aliases.update((str(other), name) for other in others)
        self.left_out.update(
            (name, str(why)) for name, why in _object(metadata.get("left_out")).items()
        )

    def pieces(self, name: str) -> Iterator[Any]:
        return self._files[name].pieces(name, PIECE)

    def close(self) -> None:
        self._stack.close()


def _object(text: Optional[str]) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


# --- what a word on the command line means ------------------------------------------------


def slots_of(word: str, directory: Optional[str]) -> Optional[Mapping[str, Union[Slot, Document]]]:
    """The slots that ``word`` names: ``0``, ``DIR:0``, or all of ``DIR``; None: it is no slot.

    Also a saved layout file's.  Raises HookError.
    """
    if word.endswith((".safetensors", ".safetensors.index.json")):
        return None
    if word.endswith(".json"):
        document = open_file(word)
        return {document.slot.name: document}
    if is_url(word):
        return {slot.name: slot for slot in open_directory(word).slots()}
    if os.path.isdir(word):
        names = glob.glob(os.path.join(glob.escape(word), "weight_state_*.json"))
        return {slot.name: slot for slot in open_directory(word).slots()} if names else None
    place, colon, name = word.rpartition(":")
    if colon and os.path.isdir(place):
        return {name: _slot(place, name)}
    if os.sep in word:
        raise HookError(f"{word} does not exist; give a slot, a saved file or a directory")
    return {word: _slot(directory, word)}


def _slot(place: Optional[str], name: str) -> Slot:
    found = open_directory(place)
    return slot_named(found, found.slots(), name)


def saved_source(word: str) -> FileSource:
    """A file, an index or a folder of safetensors files.  Raises HookError."""
    if os.path.isdir(word):
        indexes = sorted(glob.glob(os.path.join(glob.escape(word), "*.safetensors.index.json")))
        if len(indexes) == 1:
            return FileSource(word, index_of(indexes[0]))
        paths = sorted(glob.glob(os.path.join(glob.escape(word), "*.safetensors")))
        if not paths:
            raise HookError(f"{word} holds neither slots nor safetensors files; give another")
        return FileSource(word, paths)
    if word.endswith(".index.json"):
        return FileSource(word, index_of(word))
    if not os.path.exists(word):
        index = word.removesuffix(".safetensors") + ".safetensors.index.json"
        if os.path.exists(index):  # it was too large for one file
            return FileSource(word, index_of(index))
        raise HookError(f"{word} does not exist; give another file")
    return FileSource(word, [word])
