"""A slot that is stale, or whose weights are not whole, is not held as if it were good."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from bytes_owner import BytesOwner, started

from sglang_weight_hook import HookError, NotReady, OwnerGone, Stale

pytest.importorskip("torch")


@pytest.fixture
def owner(start_python: Callable[..., subprocess.Popen[str]], maps: Path) -> BytesOwner:
    return started(start_python, maps, "odd")


def test_the_weights_of_a_dead_owner_are_not_held(owner: BytesOwner) -> None:
    with owner.slot.weights_held():
        pass
    owner.kill()
    for check in (False, True):
        held = owner.slot.weights_held(check=check)
        with pytest.raises(OwnerGone, match=r"is stale: its owner .* has exited"), held:
            raise AssertionError("the body ran")
    with owner.slot.weights_held(allow=("stale",)):  # for post-mortems
        assert owner.slot.read().tensors


def test_released_weights_are_not_held(owner: BytesOwner) -> None:
    owner.tell("release")
    with pytest.raises(NotReady, match="slot 0 is released"), owner.slot.weights_held():
        raise AssertionError("the body ran")
    with pytest.raises(NotReady), owner.slot.weights_held(allow=("failed", "stale")):
        raise AssertionError("the body ran")
    with owner.slot.weights_held(allow=("released",)):
        pass


def test_a_failed_model_is_not_held(owner: BytesOwner) -> None:
    owner.tell("fail")
    with pytest.raises(NotReady, match="slot 0 is failed"), owner.slot.weights_held():
        raise AssertionError("the body ran")
    with owner.slot.weights_held(allow=("failed",)):
        pass


def test_both_are_of_one_kind() -> None:
    assert issubclass(NotReady, Stale)
    assert issubclass(OwnerGone, Stale)
    assert issubclass(Stale, HookError)
