"""Writes a random checkpoint small enough to load in no time.

One of the families in `architectures`.  Everything a server wants is there: config,
weights, and a tokenizer in which every byte is a token, so no download is needed.  The
same arguments give the same weights; another seed gives the "update" of the same model.

Runs in the venv (it needs torch, safetensors and tokenizers):

    <venv python> -m cpu_sglang.tiny_model DIRECTORY --seed 1
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpu_sglang.architectures import (
    ARCHITECTURES,
    SPECIAL_TOKENS,
    VIDEO_TOKEN,
    VISION_TOKENS,
    VOCABULARY,
    Architecture,
)


@dataclass(frozen=True)
class TinyModel:
    """The shape of a checkpoint; what is not a field follows from these."""

    architecture: str = "llama"
    layers: int = 2
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    dtype: str = "bfloat16"
    tied_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}")
        if self.hidden % self.heads or self.heads % self.kv_heads:
            raise ValueError("hidden must divide by heads, and heads by kv_heads")

    @property
    def family(self) -> Architecture:
        return ARCHITECTURES[self.architecture]

    def config(self) -> dict[str, Any]:
        family = self.family
        return {
            "architectures": [family.model_class],
            "model_type": family.model_type,
            "torch_dtype": self.dtype,
            "hidden_size": self.hidden,
            "intermediate_size": 2 * self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "vocab_size": VOCABULARY,
            "tie_word_embeddings": self.tied_embeddings or family.always_tied,
            "max_position_embeddings": 512,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "attention_bias": False,
            "mlp_bias": False,
            "initializer_range": 0.02,
            "bos_token_id": SPECIAL_TOKENS.index("<s>"),
            "eos_token_id": SPECIAL_TOKENS.index("</s>"),
            **family.settings(self),
        }

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight of the checkpoint under its Hugging Face name."""
        return dict(self.family.weights(self))


def write_checkpoint(
    directory: Path, model: TinyModel | None = None, *, seed: int = 0, shards: int = 1
) -> int:
    """Write the checkpoint and return its number of parameters."""
    model = model or TinyModel()
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "config.json", model.config())
    write_tokenizer(directory, model.family.vision)
    if model.family.vision:
        _write_image_processor(directory)
    weights = _random_weights(model, seed)
    _write_weights(directory, weights, shards)
    return sum(weight.numel() for weight in weights.values())


def _random_weights(model: TinyModel, seed: int) -> dict[str, Any]:
    import torch  # type: ignore[import-not-found, unused-ignore]

    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, model.dtype)

    def weight(name: str, shape: tuple[int, ...]) -> Any:
        values = torch.randn(shape, generator=generator) * 0.1
        # Around one, yet no two norms alike: equal ones could be mistaken for each other.
        is_scale = len(shape) == 1 and name.endswith(".weight")
        return (1 + values if is_scale else values).to(dtype)

    return {name: weight(name, shape) for name, shape in model.weight_shapes().items()}


def _write_weights(directory: Path, weights: dict[str, Any], shards: int) -> None:
    from safetensors.torch import save_file  # type: ignore[import-not-found, unused-ignore]

    metadata = {"format": "pt"}  # transformers refuses a file that does not say so
    # A directory written before with another number of shards would otherwise hold both.
    for stale in directory.glob("model*.safetensors*"):
        stale.unlink()
    if shards == 1:
        save_file(weights, directory / "model.safetensors", metadata)
        return
    shard_of: dict[str, str] = {}
    names = list(weights)
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        members = names[number::shards]
        save_file({name: weights[name] for name in members}, directory / file, metadata)
        shard_of.update(dict.fromkeys(members, file))
    size = sum(weight.numel() * weight.element_size() for weight in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": shard_of}
    _write_json(directory / "model.safetensors.index.json", index)


def write_tokenizer(directory: Path, vision: bool) -> None:
    from tokenizers import (  # type: ignore[import-not-found, unused-ignore]
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
    )

    special = [*SPECIAL_TOKENS, *((*VISION_TOKENS, VIDEO_TOKEN) if vision else ())]
    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += special[len(SPECIAL_TOKENS) :]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(directory / "tokenizer.json"))

    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    _write_json(directory / "special_tokens_map.json", roles)
    _write_json(
        directory / "tokenizer_config.json",
        {
            **roles,
            "pad_token": "<unk>",
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": 512,
            "clean_up_tokenization_spaces": False,
            "chat_template": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n"
            "{% endfor %}assistant:",
        },
    )
    _write_json(directory / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})


def _write_image_processor(directory: Path) -> None:
    from cpu_sglang.architectures import PATCH, SPATIAL_MERGE, TEMPORAL_PATCH

    _write_json(
        directory / "preprocessor_config.json",
        {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2VLProcessor",
            "patch_size": PATCH,
            "temporal_patch_size": TEMPORAL_PATCH,
            "merge_size": SPATIAL_MERGE,
            "min_pixels": (2 * PATCH) ** 2,
            "max_pixels": (8 * PATCH) ** 2,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
    )


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    default = TinyModel()
    parser = argparse.ArgumentParser(
        prog="python -m cpu_sglang.tiny_model",
        description="Write a tiny random checkpoint with a byte-level tokenizer.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--architecture", choices=ARCHITECTURES, default=default.architecture)
    parser.add_argument("--layers", type=int, default=default.layers)
    parser.add_argument("--hidden", type=int, default=default.hidden)
    parser.add_argument("--heads", type=int, default=default.heads)
    parser.add_argument("--kv-heads", type=int, default=default.kv_heads)
    parser.add_argument("--dtype", default=default.dtype)
    parser.add_argument("--tied-embeddings", action="store_true")
    parser.add_argument("--shards", type=int, default=1)
    options = vars(parser.parse_args())
    directory, seed, shards = (options.pop(name) for name in ("directory", "seed", "shards"))
    parameters = write_checkpoint(directory, TinyModel(**options), seed=seed, shards=shards)
    print(f"{directory}: {parameters:,} parameters, seed {seed}")


if __name__ == "__main__":
    main()
