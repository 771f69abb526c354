"""The Python example registers regions again exactly when they must be.

The publisher's runner is a fake (`fake_sglang`), its model and tensors are torch's, the files and
locks are real.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from example_programs import EXAMPLES, Publisher

from sglang_weight_hook.layout import files


def test_regions_are_registered_again_exactly_when_they_must_be(
    publisher: Publisher, start_example: Callable[..., subprocess.Popen[str]]
) -> None:
    regions = len(publisher.slot.read().regions)
    example = start_example(
        sys.executable, str(EXAMPLES / "register_regions.py"), "--interval", "0.02"
    )

    def line() -> dict[str, Any]:
        assert example.stdout is not None
        done: dict[str, Any] = json.loads(example.stdout.readline())
        return done

    def counts(done: dict[str, Any]) -> tuple[int, int, int]:
        return done["registered"], done["deregistered"], done["kept"]

    first = line()
    assert (first["why"], counts(first)) == ("first look", (regions, 0, 0))
    assert first["bytes"] == sum(region["size"] for region in publisher.slot.read().regions)

    publisher.tell("update")
    done = line()
    assert (done["why"], counts(done)) == ("new values", (0, 0, regions))

    publisher.tell("move")
    done = line()
    assert done["why"] == "another layout"
    assert done["registered"] >= 1
    assert done["registered"] + done["kept"] == len(publisher.slot.read().regions)

    publisher.tell("release")
    done = line()
    assert done["why"] == "the weights are released"
    assert counts(done) == (0, len(publisher.slot.read().regions), 0)
    publisher.tell("resume")
    done = line()
    assert counts(done) == (len(publisher.slot.read().regions), 0, 0)

    publisher.process.kill()
    publisher.process.wait()
    done = line()
    assert (done["why"], done["bytes"]) == ("the owner has exited", 0)


def test_other_pages_behind_the_same_addresses_are_registered_again(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand, since a release that a reader misses is a matter of luck."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import register_regions  # type: ignore[import-not-found, unused-ignore]

    library = register_regions.StandInLibrary()
    registrar = register_regions.Registrar(publisher.slot, library)
    assert registrar.look()["why"] == "first look"
    before = dict(library.regions)
    assert registrar.look() is None
    path = Path(publisher.slot.path(files.STATE))
    state = json.loads(path.read_bytes())
    path.write_text(json.dumps({**state, "physical_epoch": state.get("physical_epoch", 0) + 1}))
    done = registrar.look()
    assert (done["why"], done["kept"]) == ("other pages", 0)
    assert sorted(library.regions.values()) == sorted(before.values())
    assert not set(library.regions) & set(before)


def test_everything_is_forgotten_for_another_runner_of_the_same_process(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import register_regions  # type: ignore[import-not-found, unused-ignore]

    library = register_regions.StandInLibrary()
    registrar = register_regions.Registrar(publisher.slot, library)
    assert registrar.look()["why"] == "first look"
    before = dict(library.regions)
    for name in (files.STATE, files.LAYOUT):
        path = Path(publisher.slot.path(name))
        path.write_text(json.dumps({**json.loads(path.read_bytes()), "instance": "0" * 16}))
    done = registrar.look()
    assert (done["why"], done["kept"]) == ("another runner", 0)
    assert done["registered"] == done["deregistered"] == len(before)
    assert not set(library.regions) & set(before)
    assert registrar.look() is None


def test_the_python_example_says_what_is_wrong(publisher: Publisher) -> None:
    os.unlink(publisher.slot.path(files.STATE))
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "register_regions.py"), str(publisher.maps), "0"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "does not exist" in done.stderr
    assert "Traceback" not in done.stderr
