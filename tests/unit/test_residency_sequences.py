"""Any sequence of releases, resumes and updates, against a model of what must come of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_sglang import FakeRunner, load, settle
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from memory_saver import TAGS
from published_files import layout_of, state_of

from sglang_weight_hook.publisher import recorder

torch = pytest.importorskip("torch")
nn = torch.nn


tags = st.none() | st.lists(st.sampled_from(TAGS), unique=True, max_size=3)


steps = st.one_of(
    st.tuples(st.sampled_from(["release", "resume"]), tags, st.booleans()),
    st.tuples(st.sampled_from(["update", "stream", "fail", "settle"]), st.none(), st.just(True)),
)


def epoch_of(state: Any, tag: str) -> int:
    epoch: int = state["physical_epoch" if tag == "weights" else "kv_physical_epoch"]
    return epoch


@examples(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(steps, max_size=8), st.booleans())
def test_any_sequence_of_releases_and_resumes_is_told_as_it_is(
    maps: Path, sequence: list[tuple[str, list[str] | None, bool]], enabled: bool
) -> None:
    recorder._after_fork_in_child()  # every example begins with a fresh hook
    runner = FakeRunner(nn.Linear(2, 2))
    load(runner)
    settle()
    released: set[str] = set()
    doubtful: set[str] = set()  # named by a release that failed: how far it came is not known
    epochs = {"weights": 0, "kv_cache": 0, "cuda_graph": 0}
    broken = False
    for what, named, success in sequence:
        if what in ("release", "resume"):
            details = {"tags": named or [], "physical": enabled}
            begun = recorder.begin(f"{what}_memory_occupation", what, [], details)
            recorder.finish(begun, None, None if success else RuntimeError("refused"))
            failed = not success
            # What failed to free or back the weights leaves them in doubt until they are written.
            broken = broken or (failed and enabled and "weights" in (named or TAGS))
            touched = set(named or TAGS) if success and enabled else set()
            if what == "release":
                released |= touched
                doubtful |= set(named or TAGS) if failed and enabled else set()
            else:
                rising = {tag: tag in released for tag in touched}
                released -= touched
                for tag in doubtful & touched & {"weights", "kv_cache"}:
                    rising[tag] = epoch_of(state_of(maps), tag) > epochs[tag]
                doubtful -= touched
                for tag, rises in rising.items():
                    epochs[tag] += rises
        elif what == "settle":
            settle()
        else:
            begun = recorder.begin("update", "stream" if what == "stream" else "update", [runner])
            recorder.finish(begun, (what != "fail", "said"), None)
            broken = what == "fail"
        state = state_of(maps)
        assert {tag for tag in TAGS if state["residency"][tag] == "released"} == released
        expected = "ready"
        if "weights" in released:
            expected = "released"
        elif broken:
            expected = "failed"
        assert state["state"] == expected
        for tag in ("weights", "kv_cache"):
            assert epoch_of(state, tag) == epochs[tag]
        assert state["layout_generation"] == 1
        layout = layout_of(maps)
        assert layout["tensors"]["weight"]["ptr"] == runner.model.weight.data_ptr()
