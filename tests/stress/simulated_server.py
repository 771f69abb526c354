"""What runs inside the processes under test: a server whose weights can be checked from outside.

The recorder and the torch tensors are real, the runner is a fake.  The map of `Weights` can be
checked without asking the process: the length of every tensor follows from the layout generation
(`processes.length_at`).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
from typing import Any

import torch

from sglang_weight_hook.layout import location, variables
from sglang_weight_hook.publisher import once, recorder
from tests.stress.processes import TENSORS, length_at
from tests.unit.fake_sglang import FakeRunner, event, forget, load, settle, stream, update


class Weights(torch.nn.Module):  # type: ignore[misc,unused-ignore]
    def __init__(self) -> None:
        super().__init__()
        for number in range(TENSORS):
            self.register_parameter(
                f"layer{number}", torch.nn.Parameter(torch.zeros(length_at(1)), requires_grad=False)
            )

    def move(self, generation: int) -> None:
        """Put every tensor elsewhere, as the map of ``generation`` will tell."""
        for parameter in self.parameters():
            parameter.data = torch.zeros(length_at(generation))


class SimulatedServer:
    """A fake runner to which everything can be done that SGLang does."""

    def __init__(self, gpu_id: int = 0) -> None:
        self.runner: Any = FakeRunner(Weights(), gpu_id=gpu_id)

    @property
    def tracked(self) -> Any:
        return recorder._tracked.get(id(self.runner))

    @property
    def generation(self) -> int:
        return self.tracked.layout_generation if self.tracked else 0

    def load(self) -> None:
        load(self.runner)
        settle()

    def move(self) -> None:
        update(self.runner, during=lambda: self.runner.model.move(self.generation + 1))

    def bucket(self) -> None:
        stream(self.runner)

    def memory(self, kind: str) -> None:
        event(f"{kind}_memory_occupation", kind, details={"physical": True, "tags": []})

    def session(self) -> None:
        event("weight_update_session", "open", [self.runner])
        self.bucket()
        event("weight_update_session", "close", [self.runner])

    def truth(self) -> dict[str, Any]:
        return {
            name: [parameter.data_ptr(), list(parameter.shape)]
            for name, parameter in self.runner.model.named_parameters()
        }


def fresh(directory: str, lock_timeout: float = 0.2) -> None:
    """The hook as in a new process that publishes in ``directory``."""
    os.environ[location.DIRECTORY] = directory
    os.environ[variables.LOCK_TIMEOUT] = str(lock_timeout)
    forget()


def state_of(path: str) -> Any:
    with open(path, "rb") as file:
        return json.load(file)


class Faults:
    """The library of faults.c, if this process was started with it."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(None)
        self.library.fault_count.restype = ctypes.c_long
        self.library.fault_trail.restype = ctypes.c_char_p

    def arm(
        self, prefix: str, at: int, action: int, code: int = 0, mask: int = 127, times: int = 1
    ) -> None:
        self.library.fault_arm(
            os.fsencode(prefix), ctypes.c_long(at), action, code, mask, ctypes.c_long(times)
        )

    def disarm(self) -> None:
        self.library.fault_disarm()

    def rearm(self) -> None:
        self.library.fault_rearm()

    def clock(self, step: int) -> None:
        self.library.fault_clock(ctypes.c_long(step))

    @property
    def count(self) -> int:
        return int(self.library.fault_count())

    @property
    def trail(self) -> list[str]:
        return str(self.library.fault_trail().decode()).splitlines()


class Said(logging.Handler):
    """What the hook says in the log."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextlib.contextmanager
def listening() -> Any:
    said = Said()
    once.logger.addHandler(said)
    once.logger.propagate = False
    try:
        yield said.lines
    finally:
        once.logger.removeHandler(said)


def is_true(server: SimulatedServer) -> bool:
    """Whether the slot's files tell what is so, and nobody holds its lock."""
    from sglang_weight_hook import reader

    slot = reader.open_slot(server.tracked.slot.directory, server.tracked.slot.name)
    with slot.weights_held(timeout=0):
        document = slot.read(timeout=0)
    found = {name: [t["ptr"], t["shape"]] for name, t in document.tensors.items()}
    ready = document.state["state"] == "ready" and document.state["problem"] is None
    return found == server.truth() and document.owner_alive() and ready
