"""Fills, in the server, what SGLang 0.5.23 asks for and a machine without a GPU has not.

Test equipment, beside what cpu_sglang/shims holds for every server.  A `.pth` line of the test
venv imports this; it waits for SGLang's import, as the hook's own loader does.  Nothing of
SGLang is edited.

* Its multimodal processors come with models that look compiled kernels up by name while they
  are imported.  The names exist then; none of them is ever called.
* Its LoRA layers ask for pinned memory without asking whether there is any.  With
  ``TRUTH_UNPINNED=1`` they get the ordinary kind: the same memory to a CPU.
"""

from __future__ import annotations

import importlib
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

KERNELS = (
    "fused_sigmoid_mul_cpu",
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
)
_keep_alive: list[Any] = []  # a library takes its definitions with it


class Waiting:
    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name == "sglang" and Waiting in sys.meta_path:
            sys.meta_path.remove(Waiting)
            torch: Any = importlib.import_module("torch")
            library = torch.library.Library("sgl_kernel", "FRAGMENT")
            for kernel in KERNELS:
                library.define(kernel + "() -> ()")
            _keep_alive.append(library)
            if os.environ.get("TRUTH_UNPINNED") == "1":
                for function in ("tensor", "empty", "zeros", "arange"):
                    setattr(torch, function, _unpinned(getattr(torch, function)))
                torch.Tensor.pin_memory = _itself


def _unpinned(make: Callable[..., Any]) -> Callable[..., Any]:
    def made(*arguments: Any, **options: Any) -> Any:
        options.pop("pin_memory", None)
        return make(*arguments, **options)

    return made


def _itself(tensor: Any, device: object = None) -> Any:
    return tensor


def start() -> None:
    if Waiting not in sys.meta_path:
        sys.meta_path.insert(0, Waiting)
