"""Wait for SGLang's modules; hand each one, once it has executed, to the patch core.

Every interpreter of the environment imports this file at start-up, through
``sglang_injector.pth`` (``sglang_injector.start`` on Python 3.15+, PEP 829).  Hence the
rules here: import nothing that ``site`` has not imported already (``sys``, ``os`` and the
built-in ``_thread`` cost nothing), print nothing, never raise.  What weights, files or
torch are is none of this file's business; the work is in
``sglang_weight_hook_patch_core``, which is imported only when SGLang itself is.

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
    )
)

# (thread, module name) pairs whose spec is being looked for by `_find_among_others`.  A
# finder that in turn walks sys.meta_path (wrapt, ddtrace and others do) comes back to us
# while the pair is in here, and gets no answer: this is what ends the recursion.  Set
# operations on it are atomic; no lock is held while foreign finders run.
_walking: "set[tuple[int, str]]" = set()

_reported: "set[str]" = set()


def install() -> None:
    """Put the finder in front of ``sys.meta_path``; does nothing if it is there already.

    Idempotent, because a venv processes each ``.pth`` line twice.  Targets that were
    imported before the hook (the plugin entry point comes late) are patched at once.
    Never raises.
    """
    try:
        if os.environ.get(OFF_SWITCH) == "0" or is_installed():
            return
        sys.meta_path.insert(0, _Finder())
        if "sglang" in sys.modules:
            for name in sorted(TARGETS):
                module = sys.modules.get(name)
                # A module still executing is patched by its own loader, or is being
                # executed by somebody else's thread: its class may not exist yet.
                if module is not None and not _is_executing(module):
                    _patch(module)
    except Exception as error:
        _debug("not installed: %r" % (error,))


def uninstall() -> None:
    """Take the finder out again; methods already wrapped stay wrapped."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not _is_ours(finder)]


def is_installed() -> bool:
    """Whether the finder is on ``sys.meta_path`` of this interpreter."""
    return any(_is_ours(finder) for finder in sys.meta_path)


def _is_ours(finder: object) -> bool:
    # By name, not by class: importlib.reload of this file makes a second class.
    return type(finder).__module__ == __name__ and type(finder).__name__ == "_Finder"


def _is_executing(module: "ModuleType") -> bool:
    spec = getattr(module, "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


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
        try:
            spec = _find_among_others(fullname, path, target)
        finally:
            _walking.discard(key)
        loader = getattr(spec, "loader", None)
        # Without exec_module (a namespace package, an extension module of an old kind, a
        # legacy loader) there is nothing to wait for; the import goes on as if we were
        # not here.
        if hasattr(loader, "exec_module") and type(loader) is not _Loader:
            spec.loader = _Loader(loader)  # type: ignore[union-attr]
        return spec


def _find_among_others(
    fullname: str, path: "Optional[Sequence[str]]", target: "Optional[ModuleType]"
) -> "Optional[ModuleSpec]":
    """What the import system would have found without us (its own loop over the finders)."""
    for finder in list(sys.meta_path):
        if _is_ours(finder):
            continue
        find_spec = getattr(finder, "find_spec", None)
        if find_spec is None:
            continue
        spec: Optional[ModuleSpec] = find_spec(fullname, path, target)
        if spec is not None:
            return spec
    return None


class _Loader:
    """Stands in for the module's own loader until the module executes.

    Everything but ``exec_module`` is the original's: ``create_module``, ``get_code`` (all
    that ``python -m`` asks for), ``get_source``, ``get_data``, resource readers.
    """

    def __init__(self, original: "Any") -> None:
        self._original = original

    def __getattr__(self, name: str) -> "Any":
        if name == "_original":  # before __init__, as when copied or unpickled
            raise AttributeError(name)
        return getattr(self._original, name)

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
        original.exec_module(module)
        _patch(module)

    # The import system cuts its own frames out of the traceback of a failing import.  It
    # knows them by this file name (CPython, Python/import.c, remove_importlib_frames), and
    # our frame stands in the middle of them: with the same name it goes too, and a module
    # that fails to import shows the traceback that it shows without us.
    exec_module.__code__ = exec_module.__code__.replace(co_filename="<frozen importlib._bootstrap>")


def _patch(module: "ModuleType") -> None:
    """Let the core wrap what it knows in ``module``.  Never raises, says a failure once."""
    try:
        core = __import__(CORE)
        core.patch_module(module)
    except Exception as error:
        _report(module.__name__, error)


def _report(name: str, error: BaseException) -> None:
    if name in _reported:
        return
    _reported.add(name)
    message = "SGLang weight hook: %s is left unpatched, its weights are not published: %r" % (
        name,
        error,
    )
    try:
        # SGLang has imported logging long ago; this file must not be the one that does.
        sys.modules["logging"].getLogger("sglang_weight_hook").warning(message)
    except Exception:
        try:
            sys.stderr.write(message + "\n")
        except Exception:  # pythonw and daemons have no stderr
            pass


def _debug(message: str) -> None:
    try:
        if os.environ.get(DEBUG_SWITCH) == "1":
            sys.stderr.write("[sglang weight hook %d] %s\n" % (os.getpid(), message))
    except Exception:
        pass
