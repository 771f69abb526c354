"""Writes a random checkpoint small enough to load in no time.

A Llama, a Qwen2, or an EAGLE draft for such a Llama.  Everything a server wants is
there: config, weights, and a tokenizer in which every byte is a token, so no download is
needed.  The same arguments give the same weights; another seed gives the "update" of the
same model.

Runs in the venv (it needs torch, safetensors and tokenizers):

    <venv python> -m cpu_sglang.tiny_model DIRECTORY --seed 1
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    # An EAGLE draft for a Llama: embedding and head are the target's, `fc` joins its input.
    "llama_eagle": "LlamaForCausalLMEagle",
}
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
# SGLang pads the vocabulary to a multiple of 64; a checkpoint that is already there
# makes the shapes on disk and in memory the same.
VOCABULARY = 320


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

    def config(self) -> dict[str, Any]:
        return {
            "architectures": [ARCHITECTURES[self.architecture]],
            "model_type": self.architecture.partition("_")[0],
            "torch_dtype": self.dtype,
            "hidden_size": self.hidden,
            "intermediate_size": 2 * self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "vocab_size": VOCABULARY,
            "tie_word_embeddings": self.tied_embeddings,
            "max_position_embeddings": 512,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "attention_bias": False,
            "mlp_bias": False,
            "initializer_range": 0.02,
            "bos_token_id": SPECIAL_TOKENS.index("<s>"),
            "eos_token_id": SPECIAL_TOKENS.index("</s>"),
        }

    def weight_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every weight of the checkpoint under its Hugging Face name."""
        hidden, inner = self.hidden, 2 * self.hidden
        kv = self.kv_heads * (hidden // self.heads)
        eagle = self.architecture == "llama_eagle"
        top = "" if eagle else "model."
        if eagle:
            yield "fc.weight", (hidden, 2 * hidden)
        else:
            yield "model.embed_tokens.weight", (VOCABULARY, hidden)
        for layer in range(self.layers):
            prefix = f"{top}layers.{layer}."
            if not (eagle and layer == 0):  # SGLang's models/llama_eagle.py leaves it out
                yield prefix + "input_layernorm.weight", (hidden,)
            for name, rows in (("q", hidden), ("k", kv), ("v", kv)):
                yield prefix + f"self_attn.{name}_proj.weight", (rows, hidden)
                if self.architecture == "qwen2":
                    yield prefix + f"self_attn.{name}_proj.bias", (rows,)
            yield prefix + "self_attn.o_proj.weight", (hidden, hidden)
            yield prefix + "post_attention_layernorm.weight", (hidden,)
            yield prefix + "mlp.gate_proj.weight", (inner, hidden)
            yield prefix + "mlp.up_proj.weight", (inner, hidden)
            yield prefix + "mlp.down_proj.weight", (hidden, inner)
        if eagle:
            return
        yield "model.norm.weight", (hidden,)
        if not self.tied_embeddings:
            yield "lm_head.weight", (VOCABULARY, hidden)


def write_checkpoint(
    directory: Path, model: TinyModel | None = None, *, seed: int = 0, shards: int = 1
) -> int:
    """Write the checkpoint and return its number of parameters."""
    model = model or TinyModel()
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "config.json", model.config())
    _write_tokenizer(directory)
    weights = _random_weights(model, seed)
    _write_weights(directory, weights, shards)
    return sum(weight.numel() for weight in weights.values())


def _random_weights(model: TinyModel, seed: int) -> dict[str, Any]:
    import torch  # type: ignore[import-not-found, unused-ignore]

    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, model.dtype)

    def weight(name: str, shape: tuple[int, ...]) -> Any:
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=dtype)
        return (torch.randn(shape, generator=generator) * 0.1).to(dtype)

    return {name: weight(name, shape) for name, shape in model.weight_shapes()}


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


def _write_tokenizer(directory: Path) -> None:
    from tokenizers import (  # type: ignore[import-not-found, unused-ignore]
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
    )

    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(directory / "tokenizer.json"))

    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    _write_json(directory / "special_tokens_map.json", roles)
    _write_json(
        directory / "tokenizer_config.json",
        {
            **roles,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": 512,
            "clean_up_tokenization_spaces": False,
            "chat_template": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n"
            "{% endfor %}assistant:",
        },
    )
    _write_json(directory / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})


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
