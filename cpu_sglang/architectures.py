"""What a checkpoint of each architecture holds: its config, and its weights' names and shapes.

The names are those of the Hugging Face checkpoint, the dimensions as small as the
architecture permits.  Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cpu_sglang.tiny_model import TinyModel

Shape = tuple[int, ...]
Weights = Iterator[tuple[str, Shape]]

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
# Behind the bytes, so that the ids of the others do not depend on them.
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>")
VIDEO_TOKEN = "<|video_pad|>"
# SGLang pads the vocabulary to a multiple of 64; a checkpoint that is already there
# makes the shapes on disk and in memory the same.
VOCABULARY = 320
FIRST_VISION_TOKEN = len(SPECIAL_TOKENS) + 256

# Dimensions of single architectures; the common ones are TinyModel's fields.
EXPERTS = 4
EXPERTS_PER_TOKEN = 2
EXPERT_INNER = 32
# DeepSeek's MLA.  The latent is as wide as the part of a head without positions: SGLang's
# torch_native attention reads the cache of latents as if it were keys when it prefills, so other
# widths would fail there (what the model then says is no DeepSeek's, and of no interest).
LATENT = 16
ROPE_DIM = 16
NOPE_DIM = 16
VALUE_DIM = 16
VISION_DIM = 32
VISION_DEPTH = 2
PATCH = 14
TEMPORAL_PATCH = 2
SPATIAL_MERGE = 2


@dataclass(frozen=True)
class Architecture:
    """How a family's checkpoint differs from a Llama's."""

    model_class: str
    model_type: str
    weights: Callable[[TinyModel], Weights]
    settings: Callable[[TinyModel], dict[str, Any]] = lambda model: {}
    # Head and embedding are one by design, whatever the options say.
    always_tied: bool = False
    vision: bool = False


# -- parts that several families have ----------------------------------------


def _kv_rows(model: TinyModel) -> int:
    return model.kv_heads * (model.hidden // model.heads)


def _top(model: TinyModel, *, tied: bool = False) -> Weights:
    yield "model.embed_tokens.weight", (VOCABULARY, model.hidden)
    yield "model.norm.weight", (model.hidden,)
    if not (tied or model.tied_embeddings):
        yield "lm_head.weight", (VOCABULARY, model.hidden)


def _attention(model: TinyModel, prefix: str, *, biases: bool = False) -> Weights:
    for name, rows in (("q", model.hidden), ("k", _kv_rows(model)), ("v", _kv_rows(model))):
        yield f"{prefix}{name}_proj.weight", (rows, model.hidden)
        if biases:
            yield f"{prefix}{name}_proj.bias", (rows,)
    yield prefix + "o_proj.weight", (model.hidden, model.hidden)


def _mlp(model: TinyModel, prefix: str, inner: int) -> Weights:
    yield prefix + "gate_proj.weight", (inner, model.hidden)
    yield prefix + "up_proj.weight", (inner, model.hidden)
    yield prefix + "down_proj.weight", (model.hidden, inner)


def _norms(model: TinyModel, prefix: str, *names: str) -> Weights:
    for name in names:
        yield f"{prefix}{name}.weight", (model.hidden,)


def _layers(model: TinyModel, top: str = "model.") -> Iterator[tuple[int, str]]:
    return ((layer, f"{top}layers.{layer}.") for layer in range(model.layers))


# -- the families -------------------------------------------------------------


def _llama(model: TinyModel, *, biases: bool = False) -> Weights:
    for _, prefix in _layers(model):
        yield from _norms(model, prefix, "input_layernorm", "post_attention_layernorm")
        yield from _attention(model, prefix + "self_attn.", biases=biases)
        yield from _mlp(model, prefix + "mlp.", 2 * model.hidden)
    yield from _top(model)


def _qwen2(model: TinyModel) -> Weights:
    return _llama(model, biases=True)


def _llama_eagle(model: TinyModel) -> Weights:
    """Embedding and head are the target's, `fc` joins its input."""
    yield "fc.weight", (model.hidden, 2 * model.hidden)
    for layer, prefix in _layers(model, top=""):
        if layer:  # SGLang's models/llama_eagle.py leaves the first one out
            yield from _norms(model, prefix, "input_layernorm")
        yield from _norms(model, prefix, "post_attention_layernorm")
        yield from _attention(model, prefix + "self_attn.")
        yield from _mlp(model, prefix + "mlp.", 2 * model.hidden)


def _qwen3_moe(model: TinyModel) -> Weights:
    for _, prefix in _layers(model):
        yield from _norms(model, prefix, "input_layernorm", "post_attention_layernorm")
        yield from _attention(model, prefix + "self_attn.")
        for name in ("q_norm", "k_norm"):
            yield f"{prefix}self_attn.{name}.weight", (model.hidden // model.heads,)
        yield prefix + "mlp.gate.weight", (EXPERTS, model.hidden)
        for expert in range(EXPERTS):
            yield from _mlp(model, f"{prefix}mlp.experts.{expert}.", EXPERT_INNER)
    yield from _top(model)


def _mixtral(model: TinyModel) -> Weights:
    for _, prefix in _layers(model):
        yield from _norms(model, prefix, "input_layernorm", "post_attention_layernorm")
        yield from _attention(model, prefix + "self_attn.")
        moe = prefix + "block_sparse_moe."
        yield moe + "gate.weight", (EXPERTS, model.hidden)
        for expert in range(EXPERTS):
            yield f"{moe}experts.{expert}.w1.weight", (EXPERT_INNER, model.hidden)
            yield f"{moe}experts.{expert}.w2.weight", (model.hidden, EXPERT_INNER)
            yield f"{moe}experts.{expert}.w3.weight", (EXPERT_INNER, model.hidden)
    yield from _top(model)


def _deepseek_v2(model: TinyModel) -> Weights:
    hidden, heads = model.hidden, model.heads
    for layer, prefix in _layers(model):
        yield from _norms(model, prefix, "input_layernorm", "post_attention_layernorm")
        attention = prefix + "self_attn."
        yield attention + "q_proj.weight", (heads * (NOPE_DIM + ROPE_DIM), hidden)
        yield attention + "kv_a_proj_with_mqa.weight", (LATENT + ROPE_DIM, hidden)
        yield attention + "kv_a_layernorm.weight", (LATENT,)
        yield attention + "kv_b_proj.weight", (heads * (NOPE_DIM + VALUE_DIM), LATENT)
        yield attention + "o_proj.weight", (hidden, heads * VALUE_DIM)
        if layer == 0:  # first_k_dense_replace
            yield from _mlp(model, prefix + "mlp.", 2 * hidden)
            continue
        yield prefix + "mlp.gate.weight", (EXPERTS, hidden)
        for expert in range(EXPERTS):
            yield from _mlp(model, f"{prefix}mlp.experts.{expert}.", EXPERT_INNER)
        yield from _mlp(model, prefix + "mlp.shared_experts.", EXPERT_INNER)
    yield from _top(model)


def _gemma2(model: TinyModel) -> Weights:
    norms = ("input_layernorm", "post_attention_layernorm")
    around_mlp = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
    for _, prefix in _layers(model):
        yield from _norms(model, prefix, *norms, *around_mlp)
        yield from _attention(model, prefix + "self_attn.")
        yield from _mlp(model, prefix + "mlp.", 2 * model.hidden)
    yield from _top(model, tied=True)


def _qwen2_vl(model: TinyModel) -> Weights:
    yield from _qwen2(model)
    dim, merged = VISION_DIM, VISION_DIM * SPATIAL_MERGE**2
    yield "visual.patch_embed.proj.weight", (dim, 3, TEMPORAL_PATCH, PATCH, PATCH)
    linears = [
        *(
            (f"blocks.{block}.{name}", rows, columns)
            for block in range(VISION_DEPTH)
            for name, rows, columns in (
                ("attn.qkv", 3 * dim, dim),
                ("attn.proj", dim, dim),
                ("mlp.fc1", 2 * dim, dim),
                ("mlp.fc2", dim, 2 * dim),
            )
        ),
        ("merger.mlp.0", merged, merged),
        ("merger.mlp.2", model.hidden, merged),
    ]
    for name, rows, columns in linears:
        yield f"visual.{name}.weight", (rows, columns)
        yield f"visual.{name}.bias", (rows,)
    blocks = [f"blocks.{block}.norm{number}" for block in range(VISION_DEPTH) for number in (1, 2)]
    for name in (*blocks, "merger.ln_q"):
        yield f"visual.{name}.weight", (dim,)
        yield f"visual.{name}.bias", (dim,)


def _gpt_oss(model: TinyModel) -> Weights:
    for _, prefix in _layers(model):
        yield from _norms(model, prefix, "input_layernorm", "post_attention_layernorm")
        yield from _attention(model, prefix + "self_attn.", biases=True)
        yield prefix + "self_attn.o_proj.bias", (model.hidden,)
        yield prefix + "self_attn.sinks", (model.heads,)
        yield prefix + "mlp.router.weight", (EXPERTS, model.hidden)
        yield prefix + "mlp.router.bias", (EXPERTS,)
        experts = prefix + "mlp.experts."
        yield experts + "gate_up_proj", (EXPERTS, model.hidden, 2 * model.hidden)
        yield experts + "gate_up_proj_bias", (EXPERTS, 2 * model.hidden)
        yield experts + "down_proj", (EXPERTS, model.hidden, model.hidden)
        yield experts + "down_proj_bias", (EXPERTS, model.hidden)
    yield from _top(model)


def _gpt_oss_settings(model: TinyModel) -> dict[str, Any]:
    return {
        "intermediate_size": model.hidden,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": EXPERTS_PER_TOKEN,
        "attention_bias": True,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * (model.layers // 2),
        "swiglu_limit": 7.0,
        "hidden_act": "silu",
    }


def _qwen3_moe_settings(model: TinyModel) -> dict[str, Any]:
    return {
        "num_experts": EXPERTS,
        "num_experts_per_tok": EXPERTS_PER_TOKEN,
        "moe_intermediate_size": EXPERT_INNER,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "router_aux_loss_coef": 0.001,
    }


def _mixtral_settings(model: TinyModel) -> dict[str, Any]:
    return {
        "intermediate_size": EXPERT_INNER,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": EXPERTS_PER_TOKEN,
        "sliding_window": None,
    }


def _deepseek_v2_settings(model: TinyModel) -> dict[str, Any]:
    return {
        "num_key_value_heads": model.heads,
        "head_dim": ROPE_DIM,
        "q_lora_rank": None,
        "kv_lora_rank": LATENT,
        "qk_rope_head_dim": ROPE_DIM,
        "qk_nope_head_dim": NOPE_DIM,
        "v_head_dim": VALUE_DIM,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "num_experts_per_tok": EXPERTS_PER_TOKEN,
        "moe_intermediate_size": EXPERT_INNER,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        # DeepSeek's own checkpoints all have it, and SGLang on a CPU insists on it.
        "rope_scaling": {
            "type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 256,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
    }


def _gemma2_settings(model: TinyModel) -> dict[str, Any]:
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": model.hidden // model.heads,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 128,
    }


def _qwen2_vl_settings(model: TinyModel) -> dict[str, Any]:
    half = model.hidden // model.heads // 2
    height = half // 4
    tokens = dict(zip(("start", "end", "pad", "image"), range(FIRST_VISION_TOKEN, VOCABULARY)))
    return {
        "rope_scaling": {"type": "mrope", "mrope_section": [half - 2 * height, height, height]},
        "vision_start_token_id": tokens["start"],
        "vision_end_token_id": tokens["end"],
        "vision_token_id": tokens["pad"],
        "image_token_id": tokens["image"],
        "video_token_id": tokens["image"] + 1,
        "vision_config": {
            "model_type": "qwen2_vl",
            "depth": VISION_DEPTH,
            "embed_dim": VISION_DIM,
            "hidden_size": model.hidden,
            "num_heads": 2,
            "mlp_ratio": 2,
            "in_chans": 3,
            "in_channels": 3,
            "patch_size": PATCH,
            "spatial_patch_size": PATCH,
            "temporal_patch_size": TEMPORAL_PATCH,
            "spatial_merge_size": SPATIAL_MERGE,
            "hidden_act": "quick_gelu",
        },
    }


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("LlamaForCausalLM", "llama", _llama),
    "qwen2": Architecture("Qwen2ForCausalLM", "qwen2", _qwen2),
    "qwen3_moe": Architecture("Qwen3MoeForCausalLM", "qwen3_moe", _qwen3_moe, _qwen3_moe_settings),
    "mixtral": Architecture("MixtralForCausalLM", "mixtral", _mixtral, _mixtral_settings),
    # Multi-head latent attention, one dense layer before the experts.
    "deepseek_v2": Architecture(
        "DeepseekV2ForCausalLM", "deepseek_v2", _deepseek_v2, _deepseek_v2_settings
    ),
    "gpt_oss": Architecture("GptOssForCausalLM", "gpt_oss", _gpt_oss, _gpt_oss_settings),
    "gemma2": Architecture(
        "Gemma2ForCausalLM", "gemma2", _gemma2, _gemma2_settings, always_tied=True
    ),
    "qwen2_vl": Architecture(
        "Qwen2VLForConditionalGeneration", "qwen2_vl", _qwen2_vl, _qwen2_vl_settings, vision=True
    ),
    # An EAGLE draft for a Llama.
    "llama_eagle": Architecture("LlamaForCausalLMEagle", "llama", _llama_eagle),
}
