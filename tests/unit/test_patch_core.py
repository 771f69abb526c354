"""The patch core: which methods it wraps in which release, and that a wrapper changes nothing.

SGLang's classes are fakes here, with the signatures of the real ones; ``tests/real_sglang``
wraps the real ones.
"""

from __future__ import annotations

import doctest
import functools
import inspect
import logging
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import fake_sglang
import pytest

import sglang_weight_hook_patch_core as core
from sglang_weight_hook.publisher import recorder


class Call(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


# The signature that SGLang gives a method, and one call of it as SGLang makes it: for each
# entry of the table, in each of the forms of shared/sglang-entry-points.md.
DISK_1 = ("(self, model_path, load_format)", [Call(("m", "auto"), {})])
DISK_2 = (
    "(self, model_path, load_format, weight_name_filter=None, recapture_cuda_graph=False)",
    [
        Call(("m", "auto"), {}),
        Call(("m", "auto"), {"recapture_cuda_graph": True}),
        Call((), {"model_path": "m", "load_format": "auto", "weight_name_filter": len}),
    ],
)
DISTRIBUTED_1 = ("(self, name, dtype, shape)", [Call(("n", "d", (1,)), {})])
DISTRIBUTED_2 = (
    "(self, names, dtypes, shapes, group_name)",
    [
        Call(([], [], [], "g"), {}),
        Call((), {"names": [], "dtypes": [], "shapes": [], "group_name": "g"}),
    ],
)
DISTRIBUTED_3 = (
    "(self, names, dtypes, shapes, group_name, load_format=None)",
    [Call(([], [], [], "g"), {"load_format": "flattened_bucket"})],
)
DISTRIBUTED_4 = ("(self, named_tensors)", [Call(([],), {}), Call((), {"named_tensors": []})])
TENSOR = (
    "(self, named_tensors, load_format=None)",
    [Call(([],), {}), Call((), {"named_tensors": [], "load_format": "direct"})],
)
NOTHING = ("(self)", [Call((), {})])
REQUEST = ("(self, recv_req)", [Call(("r",), {}), Call((), {"recv_req": "r"})])
EXPERTS_1 = ("(self, new_expert_location_metadata)", [Call(("m",), {})])
EXPERTS_2 = (
    "(self, routed_experts_weights_of_layer, new_expert_location_metadata, update_layer_ids,"
    " nnodes, rank)",
    [Call(({}, "m", [0]), {"nnodes": 1, "rank": 0})],
)

RECOVERY = (
    "(*, model, new_expert_location_metadata, update_layer_ids, tp_rank)",
    [
        Call(
            (),
            {
                "model": "the runner",
                "new_expert_location_metadata": "m",
                "update_layer_ids": [0],
                "tp_rank": 0,
            },
        )
    ],
)

FORMS: dict[tuple[str, str], list[tuple[str, list[Call]]]] = {
    ("", "update_expert_location_with_recovery"): [RECOVERY],
    ("ModelRunner", "load_model"): [NOTHING],
    ("ModelRunner", "finalize_startup_weight_load"): [NOTHING],
    ("Scheduler", "__init__"): [
        ("(self, server_args, port_args, gpu_id)", [Call(("s", "p"), {"gpu_id": 0})])
    ],
    ("MMEncoder", "__init__"): [
        ("(self, server_args, rank=0)", [Call(("s",), {}), Call(("s",), {"rank": 1})])
    ],
    ("ModelRunner", "update_weights_from_disk"): [DISK_1, DISK_2],
    ("WeightUpdater", "update_weights_from_disk"): [DISK_2],
    ("ModelRunner", "update_weights_from_tensor"): [TENSOR],
    ("WeightUpdater", "update_weights_from_tensor"): [TENSOR],
    ("ModelRunner", "update_weights_from_distributed"): [
        DISTRIBUTED_1,
        DISTRIBUTED_2,
        DISTRIBUTED_3,
    ],
    ("WeightUpdater", "update_weights_from_distributed"): [DISTRIBUTED_3],
    ("WeightUpdater", "load_weights_from_distributed"): [DISTRIBUTED_4],
    ("ModelRunner", "update_weights_from_ipc"): [REQUEST],
    ("WeightUpdater", "update_weights_from_ipc"): [REQUEST],
    ("WeightUpdater", "begin_weight_update"): [NOTHING],
    ("WeightUpdater", "end_weight_update"): [
        ("(self, *, run_post_load)", [Call((), {"run_post_load": True})])
    ],
    ("ModelRunner", "update_expert_location"): [EXPERTS_1],
    ("ExpertLocationUpdater", "update"): [EXPERTS_2],
    ("ExpertBackupClient", "update_weights"): [
        ("(self, weight_name_filter=None)", [Call((), {}), Call((len,), {})])
    ],
    ("WeightChecker", "_reset_tensors"): [NOTHING],
    ("Scheduler", "release_memory_occupation"): [REQUEST],
    ("SchedulerUpdateWeightsMixin", "release_memory_occupation"): [REQUEST],
    ("SchedulerWeightUpdaterManager", "release_memory_occupation"): [REQUEST],
    ("Scheduler", "resume_memory_occupation"): [REQUEST],
    ("SchedulerUpdateWeightsMixin", "resume_memory_occupation"): [REQUEST],
    ("SchedulerWeightUpdaterManager", "resume_memory_occupation"): [REQUEST],
}

CASES = [
    pytest.param(entry, signature, call, id=f"{entry.module[11:]}.{entry.name}{number}")
    for entry in core.ENTRY_POINTS
    for number, (signature, call) in enumerate(
        (signature, call)
        for signature, calls in FORMS.get((entry.site[1], entry.method), [])
        for call in calls
    )
]


class Recorded(NamedTuple):
    kind: str
    effect: str
    runners: list[Any]
    details: dict[str, Any]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What reaches the recorder, in the place of the recorder."""
    seen: list[Any] = []

    def begin(
        kind: str, effect: str, runners: Any = (), details: Any = None, missing: Any = ()
    ) -> str:
        seen.append(Recorded(kind, effect, list(runners), details))
        return f"the event of {kind}"

    def finish(event: Any, result: Any, error: Any) -> None:
        seen.append((event, result, error))

    monkeypatch.setattr(recorder, "begin", begin)
    monkeypatch.setattr(recorder, "finish", finish)
    return seen


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend that a release of SGLang is the imported one."""

    def pretend(version: str) -> None:
        fake = types.ModuleType("sglang")
        fake.__version__ = version  # type: ignore[attr-defined]
        fake.__path__ = []
        monkeypatch.setitem(sys.modules, "sglang", fake)

    pretend("0.5.23")
    return pretend


pytestmark = pytest.mark.usefixtures("release")


def method(signature: str, name: str, answer: Callable[..., Any] = lambda arguments: None) -> Any:
    """A function with this very signature, which returns ``answer`` of its arguments."""
    scope: dict[str, Any] = {"_answer": answer}
    exec(f"def {name}{signature}:\n    'As SGLang says.'\n    return _answer(locals())", scope)
    return scope[name]


def fake_module(entry: core.EntryPoint, **methods: Any) -> types.ModuleType:
    """A module named like the entry's, with its class, with ``methods``."""
    module = types.ModuleType(entry.module)
    members = {"get_model_runner": lambda self: "the runner", "model_runner": "the runner"}
    if entry.site[1]:
        setattr(module, entry.site[1], type(entry.site[1], (), {**members, **methods}))
    else:
        vars(module).update(methods)
    return module


def bound(module: types.ModuleType, entry: core.EntryPoint) -> tuple[Any, Any]:
    """The entry's method on a new object of its class, and that object; or the function."""
    if not entry.site[1]:
        return getattr(module, entry.method), None
    cls = getattr(module, entry.site[1])
    owner = object.__new__(cls)
    return getattr(owner, entry.method), owner


def an_entry(name: str, module: str = "") -> core.EntryPoint:
    return next(
        entry for entry in core.ENTRY_POINTS if entry.name == name and entry.module.endswith(module)
    )


LOAD = an_entry("ModelRunner.load_model")
DISK = an_entry("ModelRunner.update_weights_from_disk")


# --- a wrapper changes nothing ------------------------------------------------------------


def test_every_entry_of_the_table_has_its_signature_in_this_test() -> None:
    assert {(entry.site[1], entry.method) for entry in core.ENTRY_POINTS} == set(FORMS)


@pytest.mark.parametrize(("entry", "signature", "call"), CASES)
def test_a_wrapped_method_gets_the_same_arguments_and_returns_the_same_object(
    entry: core.EntryPoint, signature: str, call: Call, recorded: list[Any]
) -> None:
    seen: list[dict[str, Any]] = []
    answer = None if entry.method == "__init__" else object()

    def remember(arguments: dict[str, Any]) -> Any:
        seen.append(arguments)
        return answer

    original = method(signature, entry.method, remember)
    module = fake_module(entry, **{entry.method: original})
    unpatched, _ = bound(module, entry)
    unpatched(*call.args, **call.kwargs)

    core.patch_module(module)

    patched, owner = bound(module, entry)
    assert patched(*call.args, **call.kwargs) is answer
    without, through = seen
    assert {**through, "self": None} == {**without, "self": None}
    begun, finished = recorded
    assert (begun.kind, begun.effect) == (entry.event, entry.effect)
    assert finished == (f"the event of {entry.event}", answer, None)
    expected = {"self": [owner], "process": []}
    assert begun.runners == expected.get(entry.whose, ["the runner"])


@pytest.mark.parametrize("entry", core.ENTRY_POINTS, ids=lambda entry: entry.name)
def test_an_exception_passes_through_as_the_same_object(
    entry: core.EntryPoint, recorded: list[Any]
) -> None:
    problem = KeyboardInterrupt("stop")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise problem

    module = fake_module(entry, **{entry.method: fail})
    core.patch_module(module)
    patched, _ = bound(module, entry)
    with pytest.raises(KeyboardInterrupt) as caught:
        patched(recv_req="request")
    assert caught.value is problem
    assert caught.value.__context__ is None
    assert recorded[-1] == (f"the event of {entry.event}", None, problem)


def test_a_wrong_call_raises_the_type_error_that_it_raises_unpatched(recorded: list[Any]) -> None:
    module = fake_module(DISK, update_weights_from_disk=method(DISK_1[0], DISK.method))
    unpatched = module.ModelRunner.update_weights_from_disk
    core.patch_module(module)
    messages = []
    for function in (unpatched, module.ModelRunner.update_weights_from_disk):
        with pytest.raises(TypeError) as caught:
            function(object(), "m", "auto", recapture_cuda_graph=True)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("broken", ["begin", "finish"])
def test_a_failing_recorder_never_reaches_the_caller_and_is_logged_once(
    broken: str,
    recorded: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr(recorder, broken, fail)
    answer = (True, "ok")
    module = fake_module(DISK, update_weights_from_disk=lambda self, *args: answer)
    core.patch_module(module)
    for _ in range(3):
        assert module.ModelRunner().update_weights_from_disk("m", "auto") is answer
    assert [record.levelname for record in caplog.records if "on fire" in record.message] == [
        "WARNING"
    ]


def test_a_failing_recorder_does_not_replace_the_exception_of_the_call(
    recorded: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr(recorder, "finish", fail)
    problem = ValueError("no such model")

    def raising(self: Any) -> None:
        raise problem

    module = fake_module(LOAD, load_model=raising)
    core.patch_module(module)
    with pytest.raises(ValueError, match="no such model") as caught:
        module.ModelRunner().load_model()
    assert caught.value is problem


def test_an_updater_that_cannot_name_its_runner_is_an_event_of_all_runners(
    recorded: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    def lost(self: Any) -> None:
        raise AttributeError("get_model_runner")

    entry = an_entry("WeightUpdater.update_weights_from_disk")
    module = fake_module(entry, update_weights_from_disk=lambda self: 7, get_model_runner=lost)
    core.patch_module(module)
    assert module.WeightUpdater().update_weights_from_disk() == 7
    assert recorded[0].runners == []
    assert "update_weights_from_disk" in caplog.text


# --- how it is wrapped --------------------------------------------------------------------


def test_a_module_patched_twice_is_wrapped_once(recorded: list[Any]) -> None:
    module = fake_module(LOAD, load_model=lambda self: None)
    core.patch_module(module)
    wrapper = module.ModelRunner.load_model
    core.patch_module(module)
    assert module.ModelRunner.load_model is wrapper
    module.ModelRunner().load_model()
    assert len(recorded) == 2


def test_the_new_class_of_a_reloaded_module_is_wrapped_too(recorded: list[Any]) -> None:
    for _ in range(2):
        module = fake_module(LOAD, load_model=lambda self: None)
        core.patch_module(module)
        module.ModelRunner().load_model()
    assert len(recorded) == 4


def test_the_signature_the_name_and_the_docstring_stay_visible() -> None:
    module = fake_module(DISK, update_weights_from_disk=method(DISK_2[0], DISK.method))
    before = module.ModelRunner.update_weights_from_disk
    core.patch_module(module)
    after = module.ModelRunner.update_weights_from_disk
    assert after is not before
    assert inspect.signature(after) == inspect.signature(before)
    assert inspect.unwrap(after) is before
    assert (after.__name__, after.__qualname__, after.__doc__, after.__module__) == (
        before.__name__,
        before.__qualname__,
        before.__doc__,
        before.__module__,
    )


@pytest.mark.skipif(sys.version_info < (3, 10), reason="dataclass(slots=True)")
def test_a_frozen_slotted_dataclass_is_wrapped_on_its_class(recorded: list[Any]) -> None:
    entry = an_entry("WeightUpdater.update_weights_from_tensor")

    @dataclass(frozen=True, slots=True)
    class WeightUpdater:
        runner: str

        def get_model_runner(self) -> str:
            return self.runner

        def update_weights_from_tensor(
            self, named_tensors: list[Any], load_format: str | None = None
        ) -> tuple[bool, str]:
            return True, "Success"

    module = types.ModuleType(entry.module)
    module.WeightUpdater = WeightUpdater  # type: ignore[attr-defined]
    core.patch_module(module)
    updater = WeightUpdater("its runner")
    assert updater.update_weights_from_tensor(named_tensors=[]) == (True, "Success")
    assert recorded[0].runners == ["its runner"]
    assert not hasattr(updater, "__dict__")


def test_an_inherited_method_is_wrapped_once_whichever_class_it_is_called_on(
    recorded: list[Any], release: Any
) -> None:
    release("0.5.9")
    mixin_entry = an_entry("SchedulerUpdateWeightsMixin.release_memory_occupation")
    mixin = fake_module(mixin_entry, release_memory_occupation=lambda self, recv_req: "freed")
    core.patch_module(mixin)
    scheduler = types.ModuleType("sglang.srt.managers.scheduler")
    base = mixin.SchedulerUpdateWeightsMixin
    scheduler.Scheduler = type("Scheduler", (base,), {})  # type: ignore[attr-defined]
    core.patch_module(scheduler)
    assert scheduler.Scheduler().release_memory_occupation("request") == "freed"
    assert [item.kind for item in recorded if isinstance(item, Recorded)] == [
        "release_memory_occupation"
    ]


def test_another_tools_wrapper_around_a_wrapped_method_still_works(recorded: list[Any]) -> None:
    module = fake_module(LOAD, load_model=lambda self: "loaded")
    core.patch_module(module)
    ours = module.ModelRunner.load_model

    @functools.wraps(ours)
    def theirs(self: Any) -> tuple[str, Any]:
        return "theirs", ours(self)

    module.ModelRunner.load_model = theirs
    core.patch_module(module)
    assert module.ModelRunner().load_model() == ("theirs", "loaded")
    assert len(recorded) == 2


def test_nothing_but_the_named_methods_is_touched() -> None:
    module = fake_module(LOAD, load_model=lambda self: None, forward=lambda self: None)
    untouched = module.ModelRunner.forward
    core.patch_module(module)
    assert module.ModelRunner.forward is untouched
    other = types.ModuleType("sglang.srt.managers.tokenizer_manager")
    other.ModelRunner = type("ModelRunner", (), {"load_model": untouched})  # type: ignore[attr-defined]
    core.patch_module(other)
    assert other.ModelRunner.load_model is untouched


# --- releases of memory -------------------------------------------------------------------


@pytest.mark.parametrize("by_name", [False, True])
def test_release_passes_on_its_tags_and_whether_memory_is_really_freed(
    by_name: bool, recorded: list[Any]
) -> None:
    entry = an_entry("SchedulerWeightUpdaterManager.release_memory_occupation")
    module = fake_module(
        entry,
        release_memory_occupation=lambda self, recv_req: None,
        memory_saver_adapter=types.SimpleNamespace(enabled=True),
    )
    core.patch_module(module)
    request = types.SimpleNamespace(tags=["kv_cache", "weights"])
    manager = module.SchedulerWeightUpdaterManager()
    if by_name:
        manager.release_memory_occupation(recv_req=request)
    else:
        manager.release_memory_occupation(request)
    assert recorded[0].details == {"tags": ["kv_cache", "weights"], "physical": True}


def test_without_a_memory_saver_nothing_is_physically_released(recorded: list[Any]) -> None:
    entry = an_entry("SchedulerWeightUpdaterManager.release_memory_occupation")
    module = fake_module(entry, release_memory_occupation=lambda self, recv_req: None)
    core.patch_module(module)
    request = types.SimpleNamespace(tags=None)
    module.SchedulerWeightUpdaterManager().release_memory_occupation(request)
    assert recorded[0].details == {"tags": [], "physical": False}


# --- the effects --------------------------------------------------------------------------


def test_every_effect_of_the_table_is_one_that_the_recorder_knows() -> None:
    assert {entry.effect for entry in core.ENTRY_POINTS} <= set(recorder.EFFECTS)


def test_the_end_of_a_deferred_load_is_no_update_and_leaves_the_runner_loading() -> None:
    # SGLang 0.5.18 and later call it inside Scheduler.__init__ (managers/scheduler.py),
    # before drafts are settled: the weights are complete, the engine is not.
    assert an_entry("ModelRunner.finalize_startup_weight_load").effect == "commit"


# --- releases -----------------------------------------------------------------------------

RELEASES = [
    "0.4.6.post5",
    "0.4.7",
    "0.4.9.post6",
    "0.4.10.post2",
    "0.5.1.post3",
    "0.5.3.post3",
    "0.5.5.post3",
    "0.5.6.post2",
    "0.5.8.post1",
    "0.5.9",
    "0.5.10.post1",
    "0.5.12.post1",
    "0.5.15.post1",
    "0.5.18",
    "0.5.20",
    "0.5.21",
    "0.5.22",
    "0.5.23",
]


def expected_in(version: str, event: str) -> set[str]:
    return {
        entry.name
        for entry in core.ENTRY_POINTS
        if entry.event == event and core._expected(entry, version)
    }


def test_release_key_agrees_with_its_examples() -> None:
    finder = doctest.DocTestFinder()
    found = [test for test in finder.find(core, "core") if test.examples]
    assert found
    for test in found:
        assert doctest.DocTestRunner().run(test).failed == 0


def test_the_known_releases_are_in_the_order_of_their_keys() -> None:
    assert sorted(RELEASES, key=core.release_key) == RELEASES
    assert core.release_key("0.5.23+cu128") == core.release_key("0.5.23")


@pytest.mark.parametrize("version", RELEASES)
def test_each_release_has_exactly_the_places_that_its_source_has(version: str) -> None:
    key = core.release_key(version)
    since_components = key >= core.release_key("0.5.18")
    holder = "WeightUpdater" if since_components else "ModelRunner"
    writes = (
        "load_weights_from_distributed"
        if key >= core.release_key("0.5.21")
        else "update_weights_from_distributed"
    )
    assert expected_in(version, "load_model") == {"ModelRunner.load_model"}
    for event in ("update_weights_from_disk", "update_weights_from_tensor"):
        assert expected_in(version, event) == {f"{holder}.{event}"}
    assert expected_in(version, "update_weights_from_distributed") == {f"{holder}.{writes}"}
    assert expected_in(version, "update_weights_from_ipc") == (
        {f"{holder}.update_weights_from_ipc"} if key >= core.release_key("0.5.5.post3") else set()
    )
    session = {"WeightUpdater.begin_weight_update", "WeightUpdater.end_weight_update"}
    assert expected_in(version, "weight_update_session") == (
        session if key >= core.release_key("0.5.21") else set()
    )
    if key <= core.release_key("0.4.9.post6"):
        scheduler = "Scheduler"
    elif key <= core.release_key("0.5.12.post1"):
        scheduler = "SchedulerUpdateWeightsMixin"
    else:
        scheduler = "SchedulerWeightUpdaterManager"
    for event in ("release_memory_occupation", "resume_memory_occupation"):
        assert expected_in(version, event) == {f"{scheduler}.{event}"}
    experts = expected_in(version, "expert_location_update")
    assert ("ModelRunner.update_expert_location" in experts) == (not since_components)
    assert ("ExpertLocationUpdater.update" in experts) == (version != "0.4.6.post5")


@pytest.mark.parametrize("version", ["0.6.0", "1.0", "0.5.24.dev7+g123", "unknown", "0.0.0.dev0"])
def test_an_unknown_release_is_taken_for_one_after_the_newest(version: str) -> None:
    for event in {entry.event for entry in core.ENTRY_POINTS}:
        assert expected_in(version, event) == expected_in(core.NEWEST, event)


# --- what is missing ----------------------------------------------------------------------


def updates_without_tensor() -> types.ModuleType:
    entry = an_entry("WeightUpdater.update_weights_from_disk")
    names = [
        entry.method
        for entry in core.ENTRY_POINTS
        if entry.site[1] == "WeightUpdater" and entry.method != "update_weights_from_tensor"
    ]
    return fake_module(entry, **{name: (lambda self, *args: "done") for name in names})


@pytest.mark.parametrize("version", ["0.5.23", "0.6.0", "unknown"])
def test_a_method_that_a_release_lacks_is_reported_once_and_the_rest_works(
    version: str, release: Any, recorded: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    release(version)
    for _ in range(3):
        module = updates_without_tensor()
        core.patch_module(module)
        assert module.WeightUpdater().update_weights_from_disk() == "done"
    warnings = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert version in warnings[0]
    assert "WeightUpdater.update_weights_from_tensor" in warnings[0]
    assert len(recorded) == 6
    assert core._missing == ["update_weights_from_tensor: WeightUpdater.update_weights_from_tensor"]


def test_a_class_that_a_release_lacks_is_reported_and_not_fatal(
    caplog: pytest.LogCaptureFixture,
) -> None:
    core.patch_module(types.ModuleType(LOAD.module))
    assert "ModelRunner.load_model" in caplog.text


def test_what_an_older_release_never_had_is_not_reported(
    release: Any, caplog: pytest.LogCaptureFixture
) -> None:
    release("0.4.6.post5")
    methods = {
        entry.method: lambda self: None
        for entry in core.ENTRY_POINTS
        if entry.site == core.RUNNER and core._expected(entry, "0.4.6.post5")
    }
    core.patch_module(fake_module(LOAD, **methods))
    assert caplog.records == []


def test_an_event_without_any_entry_point_is_reported_when_a_model_loads(
    recorded: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    module = fake_module(
        LOAD, load_model=lambda self: None, finalize_startup_weight_load=lambda self: None
    )
    core.patch_module(module)
    assert caplog.records == []
    for _ in range(2):
        module.ModelRunner().load_model()
    reported = [
        text for text in caplog.messages if "WeightUpdater.update_weights_from_disk" in text
    ]
    assert len(reported) == 1
    assert "0.5.23" in reported[0]


def test_a_module_in_a_namespace_package_is_found_without_importing_its_parents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "regular_parent" / "namespace"
    inner.mkdir(parents=True)
    (tmp_path / "regular_parent" / "__init__.py").write_text("raise AssertionError\n")
    (inner / "leaf.py").write_text("raise AssertionError\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert core._exists_on_disk("regular_parent.namespace.leaf")
    assert not core._exists_on_disk("regular_parent.namespace.other")
    assert not core._exists_on_disk("regular_parent.nothing.leaf")


def test_the_version_is_unknown_where_sglang_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sglang", types.ModuleType("sglang"))
    monkeypatch.setattr("importlib.metadata.version", lambda name: None)
    assert core._sglang_version() == "unknown"


def test_the_missing_names_reach_the_state_file(maps: Any, release: Any) -> None:
    torch = pytest.importorskip("torch")
    release("0.6.0")
    core.patch_module(updates_without_tensor())
    module = fake_module(
        LOAD, load_model=lambda self: None, finalize_startup_weight_load=lambda self: None
    )
    core.patch_module(module)
    cls = type("Runner", (module.ModelRunner, fake_sglang.FakeRunner), {})
    runner = cls(torch.nn.Linear(2, 2))
    runner.load_model()
    text = (maps / "weight_state_0.json").read_text()
    assert "WeightUpdater.update_weights_from_tensor" in text
