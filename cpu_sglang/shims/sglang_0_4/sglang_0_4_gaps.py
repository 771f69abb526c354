"""Where SGLang 0.4.x takes CUDA for granted.

Imported by ``sitecustomize`` just before SGLang.  Each piece answers one call that
0.4.x makes on a CPU server too.
"""

# mypy: ignore-errors
# (it reaches into private parts of torch and SGLang, which may or may not be installed)

from typing import Any

import torch


def _gather_on_cpu(output: Any, input: Any, group_name: str) -> None:
    # SGLang registers this operator for CUDA only; its body works anywhere.
    from sglang.srt.distributed import parallel_state

    parallel_state._groups[group_name]()._all_gather_into_tensor(output, input)


if not torch.cuda.is_available():
    # update_weights_from_tensor sends what it receives "to the current device".
    torch.cuda.current_device = lambda: torch.device("cpu")

    library = torch.library.Library("sglang", "FRAGMENT")
    library.impl("reg_all_gather_into_tensor", _gather_on_cpu, "CPU")
