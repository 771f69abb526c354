"""Runs inside the server: writes down the id of the hook's thread, once, and is gone.

Test equipment of the measurements that no other probe may disturb.  With ``MOTION_PROBE_DIR`` set,
``thread-PID`` there gets the thread's id as the kernel has it.
"""

from __future__ import annotations

import os


def _write(directory: str) -> None:
    import threading
    import time

    for _ in range(600):
        time.sleep(1.0)
        for thread in threading.enumerate():
            if thread.name == "sglang-weight-hook":
                path = os.path.join(directory, f"thread-{os.getpid()}")
                with open(path, "w") as file:
                    file.write(str(thread.native_id))
                return


def start() -> None:
    directory = os.environ.get("MOTION_PROBE_DIR")
    if directory and not globals().get("_started"):
        import threading
        import time  # noqa: F401

        globals()["_started"] = True
        threading.Thread(target=_write, args=(directory,), daemon=True).start()
