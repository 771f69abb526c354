"""What the soak does to a server: updates in every way there is, releases, requests, failures.

A server with the hook and one without it do the same, so that what the hook adds is told apart from
what SGLang does by itself.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from cpu_sglang.environment import Environment
from tests.real_sglang import weight_probe
from tests.real_sglang.hooked import HookedServer
from tests.stress.processes import ROOT

DISK = "from disk"
# Since 0.5.21 buckets go in a session; before, they are calls in a row, of which the server knows
# the last one only where it is told.
SESSIONS: dict[str, dict[str, bool]] = {
    "session of tensors": {"flattened": False, "session": True, "end_is_told": True},
    "session of flattened buckets": {"flattened": True, "session": True, "end_is_told": True},
}
CALLS: dict[str, dict[str, bool]] = {
    f"{what}, end {'' if told else 'not '}told": {
        "flattened": what == "flattened buckets",
        "session": False,
        "end_is_told": told,
    }
    for what in ("tensors", "flattened buckets")
    for told in (True, False)
}
# With `DISK` an odd number of ways, so that each comes with either of the two models.
BUCKETS = {"0.5.23": SESSIONS, "0.5.15.post1": CALLS}
REFUSED = "must run between begin_weight_update() and end_weight_update()"


def make_venv_without_hook(path: Path, environment: Environment) -> Path:
    """What `hooked.make_venv` makes, the hook left out."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(path)], check=True)
    purelib = next(path.glob("lib/python*/site-packages"))
    (purelib / "zz_shared.pth").write_text(f"{environment.purelib}\n")
    shutil.copy(weight_probe.__file__, purelib)
    (purelib / "weight_probe.pth").write_text("import weight_probe; weight_probe.start()\n")
    return path / "bin" / "python"


class Sender:
    """`soak_sender` as a process, which a trainer would be; ended with the `with` block."""

    def __init__(self, server: HookedServer) -> None:
        self._log = server.cwd / "sender.log"
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                [
                    *(str(server.environment.python), "-u"),
                    *(str(Path(__file__).with_name("soak_sender.py")), str(server.port)),
                ],
                cwd=server.cwd,
                env=server.environment.env(python_path=[ROOT]),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def __enter__(self) -> Sender:
        assert self._answer() == "ready"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def send(self, checkpoint: Path, **how: bool) -> list[dict[str, Any]]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"checkpoint": str(checkpoint), **how}) + "\n")
        self._process.stdin.flush()
        answers: list[dict[str, Any]] = self._answer()
        return answers

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                return json.loads(line)
            except ValueError:
                continue  # something that SGLang's modules print
        raise AssertionError(f"the sender has ended: {self._log.read_text()[-3000:]}")


class Load:
    """The turns of one server; ``seen`` is called after each change of its weights."""

    def __init__(
        self,
        server: HookedServer,
        sender: Sender,
        models: list[Path],
        seen: Callable[[], None] = lambda: None,
    ) -> None:
        self.server, self.sender, self.models, self.seen = server, sender, models, seen
        self.buckets = BUCKETS[server.environment.release]
        self._ways = (DISK, *self.buckets)
        self.turns = 0
        self.done: Counter[str] = Counter()
        self.says: dict[int, Any] = {0: server.generate()}

    def turn(self) -> None:
        """One update and a request; at times a release and a resume, or an update that fails."""
        self.turns += 1
        which = self.turns % 2
        self._update(self._ways[(self.turns - 1) % len(self._ways)], which)
        self._ask(which)
        if self.turns % 6 == 0:
            self.server.wait_idle()
            for route in ("/release_memory_occupation", "/resume_memory_occupation"):
                status, answer = self.server.post(route)
                assert status == 200, answer
                self.seen()
            self.done["releases and resumes"] += 1
            self._ask(which)
        if self.turns % 7 == 0:
            self._fail(which)
            self._update(DISK, which)
            self._ask(which)

    def _fail(self, which: int) -> None:
        """By turns a checkpoint that is not there, and buckets that no session was begun for."""
        if self.buckets is SESSIONS and self.done["failing"] % 2:
            answers = self.sender.send(
                self.models[which], flattened=False, session=False, end_is_told=True
            )
            assert all(REFUSED in one["message"] for one in answers), answers
        else:
            missing = self.models[0].parent / "missing"
            status, answer = self.server.update_weights_from_disk(missing)
            assert (status, answer["success"]) == (400, False)
        self.done["failing"] += 1
        self.seen()

    def _update(self, way: str, which: int) -> None:
        if way == DISK:
            status, answer = self.server.update_weights_from_disk(self.models[which])
            assert (status, answer["success"]) == (200, True), answer
        else:
            self.server.wait_idle()
            answers = self.sender.send(self.models[which], **self.buckets[way])
            assert all(one.get("success", True) for one in answers), answers
            self.server.wait_idle()  # which flushes the cache: it is of other weights
        self.done[way] += 1
        self.seen()

    def _ask(self, which: int) -> None:
        """Equal weights give equal answers."""
        said = self.server.generate()
        assert said == self.says.setdefault(which, said)
        self.done["requests"] += 1
