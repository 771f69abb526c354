"""What was found and is right as it is, or a gap that is known: each with the reason.

Judged on SGLang 0.5.23, most by its source, some by the finding and the calls to it alone.
A judgement is of one kind of finding at one place, so something else that is found there later is
told.  A place that ends in a colon is a whole module.
"""

from __future__ import annotations

from typing import NamedTuple

from .findings import BY_NAME, EMPTY, OVERRIDE, REQUEST, WRITER


class Judgement(NamedTuple):
    kind: str
    place: str
    reason: str


_RUNNER = "srt.model_executor.model_runner:ModelRunner."
_UPDATER = "srt.model_executor.model_runner_components.weight_updater:WeightUpdater."
_SCHEDULER = "srt.managers.scheduler:Scheduler."
_REQUESTS = "srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager."
_OFFLOAD = "multimodal_gen.runtime.managers.memory_managers."
_PIPELINES = "multimodal_gen.runtime.pipelines_core."

_BUILT = "runs while the pipeline is built, inside GPUWorker.__init__, or inside GPUWorker.set_lora"
_START = (
    "runs while the scheduler is built: SGLang's Scheduler.__init__ calls alloc_memory_pool and "
    "init_attention_backends of its workers, and the capture at its end is what holds"
)
_OFFLOADED = (
    "runs while the model is built, or around a forward: offloaded parameters are published as "
    "such, and their contents as volatile"
)
_VISIT = (
    "moves weights to the device for a use and back: the host's copy is what is published "
    "(publisher/diffusion.py)"
)
_LORA_ANSWER = "nothing of its answer is needed: ModelRunner's method of that name is wrapped"
_LORA_HOST = "loads to, or drops from, the host; the pool on the device is filled by forwards"
_APART = "has a model of its own, outside of the pipeline's components; it is not published"
_ONLY_RECEIVES = "receives into new tensors, which the wrapped method loads"
_CAST = (
    "known gap: casts a component for one stage of a request and casts it back, and what is cast "
    "back lies elsewhere (docs/sglang-support.md, What is not captured)"
)

JUDGED: tuple[Judgement, ...] = (
    # Language models.
    Judgement(WRITER, "srt.speculative.eagle_worker_v2:EagleDraftWorker.init_lm_head", _START),
    Judgement(
        WRITER,
        "srt.speculative.multi_layer_eagle_worker_v2:MultiLayerEagleDraftWorker.init_lm_head",
        _START,
    ),
    Judgement(
        WRITER,
        "srt.speculative.pp_draft_embedding:load_draft_embedding_from_checkpoint",
        _START,
    ),
    Judgement(WRITER, "srt.model_executor.model_runner:_gather_block_fp8_linear", _START),
    Judgement(WRITER, "srt.utils.offloader:", _OFFLOADED),
    Judgement(
        WRITER,
        "srt.hardware_backend.npu.moe.fuseep:process_fuseep_weights",
        "is the post-processing of a quantisation method for NPUs, inside the load",
    ),
    *(
        Judgement(
            OVERRIDE,
            f"srt.hardware_backend.mlx.model_runner_stub:MlxModelRunnerStub.{name}",
            "the stub of Apple's MLX holds no torch weights",
        )
        for name in ("load_model", "alloc_memory_pool")
    ),
    *(
        Judgement(REQUEST, _SCHEDULER + name, _LORA_ANSWER)
        for name in ("load_lora_adapter", "load_lora_adapter_from_tensors", "unload_lora_adapter")
    ),
    Judgement(
        REQUEST,
        _REQUESTS + "check_weights",
        "answers with checksums; its reset_tensors is wrapped (WeightChecker._reset_tensors)",
    ),
    *(
        Judgement(EMPTY, _RUNNER + name, _LORA_HOST)
        for name in ("load_lora_adapter", "load_lora_adapter_from_tensors", "unload_lora_adapter")
    ),
    Judgement(
        EMPTY,
        "srt.weight_cache.transport:choose_daemon_transport_backend",
        "is wrapped for its moment: the daemon asks for it when its weights are complete",
    ),
    Judgement(BY_NAME, _UPDATER + "_receive_bucketed_weights_from_distributed", _ONLY_RECEIVES),
    Judgement(BY_NAME, _UPDATER + "receive_weights_from_distributed", _ONLY_RECEIVES),
    Judgement(
        BY_NAME,
        "srt.checkpoint_engine.update:update_weights",
        "is the client's program, which asks the server by HTTP",
    ),
    Judgement(
        BY_NAME, "srt.configs.model_config:load_pointer_adapter", "reads a model's configuration"
    ),
    Judgement(
        BY_NAME,
        "srt.managers.scheduler_components.metrics_reporter:"
        "SchedulerMetricsReporter._update_lora_metrics",
        "sets metrics and no weights",
    ),
    Judgement(
        BY_NAME, "srt.utils.common:set_weight_attrs", "sets attributes of a parameter, no element"
    ),
    # Diffusion models.
    Judgement(WRITER, _OFFLOAD + "layerwise_offload:", _VISIT),
    Judgement(WRITER, _OFFLOAD + "weight_snapshot:", _VISIT),
    Judgement(
        BY_NAME,
        _OFFLOAD + "layerwise_offload:LayerwiseOffloadManager.update_cpu_weights",
        "is called by the wrapped updates, for weights that are on the host",
    ),
    *(
        Judgement(WRITER, f"{_PIPELINES}composed_pipeline_base:ComposedPipelineBase.{name}", _BUILT)
        for name in ("__init__", "load_modules")
    ),
    *(
        Judgement(WRITER, f"{_PIPELINES}lora.pipeline:LoRAPipeline.{name}", _BUILT)
        for name in (
            "_apply_lora_to_layers",
            "deactivate_lora_weights",
            "merge_lora_weights",
            "unmerge_lora_weights",
        )
    ),
    Judgement(
        BY_NAME,
        _PIPELINES + "lora.pipeline:_swap_peft_swiglu_fc1_lora_b",
        "orders the rows of an adapter that is not in the model yet",
    ),
    Judgement(
        BY_NAME,
        _PIPELINES + "lora.pipeline:LoRAPipeline.load_lora_adapter",
        "reads an adapter to the host; set_lora puts it into the model, and is wrapped",
    ),
    Judgement(
        WRITER,
        _PIPELINES + "stages.decoding:DecodingStage.load_model",
        "known gap: a VAE that the start left out is loaded by the first request, and published "
        "at the next event",
    ),
    Judgement(
        WRITER,
        _PIPELINES + "stages.image_encoding:LTX2ImageEncodingStage._ensure_condition_image_encoder",
        _APART,
    ),
    Judgement(
        WRITER,
        "multimodal_gen.runtime.postprocess.realesrgan_upscaler:ImageUpscaler._ensure_model_loaded",
        _APART,
    ),
    Judgement(
        WRITER, "multimodal_gen.runtime.postprocess.rife_interpolator:Model.load_model", _APART
    ),
    *(
        Judgement(
            WRITER,
            f"multimodal_gen.runtime.utils.precision:{name}",
            "casts for one stage of a request on the CPU, and puts the very same tensors back",
        )
        for name in ("_module_fp32_cache", "_restore_module_value_state")
    ),
    Judgement(WRITER, "multimodal_gen.runtime.utils.precision:_restore_tensor_dtypes", _CAST),
    *(
        Judgement(WRITER, f"multimodal_gen.runtime.{name}", "is called by loaders and by models")
        for name in (
            "utils.quantization_utils:process_model_weights_after_loading",
            "utils.weight_attrs:make_synced_weight_loader",
            "vla.pi05_quantization:finalize_fp8_weights",
            "vla.pi05_quantization:replace_projections",
        )
    ),
    Judgement(
        EMPTY,
        _PIPELINES + "composed_pipeline_base:ComposedPipelineBase.add_module",
        "puts a component that a stage has loaded among the pipeline's modules",
    ),
    Judgement(
        BY_NAME,
        "multimodal_gen.runtime.post_training.gpu_worker_post_training_mixin:"
        "GPUWorkerPostTrainingMixin.update_weights_from_tensor_checker",
        "compares checksums and writes nothing",
    ),
)
