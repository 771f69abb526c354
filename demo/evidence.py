"""What the demo checks for itself, without the hook: memory, files, modules."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

HOOK_MODULE = "sglang_patch_loader"


def checkpoint_weights(directory: Path) -> dict[str, bytes]:
    """A safetensors file is a JSON header and the bytes it describes."""
    content = (directory / "model.safetensors").read_bytes()
    header_size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + header_size])
    header.pop("__metadata__", None)
    data = content[8 + header_size :]
    return {name: data[slice(*entry["data_offsets"])] for name, entry in header.items()}


def weights_in_place(layout: dict[str, Any], checkpoint: Path) -> tuple[int, int]:
    """How many weights lie at their published address, of how many that can be compared.

    The addresses are of the server's process, and its memory is a file.  Fused weights
    (q, k and v in one) have no counterpart in the checkpoint and are passed over.
    Raises PermissionError where the machine forbids looking into another process.
    """
    pid = layout["identity"]["pid"]
    stored = checkpoint_weights(checkpoint)
    found = compared = 0
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for name, tensor in layout["tensors"].items():
            if name in stored and tensor["size"] == len(stored[name]):
                memory.seek(tensor["ptr"])
                found += memory.read(tensor["size"]) == stored[name]
                compared += 1
    return found, compared


def files_below(directory: Path) -> dict[str, str]:
    """Every file with its hash, and every folder and link.

    A ``.pyc`` in a ``__pycache__`` is left out while its source is there: using Python
    makes those, and no installer.  One without its source was left by an installer.
    """
    found = {}
    for path in directory.rglob("*"):
        name = str(path.relative_to(directory))
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        elif path.is_dir():
            if path.name != "__pycache__":
                found[name] = "folder"
        elif not _is_cache_of_existing_source(path):
            found[name] = _sha256(path)
    return found


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _is_cache_of_existing_source(path: Path) -> bool:
    if path.parent.name != "__pycache__":
        return False
    return (path.parent.parent / f"{path.name.partition('.')[0]}.py").exists()


def difference(before: dict[str, str], after: dict[str, str]) -> list[str]:
    names = before.keys() | after.keys()
    return sorted(name for name in names if before.get(name) != after.get(name))


def modules_at_start(python: Path, env: dict[str, str]) -> set[str]:
    """What a new interpreter has imported before the first line of a program."""
    command = [str(python), "-c", "import sys; print(*sys.modules)"]
    answer = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return set(answer.stdout.split())
