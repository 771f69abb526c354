"""Writes a random quantised checkpoint in the form in which its quantiser would leave it.

Weights of linear layers are random bits with small scales, packed as the format wants them; the
rest is `tiny_model`'s.  What such a model says means nothing, but each seed's is its own.

Runs in the venv (it needs torch, safetensors, tokenizers, and gguf for GGUF):

    <venv python> -m cpu_sglang.quantized_model DIRECTORY --scheme awq --seed 1
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpu_sglang.tiny_model import TinyModel, write_checkpoint

GROUP = 64  # inputs that share a scale
BLOCK = 128  # rows and columns of a block of FP8 that share one
NIBBLES = 8  # 4-bit weights in a 32-bit word

# One weight of a linear layer, [outputs, inputs] -> what the checkpoint holds instead.
Packed = Iterator[tuple[str, Any]]


@dataclass(frozen=True)
class Scheme:
    """How SGLang is told of it: by the checkpoint's config, and by launch arguments."""

    pack: Callable[[str, Any, Any], Packed]  # name without ".weight", the weight, torch's generator
    config: dict[str, Any] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    architecture: str = "llama"
    dtype: str = "bfloat16"
    # Hidden size: as small as the format's kernels on a GPU permit.
    hidden: int = 256
    gguf: str = ""  # the type of its tensors, where it is one GGUF file


def _bits(shape: tuple[int, ...], dtype: str, generator: Any) -> Any:
    import torch

    kind = getattr(torch, dtype)
    limits = torch.iinfo(kind)
    return torch.randint(limits.min, limits.max, shape, generator=generator, dtype=kind)


def _scales(shape: tuple[int, ...], dtype: str, generator: Any, size: float = 0.002) -> Any:
    import torch

    return (size * (1 + torch.rand(shape, generator=generator))).to(getattr(torch, dtype))


def _unpacked(name: str, weight: Any, generator: Any) -> Packed:
    yield name + ".weight", weight


def _int8(name: str, weight: Any, generator: Any) -> Packed:
    yield name + ".weight", _bits(tuple(weight.shape), "int8", generator)
    yield name + ".weight_scale", _scales((weight.shape[0], 1), "float32", generator, 0.001)


def _fp8(name: str, weight: Any, generator: Any) -> Packed:
    import torch

    yield name + ".weight", (10 * weight.float()).to(torch.float8_e4m3fn)
    yield name + ".weight_scale", _scales((weight.shape[0], 1), "float32", generator, 0.1)


def _fp8_blocks(name: str, weight: Any, generator: Any) -> Packed:
    import torch

    blocks = tuple(-(-length // BLOCK) for length in weight.shape)
    yield name + ".weight", (10 * weight.float()).to(torch.float8_e4m3fn)
    yield name + ".weight_scale_inv", _scales(blocks, "float32", generator, 0.1)


def _int8_blocks(name: str, weight: Any, generator: Any) -> Packed:
    blocks = tuple(-(-length // BLOCK) for length in weight.shape)
    yield name + ".weight", _bits(tuple(weight.shape), "int8", generator)
    yield name + ".weight_scale_inv", _scales(blocks, "float32", generator, 0.001)


def _awq(name: str, weight: Any, generator: Any) -> Packed:
    outputs, inputs = weight.shape
    yield name + ".qweight", _bits((inputs, outputs // NIBBLES), "int32", generator)
    yield name + ".qzeros", _bits((inputs // GROUP, outputs // NIBBLES), "int32", generator)
    yield name + ".scales", _scales((inputs // GROUP, outputs), "float16", generator)


def _gptq(name: str, weight: Any, generator: Any) -> Packed:
    import torch

    outputs, inputs = weight.shape
    zeros = torch.full((inputs // GROUP, outputs // NIBBLES), 0x77777777, dtype=torch.int32)
    yield name + ".qweight", _bits((inputs // NIBBLES, outputs), "int32", generator)
    yield name + ".qzeros", zeros  # symmetric
    yield name + ".scales", _scales((inputs // GROUP, outputs), "float16", generator)
    yield name + ".g_idx", torch.arange(inputs, dtype=torch.int32) // GROUP


def _packed_int4(name: str, weight: Any, generator: Any) -> Packed:
    import torch

    outputs, inputs = weight.shape
    yield name + ".weight_packed", _bits((outputs, inputs // NIBBLES), "int32", generator)
    yield name + ".weight_scale", _scales((outputs, inputs // GROUP), "bfloat16", generator)
    yield name + ".weight_shape", torch.tensor([outputs, inputs], dtype=torch.int64)


def _mxfp4(name: str, weight: Any, generator: Any) -> Packed:
    """Of experts, [expert, inputs, outputs]: blocks of 32 inputs in 16 bytes, and their exponents.

    Everything else stays as it is.
    """
    import torch

    if weight.dim() != 3:
        yield name + ".weight", weight
        return
    experts, inputs, outputs = weight.shape
    yield name + "_blocks", _bits((experts, outputs, inputs // 32, 16), "uint8", generator)
    yield (
        name + "_scales",
        torch.randint(
            118, 122, (experts, outputs, inputs // 32), generator=generator, dtype=torch.uint8
        ),
    )


def _compressed(kind: str, form: str, **weights: Any) -> dict[str, Any]:
    """The config of compressed-tensors for all linear layers but the head."""
    group: dict[str, Any] = {
        "targets": ["Linear"],
        "weights": {"type": kind, "symmetric": True, "dynamic": False, **weights},
    }
    if weights["num_bits"] == 8:
        group["input_activations"] = {
            "num_bits": 8,
            "type": kind,
            "symmetric": True,
            "strategy": "token",
            "dynamic": True,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


_AWQ = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": GROUP,
    "zero_point": True,
    "version": "gemm",
}
_GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": GROUP,
    "desc_act": False,
    "sym": True,
    "lm_head": False,
    "dynamic": {},
}
_FP8_BLOCKS = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}
_INT4 = _compressed("int", "pack-quantized", num_bits=4, strategy="group", group_size=GROUP)

SCHEMES: dict[str, Scheme] = {
    "w8a8_int8": Scheme(_int8, arguments=("--quantization", "w8a8_int8")),
    "compressed-int8": Scheme(
        _int8, _compressed("int", "int-quantized", num_bits=8, strategy="channel")
    ),
    "compressed-fp8": Scheme(
        _fp8, _compressed("float", "float-quantized", num_bits=8, strategy="channel")
    ),
    "compressed-int4": Scheme(_packed_int4, _INT4),
    "fp8": Scheme(_unpacked, arguments=("--quantization", "fp8")),
    "fp8-blocks": Scheme(_fp8_blocks, _FP8_BLOCKS),
    "int8-blocks": Scheme(_int8_blocks, {**_FP8_BLOCKS, "quant_method": "blockwise_int8"}),
    "awq": Scheme(_awq, _AWQ, dtype="float16"),
    "gptq": Scheme(_gptq, _GPTQ, dtype="float16"),
    "gguf-f16": Scheme(_unpacked, dtype="float16", gguf="F16"),
    "gguf-q8_0": Scheme(_unpacked, dtype="float16", gguf="Q8_0"),
    "bitsandbytes": Scheme(
        _unpacked, arguments=("--quantization", "bitsandbytes", "--load-format", "bitsandbytes")
    ),
    "mxfp4": Scheme(
        _mxfp4,
        {"quant_method": "mxfp4", "modules_to_not_convert": ["self_attn", "router", "lm_head"]},
        architecture="gpt_oss",
    ),
}


def write_quantized(directory: Path, name: str, *, seed: int = 0) -> None:
    """Write the checkpoint of a scheme; its weights are in one file."""
    scheme = SCHEMES[name]
    model = TinyModel(architecture=scheme.architecture, hidden=scheme.hidden, dtype=scheme.dtype)
    write_checkpoint(directory, model, seed=seed)
    if scheme.gguf:
        _write_gguf(directory, model, scheme.gguf)
        return
    import torch
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(seed)
    file = directory / "model.safetensors"
    packed: dict[str, Any] = {}
    for weight_name, weight in load_file(file).items():
        stem = weight_name.removesuffix(".weight")
        # Not the head, the embedding, norms and biases.
        if stem.endswith("_proj") and weight.dim() > 1:
            packed.update(scheme.pack(stem, weight, generator))
        else:
            packed[weight_name] = weight
    save_file({key: value.contiguous() for key, value in packed.items()}, file, {"format": "pt"})
    if scheme.config:
        _write_config(directory, quantization_config=scheme.config)


def model_path(directory: Path, name: str) -> Path:
    """What SGLang is given for ``--model-path``: of GGUF the file, else the directory."""
    return directory / "model.gguf" if SCHEMES[name].gguf else directory


def _write_config(directory: Path, **more: Any) -> None:
    file = directory / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, **more}, indent=1) + "\n")


# The names that llama.cpp has for a Llama's weights.
_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_GGUF_PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _write_gguf(directory: Path, model: TinyModel, kind: str) -> None:
    import gguf  # type: ignore[import-not-found, unused-ignore]
    import numpy as np
    from safetensors.torch import load_file

    config = model.config()
    writer = gguf.GGUFWriter(directory / "model.gguf", "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(model.hidden)
    writer.add_block_count(model.layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    _add_tokens(writer, directory, config["vocab_size"])
    quantization = gguf.GGMLQuantizationType[kind]
    for name, weight in load_file(directory / "model.safetensors").items():
        values = weight.float().numpy()
        if values.ndim == 1:
            writer.add_tensor(_gguf_name(name), values)
            continue
        packed = gguf.quantize(values, quantization)
        writer.add_tensor(_gguf_name(name), np.ascontiguousarray(packed), raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    # SGLang takes a directory with weights for what those are.
    (directory / "model.safetensors").unlink()


def _gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in _GGUF_NAMES:
        return _GGUF_NAMES[stem] + ".weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{_GGUF_PARTS[part]}.weight"


def _add_tokens(writer: Any, directory: Path, size: int) -> None:
    """The tokenizer that lies in the directory; SGLang is to read the one beside the file."""
    vocabulary = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    tokens += [f"<unused{number}>" for number in range(len(tokens), size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * size)
    writer.add_token_merges([])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m cpu_sglang.quantized_model",
        description="Write a tiny random quantised checkpoint with a byte-level tokenizer.",
    )
    parser.add_argument("directory", type=Path, help="of several seeds, DIRECTORY-SEED each")
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--scheme", choices=SCHEMES, required=True)
    options = parser.parse_args()
    for seed in options.seed:
        directory = options.directory
        if len(options.seed) > 1:
            directory = directory.with_name(f"{directory.name}-{seed}")
        write_quantized(directory, options.scheme, seed=seed)
        print(model_path(directory, options.scheme))


if __name__ == "__main__":
    main()
