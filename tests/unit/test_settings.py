"""The environment variables: read once, early, and never an error."""

from __future__ import annotations

import doctest
import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_weight_hook.layout import location, variables
from sglang_weight_hook.publisher import settings


def test_the_defaults_are_the_contracts() -> None:
    assert settings.parse({}, "/srv")._asdict() == {
        "directory": "/srv/weights_metadata",
        "lock_timeout": 10.0,
        "checksum": False,
        "check_seconds": 10.0,
        "quiet_seconds": 0.05,
        "share": None,
        "subscribers": (),
        "subscriber_timeout": 10.0,
        "transfer_host": "127.0.0.1",
        "mooncake_protocol": "tcp",
        "mooncake_device": "",
    }


@pytest.mark.parametrize(
    ("value", "directory"),
    [
        ("", "/srv/weights_metadata"),
        ("maps", "/srv/maps"),
        ("./a/../b/", "/srv/b"),
        ("/elsewhere", "/elsewhere"),
        ("{unknown}", "/srv/{unknown}"),
        ("a b/ä", "/srv/a b/ä"),
    ],
)
def test_the_directory_is_made_absolute(value: str, directory: str) -> None:
    assert settings.parse({location.DIRECTORY: value}, "/srv").directory == directory


def test_host_and_process_are_filled_in() -> None:
    found = location.directory_from("/m/{hostname}/{pid}/{pid}", "/srv")
    assert found == f"/m/{socket.gethostname()}/{os.getpid()}/{os.getpid()}"


def test_a_home_directory_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert location.directory_from("~/maps", "/srv") == "/home/me/maps"


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("2.5", 2.5),
        ("0", 0.0),
        ("1e2", 100.0),
        ("", 10.0),
        ("soon", 10.0),
        ("-1", 10.0),
        ("nan", 10.0),
        ("inf", 10.0),
        ("1e999", 10.0),
    ],
)
def test_a_timeout_that_makes_no_sense_is_the_default(value: str, seconds: float) -> None:
    assert settings.parse({variables.LOCK_TIMEOUT: value}, "/srv").lock_timeout == seconds


@given(st.text(), st.text())
def test_no_value_of_a_variable_raises(directory: str, timeout: str) -> None:
    found = settings.parse({location.DIRECTORY: directory, variables.LOCK_TIMEOUT: timeout}, "/srv")
    assert os.path.isabs(found.directory)
    assert 0.0 <= found.lock_timeout < 86400.0


def test_a_later_change_of_directory_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(location.DIRECTORY, "maps")
    monkeypatch.chdir(tmp_path)
    first = settings.load()
    monkeypatch.chdir("/")
    assert settings.load() is first
    assert first.directory == str(tmp_path / "maps")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_its_own_process_in_the_directory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(location.DIRECTORY, "/maps/{pid}")
    assert settings.load().directory == f"/maps/{os.getpid()}"
    child = os.fork()
    if child == 0:
        os._exit(0 if settings.load().directory == f"/maps/{os.getpid()}" else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_the_examples_of_the_module_hold() -> None:
    assert doctest.testmod(settings).failed == 0


@pytest.mark.parametrize(
    "value", ["", "0", "off", "OFF", "no", "false", "no-such-user", "1,no-such"]
)
def test_only_1_and_known_users_switch_sharing_on(value: str) -> None:
    assert settings.parse({variables.SHARE: value}, "/srv").share is None


def test_users_are_names_and_numbers() -> None:
    assert settings.parse({variables.SHARE: "1"}, "/srv").share == frozenset()
    assert settings.parse({variables.SHARE: "nobody, 1000"}, "/srv").share == {65534, 1000}
