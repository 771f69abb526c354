"""Whether anything moved since a capture, as the recorder asks after each event.

Models and tensors are real torch's; the runner around them is a fake (`fake_sglang`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from captured_model import parameter, tied_pair
from fake_sglang import FakeRunner

from sglang_weight_hook.publisher import capture as capture_module
from sglang_weight_hook.publisher import document
from sglang_weight_hook.publisher.capture import moved

torch = pytest.importorskip("torch")
nn = torch.nn


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
