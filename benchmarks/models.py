"""Real torch models on the CPU: module trees of the shape of Llama's and DeepSeek's.

The tensors are tiny, for nothing here reads them; names, nesting, quantisation scales, shared
rotary caches, and MLA's plain attributes are as SGLang has them.  `make_model` hits a count
exactly and has 2.5 modules to a tensor, as SGLang's have with their activations, attention
backends and dispatchers.
"""

from __future__ import annotations

from typing import Any

import torch

# Llama 3 8B and 70B, DeepSeek-V3 FP8, the largest that was reported, and far beyond.
COUNTS = (195, 483, 1342, 3118, 100_000)
LARGEST_LLAMA = 483

MODULES_PER_TENSOR = 2.5


class Runner:
    """A stand-in for SGLang's ModelRunner: what the recorder asks of one."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.gpu_id = 0
        self.device = "cpu"
        self.is_draft_worker = False
        self.model_config = None


class Layer(torch.nn.Module):
    """A module with the plain attributes that SGLang's have: numbers, names, configurations."""

    def __init__(self) -> None:
        super().__init__()
        self.input_size, self.output_size = 7168, 2048
        self.tp_rank, self.tp_size = 0, 8
        self.prefix = "model.layers"
        self.skip_bias_add = False
        self.quant_config = None
        self.quant_method = object()
        self.params_dtype = torch.bfloat16
        self.output_partition_sizes = [1024, 1024]


class Empty(torch.nn.Module):
    """One of the many modules without a tensor: an activation, an attention backend."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_id, self.scaling = 7, 0.125
        self.prefix = "model.layers"
        self.backend = object()


class Holder(Layer):
    """A layer with parameters of the given names."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            dtype = torch.float32 if "scale" in name else torch.bfloat16
            value = torch.nn.Parameter(torch.empty(4, 2, dtype=dtype), requires_grad=False)
            setattr(self, name, value)


class Rotary(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cos_sin_cache", torch.empty(4, 2), persistent=False)


def a_module(**children: torch.nn.Module) -> torch.nn.Module:
    module = Layer()
    for name, child in children.items():
        module.add_module(name, child)
    return module


def llama_layer(rotary: torch.nn.Module) -> torch.nn.Module:
    """6 tensors."""
    return a_module(
        self_attn=a_module(
            qkv_proj=Holder("weight"), o_proj=Holder("weight"), rotary_emb=rotary, attn=Empty()
        ),
        mlp=a_module(gate_up_proj=Holder("weight"), down_proj=Holder("weight"), act_fn=Empty()),
        input_layernorm=Holder("weight"),
        post_attention_layernorm=Holder("weight"),
    )


def deepseek_layer(rotary: torch.nn.Module) -> torch.nn.Module:
    """24 tensors, block-quantised to FP8; two of them plain attributes."""
    quantised = ("weight", "weight_scale_inv")
    attention = a_module(
        fused_qkv_a_proj_with_mqa=Holder(*quantised),
        q_a_layernorm=Holder("weight"),
        q_b_proj=Holder(*quantised),
        kv_a_layernorm=Holder("weight"),
        kv_b_proj=Holder(*quantised),
        o_proj=Holder(*quantised),
        rotary_emb=rotary,
        attn_mqa=Empty(),
        attn_mha=Empty(),
    )
    both = torch.empty(2, 4, 2, dtype=torch.bfloat16)
    attention.w_kc, attention.w_vc = both[:, :2], both[:, 2:].transpose(1, 2)
    return a_module(
        self_attn=attention,
        mlp=a_module(
            gate=Holder("weight", "e_score_correction_bias"),
            experts=Holder(
                "w13_weight", "w13_weight_scale_inv", "w2_weight", "w2_weight_scale_inv"
            ),
            topk=Empty(),
            shared_experts=a_module(
                gate_up_proj=Holder(*quantised), down_proj=Holder(*quantised), act_fn=Empty()
            ),
        ),
        input_layernorm=Holder("weight"),
        post_attention_layernorm=Holder("weight"),
    )


def make_model(count: int) -> Any:
    """A model that holds ``count`` tensors: parameters, one buffer, plain attributes."""
    layer, in_layer = (llama_layer, 6) if count <= LARGEST_LLAMA else (deepseek_layer, 24)
    rotary = Rotary()
    outside = 4  # embedding, last norm, head, rotary cache
    layers = [layer(rotary) for _ in range((count - outside) // in_layer)]
    rest = count - outside - in_layer * len(layers)
    model = a_module(
        model=a_module(
            embed_tokens=Holder("weight"),
            layers=torch.nn.ModuleList(layers),
            norm=Holder("weight"),
        ),
        lm_head=Holder("weight"),
        nextn=torch.nn.ModuleList(Holder("weight") for _ in range(rest)),
    )
    missing = int(count * MODULES_PER_TENSOR) - sum(1 for _ in model.modules())
    for number in range(max(missing, 0)):
        layers[number % len(layers)].add_module(f"idle_{number // len(layers)}", Empty())
    return model
