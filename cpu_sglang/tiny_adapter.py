"""Writes a random LoRA adapter, in PEFT's format, for a `tiny_model` checkpoint.

Runs in the venv (it needs torch and safetensors):

    <venv python> -m cpu_sglang.tiny_adapter DIRECTORY --model CHECKPOINT --seed 1
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

# SGLang packs these two by two or three, so an adapter for one of each is one for all.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_adapter(
    directory: Path,
    model: Path,
    *,
    seed: int = 0,
    rank: int = 4,
    targets: Sequence[str] = TARGETS,
) -> int:
    """Write the adapter and return how many modules of the model it changes."""
    import torch  # type: ignore[import-not-found, unused-ignore]
    from safetensors import safe_open  # type: ignore[import-not-found, unused-ignore]
    from safetensors.torch import save_file  # type: ignore[import-not-found, unused-ignore]

    generator = torch.Generator().manual_seed(seed)
    weights = {}
    modules = 0
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="pt") as checkpoint:
            for name in checkpoint.keys():  # noqa: SIM118 (it is no dict)
                module = name.removesuffix(".weight")
                if not name.endswith(".weight") or module.rpartition(".")[2] not in targets:
                    continue
                rows, columns = checkpoint.get_slice(name).get_shape()
                modules += 1
                for part, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                    key = f"base_model.model.{module}.lora_{part}.weight"
                    values = torch.randn(shape, generator=generator) * 0.5
                    weights[key] = values.to(torch.bfloat16)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(weights, directory / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(targets),
        "inference_mode": True,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
    return modules


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m cpu_sglang.tiny_adapter",
        description="Write a random LoRA adapter for a tiny checkpoint.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--model", type=Path, required=True, help="the checkpoint it is for")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rank", type=int, default=4)
    options = parser.parse_args()
    modules = write_adapter(options.directory, options.model, seed=options.seed, rank=options.rank)
    print(f"{options.directory}: {modules} modules, rank {options.rank}, seed {options.seed}")


if __name__ == "__main__":
    main()
