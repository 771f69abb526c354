"""One capture of a model, and the same tensors found with torch's own means."""

from __future__ import annotations

from typing import Any

import pytest
from fake_sglang import FakeRunner

from sglang_weight_hook.publisher import capture as capture_module
from sglang_weight_hook.publisher.capture import Capture

torch = pytest.importorskip("torch")
nn = torch.nn


def capture(model: Any, **more: Any) -> Capture:
    return capture_module.capture(FakeRunner(model, **more))


def parameter(*shape: int) -> Any:
    return nn.Parameter(torch.zeros(*shape))


def kinds(captured: Capture) -> dict[str, str]:
    return {name: row.kind for name, row in captured.tensors.items()}


def tied_pair() -> Any:
    model = nn.Module()
    model.a, model.b = nn.Linear(2, 3), nn.Linear(2, 3)
    model.b.weight = model.a.weight
    model.c = nn.Linear(4, 4, bias=False)
    model.a.w_kc = torch.ones(8, 4)
    return model


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
