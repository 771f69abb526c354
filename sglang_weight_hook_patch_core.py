"""Which SGLang methods change weights, release by release, and how each is wrapped.

The table `ENTRY_POINTS` is SGLang's history as data; nothing here asks for a version with
an ``if``.  A wrapper is a thin shell around SGLang's method: it tells the recorder
(`sglang_weight_hook.publisher.recorder`) that something begins, calls the method, returns the very
object that came back or lets the exception through, and tells the recorder how it ended.
Nothing that goes wrong on our side reaches SGLang.  File formats are not known here.

Longer than 500 lines because the loader and the installers know it by its one name, and half of it
is the table.

Imported by ``sglang_patch_loader`` when the first of SGLang's target modules has executed,
so everything imported below is in SGLang's process already.  Python 3.9 to 3.14.

Source of the table: the syntax trees of the released wheels 0.4.6.post5 to 0.5.23.
"""

from __future__ import annotations

import functools
import importlib.machinery
import logging
import os
import re
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, Optional

logger = logging.getLogger("sglang_weight_hook")

_EXECUTOR = "sglang.srt.model_executor"
_MANAGERS = "sglang.srt.managers"

RUNNER = (_EXECUTOR + ".model_runner", "ModelRunner")
UPDATER = (_EXECUTOR + ".model_runner_components.weight_updater", "WeightUpdater")
SCHEDULER = (_MANAGERS + ".scheduler", "Scheduler")
SCHEDULER_MIXIN = (_MANAGERS + ".scheduler_update_weights_mixin", "SchedulerUpdateWeightsMixin")
SCHEDULER_UPDATER = (
    _MANAGERS + ".scheduler_components.weight_updater",
    "SchedulerWeightUpdaterManager",
)
EXPERTS_OLD = (_EXECUTOR + ".expert_location_updater", "ExpertLocationUpdater")
EXPERTS = ("sglang.srt.eplb.expert_location_updater", "ExpertLocationUpdater")
EPLB_MANAGER = ("sglang.srt.eplb.eplb_manager", "")  # a function of the module itself
EXPERT_BACKUP = ("sglang.srt.elastic_ep.expert_backup_client", "ExpertBackupClient")
WEIGHT_CHECKER = ("sglang.srt.utils.weight_checker", "WeightChecker")

ENCODER_OLD = ("sglang.srt.disaggregation.encode_server", "MMEncoder")
ENCODER = ("sglang.srt.disaggregation.encoder.server", "MMEncoder")

WEIGHT_CACHE = ("sglang.srt.weight_cache.daemon", "WeightCacheDaemon")
WEIGHT_CACHE_EXPORT = ("sglang.srt.weight_cache.transport", "")

# Diffusion models: one worker for each rank, with a pipeline of several modules.
WORKER = ("sglang.multimodal_gen.runtime.managers.gpu_worker", "GPUWorker")
WORKER_MIXIN = (
    "sglang.multimodal_gen.runtime.post_training.gpu_worker_post_training_mixin",
    "GPUWorkerPostTrainingMixin",
)
PIPELINE = (
    "sglang.multimodal_gen.runtime.pipelines_core.composed_pipeline_base",
    "ComposedPipelineBase",
)

OLDEST = "0.4.6.post5"
NEWEST = "0.5.23"


class EntryPoint(NamedTuple):
    """One method of SGLang that changes weights, and the releases that have it there.

    ``event``: the name under which it is published.
    ``effect``: what it does to the weights (`publisher.events.EFFECTS`); ``request`` for the
    methods in `REQUESTS`, which call some of those.
    ``site``: module and class; an empty class is the module itself.
    ``whose``: how the runners whose weights it changes follow from its arguments, a key of
    `_RUNNERS_OF`.
    ``first``, ``last``: the first and the last release known to have it.  ``last=None``: the
    newest one has it, so a later release without it is reported.
    """

    event: str
    effect: str
    site: tuple[str, str]
    method: str
    whose: str
    first: str = OLDEST
    last: Optional[str] = None

    @property
    def module(self) -> str:
        return self.site[0]

    @property
    def name(self) -> str:
        """``Class.method``, as it is named in logs and in the state file."""
        return (self.site[1] or self.site[0]) + "." + self.method


_DISK = "update_weights_from_disk"
_TENSOR = "update_weights_from_tensor"
_DISTRIBUTED = "update_weights_from_distributed"
_IPC = "update_weights_from_ipc"
_RELEASE = "release_memory_occupation"
_RESUME = "resume_memory_occupation"
_EPLB = "expert_location_update"

# fmt: off
ENTRY_POINTS = (
    # event           effect      class              method                  whose     first          last
    EntryPoint("load_model", "load", RUNNER, "load_model", "self"),
    EntryPoint("finalize_startup_weight_load", "commit", RUNNER, "finalize_startup_weight_load", "self", "0.5.18"),
    # Encoder-only servers have no ModelRunner: the encoder loads its model as it is built.
    EntryPoint("encoder_ready", "build", ENCODER_OLD, "__init__", "self", "0.5.8.post1", "0.5.18"),
    EntryPoint("encoder_ready", "build", ENCODER, "__init__", "self", "0.5.20"),
    # The weight cache's process loads a model and hands out its memory; it has no ModelRunner.  Run
    # with ``python -m`` its class is in __main__, which nobody can patch: there the export tells.
    EntryPoint("weight_cache_ready", "build", WEIGHT_CACHE, "load", "self", "0.5.17"),
    EntryPoint("weight_cache_ready", "build", WEIGHT_CACHE_EXPORT, "choose_daemon_transport_backend", "caller", "0.5.19"),
    EntryPoint("scheduler_ready", "settle", SCHEDULER, "__init__", "process"),
    # Programs that make a runner themselves (bench_one_batch): nothing else says that it is whole.
    EntryPoint("runner_ready", "complete", RUNNER, "__init__", "self", OLDEST, "0.5.13.post1"),
    EntryPoint("runner_ready", "complete", RUNNER, "alloc_memory_pool", "self", "0.5.14"),

    EntryPoint(_DISK, "update", RUNNER, _DISK, "self", OLDEST, "0.5.15.post1"),
    EntryPoint(_DISK, "update", UPDATER, _DISK, "updater", "0.5.18"),
    EntryPoint(_TENSOR, "stream", RUNNER, _TENSOR, "self", OLDEST, "0.5.15.post1"),
    EntryPoint(_TENSOR, "stream", UPDATER, _TENSOR, "updater", "0.5.18"),
    EntryPoint(_DISTRIBUTED, "stream", RUNNER, _DISTRIBUTED, "self", OLDEST, "0.5.15.post1"),
    EntryPoint(_DISTRIBUTED, "stream", UPDATER, _DISTRIBUTED, "updater", "0.5.18", "0.5.20"),
    # Since 0.5.21 receive_weights_from_distributed only receives; this one writes.
    EntryPoint(_DISTRIBUTED, "stream", UPDATER, "load_weights_from_distributed", "updater", "0.5.21"),
    EntryPoint(_IPC, "update", RUNNER, _IPC, "self", "0.5.5.post3", "0.5.15.post1"),
    EntryPoint(_IPC, "update", UPDATER, _IPC, "updater", "0.5.18"),
    EntryPoint("weight_update_session", "open", UPDATER, "begin_weight_update", "updater", "0.5.21"),
    EntryPoint("weight_update_session", "close", UPDATER, "end_weight_update", "updater", "0.5.21"),

    # Relocation copies experts within their tensors, on the forward path and a few layers at a
    # time: a stream.  Outermost is the function that also reloads what a dead rank has lost.
    EntryPoint(_EPLB, "relocate", RUNNER, "update_expert_location", "self", OLDEST, "0.5.15.post1"),
    EntryPoint(_EPLB, "relocate", EPLB_MANAGER, "update_expert_location_with_recovery", "model_argument", "0.5.18"),
    EntryPoint(_EPLB, "relocate", EXPERTS_OLD, "update", "process", "0.4.7", "0.4.7"),
    EntryPoint(_EPLB, "relocate", EXPERTS, "update", "process", "0.4.9.post6"),
    EntryPoint("expert_backup", "partial", EXPERT_BACKUP, "update_weights", "model", "0.5.10.post1"),
    # /weights_checker with action=reset_tensors overwrites the weights with random values.
    EntryPoint("reset_tensors", "update", WEIGHT_CHECKER, "_reset_tensors", "model", "0.5.6.post2"),

    EntryPoint(_RELEASE, "release", SCHEDULER, _RELEASE, "process", OLDEST, "0.4.9.post6"),
    EntryPoint(_RELEASE, "release", SCHEDULER_MIXIN, _RELEASE, "process", "0.4.10.post2", "0.5.12.post1"),
    EntryPoint(_RELEASE, "release", SCHEDULER_UPDATER, _RELEASE, "process", "0.5.15.post1"),
    EntryPoint(_RESUME, "resume", SCHEDULER, _RESUME, "process", OLDEST, "0.4.9.post6"),
    EntryPoint(_RESUME, "resume", SCHEDULER_MIXIN, _RESUME, "process", "0.4.10.post2", "0.5.12.post1"),
    EntryPoint(_RESUME, "resume", SCHEDULER_UPDATER, _RESUME, "process", "0.5.15.post1"),

    EntryPoint("load_lora_adapter", "adapt", RUNNER, "load_lora_adapter", "self", "0.4.9.post6"),
    EntryPoint("load_lora_adapter", "adapt", RUNNER, "load_lora_adapter_from_tensors", "self", "0.5.8.post1"),
    EntryPoint("unload_lora_adapter", "adapt", RUNNER, "unload_lora_adapter", "self", "0.4.9.post6"),

    # The worker loads its pipeline as it is built (CPUWorker calls this __init__, too).
    EntryPoint("pipeline_ready", "build", WORKER, "__init__", "self", "0.5.5"),
    # A stage that loads a component with its first request (VAE), or anew (transformer, on MPS).
    EntryPoint("late_component", "adapt", PIPELINE, "add_module", "process", "0.5.6"),
    EntryPoint(_DISK, "update", WORKER, _DISK, "self", "0.5.9", "0.5.13.post1"),
    EntryPoint(_DISK, "update", WORKER_MIXIN, _DISK, "self", "0.5.14"),
    EntryPoint(_TENSOR, "stream", WORKER_MIXIN, _TENSOR, "self", "0.5.14"),
    # A LoRA adapter of a pipeline is merged into the weights.
    EntryPoint("set_lora", "partial", WORKER, "set_lora_adapter", "self", "0.5.5", "0.5.5.post3"),
    EntryPoint("set_lora", "partial", WORKER, "set_lora", "self", "0.5.6"),
    EntryPoint("merge_lora_weights", "partial", WORKER, "merge_lora_weights", "self", "0.5.5"),
    EntryPoint("unmerge_lora_weights", "partial", WORKER, "unmerge_lora_weights", "self", "0.5.5"),
    # No memory saver: the modules move to the host's memory and back, and lie elsewhere then.
    EntryPoint(_RELEASE, "adapt", WORKER, _RELEASE, "self", "0.5.15"),
    EntryPoint(_RESUME, "adapt", WORKER, _RESUME, "self", "0.5.15"),
)

# The scheduler's methods around those that write: what SGLang answers, and which bucket is the last
# (it flushes its cache then), is known here alone.
REQUESTS = (
    EntryPoint(_DISK, "request", SCHEDULER, _DISK, "process", OLDEST, "0.4.9.post6"),
    EntryPoint(_DISK, "request", SCHEDULER_MIXIN, _DISK, "process", "0.4.10.post2", "0.5.12.post1"),
    EntryPoint(_DISK, "request", SCHEDULER_UPDATER, _DISK, "process", "0.5.15.post1"),
    EntryPoint(_TENSOR, "request", SCHEDULER, _TENSOR, "process", OLDEST, "0.4.9.post6"),
    EntryPoint(_TENSOR, "request", SCHEDULER_MIXIN, _TENSOR, "process", "0.4.10.post2", "0.5.12.post1"),
    EntryPoint(_TENSOR, "request", SCHEDULER_UPDATER, _TENSOR, "process", "0.5.15.post1"),
    EntryPoint(_DISTRIBUTED, "request", SCHEDULER, _DISTRIBUTED, "process", OLDEST, "0.4.9.post6"),
    EntryPoint(_DISTRIBUTED, "request", SCHEDULER_MIXIN, _DISTRIBUTED, "process", "0.4.10.post2", "0.5.12.post1"),
    EntryPoint(_DISTRIBUTED, "request", SCHEDULER_UPDATER, _DISTRIBUTED, "process", "0.5.15.post1"),
    EntryPoint(_IPC, "request", SCHEDULER_MIXIN, _IPC, "process", "0.5.5.post3", "0.5.12.post1"),
    EntryPoint(_IPC, "request", SCHEDULER_UPDATER, _IPC, "process", "0.5.15.post1"),
    EntryPoint("weight_update_session", "request", SCHEDULER_UPDATER, "begin_weight_update", "process", "0.5.21"),
    EntryPoint("weight_update_session", "request", SCHEDULER_UPDATER, "end_weight_update", "process", "0.5.21"),
)
# fmt: on

TARGET_MODULES = frozenset(entry.module for entry in (*ENTRY_POINTS, *REQUESTS))


# --- modules ------------------------------------------------------------------------------


def patch(module: ModuleType) -> None:
    """Wrap what ``module``, which has executed, has of the table.  Never raises."""
    try:
        patch_module(module)
    except Exception as error:
        _log_once("patching " + module.__name__, error)


def catch_up(is_ours: Callable[[object], bool]) -> None:
    """Bring our finder to the front again, and patch every target that is there already.

    A finder that came in front of ours later, and that answers for SGLang's modules by asking
    ``PathFinder`` alone (the import hooks of run-time type checkers do), keeps their imports
    from us.  SGLang's plugin entry point, which activates the hook a second time, makes up for it.
    """
    if not is_ours(sys.meta_path[0]):
        ours = [finder for finder in sys.meta_path if is_ours(finder)]
        others = [finder for finder in sys.meta_path if not is_ours(finder)]
        # In one step, and without making the list shorter: a thread that is walking it for an
        # import of its own may meet a finder twice then, but skips none.
        sys.meta_path[:] = ours + others
    for name in sorted(TARGET_MODULES):
        module = sys.modules.get(name)
        spec = getattr(module, "__spec__", None)
        # A module still executing is patched by its stand-in, or is being executed by
        # somebody else's thread: its class may not exist yet.
        if module is not None and not getattr(spec, "_initializing", False):
            patch(module)


# --- whose weights ------------------------------------------------------------------------


Arguments = tuple[Any, ...]
Keywords = dict[str, Any]


def _runner_itself(args: Arguments, kwargs: Keywords) -> list[Any]:
    return [args[0]]


def _runner_of_updater(args: Arguments, kwargs: Keywords) -> list[Any]:
    return [args[0].get_model_runner()]


def _runner_by_model(args: Arguments, kwargs: Keywords) -> list[Any]:
    owner = args[0]
    # WeightChecker holds its runner up to 0.5.15 and a way to get the model since 0.5.18;
    # ExpertBackupClient the same.  The recorder accepts a model in place of its runner.
    runner = getattr(owner, "_model_runner", None) or getattr(owner, "model_runner", None)
    return [runner if runner is not None else owner._get_model()]


def _runner_by_argument(args: Arguments, kwargs: Keywords) -> list[Any]:
    return [kwargs["model"]] if "model" in kwargs else []


def _caller_with_a_model(args: Arguments, kwargs: Keywords) -> list[Any]:
    """Whose method has called a function that is not told of its owner."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        owner = frame.f_locals.get("self")
        if getattr(owner, "model", None) is not None:
            return [owner]
    raise LookupError("no caller has a model")


def _every_runner(args: Arguments, kwargs: Keywords) -> list[Any]:
    return []  # none named: the recorder takes all that it knows in this process


_RUNNERS_OF: dict[str, Callable[[Arguments, Keywords], list[Any]]] = {
    "self": _runner_itself,
    "updater": _runner_of_updater,
    "model": _runner_by_model,
    "model_argument": _runner_by_argument,
    "caller": _caller_with_a_model,
    "process": _every_runner,
}


def _runners(entry: EntryPoint, args: Arguments, kwargs: Keywords) -> list[Any]:
    """The runners concerned; all of them where SGLang no longer is as the table says."""
    try:
        return _RUNNERS_OF[entry.whose](args, kwargs)
    except Exception as error:
        _log_once("finding the runner of " + entry.name, error)
        return []


def _details(entry: EntryPoint, args: Arguments, kwargs: Keywords) -> dict[str, Any]:
    """What the recorder needs of the call's arguments beyond the runners."""
    if entry.effect not in ("release", "resume"):
        return {}
    request = _request_of(args, kwargs)
    adapter = getattr(args[0] if args else None, "memory_saver_adapter", None)
    return {
        # None or empty means every tag (SGLang, io_struct.py, ReleaseMemoryOccupationReqInput).
        "tags": list(getattr(request, "tags", None) or ()),
        # Without --enable-memory-saver the adapter is a no-op, and nothing is freed.
        "physical": bool(getattr(adapter, "enabled", False)),
    }


def _request_of(args: Arguments, kwargs: Keywords) -> Any:
    return args[1] if len(args) > 1 else kwargs.get("recv_req")


def _request_details(args: Arguments, kwargs: Keywords) -> dict[str, Any]:
    owner, request = args[0] if args else None, _request_of(args, kwargs)
    return {
        # SGLang flushes its cache after the last bucket (io_struct.py, flush_cache).
        "is_last": bool(getattr(request, "flush_cache", False)),
        # The scheduler's own record of a session (SchedulerWeightUpdaterManager, since 0.5.21).
        "is_sessionless": getattr(owner, "_session", owner) is None,
    }


def _effect(entry: EntryPoint, args: Arguments, kwargs: Keywords) -> str:
    """The entry's effect; an update with a filter of names, or of modules, is of some only."""
    if entry.effect == "update" and entry.event == _DISK:
        # The same place in both signatures: ModelRunner's and the diffusion worker's.
        fourth = args[3] if len(args) > 3 else None
        chosen = kwargs.get("weight_name_filter", kwargs.get("target_modules", fourth))
        if chosen is not None:
            return "partial"
    # A pipeline of diffusers has no LoRA; the worker only says so, and writes nothing.
    if entry.site == WORKER and entry.effect == "partial":
        pipeline = getattr(args[0], "pipeline", None)
        return "partial" if pipeline is None or hasattr(pipeline, entry.method) else "adapt"
    return entry.effect


# --- wrapping -----------------------------------------------------------------------------

_MARK = "_sglang_weight_hook_entry"

# (module, class, method) of every entry point wrapped in this process.
_wrapped: set[tuple[str, str, str]] = set()
# Names already reported as missing.
_missing: list[str] = []


def patch_module(module: ModuleType) -> None:
    """Wrap every entry point that ``module`` holds; report those it should hold and lacks.

    Idempotent, also for a class that is patched twice; a reloaded module's new classes are
    patched afresh.  Called right after the module executed, under its import lock.
    """
    _settle_directory()
    version = _sglang_version()
    for entry in (*ENTRY_POINTS, *REQUESTS):
        if entry.module != module.__name__:
            continue
        if _wrap_entry(module, entry):
            _wrapped.add((*entry.site, entry.method))
        elif _expected(entry, version):
            _report_missing(entry.event, entry.name, version)


def _wrap_entry(module: ModuleType, entry: EntryPoint) -> bool:
    owner = getattr(module, entry.site[1], None) if entry.site[1] else module
    original = getattr(owner, entry.method, None)
    if owner is None or not callable(original) or original is object.__init__:
        return False
    if entry.effect == "complete" and entry.last is not None and _has_later_step(owner, entry):
        return True
    if not hasattr(original, _MARK):
        setattr(owner, entry.method, make_wrapper(original, entry))
    return True


def _has_later_step(owner: Any, entry: EntryPoint) -> bool:
    """Whether this release completes a runner with a later step than ``entry``."""
    return any(
        other.last is None and hasattr(owner, other.method)
        for other in ENTRY_POINTS
        if (other.event, other.site) == (entry.event, entry.site)
    )


def make_wrapper(original: Callable[..., Any], entry: EntryPoint) -> Callable[..., Any]:
    """The shell around one method: same signature, same result, same exceptions."""
    is_request = entry.effect == "request"
    begin, finish = (_begin_request, _finish_request) if is_request else (_begin, _finish)

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        begun = begin(entry, args, kwargs)
        try:
            result = original(*args, **kwargs)
        except BaseException as error:
            finish(begun, None, error)
            raise
        finish(begun, result, None)
        return result

    setattr(wrapper, _MARK, entry)
    return wrapper


def _begin(entry: EntryPoint, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        from sglang_weight_hook.publisher import recorder

        if entry.effect in ("load", "settle", "build"):
            _check_all_events()
        return recorder.begin(
            entry.event,
            _effect(entry, args, kwargs),
            _runners(entry, args, kwargs),
            _details(entry, args, kwargs),
            missing=_missing,
        )
    except Exception as error:
        _log_once("begin of " + entry.event, error)
        return None


def _finish(begun: Any, result: Any, error: Optional[BaseException]) -> None:
    if begun is None:
        return
    try:
        from sglang_weight_hook.publisher import recorder

        recorder.finish(begun, result, error)
    except Exception as failure:
        _log_once("end of an event", failure)


def _begin_request(entry: EntryPoint, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        from sglang_weight_hook.publisher import recorder

        return recorder.begin_request(_request_details(args, kwargs))
    except Exception as error:
        _log_once("begin of a request: " + entry.event, error)
        return None


def _finish_request(request: Any, result: Any, error: Optional[BaseException]) -> None:
    if request is None:
        return
    try:
        from sglang_weight_hook.publisher import recorder

        recorder.finish_request(request, result, error)
    except Exception as failure:
        _log_once("end of a request", failure)


_logged: set[str] = set()


def _log_once(where: str, error: BaseException) -> None:
    if where in _logged:
        return
    _logged.add(where)
    try:
        logger.warning("SGLang weight hook: %s failed, SGLang goes on without it: %r", where, error)
    except Exception:
        pass


def _settle_directory() -> None:
    """Make the output directory absolute now: SGLang or a model may change directory later."""
    try:
        from sglang_weight_hook.publisher import settings

        settings.load()
    except Exception as error:
        _log_once("reading the settings", error)


# --- what is missing ----------------------------------------------------------------------


def release_key(version: str) -> tuple[int, ...]:
    """A release as comparable numbers: ``0.5.15.post1`` is ``(0, 5, 15, 1)``.

    >>> release_key("0.5.9") < release_key("0.5.15") < release_key("0.5.15.post1")
    True
    """
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0]))


def _sglang_version() -> str:
    version = getattr(sys.modules.get("sglang"), "__version__", None)
    if not version:
        try:
            from importlib import metadata

            version = metadata.version("sglang")
        except Exception:
            version = None
    return str(version or "unknown")


def _expected(entry: EntryPoint, version: str) -> bool:
    """Whether a release is known, or must be supposed, to have this entry point.

    A checkout without a number (``0.0.0.dev0``, ``unknown``) counts as newer than all.
    """
    key = release_key(version)
    if not any(key[:3]):
        return entry.last is None
    after_first = release_key(entry.first) <= key
    before_last = entry.last is None or key <= release_key(entry.last)
    return after_first and before_last


def _check_all_events() -> None:
    """Report each event that has not one wrapped entry point though this release is due one.

    Runs when a model loads: by then SGLang has imported what it imports at start-up.  Modules
    that exist on disk but wait for their feature (elastic EP) are not missing.
    """
    version = _sglang_version()
    for event in dict.fromkeys(entry.event for entry in ENTRY_POINTS):
        entries = [entry for entry in ENTRY_POINTS if entry.event == event]
        if any((*entry.site, entry.method) in _wrapped for entry in entries):
            continue
        due = [entry for entry in entries if _expected(entry, version) and _concerns_us(entry)]
        if due and not any(_may_still_come(entry.module) for entry in due):
            _report_missing(event, due[-1].name, version)


def _concerns_us(entry: EntryPoint) -> bool:
    """Not what is of diffusion in a process of language models: an environment may lack it."""
    package = "sglang.multimodal_gen"
    return package in sys.modules or not entry.module.startswith(package)


def _may_still_come(module: str) -> bool:
    return module not in sys.modules and _exists_on_disk(module)


def _exists_on_disk(module: str) -> bool:
    """Whether the import system would find ``module``, found without importing anything."""
    path = None
    name = ""
    for part in module.split("."):
        name = name + "." + part if name else part
        loaded = sys.modules.get(name)
        if loaded is not None:
            path = getattr(loaded, "__path__", None)
            continue
        try:
            spec = importlib.machinery.PathFinder.find_spec(name, path)
        except KeyError:
            # A namespace package (PEP 420) asks for its parent, which is not imported yet.
            path = [os.path.join(folder, part) for folder in path or sys.path]
            continue
        if spec is None:
            return False
        path = spec.submodule_search_locations
    return True


def _report_missing(event: str, name: str, version: str) -> None:
    text = event + ": " + name
    if text in _missing:
        return
    _missing.append(text)
    logger.warning(
        "SGLang weight hook: SGLang %s has no %s; changes of weights by %s will not be seen "
        "(everything else is)",
        version,
        name,
        event,
    )
