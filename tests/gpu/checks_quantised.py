"""Checks of checkpoints that come quantised: FP8 in blocks, AWQ, GPTQ, MXFP4 and others.

The checkpoints are tiny and random (cpu_sglang/quantized_model.py).  What SGLang makes of them
while it loads (Marlin's order, transposed and padded weights, interleaved scales) has no equal in
the file, so the map is held against torch inside the server, and bytes read from outside against
the driver's own.  None of these has been run yet: no GPU environment with SGLang was at hand when
they were written.
"""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from cpu_sglang.quantized_model import SCHEMES, model_path
from tests.gpu.checks_bytes import SHARES, compare_raw, stands
from tests.gpu.gpu_server import ROOT, GpuServer
from tests.gpu.map_checks import Report, check_geometry, check_memory
from tests.real_sglang.hooked import assert_true_map


def loaded_as(scheme: str) -> Callable[..., None]:
    """The check of one scheme: after the load, after an update from disk, and a request."""

    def check(report: Report, python: Path, a: Path, b: Path, folder: Path) -> None:
        one, other = (
            _checkpoint(python, folder / f"{scheme}-{seed}", scheme, seed) for seed in ("1", "2")
        )
        arguments = list(SCHEMES[scheme].arguments)
        if one.is_file():  # GGUF; the tokenizer lies beside it
            arguments += ["--tokenizer-path", str(one.parent)]
        with GpuServer(python, one, folder / "server", arguments, SHARES) as server:
            _check_map(report, server, f"{scheme}: after the load")
            # Some formats cannot be loaded a second time into what they became: the map says so.
            with report.check(f"{scheme}: an update from disk") as seen:
                try:
                    status, answer = server.update_weights_from_disk(other)
                except OSError:
                    status, answer = 0, "its scheduler has ended"
                state = server.maps.slot("0").read_state()
                assert state["state"] == ("ready" if status == 200 else "failed"), (answer, state)
                seen.update(status=status, message=answer)
            if not server.alive or not status:
                return
            _check_map(report, server, f"{scheme}: after an update from disk")
            stands(report, server)

    return check


def _check_map(report: Report, server: GpuServer, when: str) -> None:
    slot = server.maps.slot("0")
    with report.check(f"{when}: every address is torch's") as seen:
        ((live,),) = server.ask(server.places)
        document = slot.read()
        assert_true_map(document, {**live, "pid": document.state["pid"]})
        assert document.raw["validation"]["left_out"] == {}, document.raw["validation"]
        check_geometry(document, seen)
        check_memory(document, {})
        seen["dtypes"] = dict(Counter(tensor.dtype for tensor in document.iter_tensors()))
    with report.check(f"{when}: every byte is the driver's") as seen:
        seen.update(compare_raw(slot, server.bytes_by_slot()["0"]))


def _checkpoint(python: Path, path: Path, scheme: str, seed: str) -> Path:
    command = [str(python), "-m", "cpu_sglang.quantized_model", str(path)]
    subprocess.run([*command, "--scheme", scheme, "--seed", seed], cwd=ROOT, check=True)
    return model_path(path, scheme)
