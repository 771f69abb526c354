"""Whatever stands in the files, no command fails with a traceback.

On documents of the real recorder; facts are asserted, not screens.  ``tests/real_sglang`` has a
real server.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

from any_json import json_values, places, replace_at
from ended_command import Run
from fake_sglang import FakeRunner, update
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from sglang_weight_hook import reader
from sglang_weight_hook.layout import files


def test_whatever_stands_in_the_files_no_command_fails_with_a_traceback(
    run: Run, runner: FakeRunner, maps: Path, tmp_path: Path
) -> None:
    update(runner)
    names = [name.format(0) for name in files.DOCUMENTS]
    good = {name: json.loads((maps / name).read_bytes()) for name in names}
    saved = tmp_path / "saved.json"
    page = tmp_path / "map.html"

    @settings(deadline=None, max_examples=30, phases=[Phase.generate])
    @given(st.data())
    def garble(data: st.DataObject) -> None:
        contents = copy.deepcopy(good)
        for _ in range(data.draw(st.integers(1, 3))):
            name = data.draw(st.sampled_from(names[-2:] * 3 + names))
            path = data.draw(st.sampled_from(places(contents[name])[1:] or [()]))
            if path:
                replace_at(contents[name], path, data.draw(JSON))
        for name, content in contents.items():
            (maps / name).write_text(json.dumps(content))
        shutil.copy(maps / files.LAYOUT.format(0), saved)
        for source in ("0", saved):
            for command in (["show"], ["regions"], ["lookup", "4096"], ["verify"]):
                for more in ([], ["--json"]):
                    assert run(*command, source, *more).status in (0, 1, 3)
        assert run("diff", saved, "0").status in (0, 1, 3)
        assert run("report").status in (0, 1, 3)
        assert run("watch", "--begins", "--timeout", "0").status in (0, 3)
        assert run("plot", saved, "-o", page).status in (0, 1)

    original, reader.Slot.read = reader.Slot.read, impatient  # type: ignore[method-assign]
    try:
        garble()
    finally:
        reader.Slot.read = original  # type: ignore[method-assign]


JSON = json_values()


def impatient(slot: Any, timeout: float = 0, read: Any = reader.Slot.read) -> Any:
    return read(slot, 0)
