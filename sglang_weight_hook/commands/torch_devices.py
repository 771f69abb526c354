"""Which devices the torch of this interpreter is for, and what a map says on them.

torch is not imported: its ``version.py`` is parsed, and a device that a package of its own brings
is known by that package.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.machinery
import importlib.metadata
import os
from typing import Any, NamedTuple, Optional

# What torch can be built for, as `torch.version` calls it; and the packages that bring more.
BUILDS = {"cuda": "CUDA", "hip": "ROCm", "xpu": "XPU"}
PACKAGES = {"torch_npu": "NPU", "torch_musa": "MUSA", "habana_torch_plugin": "HPU"}

# On those the hook asks the device's own driver (docs/sglang-support.md).
_ASKED = ("CUDA", "CPU")


class Found(NamedTuple):
    torch: Optional[str]  # its version; None: not in this environment
    devices: dict[str, str]  # device -> version of what torch is for

    @property
    def unasked(self) -> list[str]:
        """Those of which a map says only what torch tells."""
        return [name for name in self.devices if name not in _ASKED]

    @property
    def text(self) -> str:
        kinds = " and ".join(f"{name} {version}".strip() for name, version in self.devices.items())
        text = f"torch {self.torch} for {kinds}"
        if not self.unasked:
            return text
        return (
            f"{text}; the hook asks no driver of {' or '.join(self.unasked)}: a map there has "
            "what torch tells, and null for allocations, UUID, PCI bus id and export. "
            "Not run there by the maintainers"
        )


def found() -> Found:
    stated = _stated()
    devices = {name: str(stated[key]) for key, name in BUILDS.items() if stated.get(key)}
    for package, name in PACKAGES.items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            devices[name] = importlib.metadata.version(package)
    version = stated.get("__version__")
    return Found(None if version is None else str(version), devices or {"CPU": ""})


def _stated() -> dict[str, Any]:
    """The constants of ``torch/version.py``; none where there is no torch."""
    with contextlib.suppress(Exception):
        spec = importlib.machinery.PathFinder.find_spec("torch")
        assert spec is not None
        folders = list(spec.submodule_search_locations or ())
        with open(os.path.join(folders[0], "version.py"), encoding="utf-8") as file:
            tree = ast.parse(file.read())
        constants: dict[str, Any] = {}
        for node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", 0)]
            value = getattr(node, "value", None)
            for target in targets:
                if isinstance(target, ast.Name) and isinstance(value, ast.Constant):
                    constants[target.id] = value.value
        return constants
    return {}
