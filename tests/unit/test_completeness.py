"""Random models in random memory: every name is accounted for, every byte is where it is said.

The tensors are real and lie at chosen places of one arena; the CUDA driver is a fake that
answers the hook's own ctypes calls from a table of allocations (``tests/gpu`` asks the real
one), and the runner is a fake.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import pytest
from fake_sglang import FakeRunner
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from sglang_weight_hook.publisher import capture as capture_module
from sglang_weight_hook.publisher import document
from sglang_weight_hook.publisher.devices import cuda_driver

torch = pytest.importorskip("torch")
nn = torch.nn

ARENA = 768  # bytes

relaxed = examples(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])


# --- names --------------------------------------------------------------------------------


@st.composite
def values(draw: Any, pool: list[Any]) -> Any:
    """A tensor of any sort; often one that is in the model already, or a view of it."""
    if pool and draw(st.booleans()):
        base = draw(st.sampled_from(pool))
        how = draw(st.sampled_from(["same", "data", "t", "slice", "pad", "expand"]))
        if how == "same" or base.is_sparse or isinstance(base, nn.UninitializedParameter):
            return base
        data = base.detach()
        if how == "t" and data.dim() == 2:
            return data.t()
        if how == "slice" and data.dim():
            return data[draw(st.integers(0, 1)) :]
        if how == "pad" and data.dim() == 2:
            return data[:, :-1]
        if how == "expand":
            return data.expand(2, *data.shape)
        return data
    shape = draw(st.lists(st.integers(0, 3), max_size=2))
    sort = draw(st.sampled_from(["plain"] * 6 + ["meta", "sparse", "lazy", "fp8", "bool"]))
    if sort == "sparse":
        made = torch.zeros(3, 3).to_sparse()
    elif sort == "lazy":
        made = nn.UninitializedParameter()
    elif sort == "meta":
        made = torch.empty(shape, device="meta")
    else:
        kinds = {"fp8": torch.float8_e4m3fn, "bool": torch.bool}
        made = torch.zeros(shape).to(kinds.get(sort, torch.bfloat16))
    pool.append(made)
    return made


@st.composite
def models(draw: Any, depth: int = 2, pool: list[Any] | None = None) -> Any:
    pool = [] if pool is None else pool
    made = nn.Module()
    for number in range(draw(st.integers(0, 4))):
        value = draw(values(pool))
        places = ["attribute", "list", "tuple", "dict"]
        if not isinstance(value, nn.Parameter):
            places += ["buffer", "parameter"]
        place = draw(st.sampled_from(places))
        if isinstance(value, nn.Parameter) and place == "attribute":
            made.register_parameter(f"p{number}", value)
        elif place == "parameter" and not value.is_sparse:
            made.register_parameter(f"p{number}", nn.Parameter(value, requires_grad=False))
        elif place == "buffer":
            made.register_buffer(f"b{number}", value, persistent=draw(st.booleans()))
        elif place == "list":
            setattr(made, f"l{number}", [None, value, "text", [value]])
        elif place == "tuple":
            setattr(made, f"u{number}", (value, value))
        elif place == "dict":
            setattr(made, f"d{number}", {"k": value, 7: value, "deeper": {"x": value}})
        else:
            setattr(made, f"a{number}", value)
    if depth:
        for number in range(draw(st.integers(0, 2))):
            made.add_module(f"m{number}", draw(models(depth=depth - 1, pool=pool)))
        children = list(made.children())
        if children and draw(st.booleans()):
            made.add_module("again", draw(st.sampled_from(children)))
    return made


def names_in(model: Any) -> list[str]:
    """Every name under which the model holds a tensor, by torch's own walk of its modules."""
    found = []
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, value in {**vars(module), **module._parameters, **module._buffers}.items():
            if name in vars(nn.Module()):
                continue
            full = f"{prefix}.{name}" if prefix else name
            found += tensors_in(full, value)
    return found


def tensors_in(name: str, value: Any) -> list[str]:
    if isinstance(value, torch.Tensor):
        return [name]
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return []
    return [found for key, item in value.items() for found in tensors_in(f"{name}.{key}", item)]


@relaxed
@given(models())
def test_every_name_is_a_tensor_an_alias_or_left_out_and_only_one_of_them(model: Any) -> None:
    captured = capture_module.capture(FakeRunner(model))
    aliases = [name for names in captured.aliases.values() for name in names]
    accounted = [*captured.tensors, *aliases, *captured.left_out]
    assert sorted(accounted) == sorted(names_in(model))
    assert sum(captured.expected.values()) == len(accounted)


@relaxed
@given(models())
def test_what_is_left_out_has_no_address_and_says_why(model: Any) -> None:
    captured = capture_module.capture(FakeRunner(model))
    strided = [t for t in model.parameters() if isinstance(t, nn.UninitializedParameter)]
    assert all(captured.left_out.values())
    if not captured.left_out:
        assert strided == []
    published = document.validation(captured, None, None)
    assert published["left_out"] == captured.left_out
    assert sum(published["captured"].values()) == len(captured.tensors)


@relaxed
@given(models())
def test_whether_it_moved_can_be_told_of_every_model(model: Any) -> None:
    runner = FakeRunner(model)
    before = capture_module.capture(runner)
    lazy = any(isinstance(p, nn.UninitializedParameter) for p in model.parameters())
    again = capture_module.moved(before, runner)
    # Where it can't be told, a full capture says that nothing has.
    assert not again or lazy or before.left_out
    assert document.same_layout(before, capture_module.capture(runner))


# --- memory -------------------------------------------------------------------------------


class Piece(NamedTuple):
    """A driver allocation; offsets in the arena."""

    start: int
    end: int
    # "vmm", "cuda_malloc", "imported", "managed", "pool", or "" for a hole that the driver
    # knows nothing of
    kind: str


class FakeCuda:
    """A fake libcuda that answers the calls of `cuda_driver` from a table."""

    def __init__(self, arena: int, pieces: list[Piece]) -> None:
        self.arena, self.pieces = arena, pieces
        self.retained: list[int] = []  # handles not given back

    def _at(self, address: Any) -> Piece | None:
        offset = address.value - self.arena
        found = [piece for piece in self.pieces if piece.start <= offset < piece.end]
        return found[0] if found and found[0].kind else None

    # Named as in cuda.h, with its order of arguments.
    def cuMemGetAddressRange_v2(self, base: Any, size: Any, address: Any) -> int:  # noqa: N802
        piece = self._at(address)
        if piece is None:
            return 1
        base._obj.value, size._obj.value = self.arena + piece.start, piece.end - piece.start
        return 0

    def cuPointerGetAttribute(self, data: Any, attribute: Any, address: Any) -> int:  # noqa: N802
        piece = self._at(address)
        # IS_LEGACY_CUDA_IPC_CAPABLE, IS_MANAGED, MEMPOOL_HANDLE
        true_of = {10: "cuda_malloc", 8: "managed", 17: "pool"}
        if piece is None or attribute.value not in true_of:
            return 1
        data._obj.value = int(piece.kind == true_of[attribute.value])
        return 0

    def cuMemRetainAllocationHandle(self, handle: Any, address: Any) -> int:  # noqa: N802
        piece = self._at(address)
        if piece is None or piece.kind != "vmm":
            return 1
        handle._obj.value = 1 + piece.start
        self.retained.append(handle._obj.value)
        return 0

    def cuMemRelease(self, handle: Any) -> int:  # noqa: N802
        self.retained.remove(handle.value)
        return 0


class Arena(bytearray):
    """Memory for the tensors of one example."""

    def __repr__(self) -> str:
        return f"Arena({len(self)})"


class Memory(NamedTuple):
    model: Any
    arena: Arena
    pieces: list[Piece]
    spans: dict[str, tuple[int, int, int, int]]  # name -> start, end, storage's start and end


@st.composite
def memories(draw: st.DrawFn) -> Memory:
    """Tensors over storages at chosen offsets of an arena that is cut into allocations."""
    arena = Arena(ARENA)
    cuts = sorted(draw(st.sets(st.integers(1, ARENA - 1), max_size=6)))
    kinds = st.sampled_from(["vmm", "vmm", "cuda_malloc", "imported", "managed", "pool", ""])
    pieces = [Piece(start, end, draw(kinds)) for start, end in zip([0, *cuts], [*cuts, ARENA])]
    model, spans = nn.Module(), {}
    starts: list[int] = []
    for number in range(draw(st.integers(0, 6))):
        near = draw(st.sampled_from([*starts, draw(st.integers(0, ARENA - 8))]))
        start = min(near, ARENA - 8)
        size = draw(st.integers(1, min(200, ARENA - start)))
        starts += [start, min(start + size, ARENA - 8)]
        storage = torch.frombuffer(arena, dtype=torch.uint8, count=size, offset=start)
        offset = draw(st.integers(0, size - 1))
        rows = draw(st.integers(0, 4))
        row_stride, step = draw(st.integers(0, 20)), draw(st.integers(0, 3))
        room = size - offset - 1 - max(rows - 1, 0) * row_stride
        if room < 0:
            rows, room = 1, size - offset - 1
        columns = draw(st.integers(0, 1 + (room // step if step else 5)))
        tensor = storage.as_strided((rows, columns), (row_stride, step), offset)
        name = f"t{number}"
        setattr(model, name, tensor)
        # Every byte that an element of it occupies, one by one.
        touched = [
            start + offset + row * row_stride + column * step
            for row in range(rows)
            for column in range(columns)
        ]
        if touched:
            spans[name] = (min(touched), max(touched) + 1, start, start + size)
    return Memory(model, arena, pieces, spans)


@contextmanager
def on_a_fake_gpu(memory: Memory) -> Iterator[int]:
    """The arena is device memory; its address."""
    address = torch.frombuffer(memory.arena, dtype=torch.uint8).data_ptr()
    library = FakeCuda(address, memory.pieces)
    row = capture_module.row_of

    def cuda_row(kind: str, tensor: Any, device_type: str) -> Any:
        return row(kind, tensor, "cpu")._replace(device="cuda:0")

    with (
        mock.patch.object(cuda_driver, "_library", return_value=library),
        mock.patch.object(cuda_driver, "is_initialised", return_value=True),
        mock.patch.object(capture_module, "row_of", cuda_row),
    ):
        yield address
    assert library.retained == []


Bytes = dict[str, tuple[int, int, int, int]]


def published_of(memory: Memory) -> tuple[Bytes, list[dict[str, Any]]]:
    """The spans of the canonical names, and the regions with offsets for addresses."""
    with on_a_fake_gpu(memory) as arena:
        captured = capture_module.capture(FakeRunner(memory.model, device="cuda"))
        regions = [document._region(captured, region) for region in document.regions_of(captured)]
    for region in regions:
        region["ptr"] -= arena
        region["allocation_ptr"] -= arena
    spans = {name: span for name, span in memory.spans.items() if name in captured.tensors}
    others = {name for names in captured.aliases.values() for name in names}
    assert memory.spans.keys() == spans.keys() | (others & memory.spans.keys())
    return spans, regions


def allocation_at(memory: Memory, name: str, byte: int) -> tuple[int, int, str | None]:
    """What the byte of a tensor is published as belonging to."""
    _, _, start, end = memory.spans[name]
    under = [piece for piece in memory.pieces if piece.start < end and start < piece.end]
    if not all(piece.kind for piece in under):
        return start, end - start, None  # the driver does not know all of it: the storage
    (piece,) = (piece for piece in under if piece.start <= byte < piece.end)
    return piece.start, piece.end - piece.start, piece.kind


@relaxed
@given(memories())
def test_regions_cover_exactly_the_bytes_of_the_tensors_in_each_allocation(
    memory: Memory,
) -> None:
    spans, regions = published_of(memory)
    wanted = {
        (byte, *allocation_at(memory, name, byte)[:2])
        for name, (start, end, _, _) in spans.items()
        for byte in range(start, end)
    }
    covered = {
        (byte, region["allocation_ptr"], region["allocation_size"])
        for region in regions
        for byte in range(region["ptr"], region["ptr"] + region["size"])
    }
    assert covered == wanted


@relaxed
@given(memories())
def test_no_region_reaches_out_of_its_allocation_or_touches_another_of_it(memory: Memory) -> None:
    _, regions = published_of(memory)
    for region in regions:
        start, size = region["allocation_ptr"], region["allocation_size"]
        assert region["size"] > 0
        assert start <= region["ptr"]
        assert region["ptr"] + region["size"] <= start + size
    for one in regions:
        for other in regions:
            if one is not other and one["allocation_ptr"] == other["allocation_ptr"]:
                same = one["allocation_size"] == other["allocation_size"]
                apart = (
                    one["ptr"] + one["size"] < other["ptr"]
                    or other["ptr"] + other["size"] < one["ptr"]
                )
                assert apart or not same, (one, other)


@relaxed
@given(memories())
def test_each_regions_kind_and_source_are_its_allocations(memory: Memory) -> None:
    _, regions = published_of(memory)
    for region in regions:
        for name in region["tensors"]:
            start, end, _, _ = memory.spans[name]
            inside = max(start, region["ptr"])
            assert inside < min(end, region["ptr"] + region["size"])
            base, size, kind = allocation_at(memory, name, inside)
            assert (region["allocation_ptr"], region["allocation_size"]) == (base, size)
            assert region["allocation_source"] == ("storage" if kind is None else "driver")
            assert region["allocation_kind"] == (None if kind in ("managed", "pool") else kind)


@relaxed
@given(memories())
def test_each_tensor_is_named_in_exactly_the_regions_that_hold_its_bytes(memory: Memory) -> None:
    spans, regions = published_of(memory)
    for name, (start, end, _, _) in spans.items():
        held = [region for region in regions if name in region["tensors"]]
        assert all(region["tensors"].count(name) == 1 for region in held)
        bytes_held = {
            byte for region in held for byte in range(region["ptr"], region["ptr"] + region["size"])
        }
        assert set(range(start, end)) <= bytes_held


def test_a_weight_over_several_mapped_pieces_has_a_region_in_each() -> None:
    arena = Arena(ARENA)
    model = nn.Module()
    model.big = torch.frombuffer(arena, dtype=torch.uint8, count=600, offset=50)
    pieces = [Piece(0, 256, "vmm"), Piece(256, 512, "vmm"), Piece(512, ARENA, "vmm")]
    memory = Memory(model, arena, pieces, {})
    _, regions = published_of(memory)
    assert [(r["ptr"], r["size"], r["allocation_ptr"], r["allocation_size"]) for r in regions] == [
        (50, 206, 0, 256),
        (256, 256, 256, 256),
        (512, 138, 512, 256),
    ]
    assert {region["allocation_kind"] for region in regions} == {"vmm"}


def test_two_storages_that_begin_at_one_address_each_have_all_their_allocations() -> None:
    # A slice of a storage is a storage of its own with the same beginning.
    arena = Arena(ARENA)
    model = nn.Module()
    model.small = torch.frombuffer(arena, dtype=torch.uint8, count=100)
    model.large = torch.frombuffer(arena, dtype=torch.uint8, count=600)
    memory = Memory(model, arena, [Piece(0, 256, "vmm"), Piece(256, ARENA, "vmm")], {})
    _, regions = published_of(memory)
    assert [(region["ptr"], region["size"]) for region in regions] == [(0, 256), (256, 344)]


def test_two_storages_that_begin_at_one_address_count_as_the_larger_one() -> None:
    arena = Arena(ARENA)
    for sizes in ((100, 600), (600, 100)):
        model = nn.Module()
        model.one = torch.frombuffer(arena, dtype=torch.uint8, count=sizes[0])
        model.other = torch.frombuffer(arena, dtype=torch.uint8, count=sizes[1])
        captured = capture_module.capture(FakeRunner(model))
        assert document.totals(captured)["cpu"]["storage_bytes"] == 600
        assert list(document.storages_of(captured).weights.values()) == [600]


def test_without_a_cuda_library_every_question_is_unanswered() -> None:
    with mock.patch.object(cuda_driver, "_library", return_value=None):
        assert cuda_driver.allocation_of(4096) is None
        assert cuda_driver.allocations_under(4096, 10) == []
        assert cuda_driver.allocation_kind(4096) is None
        assert cuda_driver.device_identity(0) == (None, None)


def test_a_driver_that_answers_with_memory_elsewhere_is_not_believed() -> None:
    class Liar(FakeCuda):
        def cuMemGetAddressRange_v2(self, base: Any, size: Any, address: Any) -> int:  # noqa: N802
            base._obj.value, size._obj.value = 16, 16
            return 0

    with mock.patch.object(cuda_driver, "_library", return_value=Liar(0, [])):
        assert cuda_driver.allocations_under(4096, 10) == []
        assert cuda_driver.allocations_under(20, 4) == [(16, 16)]


def test_the_fake_driver_takes_the_arguments_that_ctypes_gives() -> None:
    library = FakeCuda(1000, [Piece(0, 8, "cuda_malloc")])
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    status = library.cuMemGetAddressRange_v2(
        ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(1007)
    )
    assert (status, base.value, size.value) == (0, 1000, 8)
