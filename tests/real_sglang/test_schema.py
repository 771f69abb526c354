"""What a real server publishes is what ``sglang_weight_hook/layout/schema`` says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jsonschema  # type: ignore[import-untyped, unused-ignore]
import pytest

import sglang_weight_hook
from cpu_sglang.environment import Environment
from tests.real_sglang.hooked import HookedServer

pytestmark = pytest.mark.real_sglang

FOLDER = Path(sglang_weight_hook.__file__).parent / "layout" / "schema"


def test_the_documents_of_a_real_server_are_valid_before_and_after_an_update(
    environment: Environment,
    hooked_python: Path,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    def check(directory: str) -> str:
        for name in ("layout", "state"):
            schema = json.loads((FOLDER / f"weight_{name}.schema.json").read_bytes())
            published = json.loads((Path(directory) / f"weight_{name}_0.json").read_bytes())
            jsonschema.Draft202012Validator(schema).validate(published)
        state: str = published["state"]
        return state

    with HookedServer(environment, hooked_python, checkpoint(1), tmp_path) as server:
        assert check(server.maps.path) == "ready"
        status, answer = server.update_weights_from_disk(checkpoint(2))
        assert (status, answer["success"]) == (200, True)
        assert check(server.maps.path) == "ready"
        status, answer = server.update_weights_from_disk(tmp_path / "nothing")
        assert not answer["success"]
        assert check(server.maps.path) == "failed"
