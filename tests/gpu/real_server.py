"""A real SGLang on a real GPU, hooked: every check in one run, as a short table.

    python3 tests/gpu/real_server.py --python PY [--only NAME ...] [--json FILE]

``PY`` is the interpreter of an environment that holds SGLang; the hook is installed into a thin
venv over it and nothing else is touched.  ``pytest -m gpu tests/gpu`` does the same with
``SGLANG_PYTHON`` naming that interpreter.  Exit status 0 if every check that ran held.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.gpu.checks_background import lora, offload, saver, unannounced
from tests.gpu.checks_bytes import shared, shared_fp8, shared_saver
from tests.gpu.checks_drafts import eagle, speculative
from tests.gpu.checks_engines import engine
from tests.gpu.checks_one_server import plain
from tests.gpu.checks_quantised import loaded_as
from tests.gpu.checks_serving import serving
from tests.gpu.checks_sizes import DEEPSEEK_V3, LLAMA_70B, real_size, tensor_parallel
from tests.gpu.checks_thread import streams, thread
from tests.gpu.checks_updates import online, quantised
from tests.gpu.gpu_server import hooked_venv, make_checkpoint
from tests.gpu.map_checks import Report

# By the scheme of cpu_sglang/quantized_model.py.
QUANTISED_CHECKPOINTS = {
    "fp8_blocks": "fp8-blocks",
    "int8_blocks": "int8-blocks",
    "w8a8_int8": "w8a8_int8",
    "compressed_int8": "compressed-int8",
    "compressed_fp8": "compressed-fp8",
    "compressed_int4": "compressed-int4",
    "awq": "awq",
    "gptq": "gptq",
    "gguf": "gguf-q8_0",
    "bitsandbytes": "bitsandbytes",
    "mxfp4": "mxfp4",
}
CHECKS: dict[str, Callable[..., None]] = {
    "plain": plain,
    "speculative": speculative,
    "eagle": eagle,
    "online": online,
    "quantised": quantised,
    "unannounced": unannounced,
    "saver": saver,
    "lora": lora,
    "offload": offload,
    "streams": streams,
    "thread": thread,
    "serving": serving,
    "shared": shared,
    "shared_saver": shared_saver,
    "shared_fp8": shared_fp8,
    "mooncake": engine("mooncake"),
    "nixl": engine("nixl"),
    **{name: loaded_as(scheme) for name, scheme in QUANTISED_CHECKPOINTS.items()},
    "tensor_parallel": tensor_parallel,
    "llama": real_size(LLAMA_70B),
    "deepseek": real_size(DEEPSEEK_V3),
}
# Not among those that run unless named: another GPU, packages beside SGLang, and what no GPU has
# run yet.
NAMED_ONLY = {"tensor_parallel", "mooncake", "nixl", *QUANTISED_CHECKPOINTS}
ON_ONE_GPU = tuple(name for name in CHECKS if name not in NAMED_ONLY)


def run(python: Path, names: Sequence[str], result: Path | None = None) -> Report:
    """Make two checkpoints and a hooked venv, run the named checks, print them."""
    report = Report()
    folder = Path(tempfile.mkdtemp(prefix="hook-gpu-"))
    hooked = hooked_venv(python, folder / "venv")
    checkpoints = [folder / f"checkpoint-{seed}" for seed in (1, 2)]
    for seed, path in enumerate(checkpoints, 1):
        make_checkpoint(hooked, path, seed)
    for name in names:
        print(f"--- {name}", flush=True)
        try:
            CHECKS[name](report, hooked, *checkpoints, folder / name)
        except Exception as error:
            with report.check(f"{name}: the server"):
                raise RuntimeError(str(error)[-1500:]) from None
        if result is not None:
            result.write_text(json.dumps(report.rows, indent=1))
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description="Check the hook with SGLang on a real GPU.")
    parser.add_argument("--python", type=Path, default=Path(sys.executable))
    parser.add_argument("--only", nargs="+", choices=sorted(CHECKS), default=list(ON_ONE_GPU))
    parser.add_argument("--json", type=Path, help="write the rows there too")
    options = parser.parse_args()
    rows = run(options.python, options.only, options.json).rows
    failed = [row["check"] for row in rows if not row["held"]]
    print(f"{len(rows) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
