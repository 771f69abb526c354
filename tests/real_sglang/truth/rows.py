"""The rows of the truth matrix: which model, laid out how, and what must be covered there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tests.real_sglang.truth.comparison import BY_NAME, CHECKER

# The moments of a row's life at which all there is is compared.
LOOKS = (
    "load",
    "requests",
    "update from disk",
    "requests after it",
    "session of tensors",
    "session of flattened buckets",
    "requests at the end",
)
# The same where SGLang refuses buckets.
LOOKS_WITHOUT_BUCKETS = (
    *LOOKS[:4],
    "session of refused buckets",
    "update from disk again",
    LOOKS[-1],
)


@dataclass(frozen=True)
class Row:
    name: str
    architecture: str
    arguments: tuple[str, ...] = ()
    layout: str = "one rank"
    tp: int = 1
    slots: int = 1
    # Processes that read the same bucket: data-parallel replicas, pipeline stages.
    replicas: int = 1
    embedded: bool = False
    adapter: bool = False
    variables: Mapping[str, str] = field(default_factory=dict)
    # Tensors, over all slots, that each source has to confirm at every moment: what it was when
    # the row was written.  Fewer means that the proof has become weaker.
    covered: Mapping[str, int] = field(default_factory=dict)
    # Further names of published tensors that the map lacks at some look, layers as N.
    unlisted: tuple[str, ...] = ()
    # What SGLang says to buckets where it takes none.  The row fails once it takes them.
    refuses_buckets: str = ""
    image: bool = False  # requests with one too
    # A checkpoint of cpu_sglang.quantized_model's in the place of the architecture's.
    scheme: str = ""
    # Why no request is made: what SGLang says where a forward needs a kernel that a CPU has not.
    silent: str = ""
    # What SGLang says to another checkpoint from disk where it cannot load one into what it has
    # made of the first.  The row fails once it can.
    refuses_disk: str = ""
    # The same where its scheduler ends of that.
    ends_of_disk: str = ""
    note: str = ""
    short: bool = False  # also in `make test`


ONCE_ONLY = "AttributeError: 'Parameter' object has no attribute 'weight_loader'"
GGUF_TWICE = "Failed to get model loader: <sglang.srt.model_loader.loader.GGUFModelLoader object"

# fmt: off
ROWS = [
    Row("llama-tp2", "llama", ("--tp", "2"), "tensor parallel 2", tp=2, slots=2,
        covered={CHECKER: 30, BY_NAME: 19},
        note="`/get_weights_by_name` answers for rank 0, and for both where it gathers"),
    Row("deepseek_v2", "deepseek_v2", short=True, covered={CHECKER: 24},
        unlisted=("model.layers.N.self_attn.attn_mha.kv_b_proj.weight",),
        note="the first prefill gives `kv_b_proj` a second name (models/deepseek_v2.py), which the "
             "map does not list until the next full capture; the tensor and its address it does"),
    Row("mixtral", "mixtral", short=True, covered={CHECKER: 17}),
    Row("llama", "llama", covered={CHECKER: 15, BY_NAME: 15}),
    Row("qwen2", "qwen2", covered={CHECKER: 17}),
    Row("qwen3_moe", "qwen3_moe", covered={CHECKER: 21}),
    Row("gemma2", "gemma2", covered={CHECKER: 28}),
    Row("qwen2_vl", "qwen2_vl", image=True, covered={CHECKER: 49}),
    Row("llama-lora", "llama", layout="one rank, a LoRA adapter in use", adapter=True,
        variables={"TRUTH_UNPINNED": "1"}, covered={CHECKER: 15, BY_NAME: 15},
        note="SGLang's LoRA layers ask for pinned memory, which a machine without a GPU has not; "
             "the test gives them ordinary memory (absent_hardware.py)"),
    Row("llama-dp2", "llama", ("--dp-size", "2"), "data parallel 2", slots=2, replicas=2,
        covered={CHECKER: 30, BY_NAME: 30},
        refuses_buckets="data-parallel replicas are not supported for update weights from tensor"),
    Row("llama-pp2", "llama", ("--pp-size", "2"), "pipeline parallel 2", slots=2, replicas=2,
        covered={CHECKER: 8, BY_NAME: 7},
        note="SGLang's routes answer for the first stage only"),
    Row("llama-embedded", "llama", layout="one rank, embedded sglang.Engine", embedded=True,
        covered={CHECKER: 15, BY_NAME: 15}),
    Row("llama-gguf-f16", "llama", layout="one rank, GGUF of float16", scheme="gguf-f16",
        covered={CHECKER: 25, BY_NAME: 25}, refuses_disk=GGUF_TWICE),
    Row("llama-gguf-q8_0", "llama", layout="one rank, GGUF of Q8_0", scheme="gguf-q8_0",
        covered={CHECKER: 25, BY_NAME: 25}, silent="name 'ggml_dequantize' is not defined",
        refuses_disk=GGUF_TWICE),
    Row("llama-awq", "llama", layout="one rank, AWQ int4", scheme="awq", ends_of_disk=ONCE_ONLY,
        covered={CHECKER: 31, BY_NAME: 31},
        silent="Could not run 'sglang::awq_dequantize' with arguments from the 'CPU' backend"),
    Row("llama-int8", "llama", layout="one rank, int8 in blocks", scheme="int8-blocks",
        covered={CHECKER: 23, BY_NAME: 23}, ends_of_disk=ONCE_ONLY,
        silent="_per_token_group_quant_int8 is a triton kernel: it needs a GPU"),
]
# fmt: on
