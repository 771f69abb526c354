"""The OpenAPI document that the agent serves: valid, complete, and kept under fuzzing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from agent_process import TOKEN, Agent, Publisher

schemathesis = pytest.importorskip("schemathesis")

from hypothesis import HealthCheck, Phase, settings  # noqa: E402

from sglang_weight_hook.fleet import openapi  # noqa: E402
from sglang_weight_hook.fleet.application import Agent as Application  # noqa: E402
from sglang_weight_hook.fleet.application import Presentation  # noqa: E402
from sglang_weight_hook.fleet.feed import Feed  # noqa: E402
from sglang_weight_hook.fleet.view import Views  # noqa: E402

CASES = 20  # of each operation and each test


@pytest.fixture(scope="module")
def publisher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Publisher]:
    made = Publisher(tmp_path_factory.mktemp("published") / "maps", 2)
    yield made
    made.kill()


@pytest.fixture(scope="module")
def agent(publisher: Publisher, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    folder = tmp_path_factory.mktemp("agent")
    (folder / "token").write_text(TOKEN)
    made = Agent(folder, "--dir", publisher.directory, "--token-file", folder / "token")
    made.token = TOKEN
    yield made
    assert made.ask("/healthz").json == {"ok": True}
    assert made.end() == 0
    # No traceback, and not the token, whatever was asked.
    assert made.said() == ""


# The stream of events has no end, and tests of its own.
schema = schemathesis.openapi.from_dict(openapi.description(has_token=True)).exclude(path="/events")


@schema.parametrize()
@settings(
    max_examples=CASES,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_every_answer_is_one_that_the_description_has(case: Any, agent: Agent) -> None:
    case.call_and_validate(base_url=agent.url, headers={"Authorization": f"Bearer {TOKEN}"})


@schema.include(path_regex="^/slots/").parametrize()
@settings(
    max_examples=CASES,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_every_answer_about_a_slot_that_is_there_is_one_that_the_description_has(
    case: Any, agent: Agent
) -> None:
    case.path_parameters["id"] = "1"
    response = case.call(base_url=agent.url, headers={"Authorization": f"Bearer {TOKEN}"})
    case.validate_response(response)
    if not case.path.endswith("/transport"):
        assert response.status_code != 404


def test_what_is_described_is_what_is_answered() -> None:
    nothing: Any = None
    agent = Application(Views([]), Feed(), Presentation(nothing, nothing, nothing))
    paths = {route.path for route in agent.application().routes}  # type: ignore[attr-defined]
    assert paths == set(openapi.description()["paths"])


def test_it_is_served_as_it_is(agent: Agent) -> None:
    assert agent.get("/openapi.json") == openapi.description(has_token=True)
    assert "security" not in openapi.description(has_token=False)
