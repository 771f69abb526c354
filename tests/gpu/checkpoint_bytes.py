"""What the bytes of a served weight must be, told from the checkpoint alone (no torch)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

# SGLang fuses these (models/qwen2.py, models/llama.py: stacked_params_mapping).
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


def tensors(folder: Path) -> dict[str, bytes]:
    """Every tensor's bytes from the safetensors files (8-byte header length, JSON, data)."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        body = data[8 + length :]
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                found[name] = body[start:end]
    return found


def expected(folder: Path) -> dict[str, str]:
    """SHA-256 by the name under which SGLang serves it, fused weights put together."""
    held = tensors(folder)
    sums = {}
    for name, data in held.items():
        module, _, leaf = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        fused = next((key for key, parts in FUSED.items() if last in parts), None)
        if fused is None:
            sums[name] = hashlib.sha256(data).hexdigest()
        else:
            parts = [held[f"{parent}.{part}.{leaf}"] for part in FUSED[fused]]
            sums[f"{parent}.{fused}.{leaf}"] = hashlib.sha256(b"".join(parts)).hexdigest()
    return sums
