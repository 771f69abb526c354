"""The published map against the bytes themselves and against SGLang's own word for them.

Real servers on the CPU.  Another process, this one, reads what lies at the published addresses
with process_vm_readv(2) and compares it with what SGLang answers (sglang_answers.py) and, where
SGLang answers nothing, with a probe inside the server (truth_probe.py): after the load, after
requests, after every kind of update.  `make test-truth` runs all rows and writes
docs/truth-matrix.md; `make test` has the short form.
"""

from __future__ import annotations

import copy
import itertools
import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

import sglang_weight_hook as hook
from cpu_sglang.environment import Environment
from cpu_sglang.quantized_model import SCHEMES
from cpu_sglang.server import ServerFailed
from tests.real_sglang.hooked import ROOT
from tests.real_sglang.truth.comparison import PROBE, Moment, compare
from tests.real_sglang.truth.outside_bytes import PublishedMap, settled_maps
from tests.real_sglang.truth.report import record_server
from tests.real_sglang.truth.rows import LOOKS, LOOKS_WITHOUT_BUCKETS, ROWS, Row
from tests.real_sglang.truth.serving import EmbeddedEngine, ServedOverHttp, make_probed_venv

pytestmark = pytest.mark.real_sglang

ADAPTER = "tuned"
ENGINE_SETTINGS = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "disable_cuda_graph": True,
    "disable_overlap_schedule": True,
    "max_total_tokens": 2048,
}


@pytest.fixture(scope="module")
def probed_python(environment: Environment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_probed_venv(tmp_path_factory.mktemp("probed") / "venv", environment)


def make_adapter(environment: Environment, model: Path, path: Path) -> Path:
    command = [str(environment.python), "-m", "cpu_sglang.tiny_adapter"]
    command += [str(path), "--model", str(model)]
    subprocess.run(command, cwd=ROOT, env=environment.env(), check=True, stdout=subprocess.DEVNULL)
    return path


def quantized(environment: Environment, path: Path, scheme: str) -> list[Path]:
    """Three checkpoints, one process for all: it takes as long to import torch as to write them."""
    command = [str(environment.python), "-m", "cpu_sglang.quantized_model", str(path)]
    command += ["--scheme", scheme, "--seed", "1", "2", "3"]
    said = subprocess.run(
        command, cwd=ROOT, env=environment.env(), check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return [Path(line) for line in said.splitlines()]


class Life:
    """One row's server and what was seen of it, moment after moment."""

    def __init__(self, row: Row, running: Any) -> None:
        self.row = row
        self.running = running
        self.moments: dict[str, Moment] = {}
        self.maps: list[PublishedMap] = []

    def look(self, when: str, state: str = "ready") -> Moment:
        """Compare all there is; nothing may be untrue, and nothing may go unproved."""
        self.maps = settled_maps(self.running.map_directory, self.row.slots, state=state)
        moment = compare(self.maps, self.running, self.running.probe)
        self.moments[when] = moment
        assert not moment.untrue, f"{when}: " + "\n".join(moment.untrue[:20])
        assert not moment.unconfirmed, f"{when}: " + "\n".join(moment.unconfirmed[:20])
        assert moment.unlisted <= set(self.row.unlisted), (when, moment.unlisted)
        # The probe has seen every one of them at its place; the others are held to a number.
        assert moment.confirmed[PROBE] == moment.tensors, (when, moment.confirmed)
        for source, number in self.row.covered.items():
            assert moment.confirmed[source] >= number, (when, source, moment.confirmed)
        return moment

    def ask(self) -> Any:
        if self.row.adapter:
            # A base request and one with the adapter: both are in the pool, and both in use.
            assert self.running.ask_adapter(ADAPTER) != self.running.generate([75, 104, 111])
        if self.row.image:
            self.running.ask_about_image()
        answer = self.running.generate()
        if self.row.image:
            # SGLang moves a buffer of the vision tower then, which no method announces: the map is
            # true after the next check, which a reader can ask for.
            for slot in hook.open_directory(str(self.running.map_directory)).slots():
                slot.check()
        return answer


def start(
    row: Row, environment: Environment, python: Path, model: Path, folder: Path
) -> AbstractContextManager[Any]:
    if row.embedded:
        return EmbeddedEngine(environment, python, model, folder, ENGINE_SETTINGS)
    arguments, variables = list(row.arguments), dict(row.variables)
    if row.scheme:
        arguments += SCHEMES[row.scheme].arguments
        if model.is_file():  # GGUF; the tokenizer lies beside it
            arguments += ["--tokenizer-path", str(model.parent)]
    if row.silent:
        arguments += ["--skip-server-warmup"]
        variables["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] = "0"
    if row.adapter:
        adapter = make_adapter(environment, model, folder / "adapter")
        arguments += ["--lora-paths", f"{ADAPTER}={adapter}", "--max-loras-per-batch", "2"]
        arguments += ["--lora-backend", "torch_native"]
    return ServedOverHttp(
        environment,
        python,
        model,
        folder,
        arguments,
        variables,
        tp=row.tp,
        replicas=row.replicas,
    )


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=row.name, marks=[] if row.short else [pytest.mark.truth])
        for row in ROWS
    ],
)
def test_what_lies_at_the_published_addresses_is_what_sglang_says(
    row: Row,
    environment: Environment,
    probed_python: Path,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    if row.scheme:
        a, b, c = quantized(environment, tmp_path / row.scheme, row.scheme)
    else:
        a, b, c = (checkpoint(seed, "--architecture", row.architecture) for seed in (1, 2, 3))
    with start(row, environment, probed_python, a, tmp_path) as running:
        life = Life(row, running)
        try:
            (live_quantized if row.scheme else live_through)(life, a, b, c)
        except BaseException as error:
            record_server(row, life.moments, life.maps, str(error))
            raise
        record_server(row, life.moments, life.maps)


def live_through(life: Life, a: Path, b: Path, c: Path) -> None:
    running = life.running
    loaded = life.look("load")
    assert loaded.by_sglang > 0

    says_a = life.ask()
    assert life.look("requests").parameters() == loaded.parameters()

    assert running.update_from_disk(b)["success"]
    from_disk = life.look("update from disk")
    assert unchanged(loaded, from_disk) == []
    assert life.ask() != says_a
    assert life.look("requests after it").parameters() == from_disk.parameters()

    back = no_buckets(life, a) if life.row.refuses_buckets else two_sessions(life, a, c)
    assert life.ask() == says_a
    life.look("requests at the end")
    looks = LOOKS_WITHOUT_BUCKETS if life.row.refuses_buckets else LOOKS
    assert tuple(life.moments) == looks
    # The first checkpoint is back, whatever way it took: so is every byte that comes of it.
    assert differing(loaded, back) == []
    for lie, maps in untrue_maps(life.maps):
        found = compare(maps, running, running.probe)
        assert found.untrue, f"{lie}: nothing was noticed"
    # What the row excuses is still so; otherwise the excuse has to go.
    assert set().union(*(seen.unlisted for seen in life.moments.values())) == set(life.row.unlisted)


def live_quantized(life: Life, a: Path, b: Path, c: Path) -> None:
    """Buckets aside, which are of checkpoints with other tensors than the model then has."""
    running, row = life.running, life.row
    loaded = life.look("load")
    assert loaded.by_sglang > 0
    says_a = None if row.silent else life.ask()
    if not row.silent:
        assert life.look("requests").parameters() == loaded.parameters()
    for lie, maps in untrue_maps(life.maps):
        found = compare(maps, running, running.probe)
        assert found.untrue, f"{lie}: nothing was noticed"
    if row.refuses_disk:
        status, answer = running.update_weights_from_disk(b)
        assert (status, answer["success"]) == (400, False), answer
        assert row.refuses_disk in answer["message"], answer
        refused = life.look("refused update from disk", state="failed")
        assert refused.parameters() == loaded.parameters()
    elif row.ends_of_disk:
        with pytest.raises(ConnectionError):
            running.update_weights_from_disk(b)
        assert row.ends_of_disk in running.log_tail(10_000)
        # Its file says what became of the weights, after the process that wrote it.
        (file,) = running.map_directory.glob("weight_state_*.json")
        state = json.loads(file.read_text())
        assert (state["state"], state["event"]["success"]) == ("failed", False), state
        assert row.ends_of_disk.startswith(state["event"]["message"][:40]), state
        return
    else:
        assert running.update_from_disk(b)["success"]
        from_disk = life.look("update from disk")
        assert unchanged(loaded, from_disk) == []
        assert row.silent or life.ask() != says_a
        assert running.update_from_disk(c)["success"]
        assert unchanged(from_disk, life.look("a second one")) == []
        assert running.update_from_disk(a)["success"]
        assert differing(loaded, life.look("the first checkpoint again")) == []
        assert row.silent or life.ask() == says_a
    if row.silent:
        with pytest.raises((OSError, ServerFailed)):  # it ends SGLang's scheduler
            running.generate()
        assert row.silent in running.log_tail(10_000)


def two_sessions(life: Life, a: Path, c: Path) -> Moment:
    """SGLang 0.5.23 takes buckets in a session only: begin, three of them, end."""
    before = list(life.moments.values())[-1]
    assert refusals(life.running.send_buckets(c, flattened=False)) == []
    tensors = life.look("session of tensors")
    assert unchanged(before, tensors) == []

    assert refusals(life.running.send_buckets(a, flattened=True)) == []
    flattened = life.look("session of flattened buckets")
    assert unchanged(tensors, flattened) == []
    return flattened


def no_buckets(life: Life, a: Path) -> Moment:
    """The same where SGLang refuses each bucket, and says why in its log alone."""
    before = list(life.moments.values())[-1]
    assert len(refusals(life.running.send_buckets(a, flattened=False))) == 3
    assert f"AssertionError: {life.row.refuses_buckets}\n" in life.running.log_tail(10_000)
    assert life.look("session of refused buckets").parameters() == before.parameters()

    assert life.running.update_from_disk(a)["success"]
    back = life.look("update from disk again")
    assert unchanged(before, back) == []
    return back


def untrue_maps(maps: list[PublishedMap]) -> Iterator[tuple[str, list[PublishedMap]]]:
    """The same maps with one thing in them that is not so: the comparison must see each."""

    def altered(alter: Callable[[dict[str, Any], str, str], Any]) -> list[PublishedMap]:
        changed = copy.deepcopy(maps)
        tensors = changed[-1].tensors
        one, other = next(
            (one, other)
            for one, other in itertools.combinations(tensors, 2)
            if tensors[one]["kind"] == tensors[other]["kind"] == "parameter"
            and tensors[one]["shape"] == tensors[other]["shape"]
        )
        alter(tensors, one, other)
        return changed

    def swap(tensors: dict[str, Any], one: str, other: str) -> None:
        tensors[one], tensors[other] = tensors[other], tensors[one]

    yield "two tensors of one shape swapped", altered(swap)
    yield "a tensor left out", altered(lambda tensors, one, _: tensors.pop(one))
    yield (
        "one element further",
        altered(lambda tensors, one, _: tensors[one].update(ptr=tensors[one]["ptr"] + 2)),
    )


def refusals(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [answer for answer in answers if not answer["success"]]


def unchanged(before: Moment, after: Moment) -> list[Any]:
    """Parameters that a new checkpoint has left as they were; every one of ours is random."""
    old = before.parameters()
    return [key for key, values in after.parameters().items() if old.get(key) == values]


def differing(one: Moment, other: Moment) -> list[Any]:
    return [
        (slot, name)
        for slot, named in one.values.items()
        for name, values in named.items()
        if one.kinds[slot][name] != "lora" and other.values[slot].get(name) != values
    ]
