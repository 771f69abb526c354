"""Read what a hooked SGLang publishes.  The standard library alone: no torch, no SGLang.

    >>> import sglang_weight_hook as hook
    >>> directory = hook.open_directory(EXAMPLE)   # a weights_metadata directory
    >>> [slot.name for slot in directory.slots()]
    ['0']
    >>> document = hook.open_slot(EXAMPLE, "0").read()
    >>> document.state["state"], len(document.tensors) > 0
    ('ready', True)

A document's ``tensors`` and ``regions`` are the published objects as they are;
`Document.iter_tensors`, `Document.iter_regions` and `Document.lookup` give the same as small
typed objects.  Addresses and sizes are in bytes; shapes, strides and indices in elements.

Every error is a `HookError` whose message says what to do.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import socket
import stat
import time
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from math import prod
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Optional, TypeVar, Union

from . import identity, publish, settings
from .document import SCHEMA, SCHEMA_VERSION, STATE_SCHEMA
from .geometry import touched_bytes
from .watch import DirectoryWatch

if TYPE_CHECKING:
    from .diff import Diff

_STATE_NAME = re.compile(r"weight_state_(.+)\.json\Z")


class HookError(Exception):
    """Anything that keeps a map from being read; the message says what to do about it."""


# --- tensors, regions and what lies at an address ---------------------------------------------


class Tensor(NamedTuple):
    """One tensor of a document.  Addresses and sizes in bytes, the rest in elements."""

    name: str  # the canonical one
    ptr: int  # address of the first element; 0 where it has no memory (``meta``)
    size: int  # what the values take: number of elements * bytes of one
    span: int  # from the first to behind the last byte touched: what to read or register
    device: str  # ``cuda:0``, ``cpu``, ...
    dtype: str  # ``torch.bfloat16``, ...
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    storage_offset: int
    storage_ptr: int
    storage_size: int
    kind: str  # ``parameter``, ``buffer``, ``attribute`` or ``lora``
    resident: bool  # whether it lies on the runner's own device
    aliases: tuple[str, ...]  # its other names
    checksum: Optional[str]  # only with SGLANG_WEIGHT_HOOK_CHECKSUM=1
    raw: Mapping[str, Any]  # as published

    @classmethod
    def from_raw(cls, name: str, raw: Any) -> Tensor:
        """From an entry of the layout's ``tensors``.  Raises HookError where it is none.

        >>> half = Tensor.from_raw("model.layers.17.self_attn.w_kc", {
        ...     "ptr": 4096, "size": 24, "device": "cuda:0", "dtype": "torch.bfloat16",
        ...     "shape": [3, 4], "stride": [8, 1], "kind": "attribute"})
        >>> half.layer, half.role, half.itemsize
        (17, 'attention', 2)
        >>> half.span, hex(half.end)   # rows lie 16 bytes apart, so it reaches beyond 24
        (40, '0x1028')
        >>> half.index_of(4096 + 16 + 3)   # byte 1 of an element
        (1, 1)
        >>> half.index_of(4096 + 8) is None   # between two rows
        True
        """
        fields = _Fields(f"tensor {name!r}", raw)
        ptr, size = fields.number("ptr"), fields.number("size")
        shape, stride = fields.numbers("shape"), fields.numbers("stride")
        if len(shape) != len(stride):
            raise fields.improper("stride")
        itemsize = _itemsize(shape, size)
        return cls(
            name=name,
            ptr=ptr,
            size=size,
            span=fields.number("span", touched_bytes(shape, stride, itemsize)),
            device=fields.text("device"),
            dtype=fields.text("dtype"),
            shape=shape,
            stride=stride,
            storage_offset=fields.number("storage_offset", 0),
            storage_ptr=fields.number("storage_ptr", ptr),
            storage_size=fields.number("storage_size", size),
            kind=fields.text("kind"),
            resident=raw.get("resident", True) is True,
            aliases=fields.texts("aliases"),
            checksum=fields.text("checksum") if raw.get("checksum") is not None else None,
            raw=raw,
        )

    @property
    def end(self) -> int:
        """Address behind the last byte touched."""
        return self.ptr + self.span

    @property
    def itemsize(self) -> int:
        """Bytes of one element; 0 for a tensor without elements."""
        return _itemsize(self.shape, self.size)

    @property
    def layer(self) -> Optional[int]:
        """Number of the layer, from the name; None outside of any."""
        return layer_of(self.name)

    @property
    def role(self) -> str:
        """What it is for, from the name: one of `ROLES`."""
        return "lora" if self.kind == "lora" else role_of(self.name)

    def index_of(self, address: int) -> Optional[tuple[int, ...]]:
        """Index of the element that holds the byte at ``address``; None between elements.

        Where elements overlap (stride 0) it is one of those that hold it.
        """
        if not self.ptr <= address < self.end:
            return None
        return self.element_at(address - self.ptr)[0]

    def element_at(self, offset: int) -> tuple[Optional[tuple[int, ...]], Optional[int]]:
        """Index of the element that holds the byte at ``offset``, and which byte of it.

        ``offset``: bytes from the first element's address, below ``span``.  Two None between
        elements.
        """
        itemsize = _itemsize(self.shape, self.size)
        if not itemsize:
            return None, None
        number, byte = divmod(offset, itemsize)
        index = _index(self.shape, self.stride, number)
        return index, None if index is None else byte


class Region(NamedTuple):
    """A run of weight bytes inside one allocation, ready to be registered.  In bytes."""

    ptr: int
    size: int
    device: str
    allocation_ptr: int
    allocation_size: int
    allocation_source: str  # ``driver``, or ``storage`` where only the tensor's own is known
    allocation_kind: Optional[str]  # ``cuda_malloc``, ``vmm``, ``imported``; None: not told
    tensors: tuple[str, ...]  # canonical names
    raw: Mapping[str, Any]

    @classmethod
    def from_raw(cls, raw: Any) -> Region:
        """From an entry of the layout's ``regions``.  Raises HookError where it is none."""
        fields = _Fields("a region", raw)
        ptr, size = fields.number("ptr"), fields.number("size")
        kind = raw.get("allocation_kind")
        return cls(
            ptr=ptr,
            size=size,
            device=fields.text("device"),
            allocation_ptr=fields.number("allocation_ptr", ptr),
            allocation_size=fields.number("allocation_size", size),
            allocation_source=fields.text("allocation_source", "storage"),
            allocation_kind=None if kind is None else fields.text("allocation_kind"),
            tensors=fields.texts("tensors"),
            raw=raw,
        )

    @property
    def end(self) -> int:
        return self.ptr + self.size


class CacheBuffer(NamedTuple):
    """One tensor of the KV cache.  Addresses and sizes in bytes."""

    name: str
    ptr: int
    size: int
    device: str
    dtype: str
    shape: tuple[int, ...]
    layer: Optional[int]
    role: Optional[str]  # ``k``, ``v`` or ``kv``
    storage_ptr: int
    storage_size: int
    raw: Mapping[str, Any]

    @classmethod
    def from_raw(cls, raw: Any) -> CacheBuffer:
        """From an entry of ``memory.kv_cache``.  Raises HookError where it is none."""
        fields = _Fields("a KV cache buffer", raw)
        ptr, size = fields.number("ptr"), fields.number("size")
        return cls(
            name=fields.text("name", ""),
            ptr=ptr,
            size=size,
            device=fields.text("device"),
            dtype=fields.text("dtype", ""),
            shape=fields.numbers("shape"),
            layer=None if raw.get("layer") is None else fields.number("layer"),
            role=None if raw.get("role") is None else fields.text("role"),
            storage_ptr=fields.number("storage_ptr", ptr),
            storage_size=fields.number("storage_size", size),
            raw=raw,
        )

    @property
    def end(self) -> int:
        return self.ptr + self.size


class Hit(NamedTuple):
    """A tensor at an address."""

    tensor: Tensor
    offset: int  # bytes from the tensor's first byte
    element: Optional[tuple[int, ...]]  # its index; None between elements (padding)
    byte: Optional[int]  # which byte of that element

    @property
    def holds(self) -> bool:
        """Whether the byte belongs to one of the tensor's elements."""
        return self.element is not None


Item = TypeVar("Item")


class SpanIndex(Generic[Item]):
    """Which of many spans cover an address, in O(log n + hits) after O(n log n) to build.

    Spans may overlap and nest as they like; addresses are at least 0 and below 2**64.

    >>> index = SpanIndex([(0, 100, "all"), (10, 20, "left"), (15, 30, "right"), (9, 9, "empty")])
    >>> index.at(17)
    ['all', 'left', 'right']
    >>> index.at(30), index.at(100)
    (['all'], [])
    """

    def __init__(self, spans: Iterable[tuple[int, int, Item]]) -> None:
        """``spans``: ``(start, end, item)``, ``end`` exclusive."""
        ordered = sorted((span for span in spans if span[0] < span[1]), key=lambda s: s[:2])
        # Not lists: a look-up would wait for the memory of one integer after the other.
        self._starts = array("Q", [start for start, _, _ in ordered])
        self._ends = [end for _, end, _ in ordered]
        self._items = [item for _, _, item in ordered]
        # How far the spans up to each one reach: what ends there cannot cover what lies behind.
        reach = [0, *accumulate(self._ends, max)]
        # One that ends behind all addresses is a lie, and has a list.
        self._reach = array("Q", reach) if reach[-1] < 2**64 else reach
        # _furthest[k][i]: which of the spans i .. i + 2**k - 1 ends last.  Two look-ups answer
        # that for any range, so each hit found costs a constant.
        self._furthest = [list(range(len(ordered)))]
        width = 1
        while 2 * width <= len(ordered):
            below = self._furthest[-1]
            self._furthest.append([self._later(i, j) for i, j in zip(below, below[width:])])
            width *= 2

    def at(self, address: int) -> list[Item]:
        """The items of all spans that cover ``address``, by start address."""
        behind, reach = bisect_right(self._starts, address), self._reach
        if reach[behind] <= address:
            return []
        if reach[behind - 1] <= address:
            return [self._items[behind - 1]]
        found = []
        ranges = [(0, behind)]
        while ranges:
            low, high = ranges.pop()
            if low >= high:
                continue
            level = (high - low).bit_length() - 1
            row = self._furthest[level]
            last = self._later(row[low], row[high - (1 << level)])
            if self._ends[last] > address:
                found.append(last)
                ranges += [(low, last), (last + 1, high)]
        return [self._items[position] for position in sorted(found)]

    def _later(self, one: int, other: int) -> int:
        return one if self._ends[one] >= self._ends[other] else other


# What `Tensor.role` can be.
ROLES = (
    "embedding",
    "attention",
    "mlp",
    "moe_expert",
    "norm",
    "lm_head",
    "rotary",
    "lora",
    "other",
)

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.([0-9]{1,9})(?:\.|$)")

# In this order: a norm inside the attention is a norm, an expert's projection an expert's.
_ROLE_NAMES = (
    ("lora", re.compile(r"(?:^|[._])lora(?:[._]|$)")),
    ("rotary", re.compile(r"rotary|cos_sin|inv_freq|(?:^|[._])rope(?:[._]|$)")),
    ("lm_head", re.compile(r"(?:^|\.)(?:lm_head|embed_out)(?:\.|$)")),
    ("norm", re.compile(r"norm|(?:^|\.)ln_?(?:\w|\d+)?(?:\.|$)")),
    ("moe_expert", re.compile(r"(?:^|[._])(?:shared_)?experts?(?:[._]|$)")),
    (
        "attention",
        re.compile(r"attn|attention|(?:^|[._])(?:[qkvo]|qkv|kv_[ab]|q_[ab])_proj|w_kc|w_vc"),
    ),
    (
        "mlp",
        re.compile(
            r"mlp|feed_forward|(?:^|[._])(?:ffn|fc\d|gate_proj|up_proj|gate_up_proj|down_proj"
            r"|block_sparse_moe|dense_h_to_4h|dense_4h_to_h)(?:[._]|$)"
        ),
    ),
    ("embedding", re.compile(r"embed|(?:^|\.)(?:wte|wpe)(?:\.|$)")),
)


def layer_of(name: str) -> Optional[int]:
    """Number of the layer that a tensor's name puts it in.

    >>> layer_of("model.layers.17.mlp.experts.w13_weight"), layer_of("model.norm.weight")
    (17, None)
    """
    match = _LAYER.search(name)
    return int(match.group(1)) if match else None


def role_of(name: str) -> str:
    """What a tensor is for, as far as its name tells: one of `ROLES`.

    >>> role_of("model.layers.0.self_attn.q_norm.weight")
    'norm'
    >>> role_of("model.layers.3.mlp.shared_experts.down_proj.weight")
    'moe_expert'
    >>> role_of("model.layers.0.self_attn.rotary_emb.cos_sin_cache")
    'rotary'
    """
    lowered = name.lower()
    for role, pattern in _ROLE_NAMES:
        if pattern.search(lowered):
            return role
    return "other"


# --- documents --------------------------------------------------------------------------------


class Document:
    """One consistent publication of a slot: layout and state of the same generation.

    ``raw``: the layout document; ``state``: the state document, which is the newer of the
    two about ``content_generation`` (buckets written in place rewrite only the state).
    ``is_live`` is false for a saved copy (`open_file`), which nobody keeps up to date.
    """

    def __init__(
        self, slot: Slot, raw: dict[str, Any], state: dict[str, Any], is_live: bool = True
    ) -> None:
        self.slot = slot
        self.raw = raw
        self.state = state
        self.is_live = is_live
        # Typed objects, made of the published ones when they are asked for.
        self._typed: dict[str, Tensor] = {}
        self._by_address: Optional[SpanIndex[str]] = None
        self._regions_by_address: Optional[SpanIndex[Region]] = None

    @property
    def tensors(self) -> Mapping[str, dict[str, Any]]:
        """Every tensor by canonical name: the ``tensors`` object of the layout."""
        tensors: Mapping[str, dict[str, Any]] = self.raw["tensors"]
        return tensors

    @property
    def regions(self) -> list[dict[str, Any]]:
        """Merged spans ready for registration: the ``regions`` list of the layout."""
        regions: list[dict[str, Any]] = self.raw["regions"]
        return regions

    @property
    def identity(self) -> Mapping[str, Any]:
        """Host, process, device, ranks and model of the runner: the layout's ``identity``."""
        found: Mapping[str, Any] = self.raw["identity"]
        return found

    @property
    def memory(self) -> Mapping[str, Any]:
        """The layout's ``memory``, in bytes; empty where it is not told."""
        found = self.raw.get("memory")
        return found if isinstance(found, dict) else {}

    @property
    def layout_generation(self) -> int:
        return int(self.raw["layout_generation"])

    @property
    def content_generation(self) -> int:
        return int(self.state["content_generation"])

    @property
    def physical_epoch(self) -> Optional[int]:
        """Rises when other physical pages came behind unchanged addresses; None: not told."""
        value = self.state.get("physical_epoch", self.raw.get("physical_epoch"))
        return value if isinstance(value, int) else None

    # -- as typed objects

    def iter_tensors(self) -> Iterator[Tensor]:
        """Every tensor, in the model's order.  Raises HookError."""
        return map(self._tensor, self.tensors)

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name, canonical or alias.  Raises HookError."""
        if name in self.tensors:
            return self._tensor(name)
        for tensor in self.iter_tensors():
            if name in tensor.aliases:
                return tensor
        raise HookError(
            f"slot {self.slot.name} has no tensor {name!r}; the names are those of "
            f"{self.slot.path(publish.LAYOUT)}"
        )

    def iter_regions(self) -> Iterator[Region]:
        """Every region, by address.  Raises HookError."""
        return map(Region.from_raw, self.regions)

    def iter_kv_cache(self) -> Iterator[CacheBuffer]:
        """The tensors of the KV cache.  Raises HookError."""
        buffers = self.memory.get("kv_cache", [])
        if not isinstance(buffers, list):
            raise HookError(f"{self._where()} has no proper 'kv_cache'; {_FOREIGN}")
        return map(CacheBuffer.from_raw, buffers)

    # -- by address

    def lookup(self, address: int) -> list[Hit]:
        """The tensors at ``address``: those that hold the byte first, then those around it.

        Views overlap, so there may be several; a tensor with padding spans bytes that it does
        not hold (``hit.holds`` is false).  The first call builds an index over the document,
        every further one takes O(log n + hits).  Raises HookError.
        """
        if self._by_address is None:
            self._by_address = SpanIndex(self._spans())
        names = self._by_address.at(address)
        if len(names) == 1:  # nearly always
            return [self._hit(names[0], address)]
        hits = [self._hit(name, address) for name in names]
        return sorted(hits, key=lambda hit: (not hit.holds, hit.tensor.span))

    def _spans(self) -> Iterator[tuple[int, int, str]]:
        """From where to where each tensor reaches, without making an object of each."""
        for name, raw in self.tensors.items():
            ptr, span = (raw.get("ptr"), raw.get("span")) if isinstance(raw, dict) else (None, None)
            if not (_is_size(ptr) and _is_size(span)):
                tensor = self._tensor(name)  # has no span of its own, or raises HookError
                ptr, span = tensor.ptr, tensor.span
            if ptr:
                yield ptr, ptr + span, name

    def _hit(self, name: str, address: int) -> Hit:
        tensor = self._typed.get(name) or self._tensor(name)
        offset = address - tensor.ptr
        return Hit(tensor, offset, *tensor.element_at(offset))

    def region_at(self, address: int) -> Optional[Region]:
        """The region that covers ``address``, if any.  Raises HookError."""
        if self._regions_by_address is None:
            self._regions_by_address = SpanIndex(
                (region.ptr, region.end, region) for region in self.iter_regions()
            )
        return next(iter(self._regions_by_address.at(address)), None)

    def changes_since(self, old: Union[Document, Mapping[str, Any]]) -> Diff:
        """What changed since ``old`` (a Document, or a saved layout) of this slot."""
        return compare(old._current() if isinstance(old, Document) else old, self._current())

    def _current(self) -> dict[str, Any]:
        """The layout with the state's counts, which are the newer ones after buckets."""
        names = ("content_generation", "physical_epoch")
        return {**self.raw, **{name: self.state[name] for name in names if name in self.state}}

    def owner_alive(self) -> bool:
        """Whether the process that published this document still lives.

        More than `Slot.owner_alive`, which may speak of a successor that came after the document
        was read.  False for a saved copy.  Raises HookError.
        """
        if not self.is_live or not self.slot.owner_alive():
            return False
        # In this order: who owns the slot has removed its predecessor's documents before.
        state = self.slot._state_if_any()
        return state is not None and _process(state) == _process(self.state)

    def _tensor(self, name: str) -> Tensor:
        tensor = self._typed.get(name)
        if tensor is None:
            tensor = self._typed[name] = Tensor.from_raw(name, self.tensors[name])
        return tensor

    def _where(self) -> str:
        return self.slot.path(publish.LAYOUT)

    def __repr__(self) -> str:
        return (
            f"<Document slot={self.slot.name!r} state={self.state['state']!r} "
            f"layout={self.layout_generation} content={self.content_generation}>"
        )


class Slot:
    """One runner's published files.  Opening reads nothing yet."""

    def __init__(self, directory: str, name: str) -> None:
        self.directory = _file_name(directory)
        self.name = _file_name(name)
        self._watches: list[DirectoryWatch] = []  # that nobody waits on now

    def __reduce__(self) -> tuple[Any, ...]:
        return Slot, (self.directory, self.name)

    def path(self, document: str) -> str:
        """Path of one of `publish.DOCUMENTS`, or of a lock file, of this slot."""
        return os.path.join(self.directory, document.format(self.name))

    def read_state(self) -> dict[str, Any]:
        """The state document as it is now.  Raises HookError."""
        state = _read_json(self.path(publish.STATE))
        if state is None:
            raise HookError(
                f"{self.path(publish.STATE)} does not exist: no hooked SGLang publishes slot "
                f"{self.name} here; check the directory and that the server has loaded its model"
            )
        _check_schema(state, STATE_SCHEMA, self.path(publish.STATE))
        return state

    def read(self, timeout: float = 10.0) -> Document:
        """One consistent document, never two generations mixed.

        Waits up to ``timeout`` seconds for a publication under way.  The document's state may
        well be ``updating``: then the addresses are those from before the update.
        Raises HookError.
        """
        deadline = time.monotonic() + timeout
        pause = 0.001
        while True:
            before = self.read_state()
            layout = _read_json(self.path(publish.LAYOUT))
            if layout is not None:
                _check_schema(layout, SCHEMA, self.path(publish.LAYOUT))
                after = self.read_state()
                if _belong_together(before, layout, after):
                    return Document(self, layout, after)
                if self._was_left_half_way(before, layout, after):
                    return Document(self, layout, {**after, **_state_of(layout)})
            if time.monotonic() >= deadline:
                raise HookError(
                    f"slot {self.name} has no settled document after {timeout:g} s (state "
                    f"{before['state']!r}): the model is still loading, or the layout could not "
                    f"be written; the state file's \"problem\" and the server's log say which"
                )
            time.sleep(pause)
            pause = min(pause * 2, 0.05)

    def _was_left_half_way(
        self, before: dict[str, Any], layout: dict[str, Any], after: dict[str, Any]
    ) -> bool:
        """Whether the process died between a layout and its state, which will never come."""
        return (
            _process(before) == _process(layout["identity"]) == _process(after)
            and before["layout_generation"] < layout["layout_generation"]
            and before == after
            and os.path.lexists(self.path(publish.OWNER_LOCK))
            and not self.owner_alive()
        )

    def owner_alive(self) -> bool:
        """Whether the process that publishes this slot still lives.

        It holds ``weight_owner_{slot}.lock`` for life, so being able to lock that file means
        that it is gone.  Where the file can't be opened, pid, start time and boot decide.
        """
        try:
            descriptor = os.open(self.path(publish.OWNER_LOCK), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        except OSError:
            return _process_lives(self.read_state())
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return True
            return _process_lives(self.read_state())
        finally:
            os.close(descriptor)
        return False

    def wait_for_change(
        self,
        since: Union[Document, Mapping[str, Any], None] = None,
        timeout: Optional[float] = None,
    ) -> Optional[dict[str, Any]]:
        """The state document as soon as it is another one; None after ``timeout`` seconds.

        ``since``: the document or state that you know.  Without it, what is there now; a
        change between your last look and this call is then not noticed.  The beginning of an
        event (state ``updating``) is a change, too.  A slot that is not there yet is waited
        for.  Raises HookError.
        """
        known = since.state if isinstance(since, Document) else since
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._watching() as watch:
            if since is None:
                known = self._state_if_any()
            while True:
                state = self._state_if_any()
                if state is not None and state != known:
                    return state
                left = _LOOK_AGAIN if deadline is None else deadline - time.monotonic()
                if left <= 0:
                    return None
                watch.wait(min(left, _LOOK_AGAIN))

    @contextlib.contextmanager
    def _watching(self) -> Iterator[DirectoryWatch]:
        """A watch of the directory, kept for the next time: to close one takes the kernel 10 ms."""
        try:
            watch = self._watches.pop()
        except IndexError:
            watch = DirectoryWatch(self.directory)
        if not watch.is_fresh():
            watch.close()
            watch = DirectoryWatch(self.directory)
        try:
            yield watch
        finally:
            self._watches.append(watch)

    def generations(self, timeout: Optional[float] = None) -> Iterator[Document]:
        """The document as it is, then a new one whenever addresses, contents or state changed.

        What lies between two events in quick succession is skipped, and so are the times
        during which weights are being changed.  Ends when the process that publishes is gone,
        or after ``timeout`` seconds without a new document.  Raises HookError.
        """
        seen: Any = None
        with DirectoryWatch(self.directory) as watch:
            deadline = None if timeout is None else time.monotonic() + timeout
            while True:
                alive = self.owner_alive()  # before the look: what it published last counts
                state = self.read_state() if seen is None else self._state_if_any()
                if state is not None and _settled(state) and _generation(state) != seen:
                    document = self.read()
                    if _settled(document.state) and _generation(document.state) != seen:
                        seen = _generation(document.state)
                        yield document
                        deadline = None if timeout is None else time.monotonic() + timeout
                        continue
                left = _LOOK_AGAIN if deadline is None else deadline - time.monotonic()
                if not alive or left <= 0:
                    return
                watch.wait(min(left, _LOOK_AGAIN))

    def _state_if_any(self) -> Optional[dict[str, Any]]:
        """The state document, or None where there is none (now)."""
        try:
            return self.read_state()
        except HookError:
            if os.path.lexists(self.path(publish.STATE)):
                raise
            return None

    @contextlib.contextmanager
    def weights_held(self, timeout: float = 10.0) -> Iterator[None]:
        """Hold the shared lock: no update begins while the body runs.

        The server waits for it at most ``SGLANG_WEIGHT_HOOK_LOCK_TIMEOUT`` seconds, so keep
        the body short.  Raises HookError when an update is still running after ``timeout``
        seconds.
        """
        try:
            descriptor = os.open(self.path(publish.SAVING_LOCK), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise HookError(f"{self.path(publish.SAVING_LOCK)}: {error.strerror}") from error
        try:
            deadline = time.monotonic() + timeout
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    break
                except OSError as error:
                    if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                        raise HookError(f"cannot lock slot {self.name}: {error}") from error
                if time.monotonic() >= deadline:
                    raise HookError(
                        f"an update of slot {self.name} has been running for {timeout:g} s; "
                        f"try again when its state is no longer 'updating'"
                    )
                time.sleep(0.005)
            yield
        finally:
            os.close(descriptor)

    def __repr__(self) -> str:
        return f"<Slot {self.name!r} in {self.directory!r}>"


class Change(NamedTuple):
    """Something that `Directory.events` has seen."""

    slot: Slot
    state: Optional[dict[str, Any]]  # the state document, the last one known if it is gone
    alive: bool  # whether the process that publishes the slot lives
    initial: bool  # how it was when the watching began: nothing has happened yet


class Directory:
    """An output directory: the slots of every runner that publishes into it."""

    def __init__(self, path: str) -> None:
        self.path = _file_name(path)

    def slots(self) -> list[Slot]:
        """All slots with a state file, by name.  Raises HookError."""
        try:
            names = os.listdir(self.path)
        except OSError as error:
            raise HookError(
                f"{self.path}: {error.strerror}; give the server's weights_metadata directory, "
                f"or set {settings.DIRECTORY}"
            ) from error
        matches = (_STATE_NAME.match(name) for name in names)
        return [Slot(self.path, name) for name in sorted(m.group(1) for m in matches if m)]

    def slot(self, name: str) -> Slot:
        return Slot(self.path, name)

    def events(self, timeout: Optional[float] = None) -> Iterator[Change]:
        """What happens in this directory: first every slot as it is, then every change.

        The directory need not exist yet.  Ends after ``timeout`` seconds; None: never.
        Raises HookError.
        """
        known: dict[str, tuple[Optional[dict[str, Any]], bool]] = {}
        deadline = None if timeout is None else time.monotonic() + timeout
        initial = True
        with DirectoryWatch(self.path) as watch:
            while True:
                for name in sorted(self._names_if_any() | set(known)):
                    slot = self.slot(name)
                    before, lived = known.get(name, (None, False))
                    alive = slot.owner_alive()  # before the look: the last publication counts
                    state = slot._state_if_any()
                    known[name] = (state, alive)
                    if state is not None and state != before:
                        yield Change(slot, state, alive, initial)
                    elif lived and not alive:
                        yield Change(slot, state or before, alive, initial)
                initial = False
                left = _LOOK_AGAIN if deadline is None else deadline - time.monotonic()
                if left <= 0:
                    return
                watch.wait(min(left, _LOOK_AGAIN))

    def _names_if_any(self) -> set[str]:
        try:
            return {slot.name for slot in self.slots()}
        except HookError:  # no such directory, yet or any more
            return set()

    def __repr__(self) -> str:
        return f"<Directory {self.path!r}>"


def open_directory(path: Optional[str] = None) -> Directory:
    """The directory ``path``, else that of ``SGLANG_WEIGHT_HOOK_DIR``, else the default."""
    value = path if path is not None else os.environ.get(settings.DIRECTORY)
    return Directory(settings.directory_from(value, os.getcwd()))


def open_slot(path: Optional[str], name: str) -> Slot:
    """Slot ``name`` (``"0"``, ``"0_draft"``, …) of a directory."""
    return open_directory(path).slot(name)


def open_file(path: str) -> Document:
    """A saved copy of a ``weight_layout_{slot}.json``.  Raises HookError.

    Nothing is known about the slot as it is now: the state is that of the copy.
    """
    raw = _read_json(_file_name(path))
    if raw is None:
        raise HookError(f"{path} does not exist; give a copy of a weight_layout_{{slot}}.json")
    _check_schema(raw, SCHEMA, path)
    name = os.path.basename(path)
    match = _LAYOUT_NAME.match(name)
    state = _state_of(raw)
    for key in ("pid", "process_start_ticks", "boot_id", "hostname"):
        state[key] = raw["identity"].get(key)
    slot = Slot(os.path.dirname(os.path.abspath(path)), match.group(1) if match else name)
    return Document(slot, raw, state, is_live=False)


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> Diff:
    """What changed between two layout documents.  Raises HookError."""
    from . import diff

    try:
        return diff.diff(old, new)
    except (AttributeError, KeyError, TypeError) as error:
        raise HookError(
            f"the two cannot be compared ({type(error).__name__}: {error}): one of them is no "
            f"layout document; give two copies of a weight_layout_{{slot}}.json"
        ) from error


# --- pieces -------------------------------------------------------------------------------

_LAYOUT_NAME = re.compile(r"^weight_layout_(.+)\.json$")

_FOREIGN = "it was not written by the hook"

# Seconds after which one who waits looks again in any case: inotify is blind to other hosts.
_LOOK_AGAIN = 1.0

# The layout of a model of 100,000 tensors has some 50 MB.
MAX_DOCUMENT_BYTES = 256 * 1024**2

# More dimensions than any tensor has.
_DIMENSIONS = 128

# How many ways to divide an offset among overlapping dimensions are tried.  Tensors as torch
# makes them need one for each dimension.
_INDEX_TRIES = 10_000


def _state_of(layout: Mapping[str, Any]) -> dict[str, Any]:
    """What a layout document says itself of what is else the state document's to say."""
    fields = ("layout_generation", "content_generation", "physical_epoch", "event")
    return {
        **{field: layout[field] for field in fields if field in layout},
        "state": str(layout.get("state", "unknown")),
    }


def _settled(state: Mapping[str, Any]) -> bool:
    return bool(state["state"] != "updating")


def _generation(state: dict[str, Any]) -> tuple[Any, ...]:
    fields = (
        "layout_generation",
        "content_generation",
        "physical_epoch",
        "kv_physical_epoch",
        "state",
    )
    return (*_process(state), *(state.get(field) for field in fields))


def _itemsize(shape: tuple[int, ...], size: int) -> int:
    count = prod(shape)
    # Larger than its bytes is no tensor.
    return size // count if 0 < count <= size and size % count == 0 else 0


def _index(
    shape: tuple[int, ...], stride: tuple[int, ...], element: int
) -> Optional[tuple[int, ...]]:
    """An index with ``sum(index * stride) == element``, if there is one.

    The widest stride goes first.  Where dimensions do not overlap at most one number fits
    each; where they do (as_strided, unfold) the others are tried in turn.
    """
    plain = []  # dimensions from the widest to the narrowest, as nearly all tensors have them
    left = element
    for length, step in zip(shape, stride):
        steps, left = divmod(left, step) if step else (0, left)
        if steps >= length:
            break
        plain.append(steps)
    else:
        if not left:
            return tuple(plain)
    dimensions = sorted(
        (k for k in range(len(shape)) if stride[k] and shape[k] > 1), key=lambda k: -stride[k]
    )
    # reach[n]: how far the dimensions from the n-th on get.
    reach = [0]
    for k in reversed(dimensions):
        reach.append(reach[-1] + (shape[k] - 1) * stride[k])
    reach.reverse()
    index = [0] * len(shape)
    # Per dimension decided: the numbers still to try, and what is left of the offset before it.
    choices: list[tuple[Iterator[int], int]] = []
    left = element
    for _ in range(_INDEX_TRIES):
        depth = len(choices)
        if depth == len(dimensions):
            if left == 0:
                return tuple(index)
        else:
            step, length = stride[dimensions[depth]], shape[dimensions[depth]]
            least = max(0, -((reach[depth + 1] - left) // step))
            most = min(length - 1, left // step)
            choices.append((iter(range(most, least - 1, -1)), left))
        while choices:
            numbers, before = choices[-1]
            number = next(numbers, None)
            if number is not None:
                k = dimensions[len(choices) - 1]
                index[k] = number
                left = before - number * stride[k]
                break
            choices.pop()
        else:
            return None
    return None


class _Fields:
    """The fields of a published object, each of its proper type or a HookError."""

    def __init__(self, what: str, raw: Any) -> None:
        self._what = what
        self._raw = raw
        if not isinstance(raw, dict):
            raise HookError(f"{what} is no JSON object; {_FOREIGN}")

    def improper(self, name: str) -> HookError:
        return HookError(f"{self._what} has no proper {name!r}; {_FOREIGN}")

    def number(self, name: str, default: Optional[int] = None) -> int:
        value = self._raw.get(name, default)
        if not _is_size(value):
            raise self.improper(name)
        return int(value)

    def text(self, name: str, default: Optional[str] = None) -> str:
        value = self._raw.get(name, default)
        if not isinstance(value, str):
            raise self.improper(name)
        return value

    def numbers(self, name: str) -> tuple[int, ...]:
        value = self._raw.get(name)
        if not isinstance(value, list) or len(value) > _DIMENSIONS or not all(map(_is_size, value)):
            raise self.improper(name)
        return tuple(value)

    def texts(self, name: str) -> tuple[str, ...]:
        value = self._raw.get(name, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.improper(name)
        return tuple(value)


def _is_size(value: Any) -> bool:
    # Longer than 64 bits is no address; of some lies the product would fit into no memory.
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**64


def _file_name(name: str) -> str:
    """``name``, if a file can have it.  Raises HookError."""
    try:
        if b"\0" not in os.fsencode(name):
            return name
    except ValueError:  # a lone surrogate
        pass
    raise HookError(f"{name!r} is no name that a file can have; give that of a slot or directory")


def _read_json(path: str) -> Optional[dict[str, Any]]:
    """A whole JSON object; None where there is no file.  Raises HookError."""
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            # A device in a document's place would be read for ever, a huge file for long.
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise HookError(f"{path} is not JSON but a pipe or a device; {_FOREIGN}")
            if status.st_size > MAX_DOCUMENT_BYTES:
                raise HookError(f"{path} has {status.st_size} bytes; {_FOREIGN}")
            data = file.read(status.st_size + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise HookError(
            f"{path} cannot be read ({error.strerror}); read as a user who may, and check that "
            f"it is a file"
        ) from error
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise HookError(f"{path} is not JSON ({error}); it was not written by the hook") from error
    if not isinstance(value, dict):
        raise HookError(f"{path} holds no JSON object; it was not written by the hook")
    return value


# What the reader itself relies on; everything else is the caller's to look for.
_REQUIRED: dict[str, dict[str, type]] = {
    STATE_SCHEMA: {
        "state": str,
        "layout_generation": int,
        "content_generation": int,
        "pid": int,
    },
    SCHEMA: {
        "layout_generation": int,
        "content_generation": int,
        "identity": dict,
        "tensors": dict,
        "regions": list,
    },
}


def _check_schema(document: dict[str, Any], schema: str, path: str) -> None:
    if document.get("schema") != schema:
        raise HookError(f"{path} is no {schema} document; it was not written by the hook")
    version = document.get("schema_version")
    if not isinstance(version, int) or not 1 <= version <= SCHEMA_VERSION:
        raise HookError(
            f"{path} has schema version {version!r}, this reader knows 1 to {SCHEMA_VERSION}; "
            f"install the hook's newer release where you read"
        )
    for name, kind in _REQUIRED[schema].items():
        if not isinstance(document.get(name), kind):
            raise HookError(f"{path} has no proper {name!r}; it was not written by the hook")


def _belong_together(before: dict[str, Any], layout: dict[str, Any], after: dict[str, Any]) -> bool:
    owner = layout["identity"]
    return before["layout_generation"] == layout["layout_generation"] == after[
        "layout_generation"
    ] and _process(before) == _process(owner) == _process(after)


def _open_without_waiting(path: str, flags: int) -> int:
    # A pipe in a document's place would keep an ordinary open() waiting for its writer.
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def _process(part: dict[str, Any]) -> tuple[Any, ...]:
    return part.get("pid"), part.get("process_start_ticks"), part.get("boot_id")


def _process_lives(state: dict[str, Any]) -> bool:
    """Best answer without the owner lock; another host's process is taken to live."""
    if (state.get("hostname"), state.get("boot_id")) != (socket.gethostname(), identity.boot_id()):
        return True
    return bool(identity.start_ticks(state["pid"]) == state.get("process_start_ticks"))
