"""The C example under sanitizers, on damaged files; `make fuzz-c` is the long form."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.stress import fuzz_print_regions
from tests.stress.fuzz_print_regions import SOURCE, Fuzzing, build

SEED = 20261124


@pytest.fixture
def cc() -> str:
    found = fuzz_print_regions.compiler()
    if found is None:
        pytest.skip("no C compiler with the address sanitizer here")
    return found


def test_the_c_example_bears_any_change_of_its_files(cc: str, tmp_path: Path) -> None:
    fuzzing = Fuzzing(build(tmp_path, SOURCE.read_text(), cc), tmp_path, SEED)
    fuzzing.run(5)
    print(f"{sum(fuzzing.seen.values())} cases: {dict(sorted(fuzzing.seen.items()))}")
    assert fuzzing.failure is None, fuzzing.failure
    assert fuzzing.seen["regions: exit 0"]
    assert fuzzing.seen["regions: exit 1"]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("malloc(wanted + 1)", "malloc(wanted)", "a sanitizer's report"),
        ("json->at == end", "json->at <= end", "the Python reader has none"),
        ("if (!owner.alive)", "if (false)", "has exited"),
        ("!knows || sequence", "knows && sequence", "no end after"),
    ],
)
def test_a_mistake_in_the_c_example_is_found(
    old: str, new: str, says: str, cc: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fuzzing itself: it sees what it looks for."""
    monkeypatch.setattr(fuzz_print_regions, "HANGS_AFTER", 3)
    source = SOURCE.read_text()
    assert source.count(old) == 1
    fuzzing = Fuzzing(build(tmp_path, source.replace(old, new), cc), tmp_path, SEED)
    fuzzing.run(300)  # until the first one
    assert fuzzing.failure is not None
    assert says in fuzzing.failure
    number = int(fuzzing.failure.split("case ")[1].split(":")[0])
    again = Fuzzing(fuzzing.program, tmp_path, SEED)
    again.one(number, tmp_path / "again")
    assert again.failure is not None  # by its seed and number alone
