"""Runs scenarios in forked children, so that torch is imported once.

A scenario is called by name; what it returns is told to the test (`processes.ForkServer`).
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from tests.stress.scenarios_faults import fault, faulty_start, thrown_into
from tests.stress.scenarios_processes import (
    fork_and_go_on,
    grows,
    interrupted_often,
    leave_while_publishing,
    threads_and_forks,
)
from tests.stress.scenarios_server import (
    as_another_user,
    clock_backwards,
    life,
    publish_for_ever,
    successor,
    update_under_abuse,
)

SCENARIOS: dict[str, Callable[..., Any]] = {
    scenario.__name__: scenario
    for scenario in (
        life,
        successor,
        fault,
        faulty_start,
        publish_for_ever,
        update_under_abuse,
        clock_backwards,
        as_another_user,
        threads_and_forks,
        fork_and_go_on,
        leave_while_publishing,
        interrupted_often,
        thrown_into,
        grows,
    )
}


def main() -> None:
    """Run scenarios in forked children: torch is imported once.

    A line in, a line out: ``{"scenario": …, "arguments": {…}}`` gives ``{"pid": …}``;
    ``{"wait": pid}`` gives ``{"status": …, "said": …}``.
    """
    pipes: dict[int, int] = {}
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            pid = request["wait"]
            with os.fdopen(pipes.pop(pid), "rb") as pipe:
                said = pipe.read()
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            answer: dict[str, Any] = {"status": status, "said": said.decode()}
        else:
            reading, writing = os.pipe()
            pid = os.fork()
            if pid == 0:
                for other in pipes.values():
                    os.close(other)
                _run(writing, request["scenario"], request["arguments"])
            os.close(writing)
            pipes[pid] = reading
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)


def _run(writing: int, scenario: str, arguments: dict[str, Any]) -> None:
    status = 1
    try:
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        os.close(writing)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        result = SCENARIOS[scenario](**arguments)
        os.write(1, json.dumps(result).encode())
        status = 0
    except SystemExit:
        status = -1  # as a program ends, with all that Python does then
        raise
    except BaseException as error:
        import traceback

        os.write(1, "".join(traceback.format_exception(error)).encode())
    finally:
        if status >= 0:
            os._exit(status)


if __name__ == "__main__":
    main()
