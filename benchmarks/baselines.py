"""What the hook is compared with.

*The floor* reads the prototype's five fields of every parameter, and nothing else: no map of
weights costs less in Python.  *The prototype* is this project's predecessor and not part of it:
``SEED_PROTOTYPE`` (or ``--prototype``) names its directory; without it the rows say "not given".
"""

from __future__ import annotations

import json
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

VARIABLE = "SEED_PROTOTYPE"
NOT_GIVEN = f"prototype: not given ({VARIABLE}=DIR)"

_CORE = "sglang_weight_hook_patch_core.py"


def floor(model: Any) -> dict[str, dict[str, Any]]:
    """The bare walk."""
    return {
        name: {
            "ptr": tensor.data_ptr(),
            "size": tensor.numel() * tensor.element_size(),
            "device": str(tensor.device),
            "dtype": str(tensor.dtype),
            "shape": list(tensor.shape),
        }
        for name, tensor in model.named_parameters()
    }


def prototype_directory() -> Optional[Path]:
    given = os.environ.get(VARIABLE)
    if not given:
        return None
    if not Path(given, _CORE).is_file():
        raise SystemExit(f"{VARIABLE}={given}: no {_CORE} is there")
    return Path(given)


class Prototype:
    """The prototype's own functions over a model of ours, in the current directory.

    Its source is executed as it is, but for two things that a machine without a GPU and
    without SGLang needs: its import of SGLang's arguments is satisfied by an empty module, and
    it takes tensors on the CPU for CUDA's (or it would record none).
    """

    def __init__(self, directory: Path) -> None:
        path = directory / _CORE
        source = path.read_text(encoding="utf-8").replace("tensor.is_cuda", "True")
        source = source.replace("print(", "_quiet(")
        stand_ins = ("sglang", "sglang.srt", "sglang.srt.server_args")
        kept = {name: sys.modules.get(name) for name in stand_ins}
        for name in stand_ins:
            sys.modules[name] = types.ModuleType(name)
        sys.modules["sglang.srt.server_args"].ServerArgs = object  # type: ignore[attr-defined]
        sys.modules["sglang.srt.server_args"].PortArgs = object  # type: ignore[attr-defined]
        self._names: dict[str, Any] = {"__name__": "prototype", "_quiet": lambda *_: None}
        try:
            exec(compile(source, str(path), "exec"), self._names)
        finally:
            for name, module in kept.items():
                if module is None:
                    del sys.modules[name]
                else:
                    sys.modules[name] = module

    def runner(self, model: Any) -> Any:
        """A stand-in runner with the prototype's methods, bound as it binds them."""
        prefix = "_patched_"
        methods: dict[str, Callable[..., Any]] = {
            name[len(prefix) :]: value
            for name, value in self._names.items()
            if name.startswith(prefix)
        }
        # It puts them on ModelRunner with an underscore in front, but for this one.
        body = {
            ("" if name == "update_weights_metadata" else "_") + name: methods[name]
            for name in methods
        }
        runner = type("PrototypeRunner", (), body)()
        runner.model, runner.gpu_id = model, 0
        return runner


def prototype() -> Optional[Prototype]:
    directory = prototype_directory()
    return None if directory is None else Prototype(directory)


def dump(value: Any) -> bytes:
    """One orjson dump."""
    try:
        import orjson

        data: bytes = orjson.dumps(value)
        return data
    except ImportError:
        return json.dumps(value).encode("ascii")
