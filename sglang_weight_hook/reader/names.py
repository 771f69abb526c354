"""What a tensor's name tells: its layer and its role."""

from __future__ import annotations

import re
from typing import Optional

# What `Tensor.role` can be.
ROLES = (
    "embedding",
    "attention",
    "mlp",
    "moe_expert",
    "norm",
    "lm_head",
    "rotary",
    "lora",
    "other",
)

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.([0-9]{1,9})(?:\.|$)")

# In this order: a norm inside the attention is a norm, an expert's projection an expert's.
_ROLE_NAMES = (
    ("lora", re.compile(r"(?:^|[._])lora(?:[._]|$)")),
    ("rotary", re.compile(r"rotary|cos_sin|inv_freq|(?:^|[._])rope(?:[._]|$)")),
    ("lm_head", re.compile(r"(?:^|\.)(?:lm_head|embed_out)(?:\.|$)")),
    ("norm", re.compile(r"norm|(?:^|\.)ln_?(?:\w|\d+)?(?:\.|$)")),
    ("moe_expert", re.compile(r"(?:^|[._])(?:shared_)?experts?(?:[._]|$)")),
    (
        "attention",
        re.compile(r"attn|attention|(?:^|[._])(?:[qkvo]|qkv|kv_[ab]|q_[ab])_proj|w_kc|w_vc"),
    ),
    (
        "mlp",
        re.compile(
            r"mlp|feed_forward|(?:^|[._])(?:ffn|fc\d|gate_proj|up_proj|gate_up_proj|down_proj"
            r"|block_sparse_moe|dense_h_to_4h|dense_4h_to_h)(?:[._]|$)"
        ),
    ),
    ("embedding", re.compile(r"embed|(?:^|\.)(?:wte|wpe)(?:\.|$)")),
)


def layer_of(name: str) -> Optional[int]:
    """Number of the layer that a tensor's name puts it in.

    >>> layer_of("model.layers.17.mlp.experts.w13_weight"), layer_of("model.norm.weight")
    (17, None)
    """
    match = _LAYER.search(name)
    return int(match.group(1)) if match else None


def role_of(name: str) -> str:
    """What a tensor is for, as far as its name tells: one of `ROLES`.

    >>> role_of("model.layers.0.self_attn.q_norm.weight")
    'norm'
    >>> role_of("model.layers.3.mlp.shared_experts.down_proj.weight")
    'moe_expert'
    >>> role_of("model.layers.0.self_attn.rotary_emb.cos_sin_cache")
    'rotary'
    """
    lowered = name.lower()
    for role, pattern in _ROLE_NAMES:
        if pattern.search(lowered):
            return role
    return "other"
