"""Writes a random diffusion pipeline (FLUX.1's components) small enough to load in no time.

A folder as diffusers saves one: ``model_index.json`` and a subfolder for each component.  The
same arguments give the same weights; another seed gives the "update" of the same pipeline.

Runs in the venv with the diffusion packages beside it (it needs torch, transformers and
diffusers):

    <venv python> -m cpu_sglang.tiny_pipeline DIRECTORY --seed 1
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from cpu_sglang.tiny_model import write_tokenizer

# SGLang recognises a family by the name of its folder.
FOLDER = "FLUX.1-dev"
HIDDEN = 32
LAYERS = 2
TOKENS = 300  # the tokenizer's bytes and special tokens, and room for more
# Attention modules of the transformer that a LoRA adapter changes.
ADAPTED = ("to_q", "to_k", "to_v")


def write_pipeline(directory: Path, *, seed: int = 0) -> dict[str, int]:
    """Write the pipeline; the number of parameters of each component."""
    components = _components(seed)
    directory.mkdir(parents=True, exist_ok=True)
    for name, component in components.items():
        component.save_pretrained(directory / name)
    _name_as_published(directory / "text_encoder" / "model.safetensors")
    for name in ("tokenizer", "tokenizer_2"):
        (directory / name).mkdir(exist_ok=True)
        write_tokenizer(directory / name, vision=False)
    (directory / "model_index.json").write_text(
        json.dumps(
            {
                "_class_name": "FluxPipeline",
                "_diffusers_version": "0.30.0",
                "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
                "text_encoder": ["transformers", "CLIPTextModel"],
                "text_encoder_2": ["transformers", "T5EncoderModel"],
                "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
                "tokenizer_2": ["transformers", "PreTrainedTokenizerFast"],
                "transformer": ["diffusers", "FluxTransformer2DModel"],
                "vae": ["diffusers", "AutoencoderKL"],
            },
            indent=1,
        )
    )
    return {
        name: sum(parameter.numel() for parameter in component.parameters())
        for name, component in components.items()
        if hasattr(component, "parameters")
    }


def _name_as_published(file: Path) -> None:
    """transformers 5 leaves a prefix out that FLUX.1's own files have, and SGLang looks for."""
    from safetensors.torch import (  # type: ignore[import-not-found, unused-ignore]
        load_file,
        save_file,
    )

    weights = {
        name if name.startswith("text_model.") else f"text_model.{name}": weight
        for name, weight in load_file(file).items()
    }
    save_file(weights, file, {"format": "pt"})


def _components(seed: int) -> dict[str, Any]:
    import diffusers  # type: ignore[import-not-found, unused-ignore]
    import torch  # type: ignore[import-not-found, unused-ignore]
    import transformers  # type: ignore[import-not-found, unused-ignore]

    torch.manual_seed(seed)
    clip = transformers.CLIPTextConfig(
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_attention_heads=2,
        num_hidden_layers=LAYERS,
        projection_dim=HIDDEN,
        vocab_size=TOKENS,
        bos_token_id=1,
        eos_token_id=2,
        max_position_embeddings=77,
    )
    t5 = transformers.T5Config(
        d_model=HIDDEN,
        d_kv=HIDDEN // 2,
        d_ff=2 * HIDDEN,
        num_heads=2,
        num_layers=LAYERS,
        vocab_size=TOKENS,
        feed_forward_proj="gated-gelu",
    )
    built = {
        "text_encoder": transformers.CLIPTextModel(clip),
        "text_encoder_2": transformers.T5EncoderModel(t5),
        "transformer": diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=LAYERS,
            num_single_layers=LAYERS,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=HIDDEN,
            pooled_projection_dim=HIDDEN,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        ),
        "vae": diffusers.AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=32,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.1159,
            scaling_factor=0.3611,
        ),
    }
    built = {name: module.to(torch.bfloat16) for name, module in built.items()}
    return {**built, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)}


def write_adapter(directory: Path, *, seed: int = 0, rank: int = 4) -> int:
    """Write a LoRA adapter for the transformer; how many of its modules it changes."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    weights = {}
    modules = [
        f"{blocks}.{layer}.attn.{name}"
        for blocks in ("transformer_blocks", "single_transformer_blocks")
        for layer in range(LAYERS)
        for name in ADAPTED
    ]
    for module in modules:
        for part, shape in (("A", (rank, HIDDEN)), ("B", (HIDDEN, rank))):
            values = torch.randn(shape, generator=generator) * 0.5
            weights[f"transformer.{module}.lora_{part}.weight"] = values.to(torch.bfloat16)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(weights, directory / "pytorch_lora_weights.safetensors", {"format": "pt"})
    return len(modules)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m cpu_sglang.tiny_pipeline",
        description="Write a tiny random diffusion pipeline, or a LoRA adapter for one.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--adapter", action="store_true", help="write a LoRA adapter instead")
    options = parser.parse_args()
    if options.adapter:
        modules = write_adapter(options.directory, seed=options.seed)
        print(f"{options.directory}: {modules} modules, seed {options.seed}")
    else:
        sizes = write_pipeline(options.directory, seed=options.seed)
        print(f"{options.directory}: {sizes}, seed {options.seed}")


if __name__ == "__main__":
    main()
