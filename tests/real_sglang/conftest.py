"""Fixtures of the real-server tests: environments, checkpoints, hooked interpreters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cpu_sglang.environment import Environment, ensure_environment
from tests.real_sglang.hooked import make_checkpoint, make_venv


@pytest.fixture(scope="session")
def environment() -> Environment:
    """SGLang 0.5.23, installed on first use."""
    return ensure_environment()


@pytest.fixture(scope="session")
def hooked_python(environment: Environment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with the hook installed by the install script; SGLang behind it."""
    return make_venv(tmp_path_factory.mktemp("hooked") / "venv", environment)


@pytest.fixture(scope="session")
def checkpoint(
    environment: Environment, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """``checkpoint(seed)``: a tiny random model, made once per session."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def make(seed: int, *options: str) -> Path:
        path = folder / "-".join([str(seed), *options])
        return path if path.exists() else make_checkpoint(environment, path, seed, *options)

    return make
