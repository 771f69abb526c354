"""What makes a transfer slow, or impossible, told before it is begun.

From the layout's ``allocation_kind``, ``export`` and ``rdma_capable``, and from what this machine
has.  Plain data in, sentences out.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ...layout.transport_document import MOONCAKE, NIXL

RDMA_DEVICES = "/sys/class/infiniband"
KERNEL_MODULES = "/proc/modules"
# Kernel modules that let RDMA reach memory of a GPU, where DMA-BUF does not.
PEER_MEMORY = ("nvidia_peermem", "nv_peer_mem")


def rdma_devices() -> list[str]:
    """The RDMA devices of this machine, as far as this process's namespaces show them."""
    try:
        return sorted(os.listdir(RDMA_DEVICES))
    except OSError:
        return []


def has_peer_memory() -> bool:
    try:
        with open(KERNEL_MODULES, encoding="ascii", errors="replace") as modules:
            return any(line.split(" ", 1)[0] in PEER_MEMORY for line in modules)
    except OSError:
        return False


def warnings_about(document: Mapping[str, Any], engine: str, facts: Mapping[str, Any]) -> list[str]:
    """Sentences for the transport document and the log.

    ``facts``: ``rdma`` (whether the engine is to use RDMA), ``cuda`` (whether this build of it
    reaches memory of a GPU; None: not known), ``devices`` (RDMA devices here), ``peer_memory``.
    """
    regions = document["regions"]
    on_gpu = [region for region in regions if region["device"] != "cpu"]
    found = []
    if on_gpu and facts.get("cuda") is False:
        found.append(
            f"this build of {engine} knows no CUDA: it cannot read {_amount(on_gpu)} of a GPU; "
            "install the package for GPUs (docs/subscribers.md)"
        )
    if facts["rdma"] and not facts["devices"]:
        found.append(f"{engine} is to use RDMA, and this machine shows no RDMA device")
    if not facts["devices"] or not facts["rdma"]:
        found.extend(_without_rdma(engine, on_gpu, facts))
    else:
        found.extend(_with_rdma(engine, on_gpu, facts))
    return found


def _without_rdma(
    engine: str, on_gpu: list[Mapping[str, Any]], facts: Mapping[str, Any]
) -> list[str]:
    if engine == NIXL and not facts["devices"]:
        return [
            "no RDMA device: from another machine UCX emulates reading over TCP in a thread of "
            "the server, at the speed of one core"
        ]
    if engine == MOONCAKE and on_gpu:
        return [
            f"mooncake over TCP copies {_amount(on_gpu)} of a GPU through memory of the host, in "
            "threads of the server"
        ]
    return []


def _with_rdma(engine: str, on_gpu: list[Mapping[str, Any]], facts: Mapping[str, Any]) -> list[str]:
    found = []
    incapable = [region for region in on_gpu if region.get("rdma_capable") is False]
    unknown = [region for region in on_gpu if region.get("rdma_capable") is None]
    if incapable:
        kinds = ", ".join(sorted({str(one.get("allocation_kind")) for one in incapable}))
        found.append(
            f"{_amount(incapable)} cannot be reached by GPUDirect RDMA (allocation_kind {kinds}): "
            "registration fails, or every byte goes through memory of the host"
        )
    if unknown:
        found.append(f"whether RDMA reaches {_amount(unknown)} of a GPU is not known")
    mapped = [region for region in on_gpu if region.get("allocation_kind") == "vmm"]
    if mapped and not facts["peer_memory"]:
        return [*found, _VMM.format(_amount(mapped))]
    if on_gpu and engine == MOONCAKE and not facts["peer_memory"]:
        found.append(
            "the kernel module nvidia_peermem is not loaded: mooncake registers memory of a GPU "
            "only by DMA-BUF, where its build and the driver have it"
        )
    return found


_VMM = (
    "{} were mapped by cuMemMap (expandable segments, memory saver): without the kernel module "
    "nvidia_peermem they are registered by DMA-BUF or not at all"
)


def _amount(regions: list[Mapping[str, Any]]) -> str:
    size = sum(region["size"] for region in regions)
    noun = "region" if len(regions) == 1 else "regions"
    return f"{len(regions)} {noun} ({size / 2**30:.2f} GiB)"
