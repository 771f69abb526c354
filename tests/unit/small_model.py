"""A small real torch model with everything that makes a map hard, published by the recorder."""

from __future__ import annotations

from typing import Any

import pytest
from fake_sglang import FakeRunner, load, settle

torch = pytest.importorskip("torch")


class Pool:
    """A KV pool with one buffer pair of one layer."""

    def __init__(self) -> None:
        self.k_buffer = [torch.zeros(8, 2, 4)]
        self.v_buffer = [torch.zeros(8, 2, 4)]


class Attention(torch.nn.Module):
    """Views of one storage that overlap in span and not in bytes, as MLA's are."""

    def __init__(self) -> None:
        super().__init__()
        self.kv_b_proj = torch.nn.Linear(6, 8, bias=False, dtype=torch.bfloat16)
        both = self.kv_b_proj.weight.data.view(2, 4, 6)
        self.w_kc, self.w_vc = both[:, :3], both[:, 3:].transpose(1, 2)


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.mlp = torch.nn.Linear(6, 6)
        self.input_layernorm = torch.nn.LayerNorm(6)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(10, 6)
        self.layers = torch.nn.ModuleList(Layer() for _ in range(2))
        self.lm_head = torch.nn.Linear(6, 10, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        self.offloaded = torch.nn.Parameter(torch.empty(4, device="meta"))


def a_runner(model: Any = None, **more: Any) -> FakeRunner:
    """A runner that is loaded and settled, so published."""
    runner = FakeRunner(Model() if model is None else model, **more)
    runner.token_to_kv_pool = Pool()  # type: ignore[attr-defined]
    load(runner)
    settle()
    return runner
