"""What the hook reads of SGLang beside the methods that it wraps, and whether a release has it.

One row a question: it is answered where at least one of its places is there.  A test holds the
table against the attributes of SGLang that the publisher's and the patch core's sources name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Optional, Union

from sglang_weight_hook_patch_core import OLDEST, release_key

from .findings import RELIANCE, Finding
from .paths import Paths
from .summaries import Summary


class Attribute(NamedTuple):
    """An attribute, a property or a method of a class or of one of its bases."""

    owner: str
    name: str

    def __str__(self) -> str:
        return f"{self.owner}.{self.name}"


class Defined(NamedTuple):
    """A name that a module defines or imports."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Declared(NamedTuple):
    """An attribute of any class below a package."""

    package: str
    name: str

    def __str__(self) -> str:
        return f"{self.package}.*.{self.name}"


class Package(NamedTuple):
    """A module or package that exists."""

    name: str

    def __str__(self) -> str:
        return self.name


Place = Union[Attribute, Defined, Declared, Package]

# Where the launch arguments and the process-wide ranks are declared since 0.5.20.
_FIELDS = "sglang.srt.arg_groups.fields"


class Reliance(NamedTuple):
    what: str  # what is read there
    where: str  # by which of our files
    any_of: tuple[Place, ...]
    first: str = OLDEST  # the first release that is known to have it
    last: Optional[str] = None  # None: it is expected in the next one


def _rank(name: str, *other_names: str, first: str = OLDEST) -> Reliance:
    names = (name, *other_names)
    owners = ("ModelRunner", "ParallelState")
    places: tuple[Place, ...] = (
        *(Attribute(owner, each) for owner in owners for each in names),
        *(Declared(_FIELDS, each) for each in names),
    )
    return Reliance(f"{name} of a runner", "publisher/identity.py", places, first)


def _argument(name: str, where: str) -> Reliance:
    places = (Attribute("ServerArgs", name), Declared(_FIELDS, name))
    return Reliance(f"{name} of the launch", where, places)


_IDENTITY, _KV, _VOLATILE = (
    "publisher/identity.py",
    "publisher/kv_cache.py",
    "publisher/volatile.py",
)
_CORE, _WALK, _REACH = "sglang_weight_hook_patch_core.py", "publisher/walk.py", "publisher/reach.py"
_EVENTS, _METRICS = "publisher/events.py", "publisher/metrics.py"
_DIFFUSION = "publisher/diffusion.py"

_UPDATES = ("FromDisk", "sFromTensor", "sFromDistributed")

RELIANCES = (
    Reliance("a runner's model", "publisher/capture.py", (Attribute("ModelRunner", "model"),)),
    Reliance(
        "the device's number",
        _IDENTITY,
        (Attribute("ModelRunner", "gpu_id"), Attribute("ParallelState", "gpu_id")),
    ),
    Reliance("the device's type", _IDENTITY, (Attribute("ModelRunner", "device"),)),
    Reliance("target or draft", _IDENTITY, (Attribute("ModelRunner", "is_draft_worker"),)),
    Reliance(
        "which of several drafts",
        _IDENTITY,
        (Attribute("ModelRunner", "draft_model_idx"),),
        "0.5.8",
    ),
    Reliance("the model's configuration", _IDENTITY, (Attribute("ModelRunner", "model_config"),)),
    Reliance("the launch arguments", _IDENTITY, (Attribute("ModelRunner", "server_args"),)),
    Reliance("the model's path", _IDENTITY, (Attribute("ModelConfig", "model_path"),)),
    Reliance("the quantisation", _IDENTITY, (Attribute("ModelConfig", "quantization"),)),
    _rank("tp_rank"),
    _rank("tp_size"),
    _rank("pp_rank"),
    _rank("pp_size"),
    _rank("dp_rank", first="0.5.12"),
    _rank("dp_size", first="0.4.8"),
    _rank("moe_ep_rank", "ep_rank", first="0.4.10"),
    _rank("moe_ep_size", "ep_size", first="0.4.10"),
    *(
        _argument(name, _IDENTITY)
        for name in ("tp_size", "pp_size", "dp_size", "ep_size", "node_rank")
    ),
    Reliance(
        "the process-wide ranks",
        _IDENTITY,
        (Defined("sglang.srt.runtime_context", "get_parallel"),),
        "0.5.21",
    ),
    Reliance(
        "a draft's own ranks",
        _IDENTITY,
        (Attribute("WeightChecker", "_placement"),),
        "0.5.21",
    ),
    Reliance(
        "the weight checker of a runner",
        _IDENTITY,
        (Attribute("ModelRunner", "_weight_checker"),),
        "0.5.21",
    ),
    Reliance(
        "the parallel state of a runner",
        _IDENTITY,
        (Attribute("ModelRunner", "ps"),),
        "0.5.18",
        "0.5.20",
    ),
    _argument("enable_metrics", _METRICS),
    Reliance("the KV pool", _KV, (Attribute("ModelRunner", "token_to_kv_pool"),)),
    Reliance("keys of an MHA pool", _KV, (Attribute("MHATokenToKVPool", "k_buffer"),)),
    Reliance("values of an MHA pool", _KV, (Attribute("MHATokenToKVPool", "v_buffer"),)),
    Reliance("the buffers of an MLA pool", _KV, (Attribute("MLATokenToKVPool", "kv_buffer"),)),
    Reliance(
        "the first layer of a pool",
        _KV,
        (Attribute("KVCache", "start_layer"), Attribute("MHATokenToKVPool", "start_layer")),
    ),
    Reliance("the package of the pools", _WALK, (Package("sglang.srt.mem_cache"),)),
    Reliance("the LoRA manager", _WALK, (Attribute("ModelRunner", "lora_manager"),)),
    Reliance("the LoRA pool", _WALK, (Attribute("LoRAManager", "memory_pool"),)),
    Reliance("paged experts", _WALK, (Package("sglang.srt.layers.moe.paged_experts"),), "0.5.23"),
    Reliance(
        "the store of paged experts",
        _WALK,
        (Attribute("PagedExpertsMoEMethod", "store"),),
        "0.5.23",
    ),
    Reliance(
        # The file names no weights, so it is not parsed: that it is there has to do.
        "experts kept on the host",
        _WALK,
        (
            Attribute("HostExpertStore", "host"),
            Package("sglang.srt.layers.moe.paged_experts.store"),
        ),
        "0.5.23",
    ),
    Reliance(
        "experts of peers (DWDP)",
        _VOLATILE,
        (Defined("sglang.srt.layers.moe.dwdp", "get_global_dwdp_manager"),),
        "0.5.22",
    ),
    Reliance(
        "DWDP's weight manager", _VOLATILE, (Attribute("DwdpManager", "_weight_manager"),), "0.5.22"
    ),
    Reliance(
        "DWDP's buffers", _VOLATILE, (Attribute("DWDPWeightManager", "weight_buffer"),), "0.5.22"
    ),
    Reliance("DWDP's tensors", _VOLATILE, (Attribute("WeightBuffer", "_tensors"),), "0.5.22"),
    *(
        Reliance(f"objects of {name}, which hold tensors", _REACH, (Package(name),))
        for name in (
            "sglang.srt.layers.quantization",
            "sglang.srt.layers.moe",
            "sglang.srt.layers.linear",
            "sglang.srt.layers.parameter",
            "sglang.srt.models",
            "sglang.srt.layers.moe.topk",
        )
    ),
    Reliance(
        "dispatchers, which hold no weights",
        _REACH,
        (Package("sglang.srt.layers.moe.token_dispatcher"),),
        "0.4.9.post6",
    ),
    Reliance("the memory saver's state", _CORE, (Attribute("TorchMemorySaverAdapter", "enabled"),)),
    Reliance(
        "the memory saver of who releases",
        _CORE,
        (
            Attribute("Scheduler", "memory_saver_adapter"),
            Attribute("SchedulerWeightUpdaterManager", "memory_saver_adapter"),
        ),
    ),
    *(
        Reliance(f"tags of a {name}", _CORE, (Attribute(name, "tags"),), "0.4.8")
        for name in ("ReleaseMemoryOccupationReqInput", "ResumeMemoryOccupationReqInput")
    ),
    *(
        Reliance(
            "whether a bucket is the last",
            _CORE,
            (Attribute(f"UpdateWeight{name}ReqInput", "flush_cache"),),
            "0.4.9.post6" if name == "sFromDistributed" else OLDEST,
        )
        for name in _UPDATES[1:]
    ),
    Reliance(
        "whether a session is open",
        _CORE,
        (Attribute("SchedulerWeightUpdaterManager", "_session"),),
        "0.5.21",
    ),
    Reliance(
        "the runner of an updater",
        _CORE,
        (Attribute("WeightUpdater", "get_model_runner"),),
        "0.5.18",
    ),
    Reliance(
        "the model of a weight checker",
        _CORE,
        (Attribute("WeightChecker", "_model_runner"), Attribute("WeightChecker", "_get_model")),
        "0.5.6.post2",
    ),
    Reliance(
        "the model of an expert backup",
        _CORE,
        (
            Attribute("ExpertBackupClient", "model_runner"),
            Attribute("ExpertBackupClient", "_get_model"),
        ),
        "0.5.10.post1",
    ),
    *(
        Reliance(
            f"{name} of an answer",
            _EVENTS,
            (Attribute("LoRAUpdateResult", name), Attribute("LoRAUpdateOutput", name)),
            "0.4.9.post6",
        )
        for name in ("success", "error_message")
    ),
    Reliance(
        "the message of an answer",
        _EVENTS,
        (Attribute("UpdateWeightFromDiskReqOutput", "message"),),
    ),
    Reliance("a diffusion worker's error", _EVENTS, (Attribute("OutputBatch", "error"),), "0.5.7"),
    *(
        Reliance(
            f"{name} of a diffusion worker", _DIFFUSION, (Attribute("GPUWorker", name),), "0.5.5"
        )
        for name in ("pipeline", "server_args", "local_rank")
    ),
    *(
        Reliance(
            f"{name} of a diffusion pipeline",
            _DIFFUSION,
            (Attribute("ComposedPipelineBase", name),),
            "0.5.5",
        )
        for name in ("modules", "model_path")
    ),
    Reliance(
        "the device type of diffusion",
        _DIFFUSION,
        (Defined("sglang.multimodal_gen.runtime.platforms", "current_platform"),),
        "0.5.5",
    ),
    Reliance(
        "the offloaded layers of a diffusion component",
        _DIFFUSION,
        (Attribute("LayerwiseOffloadableModuleMixin", "layerwise_offload_managers"),),
        "0.5.13",
    ),
    *(
        Reliance(
            f"{name} of offloaded layers",
            _DIFFUSION,
            (Attribute("LayerwiseOffloadManager", name),),
            "0.5.9",
        )
        for name in ("enabled", "iter_cpu_weights")
    ),
)


def missing(summary: Summary, paths: Paths) -> Iterator[Finding]:
    """What the release is expected to have and has not."""
    key = release_key(summary.version)
    is_known = any(key[:3])
    for each in RELIANCES:
        if is_known and key < release_key(each.first):
            continue
        if each.last is not None and (not is_known or key > release_key(each.last)):
            continue
        if not any(_is_there(place, summary, paths) for place in each.any_of):
            named = " or ".join(str(place) for place in each.any_of)
            yield Finding(
                RELIANCE,
                str(each.any_of[0]),
                0,
                f"{each.what} is read from {named}, and this release has none of them",
                f"teach {each.where} where it is now, and say so in tools/sglang_release/"
                "reliances.py",
            )


def _is_there(place: Place, summary: Summary, paths: Paths) -> bool:
    if isinstance(place, Package):
        return place.name in summary.names
    if isinstance(place, Defined):
        module = summary.modules.get(place.module)
        if module is None:
            return False
        own = {each.name for each in module.functions} | {each.name for each in module.classes}
        return place.name in own | module.variables or place.name in module.imports
    if isinstance(place, Declared):
        below = [each for each in summary.modules.values() if each.name.startswith(place.package)]
        return any(place.name in kind.attributes for each in below for kind in each.classes)
    return place.name in paths.attributes_of(place.owner)
