"""What the bytes of a served weight must be, told from the checkpoint alone (no torch)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

# SGLang fuses these (models/qwen2.py, models/llama.py: stacked_params_mapping).
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


# Split over the input dimension (RowParallelLinear); what has one dimension and is no bias of
# `FUSED` is whole on every rank; all else is split over the first dimension.
ROW_PARALLEL = ("o_proj", "down_proj")
REPLICATED = ("input_layernorm", "post_attention_layernorm", "norm", "fc")


@dataclass(frozen=True)
class Weight:
    shape: tuple[int, ...]
    data: bytes

    def shard(self, dimension: int, rank: int, ranks: int) -> bytes:
        """This rank's slice along ``dimension`` (0 or 1), rows one after another."""
        if dimension == 0:
            size = len(self.data) // ranks
            return self.data[rank * size : (rank + 1) * size]
        row = len(self.data) // self.shape[0]
        part = row // ranks
        starts = range(rank * part, len(self.data), row)
        return b"".join(self.data[start : start + part] for start in starts)


def tensors(folder: Path) -> dict[str, Weight]:
    """Every tensor from the safetensors files (8-byte header length, JSON, data)."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        body = data[8 + length :]
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                found[name] = Weight(tuple(entry["shape"]), body[start:end])
    return found


def expected(folder: Path, rank: int = 0, ranks: int = 1) -> dict[str, str]:
    """SHA-256 by the name under which SGLang serves it on this tensor-parallel rank.

    Fused weights are put together of each part's slice, as SGLang does.
    """
    held = tensors(folder)
    sums = {}
    for name in held:
        module, _, leaf = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        fused = next((key for key, parts in FUSED.items() if last in parts), None)
        served, parts = name, (name,)
        if fused is not None:
            served = f"{parent}.{fused}.{leaf}"
            parts = tuple(f"{parent}.{part}.{leaf}" for part in FUSED[fused])
        if last in REPLICATED:
            pieces = [held[part].data for part in parts]
        else:
            dimension = 1 if last in ROW_PARALLEL else 0
            pieces = [held[part].shard(dimension, rank, ranks) for part in parts]
        sums[served] = hashlib.sha256(b"".join(pieces)).hexdigest()
    return sums
