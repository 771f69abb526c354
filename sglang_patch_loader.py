"""Wait for SGLang's modules; hand each one, once it has executed, to the patch core.

Every interpreter of the environment imports this file at start-up, through
``sglang_injector.pth`` (``sglang_injector.start`` on Python 3.15+, PEP 829).  Hence the
rules here: import nothing that ``site`` has not imported already (``sys``, ``os`` and the
built-in ``_thread`` cost nothing), print nothing, never raise.  Everything about weights, files
and torch is in ``sglang_weight_hook_patch_core``, which is imported only when SGLang itself is.

Runs on Python 3.9 to 3.14 (and, untested, later ones).
"""

import _thread
import os
import sys

TYPE_CHECKING = False  # typing's constant, without typing: type checkers take it for theirs
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any, Optional

OFF_SWITCH = "SGLANG_WEIGHT_HOOK"
DEBUG_SWITCH = "SGLANG_WEIGHT_HOOK_DEBUG"

CORE = "sglang_weight_hook_patch_core"

# The modules named in the core's table of entry points.  They are repeated here because
# looking them up there would import the core in every interpreter; a unit test holds the
# two lists equal.
TARGETS = frozenset(
    (
        "sglang.multimodal_gen.runtime.managers.gpu_worker",
        "sglang.multimodal_gen.runtime.pipelines_core.composed_pipeline_base",
        "sglang.multimodal_gen.runtime.post_training.gpu_worker_post_training_mixin",
        "sglang.srt.disaggregation.encode_server",
        "sglang.srt.disaggregation.encoder.server",
        "sglang.srt.elastic_ep.expert_backup_client",
        "sglang.srt.eplb.eplb_manager",
        "sglang.srt.eplb.expert_location_updater",
        "sglang.srt.managers.scheduler",
        "sglang.srt.managers.scheduler_components.weight_updater",
        "sglang.srt.managers.scheduler_update_weights_mixin",
        "sglang.srt.model_executor.expert_location_updater",
        "sglang.srt.model_executor.model_runner",
        "sglang.srt.model_executor.model_runner_components.weight_updater",
        "sglang.srt.utils.weight_checker",
        "sglang.srt.weight_cache.daemon",
        "sglang.srt.weight_cache.transport",
    )
)

# (thread, module name) pairs for which `_Finder` is asking the other finders.  A finder
# that in turn walks sys.meta_path (wrapt, ddtrace and others do) comes back to us while the
# pair is in here, and gets no answer: this is what ends the recursion.  Set operations on it
# are atomic; no lock is held while foreign finders run.
_walking: "set[tuple[int, str]]" = set()

_reported: "set[str]" = set()


def install() -> None:
    """Put the finder in front of ``sys.meta_path``; does nothing if it is there already.

    Idempotent, because a venv processes each ``.pth`` line twice, and because SGLang's plugin
    entry point runs after the ``.pth``.  Called when SGLang is there, it also patches the targets
    that were imported before the hook, or past it.  Never raises.
    """
    try:
        if os.environ.get(OFF_SWITCH) == "0":
            return
        if not is_installed():
            sys.meta_path.insert(0, _Finder())
        if "sglang" in sys.modules:
            _ask_core("catch_up", "sglang", _is_ours)
    except Exception as error:
        try:
            if os.environ.get(DEBUG_SWITCH) == "1":
                sys.stderr.write(
                    "[sglang weight hook %d] not installed: %r\n" % (os.getpid(), error)
                )
        except Exception:
            pass


def uninstall() -> None:
    """Take the finder out again; methods already wrapped stay wrapped."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not _is_ours(finder)]


def is_installed() -> bool:
    """Whether the finder is on ``sys.meta_path`` of this interpreter."""
    for finder in sys.meta_path:  # noqa: SIM110 - every start would pay for a generator
        if _is_ours(finder):
            return True
    return False


def _is_ours(finder: object) -> bool:
    # By name, not by class: importlib.reload of this file makes a second class.
    return type(finder).__module__ == __name__ and type(finder).__name__ == "_Finder"


class _Finder:
    """A meta path finder (PEP 302, PEP 451) that answers for the targets alone."""

    def find_spec(
        self,
        fullname: str,
        path: "Optional[Sequence[str]]" = None,
        target: "Optional[ModuleType]" = None,
    ) -> "Optional[ModuleSpec]":
        if fullname not in TARGETS:
            return None
        key = (_thread.get_ident(), fullname)
        if key in _walking:
            return None
        _walking.add(key)
        spec = None
        try:
            # What the import system would have found without us: its own loop over the finders.
            for finder in list(sys.meta_path):
                if not _is_ours(finder) and hasattr(finder, "find_spec"):
                    spec = finder.find_spec(fullname, path, target)
                    if spec is not None:
                        break
        finally:
            _walking.discard(key)
        # Without a loader that has exec_module (a namespace package, a legacy loader) there is
        # nothing to wait for; the import goes on as if we were not here.  Nothing is imported:
        # the import system holds its global lock while it asks finders.
        if (
            spec is not None
            and hasattr(spec.loader, "exec_module")
            and not isinstance(spec.loader, _StandIn)
        ):
            spec.loader = _StandIn(spec.loader, spec)  # type: ignore[assignment]
        return spec


class _StandIn:
    """Stands in for a module's own loader until the module executes; then it is patched.

    Everything but ``exec_module`` is the original's: ``create_module``, ``get_code``,
    ``get_source``, ``get_data``, resource readers.
    """

    def __init__(self, original: "Any", spec: "Any" = None) -> None:
        self._original = original
        self._spec = spec

    def __getattr__(self, name: str) -> "Any":
        if name == "_original":  # before __init__, as when copied or unpickled
            raise AttributeError(name)
        return getattr(self._original, name)

    def get_code(self, fullname: str) -> "Any":
        # All that ``python -m`` asks for.  The spec that it asked with becomes that of
        # __main__, so our traces go now.
        if self._spec is not None and self._spec.loader is self:
            self._spec.loader = self._original
        return self._original.get_code(fullname)

    def exec_module(self, module: "ModuleType") -> None:
        original = self._original
        # First of all our traces go: code that the module runs while it executes, and
        # everyone afterwards, sees the loader that an unpatched import leaves behind.
        spec = getattr(module, "__spec__", None)
        if spec is not None and spec.loader is self:
            spec.loader = original
        if getattr(module, "__loader__", None) is self:
            try:
                module.__loader__ = original
            except AttributeError:
                pass
        # Who has taken us for the module's own loader and puts us back later (ddtrace does)
        # shall have put back as good as that one.  Loaders written in C do not let us.
        try:
            self.__class__ = type(original)
            self.__dict__ = original.__dict__
        except (AttributeError, TypeError):
            pass
        original.exec_module(module)
        _ask_core("patch", module.__name__, module)

    # The import system cuts its own frames out of the traceback of a failing import.  It
    # knows them by this file name (CPython, Python/import.c, remove_importlib_frames), and
    # our frame stands in the middle of them: with the same name it goes too, and a module
    # that fails to import shows the traceback that it shows without us.
    exec_module.__code__ = exec_module.__code__.replace(co_filename="<frozen importlib._bootstrap>")


def _ask_core(function: str, name: str, argument: object) -> None:
    """Import the core and call it.  Never raises, says a failure once for each ``name``."""
    try:
        getattr(__import__(CORE), function)(argument)
    except Exception as error:
        if name in _reported:
            return
        _reported.add(name)
        message = "SGLang weight hook: %s is left unpatched, its weights are not published: %r"
        try:
            # SGLang has imported logging long ago; this file must not be the one that does.
            logger = sys.modules["logging"].getLogger("sglang_weight_hook")
            logger.warning(message, name, error)
        except Exception:
            try:
                sys.stderr.write(message % (name, error) + "\n")
            except Exception:  # pythonw and daemons have no stderr
                pass
