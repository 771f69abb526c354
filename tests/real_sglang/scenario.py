"""The main job on one release, from load to release of memory; what `make test-matrix` runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sglang_weight_hook as hook
from cpu_sglang.environment import Environment
from tests.real_sglang.hooked import HookedServer, assert_legacy_files, assert_true_map, run_client


@dataclass
class Row:
    """One line of the matrix: what was seen on a release."""

    release: str
    tp: int
    startup_seconds: float = 0.0
    tensors: int = 0
    seen: list[str] = field(default_factory=list)


def run(environment: Environment, python: Path, a: Path, b: Path, folder: Path, tp: int = 1) -> Row:
    """Start, check the map against the process itself, update every way, check again."""
    row = Row(environment.release, tp)
    arguments = ["--tp", str(tp)] if tp > 1 else []
    with HookedServer(environment, python, a, folder, arguments) as server:
        row.startup_seconds = server.startup_seconds or 0.0
        slots = server.maps.slots()
        assert [slot.name for slot in slots] == [str(rank) for rank in range(tp)]
        documents = check(server, slots, "ready")
        row.tensors = len(documents[0].tensors)
        row.seen.append("load")
        says_a = server.generate()

        status, answer = server.update_weights_from_disk(b)
        assert (status, answer["success"]) == (200, True), answer
        after_b = check(server, slots, "ready", updated=True)
        assert changes(documents, after_b) == [1] * tp
        assert server.generate() != says_a

        # A failing update: SGLang answers 400 and goes on with the weights it has.
        status, answer = server.update_weights_from_disk(folder / "missing")
        assert (status, answer["success"]) == (400, False), answer
        for document in check(server, slots, "failed", updated=True):
            assert document.state["event"]["success"] is False
            assert document.state["event"]["message"]
        row.seen.append("failed update")

        status, answer = server.update_weights_from_disk(a)
        assert (status, answer["success"]) == (200, True), answer
        back = check(server, slots, "ready", updated=True)
        assert server.generate() == says_a
        row.seen.append("update from disk")

        online_updates(server, environment, row, a, b, tp)
        check(server, slots, "ready", updated=True)

        # Without a memory saver (it needs CUDA) nothing is freed, and nothing is claimed to be.
        server.wait_idle()
        for route in ("/release_memory_occupation", "/resume_memory_occupation"):
            status, answer = server.post(route)
            assert status == 200, answer
            for document in check(server, slots, "ready", updated=True):
                assert document.state["event"]["kind"] == route.strip("/")
        assert server.generate() == says_a
        row.seen.append("release and resume")
        for document, before in zip(check(server, slots, "ready", updated=True), back):
            assert document.state["missing"] == before.state["missing"] == []
            assert document.state["problem"] is None
        pids = [int(document.state["pid"]) for document in back]
        assert len(set(pids)) == tp
        assert all(slot.owner_alive() for slot in slots)
        assert not [line for line in server.hook_log() if "WARNING" in line.upper()]
    assert not any(slot.owner_alive() for slot in slots)
    return row


def check(
    server: HookedServer, slots: list[hook.Slot], state: str, updated: bool = False
) -> list[hook.Document]:
    """Hold each slot against its own process; the documents."""
    live = {runner["pid"]: runner for runner in server.live(ranks=len(slots))}
    documents = []
    for slot in slots:
        document = slot.read()
        assert document.state["state"] == state, document.state
        truth = live[document.state["pid"]]
        assert_true_map(document, truth)
        assert_legacy_files(document, truth, updated)
        documents.append(document)
    return documents


def changes(before: list[hook.Document], after: list[hook.Document]) -> list[int]:
    """By how much the content generation rose, slot by slot."""
    return [new.content_generation - old.content_generation for old, new in zip(before, after)]


def online_updates(
    server: HookedServer, environment: Environment, row: Row, a: Path, b: Path, tp: int
) -> None:
    """Tensor, flattened and distributed updates, as far as the release has them."""
    slots = server.maps.slots()
    for route in ("tensor", "distributed"):
        before = [slot.read() for slot in slots]
        arguments: list[Any] = [a, b, "--port", server.port, "--routes", route]
        if environment.needs.one_weight_per_request:
            arguments.append("--one-weight-per-request")
        steps = run_client(environment, *arguments, "--tp", tp, "--buckets", 2)
        kinds = {step["route"] for step in steps if step["success"]}
        if f"/update_weights_from_{route}" not in kinds:
            continue
        assert any(step["speaks_as_b"] for step in steps), steps
        after = [slot.read() for slot in slots]
        assert all(count > 0 for count in changes(before, after))
        row.seen.append(f"update from {route}")
