"""What of SGLang the hook does not publish, and why: the one table, for `doctor` and the page.

docs/sglang-support.md, "What is not captured", has a row of each.
Which of them the installed SGLang has is told by its files, never by its release.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

from .sglang_sources import Sources


class Gap(NamedTuple):
    """A part of SGLang whose weights, or some of them, are not published."""

    name: str
    paths: tuple[str, ...]  # below SGLang's package; any of them means that it is there
    text: str
    defined: str = ""  # what the file must define at its top; empty: nothing in particular
    event: str = ""  # no gap where the patch core's table finds a method for this event


GAPS = (
    Gap(
        "MlxModelRunnerStub",
        ("srt/hardware_backend/mlx/model_runner_stub.py",),
        "overrides load_model: on Apple's MLX the weights are MLX's arrays, which torch does not "
        "hold; nothing is published",
    ),
    Gap(
        "KTransformers' experts",
        ("srt/layers/moe/kt_ep_wrapper.py",),
        "with --kt-weight-path the experts computed on the CPU lie in kt-kernel's own memory, in "
        "no tensor of torch; the rest of the model is published",
    ),
    Gap(
        "ExpertBackupManager",
        ("srt/elastic_ep/expert_backup_manager.py",),
        "keeps a copy of the checkpoint's experts in the host's memory, in one buffer of a process "
        "that has no model; the models that are filled from it are published",
    ),
    Gap(
        "new tensors of a single bucket",
        (
            "srt/model_executor/model_runner_components/weight_updater.py",
            "srt/model_executor/model_runner.py",
        ),
        "a tensor that an update_weights_from_tensor or _distributed outside a session adds (a new "
        "module, a new attribute) is published at the next event that is no such bucket; the "
        "tensors published before are checked after each",
    ),
    Gap(
        "diffusion's upscaler",
        ("multimodal_gen/runtime/postprocess/realesrgan_upscaler.py",),
        "Real-ESRGAN is loaded by the first request that asks for it, into a cache of that module "
        "and not into the pipeline",
    ),
    Gap(
        "diffusion's frame interpolator",
        ("multimodal_gen/runtime/postprocess/rife_interpolator.py",),
        "RIFE is loaded by the first request that asks for it, into a cache of that module and not "
        "into the pipeline",
    ),
    Gap(
        "a diffusion stage's own modules",
        ("multimodal_gen/runtime/pipelines_core/stages/image_encoding.py",),
        "what a stage makes for itself (LTX-2.3's condition encoder) is no component of the "
        "pipeline, and SGLang's own weights updater does not know it either",
    ),
    Gap(
        "weights that a diffusion request casts",
        ("multimodal_gen/runtime/utils/precision.py",),
        "a component that a request uses in another precision is cast, inside "
        "temporary_module_dtype or as it is brought to its device, and lies elsewhere then: the "
        "map is untrue until its next check (SGLANG_WEIGHT_HOOK_CHECK_SECONDS), which publishes an "
        "unannounced_change",
        defined="temporary_module_dtype",
    ),
    # Those that the table has entries for: a gap only where this SGLang has none of their methods.
    Gap(
        "encoder-only servers",
        ("srt/disaggregation/encode_server.py", "srt/disaggregation/encoder/server.py"),
        "load their model without a ModelRunner: they publish nothing",
        event="encoder_ready",
    ),
    Gap(
        "weight-cache daemon",
        ("srt/weight_cache/daemon.py",),
        "keeps weights in a process of its own and publishes nothing; servers that map them do",
        event="weight_cache_ready",
    ),
    Gap(
        "multimodal_gen",
        ("multimodal_gen/runtime/managers/gpu_worker.py",),
        "diffusion models have workers of their own: they publish nothing",
        event="pipeline_ready",
    ),
)


def gaps(source: Sources, found: Collection[str]) -> Iterator[tuple[Gap, str]]:
    """The gaps of an installed SGLang, each with its file.

    ``found``: the events for which it has a method that is wrapped.
    """
    for gap in GAPS:
        if gap.event and gap.event in found:
            continue
        for path in gap.paths:
            if _has(source, path, gap.defined):
                yield gap, path
                break


def _has(source: Sources, path: str, defined: str) -> bool:
    if not defined:
        return source.exists(path)
    return source.defines(module_of(path), "", defined)


def module_of(path: str) -> str:
    return "sglang." + path.removesuffix(".py").replace("/", ".")
