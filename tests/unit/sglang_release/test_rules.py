"""Each rule on a made-up release: what it finds, and what looks alike and is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.sglang_release.release_trees import RUNNER, row, runner, summary, uncovered
from tools.sglang_release.findings import BY_NAME, OVERRIDE, REQUEST, WRITER

WRITES = {
    "calls the model's load_weights": "self.model.load_weights(named)",
    "loads a state dict": "self.model.load_state_dict(named)",
    "post-processes after loading": "module.quant_method.process_weights_after_loading(module)",
    "uses a weight loader": "param.weight_loader(param, named)",
    "re-binds a draft's head": "self.draft.model.set_embed_and_head(embed, head)",
    "builds a model": "self.model = get_model(model_config=config)",
    "builds a model by a loader": "self.model = loader.load_model(model_config=config)",
    "assigns a parameter's data": "param.data = named",
    "assigns elements of a weight's data": "layer.weight.data[0] = named",
    "copies into a weight": "self.layer.weight.copy_(named)",
    "copies into an expert's weights": "expert_weights[0].copy_(named)",
    "reads from a peer into addresses": "engine.batch_transfer_sync_read(peer, here, there, sizes)",
    "takes memory away": "self.memory_saver_adapter.pause('weights')",
    "gives memory back": "self.memory_saver_adapter.resume('weights')",
}

HARMLESS = {
    "an accessor": "return self.get_model()",
    "a runner asked to load its model": "self.model_runner.load_model()",
    "a file is read": "return json.load(named)",
    "a KV buffer is filled": "self.k_buffer[0].copy_(named)",
    "a host copy of a weight": "self.cpu_weights.copy_(named)",
    "a request's data": "req.data = named",
    "a scheduler is paused": "self.engine.pause()",
    "weights are read": "return dict(self.model.named_parameters())",
    "weights are put into a temporary buffer": "temp_weights.copy_(self.weight)",
}


@pytest.mark.parametrize("statement", WRITES.values(), ids=WRITES)
def test_a_method_that_writes_weights_and_is_not_wrapped_is_found(
    statement: str, tmp_path: Path
) -> None:
    release = summary(tmp_path, runner(f"def refit(self, named):\n    {statement}  # weights"))
    assert uncovered(release) == {WRITER: [RUNNER + "refit"]}
    assert uncovered(release, row("refit")) == {}


@pytest.mark.parametrize("statement", HARMLESS.values(), ids=HARMLESS)
def test_what_only_looks_like_writing_is_not_found(statement: str, tmp_path: Path) -> None:
    text = f"def refit(self, named):\n    {statement}  # weights"
    assert uncovered(summary(tmp_path, runner(text, "import json"))) == {}


def test_what_runs_only_inside_a_wrapped_method_is_not_found(tmp_path: Path) -> None:
    release = summary(
        tmp_path,
        runner(
            """
def update(self, named):
    self._in_buckets(named)

def _in_buckets(self, named):
    write(self.model, named)
""",
            "def write(model, named):\n    model.load_weights(named)\n",
        ),
    )
    assert uncovered(release, row("update")) == {}
    assert uncovered(release) == {WRITER: ["srt.model_executor.model_runner:write"]}


def test_a_second_way_to_the_same_writer_is_found_and_named(tmp_path: Path) -> None:
    from tools.sglang_release.findings import uncovered as findings_of
    from tools.sglang_release.paths import Paths

    files = runner(
        """
def update(self, named):
    self._write(named)

def refit(self, named):
    self._write(named)

def _write(self, named):
    self.model.load_weights(named)
"""
    )
    (finding,) = findings_of(Paths(summary(tmp_path, files)), [row("update")], [])
    assert finding.place == RUNNER + "_write"
    assert finding.way == (RUNNER + "refit", RUNNER + "_write")


def test_a_writer_that_is_handed_on_can_run_at_any_time(tmp_path: Path) -> None:
    text = """
def load_model(self):
    self.timer.every_minute(self._refresh)

def _refresh(self):
    self.model.load_weights(self.source)
"""
    found = uncovered(summary(tmp_path, runner(text)), row("load_model"))
    assert found == {WRITER: [RUNNER + "_refresh"]}


def test_a_helper_of_a_writer_is_not_told_of_beside_it(tmp_path: Path) -> None:
    text = """
def refit(self, named):
    self.model.load_weights(named)
    self._rest(named)

def _rest(self, named):
    self.model.load_weights(named)
"""
    assert uncovered(summary(tmp_path, runner(text))) == {WRITER: [RUNNER + "refit"]}


def test_a_call_of_the_library_of_loaders_is_a_write_whatever_it_is_called(tmp_path: Path) -> None:
    head = "from sglang.srt.model_loader.loader import fetch"
    files = {
        **runner("def refit(self, weights):\n    fetch(self.model, weights)", head),
        "model_loader/loader.py": (
            "def fetch(model, named):\n    _fetch(model, named)\n\n"
            "def _fetch(model, named):\n    model.load_weights(named)\n"
        ),
    }
    assert uncovered(summary(tmp_path, files)) == {WRITER: [RUNNER + "refit"]}


def test_the_class_of_an_attribute_is_known_where_it_is_made(tmp_path: Path) -> None:
    files = runner(
        """
def __init__(self):
    self.helper = Refitter()

def update(self, named):
    self.helper.run(named)
""",
        "class Refitter:\n    def run(self, named):\n        self.model.load_weights(named)\n",
    )
    assert uncovered(summary(tmp_path, files), row("update")) == {}


def test_a_method_is_known_by_a_subclass_that_the_receiver_is_called_after(
    tmp_path: Path,
) -> None:
    head = """
class UpdatingMixin:
    def update_all(self, named):
        self.updater.update_all(named)

class GPUWorker(UpdatingMixin):
    pass

class Updater:
    def update_all(self, named):
        self.model.load_weights(named)
"""
    files = runner("def refit(self, named):\n    self.worker.update_all(named)", head)
    wrapped = row("update_all", "UpdatingMixin")
    assert uncovered(summary(tmp_path, files), wrapped) == {}


def test_who_only_asks_for_a_type_makes_none_of_it(tmp_path: Path) -> None:
    head = """
class Loaded:
    def __init__(self, named):
        self.model.load_weights(named)

def look(it: Loaded) -> Loaded:
    return isinstance(it, Loaded)
"""
    files = runner("def load_model(self):\n    self.held = Loaded({})", head)
    assert uncovered(summary(tmp_path, files), row("load_model")) == {}


def test_models_and_layers_are_what_is_called_and_are_not_looked_at(tmp_path: Path) -> None:
    text = "def load_weights(self, weights):\n    self.param.data = weights\n"
    files = {"models/llama.py": text, "layers/linear.py": text, "entrypoints/engine.py": text}
    assert uncovered(summary(tmp_path, files)) == {}


DISPATCHER = """
class Scheduler:
    def __init__(self):
        self.updater = Updater()
        self.dispatcher = TypeBasedDispatcher(
            [(RefitWeightsReqInput, self.updater.refit), (AbortReq, self.abort)]
        )

    def abort(self, recv_req):
        self.updater.runner.update_weights(None)

class Updater:
    def refit(self, recv_req):
        self.runner.update_weights(recv_req.named)
"""


def test_a_handler_of_requests_about_weights_is_found_and_others_are_not(tmp_path: Path) -> None:
    files = {
        "managers/scheduler.py": DISPATCHER,
        **runner("def update_weights(self, named):\n    self.model.load_weights(named)"),
    }
    release = summary(tmp_path, files)
    wrapped = row("update_weights")
    assert uncovered(release, wrapped) == {REQUEST: ["srt.managers.scheduler:Updater.refit"]}
    request = row("refit", "Updater", "sglang.srt.managers.scheduler")
    assert uncovered(release, wrapped, requests=(request,)) == {}


def test_a_subclass_that_replaces_a_wrapped_method_is_found(tmp_path: Path) -> None:
    files = {
        **runner("def load_model(self):\n    self.model = get_model(model_config=1)"),
        "other.py": (
            "from sglang.srt.model_executor.model_runner import ModelRunner\n"
            "class Replacing(ModelRunner):\n    def load_model(self):\n        self.model = None\n"
            "class Extending(ModelRunner):\n    def load_model(self):\n"
            "        super().load_model()\n"
        ),
    }
    found = uncovered(summary(tmp_path, files), row("load_model"))
    assert found == {OVERRIDE: ["srt.other:Replacing.load_model"]}


def test_a_name_alone_is_told_of_where_nothing_is_seen_to_be_written(tmp_path: Path) -> None:
    text = "def swap_weights(self):\n    self.pipe.send(b'now')\n\ndef weights(self):\n    pass"
    assert uncovered(summary(tmp_path, runner(text))) == {BY_NAME: [RUNNER + "swap_weights"]}


def test_a_caller_of_a_wrapped_method_is_not_told_of_for_its_name(tmp_path: Path) -> None:
    text = """
def update_weights(self, named):
    self.model.load_weights(named)

def swap_weights(self):
    self.update_weights({})
"""
    assert uncovered(summary(tmp_path, runner(text)), row("update_weights")) == {}
