"""A state and a layout as small as they may be, in the name of the process that runs the tests."""

from __future__ import annotations

import socket

from sglang_weight_hook.layout import process

ME = process.identity()
OWNER = (
    f'"pid": {ME["pid"]}, "process_start_ticks": {ME["process_start_ticks"]}, '
    f'"boot_id": "{ME["boot_id"]}"'
)
LAYOUT = (
    '{"schema": "sglang-weight-layout", "schema_version": 1, "layout_generation": 1, '
    f'"content_generation": 1, "identity": {{{OWNER}, "pid_namespace": "{ME["pid_namespace"]}", '
    '"x": {"pid": 8}}, "tensors": {"regions": [1], "\\"": "}"}, '
    '"regions": [{"tensors": ["]"], "ptr": 18446744073709551000, "size": 16, "device": "cuda:0", '
    '"allocation_ptr": 4096, "allocation_size": 8192}], "more": [true, null, -1.5e3]}'
)
STATE = (
    '{"schema": "sglang-weight-state", "schema_version": 1, "state": "ready", '
    f'"layout_generation": 1, "content_generation": 1, "hostname": "{socket.gethostname()}", '
    f"{OWNER}}}"
)
LINE = "18446744073709551000 16 cuda:0 4096 8192\n"
