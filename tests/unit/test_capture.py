"""What one walk of a model finds, compared with the live tensors.

Models and tensors are real torch's; the runner around them is a fake (`fake_sglang`).  Where
only a GPU has the real thing, a runner of another device stands in for it: ``tests/gpu`` has
the real one.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from fake_sglang import FakeRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglang_weight_hook.layout.documents import ATTRIBUTE, BUFFER, LORA, PARAMETER
from sglang_weight_hook.publisher import capture as capture_module
from sglang_weight_hook.publisher import cuda_driver, document, legacy, walk
from sglang_weight_hook.publisher.capture import Capture, moved

torch = pytest.importorskip("torch")
nn = torch.nn


def capture(model: Any, **more: Any) -> Capture:
    return capture_module.capture(FakeRunner(model, **more))


def parameter(*shape: int) -> Any:
    return nn.Parameter(torch.zeros(*shape))


def kinds(captured: Capture) -> dict[str, str]:
    return {name: row.kind for name, row in captured.tensors.items()}


# --- which tensors, under which names -----------------------------------------------------


def test_parameters_buffers_and_attributes_are_found_under_their_kinds() -> None:
    model = nn.BatchNorm1d(3)
    model.w_kc = torch.zeros(2, 2)
    model.register_buffer("cos_sin_cache", torch.zeros(4), persistent=False)
    assert kinds(capture(model)) == {
        "weight": PARAMETER,
        "bias": PARAMETER,
        "running_mean": BUFFER,
        "running_var": BUFFER,
        "num_batches_tracked": BUFFER,
        "cos_sin_cache": BUFFER,
        "w_kc": ATTRIBUTE,
    }


def test_a_tied_weight_is_one_tensor_with_an_alias() -> None:
    model = nn.Module()
    model.embed_tokens, model.lm_head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    model.lm_head.weight = model.embed_tokens.weight
    captured = capture(model)
    assert list(captured.tensors) == ["embed_tokens.weight"]
    assert captured.aliases == {"embed_tokens.weight": ["lm_head.weight"]}
    assert captured.expected[PARAMETER] == 2


def test_a_module_under_two_names_has_all_its_tensors_under_both() -> None:
    shared = nn.Linear(2, 2)
    captured = capture(nn.ModuleDict({"a": shared, "b": shared}))
    assert captured.aliases == {"a.weight": ["b.weight"], "a.bias": ["b.bias"]}


def test_two_tensors_over_the_same_elements_are_one_with_an_alias() -> None:
    model = nn.Module()
    model.a = parameter(3, 4)
    model.b = nn.Parameter(model.a.data)
    model.c = model.a.data
    captured = capture(model)
    assert list(captured.tensors) == ["a"]
    assert captured.aliases == {"a": ["b", "c"]}


def test_tensors_that_share_a_storage_without_being_the_same_are_two() -> None:
    model = nn.Module()
    whole = torch.zeros(6, 4)
    model.qkv, model.q, model.t = nn.Parameter(whole), whole[:2], whole.t()
    captured = capture(model)
    assert list(captured.tensors) == ["qkv", "q", "t"]
    assert {row.storage_ptr for row in captured.tensors.values()} == {whole.data_ptr()}
    assert document.totals(captured)["cpu"] == {
        "tensors": 3,
        "tensor_bytes": 96 + 32 + 96,
        "storage_bytes": 96,
    }


def test_containers_are_looked_into_one_level_deep() -> None:
    model = nn.Module()
    one, two, three, deep = (torch.ones(2) for _ in range(4))
    model.in_list, model.in_tuple = [one, "text", None], (7, two)
    model.in_dict = {"k": three, "deeper": {"x": deep}}
    model.nested = [[deep]]
    model.empty = []
    assert list(capture(model).tensors) == ["in_list.0", "in_tuple.1", "in_dict.k"]


def test_torchs_own_bookkeeping_is_not_taken_for_attributes() -> None:
    model = nn.Linear(2, 2)
    model.register_forward_hook(lambda *arguments: None)
    assert capture(model).expected == {PARAMETER: 2, BUFFER: 0, ATTRIBUTE: 0, LORA: 0}


def test_torchs_list_of_internals_still_covers_what_torch_keeps() -> None:
    containers = (list, tuple, dict, set)
    own = {name for name, value in vars(nn.Module()).items() if isinstance(value, containers)}
    assert own <= walk._MODULE_INTERNALS


def test_a_module_that_contains_itself_is_walked_once() -> None:
    model = nn.Module()
    model.weight = parameter(2)
    model.add_module("me", model)
    child = nn.Module()
    child.add_module("parent", model)
    model.add_module("child", child)
    captured = capture(model)
    assert list(captured.tensors) == ["weight"]
    assert captured.aliases == {}


def test_absent_parameters_buffers_and_children_are_nothing() -> None:
    model = nn.Linear(2, 2, bias=False)
    model.register_buffer("mask", None)
    model.add_module("adapter", None)
    assert list(capture(model).tensors) == ["weight"]


def test_the_names_are_in_the_order_in_which_torch_gives_them() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    model.own = parameter(1)
    captured = capture(model)
    parameters = [name for name, row in captured.tensors.items() if row.kind == PARAMETER]
    assert parameters == [name for name, _ in model.named_parameters()]
    buffers = [name for name, row in captured.tensors.items() if row.kind == BUFFER]
    assert buffers == [name for name, _ in model.named_buffers()]


ODD_NAMES = ["ä", "重み", "\U0001f40d", "a\nb", 'a"b', "a'b", "a\\b", "\udc80", "", " ", "\0"]


def test_odd_names_are_kept_as_they_are() -> None:
    model = nn.Module()
    for name in ODD_NAMES:
        model._parameters[name] = parameter(1)
    assert list(capture(model).tensors) == ODD_NAMES


def test_two_tensors_that_come_to_one_name_are_both_accounted_for() -> None:
    model = nn.Module()
    model.child = nn.Linear(2, 2, bias=False)
    setattr(model, "child.weight", torch.zeros(5))
    model.scales = {1: torch.zeros(3), "1": torch.zeros(4)}
    captured = capture(model)
    assert captured.tensors["child.weight"].kind == PARAMETER
    assert captured.tensors["child.weight"].ptr == model.child.weight.data_ptr()
    assert len(captured.tensors) + len(captured.left_out) == 4


def test_an_empty_model_is_captured_as_empty() -> None:
    captured = capture(nn.Module())
    assert captured.tensors == {}
    assert moved(captured, FakeRunner(nn.Module()))  # another model
    assert document.totals(captured) == {}


def test_a_runner_without_a_model_is_an_error() -> None:
    with pytest.raises(LookupError, match="no model"):
        capture(None)


def test_the_lora_pool_is_found() -> None:
    runner = FakeRunner(nn.Module())
    pool = type("LoRAMemoryPool", (), {})()
    pool.A_buffer = {"qkv_proj": [torch.zeros(2, 3), torch.zeros(2, 3)]}
    pool.embedding = torch.zeros(4)
    pool.unrelated = object()
    runner.lora_manager = type("LoRAManager", (), {"memory_pool": pool})()  # type: ignore[attr-defined]
    assert kinds(capture_module.capture(runner)) == dict.fromkeys(
        ["lora_pool.embedding", "lora_pool.A_buffer.qkv_proj.0", "lora_pool.A_buffer.qkv_proj.1"],
        LORA,
    )


def test_the_kv_cache_is_found_without_its_books() -> None:
    runner = FakeRunner(nn.Module())
    pool = type("MHATokenToKVPool", (), {})()
    pool.k_buffer, pool.v_buffer = [torch.zeros(4, 2, 2)], [torch.zeros(4, 2, 2)]
    pool.data_ptrs = torch.zeros(2)
    runner.token_to_kv_pool = pool  # type: ignore[attr-defined]
    captured = capture_module.capture(runner)
    assert [(entry["name"], entry["ptr"], entry["size"]) for entry in captured.kv_cache] == [
        ("k_buffer.0", pool.k_buffer[0].data_ptr(), 64),
        ("v_buffer.0", pool.v_buffer[0].data_ptr(), 64),
    ]
    assert sum(document.storages_of(captured).kv_cache.values()) == 128


# --- where each lies ----------------------------------------------------------------------

STRIDED: dict[str, tuple[Callable[[], Any], int]] = {
    "contiguous": (lambda: torch.zeros(3, 4), 48),
    "transposed": (lambda: torch.zeros(3, 4).t(), 48),
    "padded": (lambda: torch.zeros(3, 8)[:, :4], 80),
    "expanded": (lambda: torch.zeros(1, 4).expand(3, 4), 16),
    "offset": (lambda: torch.zeros(6, 4)[2:5], 48),
    "every other": (lambda: torch.zeros(12)[::2], 44),
    "a scalar": (lambda: torch.zeros(()), 4),
    "half": (lambda: torch.zeros(3, dtype=torch.float16), 6),
    "fp8": (lambda: torch.zeros(5, dtype=torch.float8_e4m3fn), 5),
}


@pytest.mark.parametrize(("make", "span"), STRIDED.values(), ids=list(STRIDED))
def test_a_strided_tensor_has_the_span_that_its_elements_touch(
    make: Callable[[], Any], span: int
) -> None:
    model, tensor = nn.Module(), make()
    model.w = tensor
    (row,) = capture(model).tensors.values()
    assert row.ptr == tensor.data_ptr()
    assert row.size == tensor.numel() * tensor.element_size()
    assert row.span == span
    assert row.shape == list(tensor.shape)
    assert row.stride == list(tensor.stride())
    assert row.storage_offset == tensor.storage_offset()
    assert row.ptr == row.storage_ptr + row.storage_offset * tensor.element_size()
    assert row.ptr + row.span <= row.storage_ptr + row.storage_size
    assert (row.dtype, row.device, row.resident) == (str(tensor.dtype), "cpu", True)


def test_a_zero_size_tensor_has_a_row_and_no_region() -> None:
    model = nn.Module()
    model.none, model.slice = parameter(0, 4), torch.zeros(4)[2:2]
    captured = capture(model)
    assert [(row.size, row.span) for row in captured.tensors.values()] == [(0, 0), (0, 0)]
    assert document.regions_of(captured) == []


def test_what_lies_on_another_device_is_listed_without_an_address() -> None:
    model = nn.Linear(3, 2)
    model.register_buffer("scale", torch.zeros(2))
    captured = capture(model, device="cuda:0")
    assert captured.device_type == "cuda"
    for row in captured.tensors.values():
        assert (row.ptr, row.storage_ptr, row.resident, row.device) == (0, 0, False, "cpu")
        assert row.size > 0
    assert legacy.weights_meta(captured, False) == {}
    assert document.regions_of(captured) == []
    assert document.validation(captured, 2, None)["not_resident"] == ["weight", "bias", "scale"]


def test_a_meta_tensor_is_listed_without_an_address() -> None:
    model = nn.Linear(3, 2, device="meta")
    row = capture(model).tensors["weight"]
    assert (row.ptr, row.size, row.device, row.resident) == (0, 24, "meta", False)


def test_two_tensors_without_an_address_are_not_taken_for_one() -> None:
    model = nn.ModuleList([nn.Linear(3, 2, bias=False) for _ in range(2)]).to("meta")
    captured = capture(model)
    assert list(captured.tensors) == ["0.weight", "1.weight"]
    assert captured.aliases == {}


@pytest.mark.parametrize(
    ("device", "kind"),
    [("cpu", "cpu"), ("cuda", "cuda"), ("cuda:3", "cuda"), ("", "cpu"), (None, "cpu")],
)
def test_the_device_of_a_runner_is_a_kind_of_device(device: str | None, kind: str) -> None:
    # A runner that names none has the GPU where this process uses one, else the CPU.
    assert capture(nn.Module(), device=device).device_type == kind


# --- what has no address ------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_an_uninitialised_parameter_is_left_out_with_the_reason() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
    captured = capture(model)
    assert list(captured.tensors) == ["0.weight", "0.bias"]
    assert set(captured.left_out) == {"1.weight", "1.bias"}
    assert all("uninitialized" in reason.lower() for reason in captured.left_out.values())
    assert captured.expected[PARAMETER] == 4


def test_a_sparse_tensor_is_left_out_with_the_reason() -> None:
    model = nn.Module()
    model.plain, model.sparse = torch.zeros(2), torch.eye(3).to_sparse()
    captured = capture(model)
    assert list(captured.tensors) == ["plain"]
    assert "torch.sparse_coo" in captured.left_out["sparse"]


class Packed(torch.Tensor):  # type: ignore[misc, name-defined]
    """A wrapper subclass, as torchao's and DTensor are: no storage of its own."""

    @staticmethod
    def __new__(cls, data: Any, scale: Any) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.float32)

    def __init__(self, data: Any, scale: Any) -> None:
        self.packed, self.scale = data, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["packed", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(func)


class Broken(Packed):
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        raise RuntimeError("not laid out yet")


def test_a_wrapper_subclass_is_published_as_the_tensors_it_wraps() -> None:
    data, scale = torch.zeros(4, 4, dtype=torch.int8), torch.zeros(4)
    model = nn.Module()
    model._buffers["w"] = Packed(data, scale)
    captured = capture(model)
    assert {name: row.ptr for name, row in captured.tensors.items()} == {
        "w.packed": data.data_ptr(),
        "w.scale": scale.data_ptr(),
    }
    assert captured.left_out == {}


def test_a_wrapper_subclass_that_cannot_be_opened_is_left_out_with_the_reason() -> None:
    model = nn.Linear(2, 2)
    model._buffers["w"] = Broken(torch.zeros(2, 2), torch.zeros(2))
    captured = capture(model)
    assert list(captured.tensors) == ["weight", "bias"]
    assert "not laid out yet" in captured.left_out["w"]


def test_every_name_that_the_model_holds_is_captured_an_alias_or_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].tied, model[0].sparse = model[0].weight.data, torch.eye(2).to_sparse()
    captured = capture(model)
    accounted = len(captured.tensors) + len(captured.left_out)
    accounted += sum(len(names) for names in captured.aliases.values())
    assert accounted == sum(captured.expected.values())


# --- moved --------------------------------------------------------------------------------


def rebind_data(model: Any) -> None:
    model.a.weight.data = torch.zeros(3, 2)


def new_parameter(model: Any) -> None:
    model.a.weight = parameter(3, 2)


def rebind_alias(model: Any) -> None:
    model.b.weight = parameter(3, 2)


def add(model: Any) -> None:
    model.register_buffer("late", torch.zeros(1))


def remove(model: Any) -> None:
    model.a.bias = None


def rename(model: Any) -> None:
    model.d = model._modules.pop("a")


def transpose(model: Any) -> None:
    model.c.weight = nn.Parameter(model.c.weight.t())


def another_dtype(model: Any) -> None:
    model.a.bias = nn.Parameter(model.a.bias.data.view(torch.int32), requires_grad=False)


def fewer_rows_of_an_attribute(model: Any) -> None:
    model.a.w_kc = model.a.w_kc[:2]


def swap(model: Any) -> None:
    model.a.bias.data, model.b.bias.data = model.b.bias.data, model.a.bias.data


def nothing(model: Any) -> None:
    pass


def write_in_place(model: Any) -> None:
    model.a.weight.data.fill_(5.0)
    model.a.bias.data.copy_(torch.ones(3))


def same_memory_again(model: Any) -> None:
    model.a.weight = nn.Parameter(model.a.weight.data)
    model.b.weight = model.a.weight


def toggle_gradients(model: Any) -> None:
    model.requires_grad_(False)


def tied_pair() -> Any:
    model = nn.Module()
    model.a, model.b = nn.Linear(2, 3), nn.Linear(2, 3)
    model.b.weight = model.a.weight
    model.c = nn.Linear(4, 4, bias=False)
    model.a.w_kc = torch.ones(8, 4)
    return model


@pytest.mark.parametrize(
    "change",
    [
        rebind_data,
        new_parameter,
        rebind_alias,
        add,
        remove,
        rename,
        swap,
        transpose,
        another_dtype,
        fewer_rows_of_an_attribute,
    ],
)
def test_moved_is_true_when_an_address_or_a_name_changed(change: Callable[[Any], None]) -> None:
    runner = FakeRunner(tied_pair())
    before = capture_module.capture(runner)
    kept = copy.copy(list(runner.model.parameters()))  # so that no address is used twice
    change(runner.model)
    assert moved(before, runner)
    assert not document.same_layout(before, capture_module.capture(runner))
    assert kept


@pytest.mark.parametrize("change", [nothing, write_in_place, same_memory_again, toggle_gradients])
def test_moved_is_false_when_only_values_changed(change: Callable[[Any], None]) -> None:
    runner = FakeRunner(tied_pair())
    before = capture_module.capture(runner)
    change(runner.model)
    assert not moved(before, runner)
    assert document.same_layout(before, capture_module.capture(runner))


def test_moved_sees_a_parameter_that_has_another_ones_name_now() -> None:
    model = nn.Module()
    model.register_parameter("one", None)
    model.register_parameter("other", nn.Parameter(torch.zeros(2)))
    runner = FakeRunner(model)
    before = capture_module.capture(runner)
    model.one, model.other = model.other, None
    assert moved(before, runner)


def test_moved_asks_no_module_whether_it_is_equal() -> None:
    class Strict(nn.Linear):
        def __eq__(self, other: object) -> bool:
            raise AssertionError

        __hash__ = nn.Linear.__hash__

    runner = FakeRunner(nn.Sequential(Strict(2, 2)))
    assert not moved(capture_module.capture(runner), runner)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_moved_is_true_when_it_cannot_be_told() -> None:
    runner = FakeRunner(nn.LazyLinear(3))
    assert moved(None, runner)
    assert moved(capture_module.capture(runner), runner)


def test_moved_sees_a_plain_attribute_that_was_bound_anew() -> None:
    model = nn.Linear(2, 2)
    model.w_kc, model.scales = torch.zeros(3, 2), {"k": torch.zeros(3)}
    runner = FakeRunner(model)
    before = capture_module.capture(runner)
    assert not moved(before, runner)
    kept = model.scales["k"]
    model.scales["k"] = torch.zeros(3)
    assert moved(before, runner)
    model.scales["k"] = kept
    assert not moved(before, runner)
    model.w_kc = model.w_kc.clone()
    assert moved(before, runner)


# --- driver allocations (a fake driver: tests/gpu asks the real one) -----------------------


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[tuple[int, int]]]:
    """What a fake CUDA driver answers, by storage; its "cuda" is the CPU."""
    answers: dict[int, list[tuple[int, int]]] = {}
    monkeypatch.setattr(cuda_driver, "is_initialised", lambda: True)
    monkeypatch.setattr(cuda_driver, "allocations_under", lambda ptr, size: answers.get(ptr, []))
    row = capture_module.row_of

    def on_the_gpu(kind: str, tensor: Any, device_type: str) -> Any:
        return row(kind, tensor, "cpu")._replace(device="cuda:0")

    monkeypatch.setattr(capture_module, "row_of", on_the_gpu)
    return answers


def test_a_region_ends_where_its_driver_allocation_does(
    driver: dict[int, list[tuple[int, int]]],
) -> None:
    model = nn.Module()
    whole = torch.zeros(64, dtype=torch.uint8)
    model.a, model.b = whole[:32], whole[32:]
    base = whole.data_ptr()
    driver[base] = [(base, 48), (base + 48, 16)]
    regions = document.regions_of(capture(model, device="cuda"))
    assert [(r.start - base, r.end - base, r.names) for r in regions] == [
        (0, 48, ["a", "b"]),
        (48, 64, ["b"]),
    ]


def test_allocations_that_the_driver_no_longer_tells_are_remembered(
    driver: dict[int, list[tuple[int, int]]],
) -> None:
    model = nn.Linear(2, 2, bias=False)
    ptr = model.weight.data_ptr()
    driver[ptr] = [(ptr - 64, 4096)]
    before = capture(model, device="cuda")
    driver.clear()
    after = capture_module.known_allocations(before, capture(model, device="cuda"))
    assert after.allocations == before.allocations
    assert document.same_layout(before, after)
    model.weight = parameter(2, 2)
    moved_away = capture_module.known_allocations(before, capture(model, device="cuda"))
    assert moved_away.allocations == {}


# --- random models ------------------------------------------------------------------------


@st.composite
def models(draw: st.DrawFn, depth: int = 2) -> Any:
    """Modules with parameters, buffers and attributes, some tied, shared, strided or empty."""
    pool: list[Any] = []

    def tensor() -> Any:
        if len(pool) > 0 and draw(st.booleans()):
            base = draw(st.sampled_from(pool))
            view = draw(st.sampled_from(["same", "data", "t", "slice", "expand"]))
            if view == "same":
                return base
            data = base.detach()
            if view == "t" and data.dim() == 2:
                return data.t()
            if view == "slice" and data.dim():
                return data[: draw(st.integers(0, 2))]
            if view == "expand":
                return data.expand(2, *data.shape)
            return data
        shape = draw(st.lists(st.integers(0, 3), max_size=2))
        dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.float64]))
        device = draw(st.sampled_from(["cpu"] * 7 + ["meta"]))
        made = torch.empty(shape, dtype=dtype, device=device)
        pool.append(made)
        return made

    def module(left: int) -> Any:
        made = nn.Module()
        for number in range(draw(st.integers(0, 3))):
            kind = draw(st.sampled_from([PARAMETER, BUFFER, ATTRIBUTE, "list"]))
            value = tensor()
            if kind == PARAMETER:
                value = value if isinstance(value, nn.Parameter) else nn.Parameter(value)
                pool.append(value)
                made.register_parameter(f"p{number}", value)
            elif isinstance(value, nn.Parameter):
                made.register_parameter(f"q{number}", value)
            elif kind == BUFFER:
                made.register_buffer(f"b{number}", value, persistent=draw(st.booleans()))
            else:
                setattr(made, f"a{number}", value if kind == ATTRIBUTE else [None, value])
        if left:
            for number in range(draw(st.integers(0, 2))):
                made.add_module(f"m{number}", module(left - 1))
        return made

    return module(depth)


def live_tensors(model: Any) -> dict[str, Any]:
    """Every tensor by name, found with torch's own means and not with ours."""
    found = dict(model.named_parameters(remove_duplicate=False))
    found.update(model.named_buffers(remove_duplicate=False))
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, value in vars(module).items():
            full = f"{prefix}.{name}" if prefix else name
            if isinstance(value, torch.Tensor):
                found[full] = value
            elif isinstance(value, list) and len(value) == 2:
                found[full + ".1"] = value[1]
    return found


def end_of(tensor: Any) -> int:
    """Address behind the last byte, by looking at every element's own."""
    if tensor.numel() == 0:
        return int(tensor.data_ptr())
    places = torch.ones(tensor.shape).nonzero().tolist()
    return max(int(tensor[tuple(place)].data_ptr()) for place in places) + int(
        tensor.element_size()
    )


slow_start = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=60)


@slow_start
@given(models())
def test_every_address_and_span_is_the_live_tensors_own(model: Any) -> None:
    captured = capture(model)
    live = live_tensors(model)
    names = {name: name for name in captured.tensors}
    for canonical, aliases in captured.aliases.items():
        names.update(dict.fromkeys(aliases, canonical))
    assert set(names) == set(live)
    assert captured.left_out == {}
    for name, canonical in names.items():
        tensor, row = live[name], captured.tensors[canonical]
        if tensor.device.type == "meta":
            assert (row.ptr, row.resident) == (0, False)
            continue
        assert row.ptr == tensor.data_ptr()
        assert row.ptr + row.span == end_of(tensor)
        assert row.shape == list(tensor.shape)
        assert row.stride == list(tensor.stride())
        assert row.storage_ptr == tensor.untyped_storage().data_ptr()


@slow_start
@given(models())
def test_totals_count_each_storage_once(model: Any) -> None:
    storages = {}
    for tensor in live_tensors(model).values():
        if tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    totals = document.totals(capture(model)).get("cpu", {"storage_bytes": 0})
    assert totals["storage_bytes"] == sum(storages.values())


@slow_start
@given(models())
def test_every_resident_byte_lies_in_a_region(model: Any) -> None:
    captured = capture(model)
    regions = document.regions_of(captured)
    for name, row in captured.tensors.items():
        holders = [region for region in regions if name in region.names]
        assert len(holders) == (1 if row.resident and row.ptr and row.span else 0)
        for region in holders:
            assert region.start <= row.ptr
            assert row.ptr + row.span <= region.end


@slow_start
@given(models())
def test_an_unchanged_model_has_not_moved(model: Any) -> None:
    runner = FakeRunner(model)
    before = capture_module.capture(runner)
    assert not moved(before, runner)
    assert document.same_layout(before, capture_module.capture(runner))


def test_a_capture_keeps_no_tensor_alive() -> None:
    model = tied_pair()
    model.scales = [torch.zeros(3)]
    held = [weakref.ref(tensor) for tensor in live_tensors(model).values()]
    held.append(weakref.ref(model.scales[0]))
    captured = capture(model)
    del model
    gc.collect()
    assert [reference() for reference in held] == [None] * len(held)
    assert captured.tensors


def test_a_capture_writes_nothing_and_allocates_no_storage() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)))
    before = [(p.data_ptr(), p._version, p.detach().clone()) for p in model.parameters()]
    profile = torch.profiler.profile(profile_memory=True)
    with profile:
        capture(model)
    assert sum(event.self_cpu_memory_usage for event in profile.key_averages()) == 0
    for parameter_, (ptr, version, value) in zip(model.parameters(), before):
        assert (parameter_.data_ptr(), parameter_._version) == (ptr, version)
        assert torch.equal(parameter_, value)
