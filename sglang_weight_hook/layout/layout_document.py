"""The fields of ``weight_layout_{slot}.json``.

To add a field: one line in the type that has it, then ``python -m tools.format``, which makes
the JSON Schema and the table in ``docs/format.md`` of these types.  Nothing here is needed at
run time: import it under ``if TYPE_CHECKING``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Optional, TypedDict

from .field import Address, Count, Field, Seconds
from .state_document import Event, Process, Standing

Kind = Literal["parameter", "buffer", "attribute", "lora"]


class Identity(Process, total=False):
    """Who publishes. An invalidated document has only the process's own fields."""

    pid_namespace: Annotated[
        Optional[str], Field("The publisher's pid namespace (readlink /proc/self/ns/pid).")
    ]
    gpu_id: Annotated[
        Count, Field("SGLang's device ordinal: local to the node and to CUDA_VISIBLE_DEVICES.")
    ]
    gpu_uuid: Annotated[
        Optional[str], Field("GPU UUID as nvidia-smi prints it (GPU-…); null without CUDA.")
    ]
    pci_bus_id: Annotated[
        Optional[str], Field("PCI bus id (domain:bus:device.function); null without CUDA.")
    ]
    cuda_visible_devices: Annotated[
        Optional[str],
        Field(
            "The environment variable CUDA_VISIBLE_DEVICES of the publishing process; null where "
            "it is not set."
        ),
    ]
    device: Annotated[Optional[str], Field("The runner's torch device type: cuda, cpu, …")]
    role: Annotated[Literal["target", "draft"], Field("draft: a speculative-decoding runner.")]
    draft_index: Annotated[
        Optional[Count], Field("Which of several draft runners, where SGLang numbers them.")
    ]
    tp_rank: Annotated[
        Optional[Count],
        Field("Tensor parallel rank; null where this SGLang release does not say."),
    ]
    tp_size: Annotated[
        Optional[Count],
        Field("Tensor parallel size; null where this SGLang release does not say."),
    ]
    pp_rank: Annotated[
        Optional[Count],
        Field("Pipeline parallel rank; null where this SGLang release does not say."),
    ]
    pp_size: Annotated[
        Optional[Count],
        Field("Pipeline parallel size; null where this SGLang release does not say."),
    ]
    dp_rank: Annotated[
        Optional[Count], Field("Data parallel rank; null where this SGLang release does not say.")
    ]
    dp_size: Annotated[
        Optional[Count], Field("Data parallel size; null where this SGLang release does not say.")
    ]
    ep_rank: Annotated[
        Optional[Count],
        Field("Expert parallel rank; null where this SGLang release does not say."),
    ]
    ep_size: Annotated[
        Optional[Count],
        Field("Expert parallel size; null where this SGLang release does not say."),
    ]
    node_rank: Annotated[
        Optional[Count], Field("Rank of this node; null where this SGLang release does not say.")
    ]
    model_path: Annotated[Optional[str], Field("SGLang's --model-path.")]
    model_class: Annotated[Optional[str], Field("Class of the loaded model.")]
    quantization: Annotated[
        Optional[str], Field("SGLang's --quantization; null where there is none.")
    ]
    sglang_version: Annotated[Optional[str], Field("SGLang's version.")]
    torch_version: Annotated[Optional[str], Field("torch's version.")]
    hook_version: Annotated[Optional[str], Field("This hook's version.")]
    python_version: Annotated[Optional[str], Field("Python's version.")]


class DeviceTotals(TypedDict, total=False):
    """The tensors of one torch device, added up."""

    tensors: Annotated[Count, Field("How many tensors.", required=True)]
    tensor_bytes: Annotated[Count, Field("Sum of their size, in bytes.", required=True)]
    storage_bytes: Annotated[
        Count,
        Field(
            "Bytes of their resident storages, each counted once: less than tensor_bytes where "
            "tensors share storages.",
            required=True,
        ),
    ]


class KvRange(TypedDict, total=False):
    """One buffer of the KV cache."""

    name: Annotated[str, Field("Name within SGLang's pool, for example k_buffer.0.", required=True)]
    layer: Annotated[Optional[Count], Field("Layer of the model, where the name tells.")]
    role: Annotated[
        Optional[Literal["k", "v", "kv"]],
        Field("Keys, values, both in one (MLA), or not known."),
    ]
    ptr: Annotated[Address, Field("First address.", required=True)]
    size: Annotated[Count, Field("Bytes touched.", required=True)]
    device: Annotated[str, Field("torch device.", required=True)]
    dtype: Annotated[str, Field("torch dtype.", required=True)]
    shape: Annotated[list[Count], Field("Length of each dimension, in elements.", required=True)]
    storage_ptr: Annotated[Address, Field("Address of its storage.", required=True)]
    storage_size: Annotated[Count, Field("Bytes of its storage.", required=True)]


class Memory(TypedDict, total=False):
    """What the device's memory is taken up by, in bytes. On a GPU: weights + kv_cache + lora +
    siblings + other_live + reserved_free + other + device_free - unbacked = device_total. Device
    figures are null without CUDA. Empty in an invalidated document."""

    weights_bytes: Annotated[
        Optional[Count], Field("Storages of this runner's weights, each counted once.")
    ]
    kv_cache_bytes: Annotated[Optional[Count], Field("Storages of the KV cache.")]
    lora_bytes: Annotated[Optional[Count], Field("Storages of the LoRA pool.")]
    siblings_bytes: Annotated[
        Optional[Count],
        Field("Storages of this process's other slots that this one does not share."),
    ]
    other_live_bytes: Annotated[
        Optional[Count],
        Field(
            "Live in torch's allocator and in no storage of this process's slots: activations, "
            "workspaces, CUDA graphs."
        ),
    ]
    reserved_free_bytes: Annotated[
        Optional[Count], Field("Reserved by torch's allocator, not live.")
    ]
    other_bytes: Annotated[
        Optional[Count],
        Field(
            "Device memory used outside this process's allocator: CUDA context, NCCL, other "
            "processes."
        ),
    ]
    unbacked_bytes: Annotated[
        Optional[Count],
        Field("Addresses that the allocator holds while their physical pages are released."),
    ]
    device_free_bytes: Annotated[
        Optional[Count], Field("Free on the device, shared by all its processes (cudaMemGetInfo).")
    ]
    device_total_bytes: Annotated[Optional[Count], Field("The device's memory (cudaMemGetInfo).")]
    shared_with: Annotated[
        list[str],
        Field("Slots of the same process with which this one has storages of weights in common."),
    ]
    shared_bytes: Annotated[
        Optional[Count],
        Field(
            "Of this slot's weights and LoRA pool, bytes of storages that a slot loaded earlier "
            "in the same process has too: subtract them when adding up slots."
        ),
    ]
    shared_kv_cache_bytes: Annotated[
        Optional[Count],
        Field(
            "Of this slot's KV cache, bytes of storages that a slot loaded earlier in the same "
            "process has too: subtract them when adding up slots."
        ),
    ]
    off_device_bytes: Annotated[
        Optional[Count],
        Field(
            "Storages of weights on another device than the runner's (offloaded to the host), each "
            "counted once. No part of the device's sum."
        ),
    ]
    kv_cache: Annotated[list[KvRange], Field("Every buffer of the KV cache.")]


class Allocator(TypedDict, total=False):
    """What torch's allocator has live against what the documents of this process explain; null
    without CUDA."""

    live_bytes: Annotated[Count, Field("Bytes live in the allocator.")]
    explained_bytes: Annotated[Count, Field("Of the live bytes, those in published storages.")]
    unexplained_bytes: Annotated[
        int,
        Field("live_bytes less explained_bytes: rounding, activations, workspaces."),
    ]
    storages_outside: Annotated[Count, Field("Published storages that are not the allocator's.")]


class Validation(TypedDict, total=False):
    """Whether the document is complete. An invalidated document has only problem."""

    problem: Annotated[str, Field("Why the map was invalidated.")]
    expected: Annotated[dict[Kind, Count], Field("Names that the model holds, by kind.")]
    captured: Annotated[dict[Kind, Count], Field("Tensors in this document, by kind.")]
    aliases: Annotated[Count, Field("Names that are aliases of tensors in this document.")]
    named_parameters: Annotated[
        Optional[Count], Field("torch's own count of parameters; null where it was not asked for.")
    ]
    not_resident: Annotated[
        list[str], Field("Canonical names of tensors that are not on the runner's device.")
    ]
    left_out: Annotated[dict[str, str], Field("Name to the reason why it has no entry.")]
    allocator: Optional[Allocator]


class Checksums(TypedDict, total=False):
    """How the tensors' checksums were made; null unless SGLANG_WEIGHT_HOOK_CHECKSUM=1."""

    algorithm: Annotated[str, Field("How the tensors' checksum fields were made.", required=True)]
    content_generation: Annotated[
        Count, Field("The content generation that the checksums are of.", required=True)
    ]
    seconds: Annotated[Seconds, Field("How long computing the checksums took.", required=True)]


class Region(TypedDict, total=False):
    """A maximal gap-free run of weight bytes inside one allocation: what one registration
    covers."""

    ptr: Annotated[Address, Field("First address.", required=True)]
    size: Annotated[int, Field("Bytes.", required=True, minimum=1)]
    device: Annotated[str, Field("torch device.", required=True)]
    allocation_ptr: Annotated[
        Address, Field("First address of the allocation around it.", required=True)
    ]
    allocation_size: Annotated[Count, Field("Bytes of that allocation.", required=True)]
    allocation_source: Annotated[
        Literal["driver", "storage"],
        Field(
            "driver: the CUDA driver named the allocation. storage: without CUDA, the tensor's "
            "storage is taken for it.",
            required=True,
        ),
    ]
    allocation_kind: Annotated[
        Optional[Literal["cuda_malloc", "vmm", "imported"]],
        Field(
            "cuda_malloc: exportable with cudaIpcGetMemHandle. vmm: mapped with cuMemMap "
            "(expandable segments, memory saver), which is not. imported: opened with "
            "cudaIpcOpenMemHandle, another process's memory. null: not known, or managed or pool "
            "memory."
        ),
    ]
    export: Annotated[
        Optional[Literal["legacy_ipc", "posix_fd", "fabric", "none"]],
        Field(
            "What another process on the machine can open the allocation with. legacy_ipc: a "
            "handle of cudaIpcGetMemHandle. posix_fd, fabric: a file descriptor or a fabric handle "
            "of cuMemExportToShareableHandle. none: nothing (memory saver, host memory); the owner "
            "can copy it. null: not known."
        ),
    ]
    rdma_capable: Annotated[
        Optional[bool],
        Field(
            "Whether the allocation can be registered for RDMA: for memory of a GPU, by GPUDirect "
            "RDMA. null: not known."
        ),
    ]
    tensors: Annotated[
        list[str],
        Field("Canonical names of the tensors in it, by address.", required=True, min_items=1),
    ]


class Tensor(TypedDict, total=False):
    """One tensor, under its canonical name."""

    ptr: Annotated[
        Address,
        Field(
            "Address of the first element, in the publishing process's address space; 0 for a "
            "tensor without memory.",
            required=True,
        ),
    ]
    size: Annotated[
        Count,
        Field("Bytes of the values: number of elements times element size.", required=True),
    ]
    span: Annotated[
        Count,
        Field(
            "Bytes from ptr to one past the last byte touched. This is what a reader must cover: "
            "more than size for padded rows, less for an expanded tensor.",
            required=True,
        ),
    ]
    device: Annotated[str, Field("torch device, for example cuda:0 or cpu.", required=True)]
    dtype: Annotated[str, Field("torch dtype, for example torch.bfloat16.", required=True)]
    shape: Annotated[list[Count], Field("Length of each dimension, in elements.", required=True)]
    stride: Annotated[list[int], Field("Step of each dimension, in elements.", required=True)]
    storage_offset: Annotated[
        Count, Field("Where the first element lies in the storage, in elements.", required=True)
    ]
    storage_ptr: Annotated[
        Address, Field("Address of the storage that the tensor is a view of.", required=True)
    ]
    storage_size: Annotated[
        Count, Field("Bytes of that storage; other tensors may lie in it too.", required=True)
    ]
    kind: Annotated[
        Kind,
        Field(
            "parameter and buffer: as torch registers them. attribute: a plain attribute of a "
            "module. lora: of the LoRA pool.",
            required=True,
        ),
    ]
    resident: Annotated[
        bool,
        Field(
            "Whether it lies on the runner's own device. false: offloaded or meta; the address is "
            "no device address.",
            required=True,
        ),
    ]
    aliases: Annotated[list[str], Field("Other names of the very same tensor.", required=True)]
    volatile: Annotated[
        bool,
        Field(
            "true: SGLang rewrites or swaps its bytes in a forward (LoRA pool, offloaded weights, "
            "caches of paged experts). The address is current; the contents are outside "
            "content_generation and are not checksummed. Absent: false."
        ),
    ]
    checksum: Annotated[
        str,
        Field("Checksum of the values (see checksums), where SGLANG_WEIGHT_HOOK_CHECKSUM=1."),
    ]


class LayoutName(TypedDict, total=False):
    """Opens the layout document."""

    schema: Annotated[
        Literal["sglang-weight-layout"], Field("What this document is.", required=True)
    ]


class LayoutDocument(LayoutName, Standing, total=False):
    """Everything about where the weights of one SGLang model runner lie. Sizes and addresses in
    bytes, times in seconds. Fields that are not described here are to be ignored."""

    identity: Annotated[Identity, Field(required=True)]
    event: Annotated[Event, Field(required=True)]
    totals: Annotated[dict[str, DeviceTotals], Field("By torch device.", required=True)]
    memory: Annotated[Memory, Field(required=True)]
    checksums: Optional[Checksums]
    validation: Annotated[Validation, Field(required=True)]
    regions: Annotated[
        list[Region], Field("Merged spans by address, ready to be registered.", required=True)
    ]
    tensors: Annotated[
        dict[str, Tensor],
        Field(
            "Every tensor by canonical name, in the model's order, parameters first.",
            required=True,
        ),
    ]


# What the presence or value of one field asks of others, by type, in the words of JSON Schema.
CONDITIONS: Mapping[str, Mapping[str, Any]] = {
    "Validation": {
        "anyOf": [
            {"required": ["problem"]},
            {
                "required": [
                    "expected",
                    "captured",
                    "aliases",
                    "named_parameters",
                    "not_resident",
                    "left_out",
                ]
            },
        ]
    },
    # An invalidated document has no addresses, any other one has all that a release publishes.
    "LayoutDocument": {
        "if": {
            "required": ["validation"],
            "properties": {"validation": {"required": ["problem"]}},
        },
        "then": {
            "properties": {
                "tensors": {"maxProperties": 0},
                "regions": {"maxItems": 0},
                "state": {"enum": ["failed", "released"]},
            }
        },
        "else": {
            "properties": {
                "memory": {
                    "required": [
                        "weights_bytes",
                        "kv_cache_bytes",
                        "kv_cache",
                        "device_free_bytes",
                        "device_total_bytes",
                    ]
                },
                "identity": {
                    "required": [
                        "gpu_id",
                        "role",
                        "model_path",
                        "model_class",
                        "sglang_version",
                        "torch_version",
                        "hook_version",
                    ]
                },
            }
        },
    },
}
