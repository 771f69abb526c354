"""Which tensors one walk of a model finds, and under which names.

Models and tensors are real torch's; the runner around them is a fake (`fake_sglang`).
"""

from __future__ import annotations

import pytest
from captured_model import capture, kinds, parameter
from fake_sglang import FakeRunner

from sglang_weight_hook.layout.documents import ATTRIBUTE, BUFFER, LORA, PARAMETER
from sglang_weight_hook.publisher import capture as capture_module
from sglang_weight_hook.publisher import document, walk
from sglang_weight_hook.publisher.capture import moved

torch = pytest.importorskip("torch")
nn = torch.nn


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


def test_containers_are_looked_into_within_each_other() -> None:
    model = nn.Module()
    one, two, three, deep = (torch.ones(2) for _ in range(4))
    model.in_list, model.in_tuple = [one, "text", None], (7, two)
    model.in_dict = {"k": three, "deeper": {"x": deep}}
    model.nested = [[deep]]
    model.empty = []
    captured = capture(model)
    assert list(captured.tensors) == ["in_list.0", "in_tuple.1", "in_dict.k", "in_dict.deeper.x"]
    assert captured.aliases == {"in_dict.deeper.x": ["nested.0.0"]}


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
    assert not moved(captured, FakeRunner(nn.Module()))  # another model that holds nothing
    assert moved(captured, FakeRunner(nn.Linear(2, 2)))
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


def test_every_name_that_the_model_holds_is_captured_an_alias_or_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].tied, model[0].sparse = model[0].weight.data, torch.eye(2).to_sparse()
    captured = capture(model)
    accounted = len(captured.tensors) + len(captured.left_out)
    accounted += sum(len(names) for names in captured.aliases.values())
    assert accounted == sum(captured.expected.values())
