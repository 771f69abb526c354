"""A process that publishes the tiny Llama of ``cpu_sglang`` as SGLang builds it: same names, same
shapes, no SGLang.  For the tests of what the pages show.

What it holds is held against a real server by ``tests/real_sglang/test_tutorial.py``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from sglang_weight_hook.reader import Slot, open_slot

# Updates once for each line on stdin, and says when it is done.
OWNER = """
import sys, time
import torch
from fake_sglang import FakeRunner, load, settle, update

HIDDEN, LAYERS, VOCABULARY = 64, 2, 320

class Weight(torch.nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(shape, dtype=torch.bfloat16))

class Rotary(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("cos_sin_cache", torch.randn(768, 16, dtype=torch.bfloat16))

class Attention(torch.nn.Module):
    def __init__(self, rotary):
        super().__init__()
        self.qkv_proj, self.o_proj = Weight(2 * HIDDEN, HIDDEN), Weight(HIDDEN, HIDDEN)
        self.rotary_emb = rotary

class Mlp(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj, self.down_proj = Weight(4 * HIDDEN, HIDDEN), Weight(HIDDEN, 2 * HIDDEN)

class Layer(torch.nn.Module):
    def __init__(self, rotary):
        super().__init__()
        self.self_attn, self.mlp = Attention(rotary), Mlp()
        self.input_layernorm, self.post_attention_layernorm = Weight(HIDDEN), Weight(HIDDEN)

class LlamaModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = Weight(VOCABULARY, HIDDEN)
        rotary = Rotary()
        self.layers = torch.nn.ModuleList(Layer(rotary) for _ in range(LAYERS))
        self.norm = Weight(HIDDEN)

class LlamaForCausalLM(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = LlamaModel()
        self.lm_head = Weight(VOCABULARY, HIDDEN)

class Pool:
    def __init__(self):
        shape = (2049, 2, 16)
        self.k_buffer = [torch.zeros(shape, dtype=torch.bfloat16) for _ in range(LAYERS)]
        self.v_buffer = [torch.zeros(shape, dtype=torch.bfloat16) for _ in range(LAYERS)]

runner = FakeRunner(LlamaForCausalLM())
runner.token_to_kv_pool = Pool()
load(runner)
settle()
def fill():
    with torch.no_grad():
        for parameter in runner.model.parameters():
            parameter.add_(1)
    time.sleep(0.5)  # as updates do that have something to load: who watches sees them begin
print("ready", flush=True)
for line in sys.stdin:
    update(runner, during=fill)
    print("done", flush=True)
"""


class TinyLlama:
    """The process, and its slot as a reader sees it."""

    def __init__(self, folder: Path) -> None:
        here = Path(__file__).resolve().parent
        self.folder = folder
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYTHON", "SGLANG_WEIGHT_HOOK"))
        }
        environment["PYTHONPATH"] = os.pathsep.join((str(here.parents[1]), str(here)))
        environment["SGLANG_WEIGHT_HOOK_SHARE"] = "1"
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER],
            env=environment,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == "ready"
        self.slot: Slot = open_slot(str(folder / "weights_metadata"), "0")

    def update(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("update\n")
        self.process.stdin.flush()
        assert self._answer() == "done"

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()
