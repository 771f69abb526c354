"""Who publishes: host, process, device, ranks, model.

SGLang has moved its ranks about; `RANK_SOURCES` is the table of where each release keeps
them, tried in order.  What a release does not have is published as null, never guessed.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Collection
from typing import Any, Optional

from .. import __version__
from ..layout import process
from . import devices
from .diffusion import WorkerAsRunner

_MISSING = object()


# --- ranks --------------------------------------------------------------------------------


def _attribute(runner: Any, name: str) -> Any:
    return getattr(runner, name, _MISSING)


def _parallel_state(runner: Any, name: str) -> Any:
    return getattr(getattr(runner, "ps", None), name, _MISSING)


def _placement(runner: Any, name: str) -> Any:
    # Its dp_size is the attention's, and its dp_rank is 0 where there is none (SGLang 0.5.23,
    # utils/weight_checker.py): neither is what it is called.
    if name.startswith("dp_"):
        return _MISSING
    placement = getattr(getattr(runner, "_weight_checker", None), "_placement", None)
    return placement.get(name, _MISSING) if isinstance(placement, dict) else _MISSING


def _runtime_context(runner: Any, name: str) -> Any:
    context = sys.modules.get("sglang.srt.runtime_context")
    return getattr(context.get_parallel(), name, _MISSING) if context else _MISSING


def _server_args(runner: Any, name: str) -> Any:
    return getattr(getattr(runner, "server_args", None), name, _MISSING)


# Where the ranks are: on the runner up to 0.5.15 and in 0.5.21; on runner.ps in 0.5.18 and
# 0.5.20; in the weight checker's placement (taken inside a draft's own scope, so right for
# drafts too) and in the process-wide runtime context since 0.5.21.
RANK_SOURCES: tuple[Callable[[Any, str], Any], ...] = (
    _attribute,
    _parallel_state,
    _placement,
    _runtime_context,
)

# Published name -> the names SGLang has used for it.
RANKS = {
    "tp_rank": ("tp_rank",),
    "tp_size": ("tp_size",),
    "pp_rank": ("pp_rank",),
    "pp_size": ("pp_size",),
    "dp_rank": ("dp_rank",),
    "dp_size": ("dp_size",),
    "ep_rank": ("moe_ep_rank", "ep_rank"),
    "ep_size": ("moe_ep_size", "ep_size"),
}

# Sizes (not ranks) are launch arguments, so the arguments may answer last.
_ARGUMENTS = ("tp_size", "pp_size", "dp_size", "ep_size")


def ranks(runner: Any) -> dict[str, Optional[int]]:
    """Parallel ranks and sizes of ``runner``; null where its release has none."""
    result: dict[str, Optional[int]] = {}
    # A diffusion process has the runtime context of a language model that it does not run.
    foreign = isinstance(runner, WorkerAsRunner)
    sources = (_attribute,) if foreign else RANK_SOURCES
    for published, names in RANKS.items():
        value: Any = _MISSING
        for source in sources:
            for name in names:
                value = _ask(source, runner, name)
                if isinstance(value, int):
                    break
            if isinstance(value, int):
                break
        if not isinstance(value, int) and published in _ARGUMENTS:
            value = _ask(_server_args, runner, published)
        result[published] = value if isinstance(value, int) else None
    node_rank = _ask(_server_args, runner, "node_rank")
    result["node_rank"] = node_rank if isinstance(node_rank, int) else None
    return result


def _ask(source: Callable[[Any, str], Any], runner: Any, name: str) -> Any:
    try:
        return source(runner, name)
    except Exception:  # e.g. the runtime context before it is published
        return _MISSING


# --- the whole ----------------------------------------------------------------------------


def gpu_id(runner: Any) -> int:
    """SGLang's device ordinal for the runner: local to the node and to CUDA_VISIBLE_DEVICES."""
    value = getattr(runner, "gpu_id", None)
    if not isinstance(value, int):
        value = _parallel_state(runner, "gpu_id")
    return value if isinstance(value, int) else 0


def device_type(runner: Any) -> str:
    """torch's name for the runner's own kind of device: weights elsewhere are not resident."""
    device = str(getattr(runner, "device", None) or "")
    return device.partition(":")[0] or devices.in_use()


def is_draft(runner: Any) -> bool:
    return bool(getattr(runner, "is_draft_worker", False))


def draft_index(runner: Any) -> Optional[int]:
    """``draft_model_idx`` (SGLang >= 0.5.8): which of several MTP runners this is."""
    index = getattr(runner, "draft_model_idx", None)
    return index if isinstance(index, int) else None


def slot_name(runner: Any, taken: Collection[str]) -> str:
    """``{gpu_id}`` for a target, ``{gpu_id}_draft``, ``{gpu_id}_draft1``, … for drafts.

    ``taken``: the names of the process's other slots.
    """
    base = str(gpu_id(runner))
    if not is_draft(runner):
        return base
    index = draft_index(runner)
    if index is None:  # before 0.5.8, and single drafts: in the order in which they load
        index = next(i for i in range(1000) if _draft_slot(base, i) not in taken)
    return _draft_slot(base, index)


def _draft_slot(base: str, index: int) -> str:
    return f"{base}_draft{index or ''}"


def identity(runner: Any) -> dict[str, Any]:
    """The ``identity`` object of the layout document."""
    config = getattr(runner, "model_config", runner)  # the weight cache's daemon has none
    # Of a runner that names no device no ordinal is guessed.
    uuid, bus_id = devices.of(str(getattr(runner, "device", ""))).identity(gpu_id(runner))
    return {
        **process.identity(),
        "gpu_id": gpu_id(runner),
        "gpu_uuid": uuid,
        "pci_bus_id": bus_id,
        "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "device": str(getattr(runner, "device", "") or "") or None,
        "role": "draft" if is_draft(runner) else "target",
        "draft_index": draft_index(runner),
        **ranks(runner),
        "model_path": _text(getattr(config, "model_path", None)),
        "model_class": type(getattr(runner, "model", None)).__name__,
        "quantization": _text(getattr(config, "quantization", None)),
        "sglang_version": _text(getattr(sys.modules.get("sglang"), "__version__", None)),
        "torch_version": _text(getattr(sys.modules.get("torch"), "__version__", None)),
        "hook_version": __version__,
        "python_version": platform.python_version(),
    }


def _text(value: Any) -> Optional[str]:
    return None if value is None else str(value)
