"""A capture keeps no tensor alive, writes nothing and allocates nothing."""

from __future__ import annotations

import gc
import weakref

import pytest
from captured_model import capture, live_tensors, tied_pair

torch = pytest.importorskip("torch")
nn = torch.nn


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
