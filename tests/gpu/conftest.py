"""Fixtures of the tests that publish this process's own CUDA memory (``test_cuda_*.py``).

`cuda_model` imports torch: the fixtures import it, so that ``test_real_server.py`` goes without.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sglang_weight_hook.publisher import background
from tests.unit.fake_sglang import FakeRunner, forget

if TYPE_CHECKING:
    from tests.gpu.cuda_model import Driver


@pytest.fixture(scope="module")
def driver() -> Driver:
    from tests.gpu.cuda_model import Driver

    try:
        return Driver()
    except OSError as error:
        pytest.skip(f"no CUDA driver: {error}")


@pytest.fixture
def maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The output directory, on a machine with a GPU; every test begins with a fresh hook."""
    from tests.gpu.cuda_model import IN_CHILD, torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.empty(1, device="cuda")  # from here on this thread has a context
    gc.collect()  # what an earlier test left must not be freed in the middle of this one
    for name in list(os.environ):
        if name.startswith("SGLANG_WEIGHT_HOOK") and name != IN_CHILD:
            monkeypatch.delenv(name)
    monkeypatch.setenv("SGLANG_WEIGHT_HOOK_DIR", str(tmp_path / "maps"))
    # Without the hook's thread, but for the tests of it (test_cuda_background.py).
    monkeypatch.setenv("SGLANG_WEIGHT_HOOK_CHECK_SECONDS", "0")
    monkeypatch.setenv("SGLANG_WEIGHT_HOOK_QUIET_MS", "0")
    background.stop()
    forget()
    yield tmp_path / "maps"
    background.stop()
    forget()


@pytest.fixture
def runner(maps: Path) -> FakeRunner:
    from tests.gpu.cuda_model import a_model, load

    return load(a_model())


@pytest.fixture
def layout(runner: FakeRunner, maps: Path) -> Any:
    from tests.gpu.cuda_model import layout_in

    published = layout_in(maps)
    assert published["validation"]["left_out"] == {}
    return published
